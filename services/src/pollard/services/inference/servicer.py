"""The protocol's methods over grpcio: decode, call, encode."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from types import MappingProxyType
from typing import Any

import grpc
from google.protobuf.message import DecodeError, Message

from pollard.inference import grpc_service_pb2 as pb
from pollard.services.common.routing import ALIAS_METADATA, STICKY_METADATA
from pollard.services.common.shadows import SHADOW_METADATA
from pollard.services.common.status import abort, describe, passes_through
from pollard.services.inference import protocol
from pollard.services.inference.engine import Engine
from pollard.services.inference.errors import RequestInvalid
from pollard.services.inference.methods import Call, ProtocolMethods, Unary
from pollard.services.inference.parameters import RequestOptions
from pollard.services.inference.restrictions import Restriction
from pollard.services.inference.shared_memory import SharedMemory
from pollard.services.inference.streaming import stream_infer

SERVICE_NAME = "inference.GRPCInferenceService"

STREAM_STATUS_METADATA = "triton_grpc_error"
"""With the value "true", a request that fails ends its stream with a status."""

Context = grpc.aio.ServicerContext[Any, Any]

_UNRESTRICTED: Mapping[str, Restriction] = MappingProxyType({})


class InferenceServicer:
    """Answers `inference.GRPCInferenceService`."""

    def __init__(
        self,
        engine: Engine,
        methods: ProtocolMethods,
        shared: SharedMemory,
        restrictions: Mapping[str, Restriction] = _UNRESTRICTED,
    ) -> None:
        """Serve `engine`, with everything but inference from `methods`.

        Args:
            engine: Runs the models.
            methods: The rest of the protocol.
            shared: Tensors in shared memory.
            restrictions: What calls must carry, by method.
        """
        self._engine = engine
        self._methods = methods
        self._shared = shared
        self._restrictions = restrictions
        self._stopping = asyncio.Event()

    def stop_streams(self) -> None:
        """Read no more from streams, and end each when what was read has been answered."""
        self._stopping.set()

    async def model_infer(self, data: bytes, context: Context) -> bytes:
        """Run a model. Takes and gives bytes: the domain decodes them once."""
        alias = sticky_key = ""
        shadow = False
        for key, value in context.invocation_metadata() or ():
            if key == ALIAS_METADATA:
                alias = str(value)
            elif key == STICKY_METADATA:
                sticky_key = str(value)
            elif key == SHADOW_METADATA:
                shadow = True
        return await protocol.model_infer(
            self._engine,
            data,
            alias=alias,
            sticky_key=sticky_key,
            seconds_left=context.time_remaining(),
            shared=self._shared,
            shadow=shadow,
        )

    async def model_stream_infer(self, requests: AsyncIterator[bytes], context: Context) -> None:
        """Run a model for each request of a stream."""
        metadata = {key: str(value) for key, value in context.invocation_metadata() or ()}

        async def infer(
            request: pb.ModelInferRequest,
        ) -> tuple[pb.ModelInferResponse, RequestOptions]:
            return await protocol.answer(
                self._engine,
                request,
                alias=metadata.get(ALIAS_METADATA, ""),
                sticky_key=metadata.get(STICKY_METADATA, ""),
                seconds_left=context.time_remaining(),
                shared=self._shared,
            )

        answers = stream_infer(
            requests,
            protocol.parse,
            infer,
            lambda error: describe(error).message,
            strict=metadata.get(STREAM_STATUS_METADATA) == "true",
            stopping=self._stopping,
        )
        # Written by hand, not yielded: when the client goes, everything is cleaned up at once.
        async with contextlib.aclosing(answers):
            async for answer in answers:
                await context.write(answer)

    def add_to(self, server: grpc.aio.Server) -> None:
        """Register the methods with a server."""
        handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
            # No serialisers: these paths take and give bytes.
            "ModelInfer": grpc.unary_unary_rpc_method_handler(
                self._guarded("ModelInfer", self.model_infer)
            ),
            "ModelStreamInfer": grpc.stream_stream_rpc_method_handler(
                self._guarded("ModelStreamInfer", self.model_stream_infer)
            ),
        }
        for name, (kind, method) in self._methods.unary.items():
            handlers[name] = grpc.unary_unary_rpc_method_handler(
                self._guarded(name, _from_bytes(kind, method)), response_serializer=_serialize
            )
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(SERVICE_NAME, handlers),)
        )

    def _guarded(
        self, name: str, method: Callable[[Any, Context], Awaitable[Any]]
    ) -> Callable[..., Awaitable[Any]]:
        restriction = self._restrictions.get(name)
        if restriction is None:
            return _guarded(method)

        async def checked(request: Any, context: Context) -> Any:
            restriction.check(context.invocation_metadata() or ())
            return await method(request, context)

        return _guarded(checked)


def _serialize(message: Message) -> bytes:
    return message.SerializeToString()


def _from_bytes(
    kind: type[Message], method: Unary
) -> Callable[[bytes, Context], Awaitable[Message]]:
    async def call(data: bytes, context: Context) -> Message:
        # Here and not by grpcio, which answers UNKNOWN to what cannot be parsed.
        try:
            request = kind.FromString(data)
        except DecodeError as error:
            raise RequestInvalid(f"the request is not a {kind.DESCRIPTOR.name}: {error}") from None
        alias = ""
        for key, value in context.invocation_metadata() or ():
            if key == ALIAS_METADATA:
                alias = str(value)
        return await method(request, Call(alias))

    return call


def _guarded(method: Callable[[Any, Context], Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    # In place of common.status.ErrorInterceptor, which builds a handler anew for every request:
    # that costs more than the rest of the servicer.
    async def guarded(request: Any, context: Context) -> Any:
        try:
            return await method(request, context)
        except Exception as error:
            if passes_through(error):
                raise
            await abort(context, error)

    return guarded
