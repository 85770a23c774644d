"""From domain errors to gRPC statuses: one table, one interceptor."""

from __future__ import annotations

import asyncio
import errno
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, NoReturn

import grpc
import structlog
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2

from pollard.runtime import errors as runtime_errors
from pollard.runtime.disk import disk_full
from pollard.services.common import errors
from pollard.services.common.handlers import WrappedHandlers, function_of, with_function
from pollard.services.common.telemetry.record import CallRecord, current_call
from pollard.services.common.telemetry.request_ids import request_id_of

DOMAIN = "pollard.ai"

_log = structlog.get_logger("pollard.errors")

# The first class that an error is an instance of decides, so the more special
# come first.
_TABLE: tuple[tuple[type[Exception], grpc.StatusCode], ...] = (
    (errors.Unauthenticated, grpc.StatusCode.UNAUTHENTICATED),
    (errors.PermissionDenied, grpc.StatusCode.PERMISSION_DENIED),
    (errors.InvalidRequest, grpc.StatusCode.INVALID_ARGUMENT),
    (errors.NotFound, grpc.StatusCode.NOT_FOUND),
    (errors.AlreadyExists, grpc.StatusCode.ALREADY_EXISTS),
    (errors.FailedPrecondition, grpc.StatusCode.FAILED_PRECONDITION),
    (errors.Conflict, grpc.StatusCode.ABORTED),
    (errors.OutOfRange, grpc.StatusCode.OUT_OF_RANGE),
    (errors.ResourceExhausted, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (errors.Unavailable, grpc.StatusCode.UNAVAILABLE),
    (errors.DeadlineExceeded, grpc.StatusCode.DEADLINE_EXCEEDED),
    (errors.DataLoss, grpc.StatusCode.DATA_LOSS),
    (errors.Unimplemented, grpc.StatusCode.UNIMPLEMENTED),
    (errors.Internal, grpc.StatusCode.INTERNAL),
    (runtime_errors.RequirementsNotMet, grpc.StatusCode.FAILED_PRECONDITION),
    (runtime_errors.BundleError, grpc.StatusCode.INVALID_ARGUMENT),
    (runtime_errors.ProviderMissing, grpc.StatusCode.FAILED_PRECONDITION),
    (runtime_errors.DeviceMemoryShort, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (runtime_errors.DeviceFault, grpc.StatusCode.UNAVAILABLE),
    (runtime_errors.ModelError, grpc.StatusCode.INVALID_ARGUMENT),
    (runtime_errors.TensorInvalid, grpc.StatusCode.INVALID_ARGUMENT),
    (runtime_errors.ImageInvalid, grpc.StatusCode.INVALID_ARGUMENT),
    (runtime_errors.StepsInvalid, grpc.StatusCode.FAILED_PRECONDITION),
    (runtime_errors.KeyInvalid, grpc.StatusCode.FAILED_PRECONDITION),
)

_MAX_MESSAGE_BYTES = 1024
_MAX_VALUE_BYTES = 256
"""Statuses travel as headers, of which clients take 8 KiB; messages quote what requests name."""


@dataclass(frozen=True)
class Outcome:
    """An error as it leaves a server."""

    code: grpc.StatusCode
    message: str
    reason: str
    metadata: dict[str, str] = field(default_factory=dict)
    retry_seconds: float | None = None
    """When trying again may help; None where nobody knows."""

    def to_proto(self) -> status_pb2.Status:
        """Return the status with its one ErrorInfo, and RetryInfo where it is known."""
        info = error_details_pb2.ErrorInfo(
            reason=self.reason, domain=DOMAIN, metadata=self.metadata
        )
        details: list[Message] = [info]
        if self.retry_seconds is not None:
            retry = error_details_pb2.RetryInfo()
            retry.retry_delay.FromNanoseconds(int(self.retry_seconds * 1e9))
            details.append(retry)
        status = status_pb2.Status(code=self.code.value[0], message=self.message)
        for detail in details:
            status.details.add().Pack(detail)
        return status


class RelayedError(Exception):
    """How another Pollard server ended a call that was handed on to it; leaves unchanged."""

    def __init__(self, outcome: Outcome) -> None:
        super().__init__(outcome.message)
        self.outcome = outcome

    @classmethod
    def of(cls, error: grpc.aio.AioRpcError) -> RelayedError:
        """Return the error of a call as it should leave this server."""
        status = status_pb2.Status()
        info = error_details_pb2.ErrorInfo(reason="UNREACHABLE")
        for key, value in error.trailing_metadata() or ():
            if key == "grpc-status-details-bin" and isinstance(value, bytes):
                status.ParseFromString(value)
        retry = error_details_pb2.RetryInfo()
        seconds = None
        for detail in status.details:
            if detail.Unpack(retry):
                seconds = retry.retry_delay.ToNanoseconds() / 1e9
            else:
                detail.Unpack(info)
        words = error.details() or ""
        return cls(Outcome(error.code(), words, info.reason, dict(info.metadata), seconds))


def describe(error: BaseException, call: CallRecord | None = None) -> Outcome:
    """Return how ``error`` leaves a server.

    An error that nobody expected is logged with its traceback; the caller
    learns only a request id, under which the log has it.

    Args:
        error: What happened.
        call: During which call; None is that of this task.
    """
    if isinstance(error, RelayedError):
        return error.outcome
    if isinstance(error, (errors.ServiceError, runtime_errors.RuntimeFault)):
        for kind, code in _TABLE:
            if isinstance(error, kind):
                return Outcome(
                    code,
                    _cut(error.message, _MAX_MESSAGE_BYTES),
                    error.reason,
                    {key: _cut(value, _MAX_VALUE_BYTES) for key, value in error.metadata.items()},
                    getattr(error, "retry_seconds", None),
                )
    if disk_full(error):
        return Outcome(
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            "the disk is full; free some space and try again",
            "DISK_FULL",
        )
    if isinstance(error, MemoryError):
        return Outcome(grpc.StatusCode.RESOURCE_EXHAUSTED, "out of memory", "OUT_OF_MEMORY")
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        return Outcome(
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            "the server has as many files open as it may; try again, or allow it more "
            "(LimitNOFILE, ulimit -n)",
            "OUT_OF_FILES",
        )
    if errors.out_of_threads(error):
        return Outcome(
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            "the server can start no more threads; try again, or allow it more (TasksMax, ulimit "
            "-u, the limit of pids of a container) or more memory",
            "OUT_OF_THREADS",
        )
    call = call or current_call()
    request_id = call.request_id if call is not None else request_id_of("")
    _log.error("unexpected error", request_id=request_id, exc_info=error)
    return Outcome(
        grpc.StatusCode.INTERNAL,
        f"internal error; the server's log has it under request id {request_id}",
        "INTERNAL",
        {"request_id": request_id},
    )


def _cut(text: str, limit: int) -> str:
    raw = text.encode("utf-8", "replace")
    return text if len(raw) <= limit else raw[: limit - 3].decode("utf-8", "ignore") + "…"


def to_proto(error: BaseException) -> status_pb2.Status:
    """Return ``error`` as a ``google.rpc.Status``, for fields that carry one."""
    return describe(error).to_proto()


async def abort(context: grpc.aio.ServicerContext[Any, Any], error: BaseException) -> NoReturn:
    """End a request with ``error``."""
    outcome = describe(error)
    call = current_call()
    if call is not None:
        call.failed(outcome.reason, outcome.message)
    await context.abort(
        outcome.code,
        outcome.message,
        trailing_metadata=(
            *(call.trailing if call is not None else ()),
            ("grpc-status-details-bin", outcome.to_proto().SerializeToString()),
        ),
    )
    raise AssertionError("abort returned")


def passes_through(error: BaseException) -> bool:
    """Whether grpc itself handles `error` when a method raises it."""
    # abort() raises AbortError, context.write() InternalError once the client has gone: both are
    # plain Exceptions that grpc handles itself.
    return isinstance(
        error,
        (grpc.aio.AbortError, grpc.aio.InternalError, asyncio.CancelledError, GeneratorExit),
    )


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Turns domain errors that a method raises, and messages that cannot be read, into statuses."""

    def __init__(self) -> None:
        """Begin with no method wrapped."""
        self._wrapped = WrappedHandlers()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Wrap the method's handler."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        return self._wrapped.of(handler_call_details.method, handler, lambda: _guard(handler))


@dataclass(frozen=True)
class _Unreadable:
    """Stands for a message of a request that could not be parsed."""

    why: str
    size: int

    def ByteSize(self) -> int:  # noqa: N802 -- messages have it, and limits of callers ask for it
        return self.size

    def error(self) -> errors.InvalidRequest:
        return errors.InvalidRequest(
            f"the request cannot be read: {self.why}", reason="REQUEST_INVALID"
        )


def _guard(handler: Any) -> Any:
    method = function_of(handler)
    parse = handler.request_deserializer
    if parse is not None:
        method, parse = _reading(handler, method), _lenient(parse)
    if not handler.response_streaming:
        return with_function(handler, _guard_unary(method), parse)
    if inspect.isasyncgenfunction(function_of(handler)):
        return with_function(handler, _guard_stream(method), parse)
    # The health service's Watch writes to its context and raises nothing of ours.
    return handler


def _lenient(parse: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    # grpcio answers UNKNOWN to what cannot be parsed and logs a traceback each time, past the
    # access log and its limit. So the method is begun all the same, and refuses.
    def parsed(data: bytes) -> Any:
        try:
            return parse(data)
        except DecodeError as error:
            return _Unreadable(str(error), len(data))

    return parsed


def _reading(handler: Any, method: Callable[..., Any]) -> Callable[..., Any]:
    """Return a method that raises what an unreadable message stands for before it is used."""
    if handler.request_streaming:

        def streamed(requests: AsyncIterator[Any], context: Any) -> Any:
            return method(_readable(requests), context)

        return streamed

    def single(request: Any, context: Any) -> Any:
        if isinstance(request, _Unreadable):
            raise request.error()
        return method(request, context)

    return single


async def _readable(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
    async for request in requests:
        if isinstance(request, _Unreadable):
            raise request.error()
        yield request


def _guard_unary(method: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    async def guarded(request: Any, context: Any) -> Any:
        try:
            return await method(request, context)
        except BaseException as error:
            if passes_through(error):
                raise
            await abort(context, error)

    return guarded


def _guard_stream(method: Callable[..., Any]) -> Callable[..., AsyncIterator[Any]]:
    async def guarded(request: Any, context: Any) -> AsyncIterator[Any]:
        try:
            async for response in method(request, context):
                yield response
        except BaseException as error:
            if passes_through(error):
                raise
            await abort(context, error)

    return guarded
