"""The protocol as an ASGI application: gRPC for servers that carry HTTP/2 with trailers.

Health and reflection are answered here as well, so that clients find what they find at grpcio's
server.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from google.protobuf.message import DecodeError
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection, reflection_pb2

from pollard.inference import grpc_service_pb2 as pb
from pollard.services.common import errors
from pollard.services.common.lifecycle import cancel
from pollard.services.common.reflection import reflection_pool
from pollard.services.common.routing import ALIAS_METADATA, STICKY_METADATA
from pollard.services.common.shadows import SHADOW_METADATA
from pollard.services.common.status import describe
from pollard.services.inference import protocol
from pollard.services.inference.engine import Engine
from pollard.services.inference.errors import FeatureNotOffered, RequestExpired, RequestInvalid
from pollard.services.inference.frontends.framing import (
    CallerGone,
    Messages,
    MessageTooLarge,
    frame,
    seconds_of,
    trailers,
)
from pollard.services.inference.frontends.receiving import ClientWatch, ReadAhead, Receive
from pollard.services.inference.methods import Call, ProtocolMethods, Unary
from pollard.services.inference.parameters import RequestOptions
from pollard.services.inference.restrictions import Restriction
from pollard.services.inference.servicer import SERVICE_NAME, STREAM_STATUS_METADATA
from pollard.services.inference.shared_memory import SharedMemory
from pollard.services.inference.streaming import stream_infer

_HEALTH = "grpc.health.v1.Health"

_UNRESTRICTED: Mapping[str, Restriction] = MappingProxyType({})

_ALIAS, _STICKY = ALIAS_METADATA.encode(), STICKY_METADATA.encode()
_SHADOW = SHADOW_METADATA.encode()
_STRICT = STREAM_STATUS_METADATA.encode()

_START = {
    "type": "http.response.start",
    "status": 200,
    "headers": [(b"content-type", b"application/grpc")],
    "trailers": True,
}

_OK = {
    "type": "http.response.trailers",
    "headers": [(b"grpc-status", b"0")],
    "more_trailers": False,
}

Scope = Mapping[str, Any]
Send = Callable[[Mapping[str, Any]], Awaitable[None]]


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


UnaryMethod = Callable[[bytes, Headers], Awaitable[bytes]]
StreamMethod = Callable[[AsyncIterator[bytes], Headers], AsyncIterator[bytes]]


class GrpcApplication:
    """Answers gRPC calls that come as ASGI's HTTP requests."""

    def __init__(
        self,
        engine: Engine,
        methods: ProtocolMethods,
        shared: SharedMemory,
        *,
        max_message_bytes: int,
        restrictions: Mapping[str, Restriction] = _UNRESTRICTED,
    ) -> None:
        """Serve `engine`, with everything but inference from `methods`."""
        self._engine = engine
        self._shared = shared
        self._max_message_bytes = max_message_bytes
        self._stopping = asyncio.Event()
        self._in_flight = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._health: dict[str, int] = {}
        self._health_changed = asyncio.Event()
        prefix = f"/{SERVICE_NAME}/"
        self._restrictions = {prefix + name: each for name, each in restrictions.items()}
        self._unary: dict[str, UnaryMethod] = {prefix + "ModelInfer": self._infer}
        for name, (kind, method) in methods.unary.items():
            self._unary[prefix + name] = _with_messages(kind, method)
        self._unary[f"/{_HEALTH}/Check"] = self._check
        self._streams: dict[str, StreamMethod] = {
            prefix + "ModelStreamInfer": self._stream_infer,
            f"/{_HEALTH}/Watch": self._watch,
            f"/{reflection.SERVICE_NAME}/ServerReflectionInfo": self._reflect,
        }
        names = [SERVICE_NAME, _HEALTH]
        self._reflection = reflection.ReflectionServicer(
            [*names, reflection.SERVICE_NAME],
            pool=reflection_pool([*names, reflection.SERVICE_NAME]),
        )

    def set_serving(self, serving: bool) -> None:
        """Tell health, for the server and its service."""
        kind = health_pb2.HealthCheckResponse
        state = kind.SERVING if serving else kind.NOT_SERVING
        self._health = {"": state, SERVICE_NAME: state, _HEALTH: state}
        self._health_changed.set()
        self._health_changed = asyncio.Event()

    async def stop(self, grace_seconds: float) -> None:
        """Take no more calls; wait until those in flight are answered, but not for long."""
        self.set_serving(False)
        self._stopping.set()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), grace_seconds)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one call."""
        headers = _read_headers(scope["headers"])
        self._in_flight += 1
        self._idle.clear()
        try:
            if self._restrictions:
                restriction = self._restrictions.get(scope["path"])
                if restriction is not None:
                    restriction.check(scope["headers"])
            unary = self._unary.get(scope["path"])
            if unary is not None:
                await self._answer(unary, headers, receive, send)
                return
            stream = self._streams.get(scope["path"])
            if stream is None:
                raise FeatureNotOffered(f"there is no method {scope['path']}")
            await self._answer_stream(stream, headers, receive, send)
        except CallerGone:
            return
        except asyncio.CancelledError:
            # By whoever watches the client: it has gone, and nobody waits for an answer.
            return
        except Exception as error:
            outcome = describe(error)
            await _end(send, outcome.code.value[0], outcome.message, outcome.to_proto())
        finally:
            self._in_flight -= 1
            if not self._in_flight:
                self._idle.set()

    async def _answer(
        self,
        method: UnaryMethod,
        headers: Headers,
        receive: Receive,
        send: Send,
    ) -> None:
        data = await Messages(receive, headers.encoding, self._max_message_bytes).only()
        watch = ClientWatch(receive)
        watch.listen_later()
        try:
            answer = await method(data, headers)
        finally:
            watch.stop()
        if len(answer) > self._max_message_bytes:
            raise MessageTooLarge(
                f"the answer has {len(answer)} bytes, the limit is {self._max_message_bytes}; "
                "raise --max-message-bytes"
            )
        try:
            await send(_START)
            await send({"type": "http.response.body", "body": frame(answer), "more_body": False})
            await send(_OK)
        except OSError:
            raise CallerGone from None

    async def _answer_stream(
        self, method: StreamMethod, headers: Headers, receive: Receive, send: Send
    ) -> None:
        started = False
        ahead = ReadAhead(receive)
        messages = Messages(ahead.receive, headers.encoding, self._max_message_bytes)
        try:
            async with asyncio.timeout(headers.seconds_left):
                answers = method(messages.each(), headers)
                async with contextlib.aclosing(answers):  # type: ignore[type-var]  # all generators
                    async for answer in answers:
                        try:
                            if not started:
                                await send(_START)
                                started = True
                            await send(
                                {
                                    "type": "http.response.body",
                                    "body": frame(answer),
                                    "more_body": True,
                                }
                            )
                        except OSError:
                            # Leaves the loop, and with it everything under way for this client.
                            raise CallerGone from None
        except (CallerGone, asyncio.CancelledError):
            raise
        except TimeoutError:
            outcome = describe(RequestExpired("Deadline Exceeded"))
        except Exception as error:
            outcome = describe(error)
        else:
            with contextlib.suppress(OSError):
                if not started:
                    await send(_START)
                await send({"type": "http.response.body", "body": b"", "more_body": False})
                await send(_OK)
            return
        finally:
            ahead.stop()
        await _end(
            send, outcome.code.value[0], outcome.message, outcome.to_proto(), started=started
        )

    async def _infer(self, data: bytes, headers: Headers) -> bytes:
        return await protocol.model_infer(
            self._engine,
            data,
            alias=headers.alias,
            sticky_key=headers.sticky_key,
            seconds_left=headers.seconds_left,
            shared=self._shared,
            shadow=headers.shadow,
        )

    def _stream_infer(
        self, requests: AsyncIterator[bytes], headers: Headers
    ) -> AsyncIterator[bytes]:
        async def infer(
            request: pb.ModelInferRequest,
        ) -> tuple[pb.ModelInferResponse, RequestOptions]:
            return await protocol.answer(
                self._engine,
                request,
                alias=headers.alias,
                sticky_key=headers.sticky_key,
                seconds_left=headers.seconds_left,
                shared=self._shared,
            )

        return stream_infer(
            requests,
            protocol.parse,
            infer,
            lambda error: describe(error).message,
            strict=headers.strict_stream,
            stopping=self._stopping,
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
            while not self._stopping.is_set() or last is None:
                changed = self._health_changed
                state = self._health.get(name, unknown)
                if state != last:
                    yield health_pb2.HealthCheckResponse(status=state).SerializeToString()
                    last = state
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
            for response in self._reflection.ServerReflectionInfo(iter([request]), None):
                yield response.SerializeToString()


async def _drain(requests: AsyncIterator[bytes]) -> None:
    async for _ in requests:
        pass
    # The client has sent all that it wanted; what comes further is its going.
    await asyncio.Event().wait()


def _read_headers(pairs: Any) -> Headers:
    headers = Headers()
    for key, value in pairs:
        if key == b"grpc-timeout":
            headers.seconds_left = seconds_of(value)
        elif key == b"grpc-encoding":
            headers.encoding = value
        elif key == _ALIAS:
            headers.alias = value.decode("latin-1")
        elif key == _STICKY:
            headers.sticky_key = value.decode("latin-1")
        elif key == _SHADOW:
            headers.shadow = True
        elif key == _STRICT:
            headers.strict_stream = value == b"true"
    return headers


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


async def _end(send: Send, code: int, message: str, details: Any, *, started: bool = False) -> None:
    # An OSError says that the client has gone meanwhile.
    with contextlib.suppress(OSError):
        if not started:
            await send(_START)
        await send({"type": "http.response.body", "body": b"", "more_body": False})
        await send(
            {
                "type": "http.response.trailers",
                "headers": trailers(code, message, details.SerializeToString()),
                "more_trailers": False,
            }
        )
