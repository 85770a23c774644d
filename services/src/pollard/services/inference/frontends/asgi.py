"""The protocol as an ASGI application: gRPC for servers that carry HTTP/2 with trailers."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from pollard.services.common.auth.callers import set_caller
from pollard.services.common.auth.gate import AUTHORIZATION, BEHALF
from pollard.services.common.auth.usage import Lease
from pollard.services.common.routing import ALIAS_METADATA, STICKY_METADATA
from pollard.services.common.shadows import SHADOW_METADATA
from pollard.services.common.status import Outcome, describe
from pollard.services.common.telemetry.codes import CANCELLED, OK
from pollard.services.common.telemetry.record import CallRecord, set_call
from pollard.services.common.telemetry.request_ids import REQUEST_ID
from pollard.services.common.telemetry.traces import TRACEPARENT, TRACESTATE
from pollard.services.inference.errors import FeatureNotOffered, RequestExpired
from pollard.services.inference.frontends.calls import (
    Headers,
    ServerCalls,
    StreamMethod,
    UnaryMethod,
)
from pollard.services.inference.frontends.framing import (
    CallerGone,
    Messages,
    MessageTooLarge,
    frame,
    seconds_of,
    trailers,
)
from pollard.services.inference.frontends.receiving import ClientWatch, ReadAhead, Receive
from pollard.services.inference.servicer import STREAM_STATUS_METADATA

_ALIAS, _STICKY = ALIAS_METADATA.encode(), STICKY_METADATA.encode()
_SHADOW = SHADOW_METADATA.encode()
_AUTHORIZATION, _BEHALF = AUTHORIZATION.encode(), BEHALF.encode()
_STRICT = STREAM_STATUS_METADATA.encode()
_REQUEST_ID = REQUEST_ID.encode()
_TRACEPARENT, _TRACESTATE = TRACEPARENT.encode(), TRACESTATE.encode()

_START = {
    "type": "http.response.start",
    "status": 200,
    "headers": [(b"content-type", b"application/grpc")],
    "trailers": True,
}

Scope = Mapping[str, Any]
Send = Callable[[Mapping[str, Any]], Awaitable[None]]


class GrpcApplication:
    """Answers gRPC calls that come as ASGI's HTTP requests."""

    def __init__(self, calls: ServerCalls, *, max_message_bytes: int) -> None:
        """Take what to answer with."""
        self._calls = calls
        self._max_message_bytes = max_message_bytes
        self._in_flight = 0
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def serving(self) -> bool:
        """What health says."""
        return self._calls.serving

    def set_serving(self, serving: bool) -> None:
        """Tell health, for the server and its service."""
        self._calls.set_serving(serving)

    async def stop(self, grace_seconds: float) -> None:
        """Take no more calls; wait until those in flight are answered, but not for long."""
        self.set_serving(False)
        self._calls.stopping.set()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), grace_seconds)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one call."""
        headers = _read_headers(scope["headers"])
        record = self._calls.begin(scope["path"], headers)
        set_call(record)
        code = OK
        self._in_flight += 1
        self._idle.clear()
        try:
            restriction = self._calls.restriction(scope["path"])
            if restriction is not None:
                restriction.check(scope["headers"])
            with self._calls.enter(scope["path"], headers) as lease:
                set_caller(headers.caller)
                record.caller = headers.caller.name
                unary = self._calls.unary.get(scope["path"])
                if unary is not None:
                    await self._answer(unary, headers, record, receive, send, lease)
                    return
                stream = self._calls.streams.get(scope["path"])
                if stream is None:
                    raise FeatureNotOffered(f"there is no method {scope['path']}")
                code = await self._answer_stream(stream, headers, record, receive, send, lease)
        except (CallerGone, asyncio.CancelledError):
            # Cancelled by whoever watches the client: it has gone, and nobody waits for an answer.
            code = CANCELLED
        except Exception as error:
            code = await _end(send, describe(error), record)
        finally:
            record.end(code)
            self._in_flight -= 1
            if not self._in_flight:
                self._idle.set()

    async def _answer(
        self,
        method: UnaryMethod,
        headers: Headers,
        record: CallRecord,
        receive: Receive,
        send: Send,
        lease: Lease,
    ) -> None:
        data = await Messages(receive, headers.encoding, self._max_message_bytes).only()
        lease.check_size(len(data))
        watch = ClientWatch(receive)
        watch.listen_later()
        try:
            answer = await method(data, headers)
        finally:
            watch.stop()
            # Before the caller learns that the call has ended.
            lease.close()
        if len(answer) > self._max_message_bytes:
            raise MessageTooLarge(
                f"the answer has {len(answer)} bytes, the limit is {self._max_message_bytes}; "
                "raise --max-message-bytes"
            )
        try:
            await send(_START)
            await send({"type": "http.response.body", "body": frame(answer), "more_body": False})
            await send(_ok(record))
        except OSError:
            raise CallerGone from None

    async def _answer_stream(
        self,
        method: StreamMethod,
        headers: Headers,
        record: CallRecord,
        receive: Receive,
        send: Send,
        lease: Lease,
    ) -> int:
        started = False
        ahead = ReadAhead(receive)
        messages = Messages(ahead.receive, headers.encoding, self._max_message_bytes)
        lasting = self._calls.gate.open_calls.lasting(headers.caller)
        try:
            async with asyncio.timeout(headers.seconds_left), lasting:
                answers = method(self._calls.metered(record.path, messages.each(), lease), headers)
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
            lease.close()
            with contextlib.suppress(OSError):
                if not started:
                    await send(_START)
                await send({"type": "http.response.body", "body": b"", "more_body": False})
                await send(_ok(record))
            return OK
        finally:
            ahead.stop()
            lease.close()
        return await _end(send, outcome, record, started=started)


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
        elif key == _AUTHORIZATION:
            headers.authorization = b"twice" if headers.authorization else value
        elif key == _BEHALF:
            headers.behalf = b"twice" if headers.behalf else value
        elif key == _REQUEST_ID:
            headers.request_id = "" if headers.request_id else value
        elif key == _TRACEPARENT:
            headers.traceparent = "" if headers.traceparent else value
        elif key == _TRACESTATE:
            headers.tracestate = "" if headers.tracestate else value
    return headers


def _ok(record: CallRecord) -> Mapping[str, Any]:
    return {
        "type": "http.response.trailers",
        "headers": [(b"grpc-status", b"0"), (_REQUEST_ID, record.request_id.encode())],
        "more_trailers": False,
    }


async def _end(send: Send, outcome: Outcome, record: CallRecord, *, started: bool = False) -> int:
    """End a call with an error; return its status."""
    code: int = outcome.code.value[0]
    record.failed(outcome.reason, outcome.message)
    details = outcome.to_proto().SerializeToString()
    # An OSError says that the client has gone meanwhile.
    with contextlib.suppress(OSError):
        if not started:
            await send(_START)
        await send({"type": "http.response.body", "body": b"", "more_body": False})
        await send(
            {
                "type": "http.response.trailers",
                "headers": [
                    *trailers(code, outcome.message, details),
                    (_REQUEST_ID, record.request_id.encode()),
                ],
                "more_trailers": False,
            }
        )
    return code
