"""Counts of gRPC calls under the names that dashboards for gRPC servers know.

Every front end tells a `MethodCalls` when a call begins and how it ended. That is on the way of
every request, on several threads, hence one short lock and no more.
"""

from __future__ import annotations

import asyncio
import inspect
import threading
import time
from bisect import bisect_left
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from typing import Any

import grpc
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from pollard.services.common.handlers import function_of, with_function

UNARY = "unary"
CLIENT_STREAM = "client_stream"
SERVER_STREAM = "server_stream"
BIDI_STREAM = "bidi_stream"

BOUNDS = (
    *(0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1),
    *(0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0),
)
"""Upper bounds of the buckets of durations, in seconds."""

OTHER = "other"
"""Service and method of calls that no method here answers: callers could make up any number."""

_CODES = {code.value[0]: code.name for code in grpc.StatusCode}

OK = 0
CANCELLED = 1
UNKNOWN = 2
DEADLINE_EXCEEDED = 4


class Buckets:
    """A histogram with fixed bounds. Whoever adds to it sees to it that nobody else does."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float] = BOUNDS) -> None:
        """Start empty."""
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def add(self, value: float) -> None:
        """Count a value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def cumulated(self) -> list[tuple[str, float]]:
        """Return upper bounds and how many values are not above them, as Prometheus wants it."""
        return cumulated(self.bounds, self.counts)


def cumulated(bounds: Sequence[float], counts: Sequence[int]) -> list[tuple[str, float]]:
    """Return upper bounds and how many values are not above them, as Prometheus wants it."""
    found: list[tuple[str, float]] = []
    total = 0
    for bound, count in zip((*bounds, float("inf")), counts, strict=True):
        total += count
        found.append(("+Inf" if bound == float("inf") else repr(float(bound)), total))
    return found


class MethodCalls:
    """The calls of one method."""

    __slots__ = ("_lock", "codes", "durations", "kind", "method", "service", "started")

    def __init__(self, service: str, method: str, kind: str) -> None:
        """Start at zero."""
        self.service, self.method, self.kind = service, method, kind
        self.started = 0
        self.codes: dict[int, int] = {}
        self.durations = Buckets()
        self._lock = threading.Lock()

    def start(self) -> float:
        """Count a call that has come; return what `end` wants to know."""
        with self._lock:
            self.started += 1
        return time.perf_counter()

    def end(self, began: float, code: int = OK) -> None:
        """Count the end of a call.

        Args:
            began: What `start` returned.
            code: Its status.
        """
        seconds = time.perf_counter() - began
        with self._lock:
            self.codes[code] = self.codes.get(code, 0) + 1
            self.durations.add(seconds)


class CallMetrics(Collector):
    """The calls of one server, by method."""

    def __init__(self) -> None:
        """Start with no methods."""
        self._methods: dict[str, MethodCalls] = {}
        self._other = MethodCalls(OTHER, OTHER, UNARY)

    def add(self, path: str, kind: str = UNARY) -> MethodCalls:
        """Return the calls of a method that this server answers, making them.

        Args:
            path: "/package.Service/Method".
            kind: UNARY or one of the streams.
        """
        found = self._methods.get(path)
        if found is None:
            _, service, method = path.split("/", 2)
            found = self._methods[path] = MethodCalls(service, method, kind)
        return found

    def of(self, path: str) -> MethodCalls:
        """Return the calls of a method; all that no method answers are counted together."""
        return self._methods.get(path, self._other)

    def collect(self) -> Iterable[Metric]:
        """Return the counts as they stand."""
        labels = ["grpc_type", "grpc_service", "grpc_method"]
        started = CounterMetricFamily("grpc_server_started", "Calls that have come.", labels=labels)
        handled = CounterMetricFamily(
            "grpc_server_handled",
            "Calls that have ended, by status.",
            labels=[*labels, "grpc_code"],
        )
        handling = HistogramMetricFamily(
            "grpc_server_handling_seconds", "Time from a call's coming to its end.", labels=labels
        )
        for each in (*self._methods.values(), self._other):
            if not each.started and each is self._other:
                continue
            values = [each.kind, each.service, each.method]
            started.add_metric(values, each.started)
            for code, count in sorted(each.codes.copy().items()):
                handled.add_metric([*values, _CODES.get(code, str(code))], count)
            handling.add_metric(values, each.durations.cumulated(), each.durations.total)
        yield started
        yield handled
        yield handling


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Counts the calls of grpcio's server."""

    def __init__(self, calls: CallMetrics) -> None:
        """Count into `calls`."""
        self._calls = calls

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Wrap the method's handler."""
        handler = await continuation(handler_call_details)
        path = str(handler_call_details.method)
        if handler is None:
            calls = self._calls.of(OTHER)
            calls.end(calls.start(), grpc.StatusCode.UNIMPLEMENTED.value[0])
            return None
        kind = {
            (False, False): UNARY,
            (False, True): SERVER_STREAM,
            (True, False): CLIENT_STREAM,
            (True, True): BIDI_STREAM,
        }[handler.request_streaming, handler.response_streaming]
        calls = self._calls.add(path, kind)
        method = function_of(handler)
        if handler.response_streaming:
            if inspect.isasyncgenfunction(method):
                wrapped: Any = _counted_stream(method, calls)
            elif inspect.iscoroutinefunction(method):
                wrapped = counted(method, calls)
            else:
                return handler
        else:
            wrapped = counted(method, calls)
        return with_function(handler, wrapped)


def counted(
    method: Callable[..., Awaitable[Any]], calls: MethodCalls
) -> Callable[..., Awaitable[Any]]:
    """Return a method of grpcio's server that also counts its calls."""

    async def count(request: Any, context: Any) -> Any:
        began = calls.start()
        code = OK
        try:
            return await method(request, context)
        except BaseException as error:
            code = _code_of(error, context)
            raise
        finally:
            calls.end(began, code or _code_set(context))

    return count


def _counted_stream(
    method: Callable[..., Any], calls: MethodCalls
) -> Callable[..., AsyncIterator[Any]]:
    async def count(request: Any, context: Any) -> AsyncIterator[Any]:
        began = calls.start()
        code = OK
        try:
            async for response in method(request, context):
                yield response
        except BaseException as error:
            code = _code_of(error, context)
            raise
        finally:
            calls.end(began, code or _code_set(context))

    return count


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
