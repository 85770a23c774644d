"""Counters of requests, in the form in which servers report them to the manager."""

from __future__ import annotations

import math
import threading

from pollard.models.v1 import fleet_service_pb2 as fleet_pb

_SCALE = 16
"""Buckets per doubling: a bucket is 4.4 % wide, so that a ratio of 1.2 can be told from 1."""

_BUCKETS = _SCALE * 32
"""From 1 µs to over an hour."""

_FIRST_EXPONENT, _LAST_EXPONENT = 5, 25
"""Prometheus gets one bound a doubling, 32 µs to 34 s: it keeps a series of each."""

_DISTANCE_SCALE = 4
_DISTANCE_BUCKETS = _DISTANCE_SCALE * 40
"""From a millionth to a million times the length."""


class RequestCounters:
    """Counts and latencies of the requests to one revision; they only grow.

    Not safe for use from several threads: the event loop's thread owns it.
    """

    def __init__(self) -> None:
        self.succeeded = 0
        self.failed = 0
        self.rejected = 0
        self.shadow: ShadowCounters | None = None
        """Of copies that ran on the revision; None while there were none."""
        self._counts = [0] * _BUCKETS
        self._sum_us = 0.0

    def succeed(self, seconds: float) -> None:
        """Count a request answered with success after `seconds` in the engine."""
        microseconds = seconds * 1e6
        self.succeeded += 1
        self._sum_us += microseconds
        bucket = int(math.log2(microseconds) * _SCALE) if microseconds > 1 else 0
        self._counts[min(bucket, _BUCKETS - 1)] += 1

    def fail(self) -> None:
        """Count a request that failed for a reason of the server's."""
        self.failed += 1

    def reject(self) -> None:
        """Count a request that failed for a reason of the client's."""
        self.rejected += 1

    def shadows(self) -> ShadowCounters:
        """Return the counters of copies, making them."""
        if self.shadow is None:
            self.shadow = ShadowCounters()
        return self.shadow

    def to_seconds(self) -> tuple[list[tuple[str, float]], float]:
        """Return the latencies of the answered as Prometheus wants histograms.

        Returns:
            Upper bounds in seconds, each with how many latencies are not above it, and the sum.
        """
        counts = self._counts.copy()
        found: list[tuple[str, float]] = []
        total = done = 0
        for exponent in range(_FIRST_EXPONENT, _LAST_EXPONENT + 1):
            total += sum(counts[done : exponent * _SCALE])
            done = exponent * _SCALE
            found.append((repr(2.0**exponent * 1e-6), total))
        found.append(("+Inf", total + sum(counts[done:])))
        return found, self._sum_us * 1e-6

    def to_proto(self) -> fleet_pb.Counters:
        """Return the counters as they stand; empty buckets at either end are left out."""
        return fleet_pb.Counters(
            succeeded=self.succeeded,
            failed=self.failed,
            rejected=self.rejected,
            latency=_histogram(_SCALE, self._counts, self._sum_us),
            shadow=None if self.shadow is None else self.shadow.to_proto(),
        )


class ShadowCounters:
    """Counts of the copies that ran on one revision; they only grow. Safe on every thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._compared = self._items = self._agreed = self._dropped = self._failed = 0
        self._distances = [0] * _DISTANCE_BUCKETS
        self._sum = 0.0

    def compare(self, agreed: int, distances: list[float]) -> None:
        """Count a copy that was compared.

        Args:
            agreed: How many of its items have the same first answer.
            distances: Relative distance of each item's scores, 0 or more.
        """
        with self._lock:
            self._compared += 1
            self._items += len(distances)
            self._agreed += agreed
            for distance in distances:
                millionths = distance * 1e6
                bucket = 0
                if millionths > 1:
                    bucket = _DISTANCE_BUCKETS - 1
                    if millionths < 1e12:
                        self._sum += millionths
                        bucket = int(math.log2(millionths) * _DISTANCE_SCALE)
                self._distances[min(bucket, _DISTANCE_BUCKETS - 1)] += 1

    def drop(self) -> None:
        """Count a copy that was not run."""
        with self._lock:
            self._dropped += 1

    def fail(self) -> None:
        """Count a copy that the revision failed."""
        with self._lock:
            self._failed += 1

    def to_proto(self) -> fleet_pb.ShadowCounters:
        """Return the counters as they stand at one moment."""
        with self._lock:
            return fleet_pb.ShadowCounters(
                compared=self._compared,
                items=self._items,
                agreed=self._agreed,
                dropped=self._dropped,
                failed=self._failed,
                distance=_histogram(_DISTANCE_SCALE, self._distances, self._sum),
            )


def _histogram(scale: int, counts: list[int], total: float) -> fleet_pb.Histogram:
    used = [index for index, count in enumerate(counts) if count]
    first, end = (used[0], used[-1] + 1) if used else (0, 0)
    return fleet_pb.Histogram(scale=scale, offset=first, counts=counts[first:end], sum_us=total)
