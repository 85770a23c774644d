"""Rates and percentiles of the last seconds, out of counters that only grow."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from pollard.models.v1 import fleet_service_pb2 as pb

Key = tuple[str, int]
"""Model and revision."""

_DEFAULT_SCALE = 4
"""Buckets per doubling where a histogram does not say."""


@dataclass
class Histogram:
    """Counts in exponential buckets, in microseconds."""

    scale: int = 0
    """Buckets per doubling; 0 while there is nothing."""
    counts: dict[int, int] = field(default_factory=dict)

    def add(self, later: pb.Histogram, earlier: pb.Histogram | None) -> None:
        """Add what a server has counted between two reports.

        The coarser scale remains; one that is no multiple of it is left out.
        """
        added = dict(enumerate(later.counts, later.offset))
        if earlier is not None:
            for index, count in enumerate(earlier.counts, earlier.offset):
                added[index] = added.get(index, 0) - count
        scale = later.scale or _DEFAULT_SCALE
        if not self.scale:
            self.scale = scale
        coarse = min(self.scale, scale)
        if max(self.scale, scale) % coarse:
            return
        if coarse != self.scale:
            ratio = self.scale // coarse
            merged: dict[int, int] = {}
            for index, count in self.counts.items():
                merged[index // ratio] = merged.get(index // ratio, 0) + count
            self.scale, self.counts = coarse, merged
        ratio = scale // coarse
        for index, count in added.items():
            if count > 0:
                self.counts[index // ratio] = self.counts.get(index // ratio, 0) + count

    def milliseconds(self, quantile: float) -> float | None:
        """Return a quantile, to half a bucket; None if there is nothing."""
        left = quantile * sum(self.counts.values())
        for index in sorted(self.counts):
            left -= self.counts[index]
            if left <= 0:
                return float(2.0 ** ((index + 0.5) / self.scale)) / 1000
        return None


@dataclass
class Rates:
    """What the servers of one kind did with a revision in the last seconds, all together."""

    per_second: float = 0.0
    """Requests, or images, that were answered."""
    failed_per_second: float = 0.0
    rejected_per_second: float = 0.0
    """Those that failed for a reason of the client's."""
    latency: Histogram = field(default_factory=Histogram)
    """Of those that inference servers answered."""
    waiting: int = 0
    """Requests that waited for a worker when the last reports were made."""
    in_flight: int = 0
    servers: int = 0
    """Servers whose rates these are."""


@dataclass(frozen=True)
class _Seen:
    moment: float
    """By the server's clock, in seconds."""
    revisions: Mapping[Key, pb.RevisionStatus]


class Meter:
    """Keeps the reports of the last seconds."""

    def __init__(self, window_seconds: float) -> None:
        """Begin with none.

        Args:
            window_seconds: Over how long rates are taken.
        """
        self._window = window_seconds
        self._seen: dict[str, deque[_Seen]] = {}
        self._kinds: dict[str, pb.ServerKind.ValueType] = {}
        self._connected: set[str] = set()

    def note(self, servers: Sequence[pb.Server]) -> None:
        """Take in what the manager says of its servers."""
        self._connected = {each.hello.server_id for each in servers if each.connected}
        for gone in self._seen.keys() - {each.hello.server_id for each in servers}:
            del self._seen[gone]
        for server in servers:
            name = server.hello.server_id
            moment = server.report.time.ToNanoseconds() / 1e9
            self._kinds[name] = server.hello.kind
            seen = self._seen.setdefault(name, deque())
            if seen and moment < seen[-1].moment:
                seen.clear()  # Its clock was put back, or it is another server.
            if not seen or moment > seen[-1].moment:
                statuses = {(item.model, item.revision): item for item in server.report.revisions}
                seen.append(_Seen(moment, statuses))
            # One that is older than the window remains, to reckon from.
            while len(seen) > 2 and seen[1].moment <= seen[-1].moment - self._window:
                seen.popleft()

    @property
    def knows_all(self) -> bool:
        """Whether there are rates of every server that is connected."""
        return all(len(self._seen.get(name, ())) > 1 for name in self._connected)

    @property
    def covered(self) -> float:
        """Over how many seconds rates are taken now: that of the server seen longest."""
        spans = [
            seen[-1].moment - seen[0].moment
            for name, seen in self._seen.items()
            if name in self._connected
        ]
        return max(spans, default=0.0)

    def rates(self) -> dict[tuple[str, Key], Rates]:
        """Return what every revision does, by "INFERENCE" or "PREPROCESS" and revision."""
        found: dict[tuple[str, Key], Rates] = {}
        for name, seen in self._seen.items():
            if name not in self._connected:
                continue
            first, last = seen[0], seen[-1]
            kind = pb.ServerKind.Name(self._kinds[name]).removeprefix("SERVER_KIND_")
            for key, status in last.revisions.items():
                rates = found.setdefault((kind, key), Rates())
                rates.waiting += status.waiting
                rates.in_flight += status.in_flight
                seconds = last.moment - first.moment
                if seconds <= 0:
                    continue
                rates.servers += 1
                now = status.counters
                before = first.revisions[key].counters if key in first.revisions else None
                if before is not None and before.run_id != now.run_id:
                    before = None  # The server began anew, and its counters with it.
                for field_name, counter in (
                    ("per_second", "succeeded"),
                    ("failed_per_second", "failed"),
                    ("rejected_per_second", "rejected"),
                ):
                    more = getattr(now, counter) - (getattr(before, counter) if before else 0)
                    rate = getattr(rates, field_name) + max(0, more) / seconds
                    setattr(rates, field_name, rate)
                rates.latency.add(now.latency, before.latency if before is not None else None)
        return found
