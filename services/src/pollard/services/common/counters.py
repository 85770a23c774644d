"""Counters of requests, in the form in which servers report them to the manager."""

from __future__ import annotations

import math

from pollard.models.v1 import fleet_service_pb2 as fleet_pb

_SCALE = 16
"""Buckets per doubling: a bucket is 4.4 % wide, so that a ratio of 1.2 can be told from 1."""

_BUCKETS = _SCALE * 32
"""From 1 µs to over an hour."""


class RequestCounters:
    """Counts and latencies of the requests to one revision; they only grow.

    Not safe for use from several threads: the event loop's thread owns it.
    """

    def __init__(self) -> None:
        self.succeeded = 0
        self.failed = 0
        self.rejected = 0
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

    def to_proto(self) -> fleet_pb.Counters:
        """Return the counters as they stand; empty buckets at either end are left out."""
        used = [index for index, count in enumerate(self._counts) if count]
        first, end = (used[0], used[-1] + 1) if used else (0, 0)
        return fleet_pb.Counters(
            succeeded=self.succeeded,
            failed=self.failed,
            rejected=self.rejected,
            latency=fleet_pb.Histogram(
                scale=_SCALE,
                offset=first,
                counts=self._counts[first:end],
                sum_us=self._sum_us,
            ),
        )
