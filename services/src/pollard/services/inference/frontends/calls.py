"""The methods of a server from bytes to bytes, for front ends that are not grpcio's server.

Health and reflection are among them, so that clients find what they find at grpcio's server.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from google.protobuf.message import DecodeError
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection, reflection_pb2

from pollard.inference import grpc_service_pb2 as pb
from pollard.services.common import errors
from pollard.services.common.auth import OPEN, Caller, Gate
from pollard.services.common.auth.roles import ACCESS
from pollard.services.common.auth.usage import Lease
from pollard.services.common.call_metrics import BIDI_STREAM, SERVER_STREAM
from pollard.services.common.lifecycle import cancel
from pollard.services.common.reflection import reflection_pool
from pollard.services.common.status import describe
from pollard.services.common.telemetry.record import CallRecord, CallWatch
from pollard.services.inference import protocol
from pollard.services.inference.engine import Engine
from pollard.services.inference.errors import RequestInvalid
from pollard.services.inference.frontends.framing import CallerGone
from pollard.services.inference.methods import Call, ProtocolMethods, Unary
from pollard.services.inference.parameters import RequestOptions
from pollard.services.inference.restrictions import Restriction
from pollard.services.inference.servicer import SERVICE_NAME
from pollard.services.inference.shared_memory import SharedMemory
from pollard.services.inference.streaming import stream_infer

MODEL_INFER = f"/{SERVICE_NAME}/ModelInfer"

_HEALTH = "grpc.health.v1.Health"

_UNRESTRICTED: Mapping[str, Restriction] = MappingProxyType({})


class HealthUnknown(errors.NotFound):
    """Health of a service that is not there was asked for."""

    def __init__(self, message: str, **metadata: object) -> None:
        super().__init__(message, reason="SERVICE_UNKNOWN", **metadata)


@dataclass(slots=True)
class Headers:
    """What a call says beside its messages."""

    alias: str = ""
    sticky_key: str = ""
    shadow: bool = False
    encoding: bytes = b""
    seconds_left: float | None = None
    strict_stream: bool = False
    authorization: str | bytes = ""
    behalf: str | bytes = ""
    request_id: str | bytes = ""
    traceparent: str | bytes = ""
    tracestate: str | bytes = ""
    caller: Caller = OPEN
    """Who calls, once the gate has said so."""


UnaryMethod = Callable[[bytes, Headers], Awaitable[bytes]]
StreamMethod = Callable[[AsyncIterator[bytes], Headers], AsyncIterator[bytes]]


class ServerCalls:
    """Every method that a server answers, by its path."""

    def __init__(
        self,
        engine: Engine,
        methods: ProtocolMethods,
        shared: SharedMemory,
        restrictions: Mapping[str, Restriction] = _UNRESTRICTED,
        gate: Gate | None = None,
        watch: CallWatch | None = None,
    ) -> None:
        """Serve `engine`, with everything but inference from `methods`.

        Args:
            engine: Runs the models.
            methods: The rest of the protocol.
            shared: Tensors in shared memory.
            restrictions: What calls must carry, by method.
            gate: Who may call what.
            watch: Makes the records of calls.
        """
        self._records = watch or CallWatch()
        self.metrics = self._records.metrics
        self.engine = engine
        self.gate = gate or Gate()
        self.shared = shared
        self.stopping = asyncio.Event()
        """Streams are read no further once it is set."""
        self.serving = False
        """What health says."""
        self._health: dict[str, int] = {}
        self._health_changed = asyncio.Event()
        prefix = f"/{SERVICE_NAME}/"
        self._restrictions = {prefix + name: each for name, each in restrictions.items()}
        self.unary: dict[str, UnaryMethod] = {MODEL_INFER: self._infer}
        for name, (kind, method) in methods.unary.items():
            self.unary[prefix + name] = _with_messages(kind, method)
        self.unary[f"/{_HEALTH}/Check"] = self._check
        self.streams: dict[str, StreamMethod] = {
            prefix + "ModelStreamInfer": self._stream_infer,
            f"/{_HEALTH}/Watch": self._watch,
            f"/{reflection.SERVICE_NAME}/ServerReflectionInfo": self._reflect,
        }
        for path in self.unary:
            self.metrics.add(path)
        for path in self.streams:
            self.metrics.add(path, SERVER_STREAM if path.endswith("/Watch") else BIDI_STREAM)
        self.infers = self.metrics.of(MODEL_INFER)
        names = [SERVICE_NAME, _HEALTH]
        self._reflection = reflection.ReflectionServicer(
            [*names, reflection.SERVICE_NAME],
            pool=reflection_pool([*names, reflection.SERVICE_NAME]),
        )

    def set_serving(self, serving: bool) -> None:
        """Tell health, for the server and its service; that health itself answers, is seen."""
        self.serving = serving
        kind = health_pb2.HealthCheckResponse
        state = kind.SERVING if serving else kind.NOT_SERVING
        self._health = {"": state, SERVICE_NAME: state, _HEALTH: kind.SERVING}
        self._health_changed.set()
        self._health_changed = asyncio.Event()

    def begin(self, path: str, headers: Headers) -> CallRecord:
        """Return the record of a call that has come."""
        return self._records.begin(
            path,
            counts=self.infers if path == MODEL_INFER else None,
            request_id=headers.request_id,
            traceparent=headers.traceparent,
            tracestate=headers.tracestate,
        )

    def restriction(self, path: str) -> Restriction | None:
        """Return what a call of this method must carry; None if nothing."""
        return self._restrictions.get(path) if self._restrictions else None

    def enter(
        self, path: str, headers: Headers, names: Callable[[], Iterable[str]] | None = None
    ) -> Lease:
        """Ask the gate who calls, and count the call; close what is returned when it has ended.

        Raises:
            ServiceError: the caller is not known, may not, or uses as much as it may.
        """
        headers.caller = self.gate.admit(path, headers.authorization, headers.behalf, names)
        return self.gate.enter(path, headers.caller)

    async def metered(
        self, path: str, messages: AsyncIterator[bytes], lease: Lease
    ) -> AsyncIterator[bytes]:
        """Give the messages of a stream on, as fast as the caller may send them.

        Raises:
            LimitReached: one is larger than the caller may send.
        """
        counted = path in ACCESS and ACCESS[path].metered
        async for message in messages:
            lease.check_size(len(message))
            if counted:
                early = lease.pause()
                if early:
                    await asyncio.sleep(early)
            yield message

    async def _infer(self, data: bytes, headers: Headers) -> bytes:
        return await protocol.model_infer(
            self.engine,
            data,
            alias=headers.alias,
            sticky_key=headers.sticky_key,
            seconds_left=headers.seconds_left,
            shared=self.shared,
            shadow=headers.shadow,
        )

    def _stream_infer(
        self, requests: AsyncIterator[bytes], headers: Headers
    ) -> AsyncIterator[bytes]:
        async def infer(
            request: pb.ModelInferRequest,
        ) -> tuple[pb.ModelInferResponse, RequestOptions]:
            return await protocol.answer(
                self.engine,
                request,
                alias=headers.alias,
                sticky_key=headers.sticky_key,
                seconds_left=headers.seconds_left,
                shared=self.shared,
            )

        return stream_infer(
            requests,
            protocol.parse,
            infer,
            lambda error: describe(error).message,
            strict=headers.strict_stream,
            stopping=self.stopping,
        )

    async def _check(self, data: bytes, _: Headers) -> bytes:
        name = _parse(health_pb2.HealthCheckRequest, data).service
        if name not in self._health:
            raise HealthUnknown(f"there is no service {name!r}", service=name)
        answer: bytes = health_pb2.HealthCheckResponse(
            status=self._health[name]
        ).SerializeToString()
        return answer

    async def _watch(self, requests: AsyncIterator[bytes], _: Headers) -> AsyncIterator[bytes]:
        name = _parse(health_pb2.HealthCheckRequest, await anext(requests)).service
        gone = asyncio.ensure_future(_drain(requests))
        unknown = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
        try:
            last = None
            while True:
                changed = self._health_changed
                # Looked at before the state is: what is told last is the state when stopping.
                ending = self.stopping.is_set()
                state = self._health.get(name, unknown)
                if state != last:
                    yield health_pb2.HealthCheckResponse(status=state).SerializeToString()
                    last = state
                if ending:
                    return
                waiting = asyncio.ensure_future(changed.wait())
                await asyncio.wait({waiting, gone}, return_when=asyncio.FIRST_COMPLETED)
                await cancel(waiting)
                if gone.done() and gone.exception() is not None:
                    raise CallerGone
        finally:
            await cancel(gone)

    async def _reflect(self, requests: AsyncIterator[bytes], _: Headers) -> AsyncIterator[bytes]:
        async for data in requests:
            request = _parse(reflection_pb2.ServerReflectionRequest, data)
            answers: Iterable[Any] = self._reflection.ServerReflectionInfo(iter([request]), None)
            for response in answers:
                yield response.SerializeToString()


async def _drain(requests: AsyncIterator[bytes]) -> None:
    async for _ in requests:
        pass
    # The client has sent all that it wanted; what comes further is its going.
    await asyncio.Event().wait()


def _with_messages(kind: Any, method: Unary) -> UnaryMethod:
    async def call(data: bytes, headers: Headers) -> bytes:
        response = await method(_parse(kind, data), Call(headers.alias))
        return response.SerializeToString()

    return call


def _parse(kind: Any, data: bytes) -> Any:
    try:
        return kind.FromString(data)
    except DecodeError as error:
        raise RequestInvalid(f"the request is not a {kind.DESCRIPTOR.name}: {error}") from None
