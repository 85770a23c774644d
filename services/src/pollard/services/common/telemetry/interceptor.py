"""Calls of grpcio's servers: counted, told of, traced, and named."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import Any

import grpc

from pollard.services.common.auth.callers import current_caller
from pollard.services.common.call_metrics import (
    BIDI_STREAM,
    CLIENT_STREAM,
    SERVER_STREAM,
    UNARY,
)
from pollard.services.common.handlers import WrappedHandlers, function_of, with_function
from pollard.services.common.telemetry.codes import CANCELLED, DEADLINE_EXCEEDED, OK, UNKNOWN
from pollard.services.common.telemetry.record import CallRecord, CallWatch, set_call
from pollard.services.common.telemetry.request_ids import REQUEST_ID
from pollard.services.common.telemetry.traces import TRACEPARENT, TRACESTATE

_KINDS = {
    (False, False): UNARY,
    (False, True): SERVER_STREAM,
    (True, False): CLIENT_STREAM,
    (True, True): BIDI_STREAM,
}


def named(
    metadata: Iterable[tuple[str, str | bytes]] | None,
) -> tuple[str | bytes, str | bytes, str | bytes]:
    """Return what a call's metadata say of its id and its trace, as `CallWatch.begin` takes it.

    Of two headers of the same name none counts: one of them was put there by somebody else.
    """
    found: dict[str, str | bytes] = {}
    for key, value in metadata or ():
        if key in (REQUEST_ID, TRACEPARENT, TRACESTATE):
            found[key] = "" if key in found else value
    return found.get(REQUEST_ID, ""), found.get(TRACEPARENT, ""), found.get(TRACESTATE, "")


class CallInterceptor(grpc.aio.ServerInterceptor):
    """The outermost interceptor: nothing that happens to a call escapes it."""

    def __init__(self, watch: CallWatch) -> None:
        """Have `watch` make a record of each call."""
        self._watch = watch
        self._wrapped = WrappedHandlers()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Wrap the method's handler."""
        handler = await continuation(handler_call_details)
        path = str(handler_call_details.method)
        if handler is None:
            record = self._watch.begin(path, *named(handler_call_details.invocation_metadata))
            record.end(grpc.StatusCode.UNIMPLEMENTED.value[0])
            return None
        # What refuses a call is made anew for each.
        refused = getattr(function_of(handler), "refuses", None)
        if refused is not None:
            return self._known(path, refused, handler)
        return self._wrapped.of(path, handler, lambda: self._known(path, handler, handler))

    def _known(self, path: str, method: Any, handler: Any) -> Any:
        """Wrap a handler, and count its method's calls by the kind that it has."""
        kind = _KINDS[method.request_streaming, method.response_streaming]
        self._watch.metrics.add(path, kind)
        return self._wrap(path, handler)

    def _wrap(self, path: str, handler: Any) -> Any:
        function = function_of(handler)
        if not handler.response_streaming:
            return with_function(handler, self._unary(path, function))
        if inspect.isasyncgenfunction(function):
            return with_function(handler, self._stream(path, function))
        if inspect.iscoroutinefunction(function):
            return with_function(handler, self._unary(path, function))
        return handler

    def _begin(self, path: str, context: Any) -> CallRecord:
        record = self._watch.begin(path, *named(context.invocation_metadata()))
        set_call(record)
        context.set_trailing_metadata(record.trailing)
        return record

    def _unary(
        self, path: str, method: Callable[..., Awaitable[Any]]
    ) -> Callable[..., Awaitable[Any]]:
        async def watched(request: Any, context: Any) -> Any:
            record = self._begin(path, context)
            code = OK
            try:
                return await method(request, context)
            except BaseException as error:
                code = _code_of(error, context)
                raise
            finally:
                _end(record, code, context)

        return watched

    def _stream(self, path: str, method: Callable[..., Any]) -> Callable[..., AsyncIterator[Any]]:
        async def watched(request: Any, context: Any) -> AsyncIterator[Any]:
            record = self._begin(path, context)
            code = OK
            try:
                async for response in method(request, context):
                    yield response
            except BaseException as error:
                code = _code_of(error, context)
                raise
            finally:
                _end(record, code, context)

        return watched


def _end(record: CallRecord, code: int, context: Any) -> None:
    record.caller = current_caller().name
    record.end(code or _code_set(context))


def _code_of(error: BaseException, context: Any) -> int:
    if isinstance(error, (asyncio.CancelledError, GeneratorExit)):
        # The deadline ends a method in the same way as its client's going.
        left = context.time_remaining()
        return DEADLINE_EXCEEDED if left is not None and left <= 0 else CANCELLED
    if isinstance(error, grpc.aio.InternalError):
        return CANCELLED
    return _code_set(context) or UNKNOWN


def _code_set(context: Any) -> int:
    code = context.code()
    number: int = code.value[0] if isinstance(code, grpc.StatusCode) else code or OK
    return number
