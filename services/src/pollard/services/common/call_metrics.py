"""Counts of gRPC calls under the names that dashboards for gRPC servers know.

Every front end tells a `MethodCalls` when a call begins and how it ended. That is on the way of
every request, on several threads, hence one short lock and no more.
"""

from __future__ import annotations

import threading
import time
from bisect import bisect_left
from collections.abc import Iterable, Sequence

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from pollard.services.common.telemetry.codes import NAMES, OK

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


_ENDLESS = frozenset({"Sync", "WatchEvents"})
"""Streams that last as long as whoever listens: nobody would see a span of theirs in time."""


class MethodCalls:
    """The calls of one method."""

    __slots__ = (
        "_lock",
        "codes",
        "durations",
        "kind",
        "method",
        "service",
        "span_name",
        "started",
        "told",
        "traced",
    )

    def __init__(self, service: str, method: str, kind: str) -> None:
        """Start at zero."""
        self.service, self.method, self.kind = service, method, kind
        self.told = not service.startswith("grpc.")
        """Whether the access log has a line for a call: probes and reflection are not worth it."""
        self.traced = self.told and method not in _ENDLESS
        self.span_name = f"{service}/{method}"
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
                handled.add_metric([*values, NAMES.get(code, str(code))], count)
            handling.add_metric(values, each.durations.cumulated(), each.durations.total)
        yield started
        yield handled
        yield handling
