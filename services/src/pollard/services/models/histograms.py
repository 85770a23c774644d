"""Latency histograms of several servers, added up and compared without assumptions."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from pollard.models.v1 import fleet_service_pb2 as fleet_pb

_DEFAULT_SCALE = 4
"""Buckets per doubling where a histogram does not say."""


@dataclass
class Latencies:
    """Counts of values in exponential buckets.

    Bucket i holds values v with ``2**(i/scale) <= v < 2**((i+1)/scale)`` microseconds.
    """

    scale: int = 0
    """Buckets per doubling; 0 while there is nothing."""
    counts: dict[int, int] = field(default_factory=dict)

    @classmethod
    def of(cls, message: fleet_pb.Histogram) -> Latencies:
        """Return what a server reported."""
        counts = {message.offset + i: count for i, count in enumerate(message.counts) if count}
        return cls(message.scale or _DEFAULT_SCALE, counts)

    def to_json(self) -> dict[str, Any]:
        """Return it in a form that can be stored."""
        counts = {str(index): count for index, count in sorted(self.counts.items())}
        return {"scale": self.scale, "counts": counts}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Latencies:
        """Return what was stored."""
        return cls(value["scale"], {int(index): n for index, n in value["counts"].items()})

    @property
    def total(self) -> int:
        """Number of values."""
        return sum(self.counts.values())

    def since(self, earlier: Latencies) -> Latencies | None:
        """Return what was added after ``earlier``; None if it is no later state of the same."""
        if earlier.counts and earlier.scale != self.scale:
            return None
        added = dict(self.counts)
        for index, count in earlier.counts.items():
            left = added.get(index, 0) - count
            if left < 0:
                return None
            added[index] = left
        return Latencies(self.scale, {index: count for index, count in added.items() if count})

    def add(self, other: Latencies) -> None:
        """Add another histogram; the coarser scale of the two remains.

        Histograms whose scales are no multiples of each other cannot be added:
        the other one is left out.
        """
        if not other.counts:
            return
        if not self.scale:
            self.scale = other.scale
        coarse = min(self.scale, other.scale)
        if max(self.scale, other.scale) % coarse:
            return
        self.coarsen(coarse)
        ratio = other.scale // coarse
        for index, count in other.counts.items():
            self.counts[index // ratio] = self.counts.get(index // ratio, 0) + count

    def coarsen(self, scale: int) -> None:
        """Bring it to a scale that divides its own."""
        if not self.scale or self.scale == scale:
            return
        ratio = self.scale // scale
        merged: dict[int, int] = {}
        for index, count in self.counts.items():
            merged[index // ratio] = merged.get(index // ratio, 0) + count
        self.scale, self.counts = scale, merged

    def edge(self, index: int) -> float:
        """Return the lower edge of a bucket in microseconds."""
        return float(2.0 ** (index / self.scale))

    def estimate(self, quantile: float) -> float:
        """Return a quantile in microseconds, to half a bucket; 0 if there is nothing."""
        left = quantile * self.total
        for index in sorted(self.counts):
            left -= self.counts[index]
            if left <= 0:
                return self.edge(index) * float(2.0 ** (0.5 / self.scale))
        return 0.0

    def at_least(self, quantile: float, alpha: float) -> int | None:
        """Return a bucket whose lower edge the true quantile reaches, at confidence 1 - alpha.

        By the order statistics, whatever the distribution: if fewer than
        ``1 - quantile`` of all values lay at or above the edge, so many of those seen
        would be there with a probability of at most ``alpha``. None if even
        the lowest bucket is not certain.
        """
        total, above = self.total, 0
        for index in sorted(self.counts, reverse=True):
            above += self.counts[index]
            if upper_tail(total, 1 - quantile, above) <= alpha:
                return index
        return None

    def at_most(self, quantile: float, alpha: float) -> int | None:
        """Return a bucket whose upper edge the true quantile does not exceed, likewise."""
        total, below = self.total, 0
        for index in sorted(self.counts):
            below += self.counts[index]
            if upper_tail(total, quantile, below) <= alpha:
                return index
        return None


def upper_tail(trials: int, chance: float, successes: int) -> float:
    """Return the probability of at least ``successes``; 1 where that is no surprise."""
    if successes <= trials * chance:
        return 1.0
    term = math.exp(
        math.lgamma(trials + 1)
        - math.lgamma(successes + 1)
        - math.lgamma(trials - successes + 1)
        + successes * math.log(chance)
        + (trials - successes) * math.log1p(-chance)
    )
    odds = chance / (1 - chance)
    total, count = 0.0, successes
    while term > total * 1e-12 and term > 0:
        total += term
        if count == trials:
            break
        term *= (trials - count) / (count + 1) * odds
        count += 1
    return min(1.0, total)
