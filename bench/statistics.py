"""Medians and intervals of interleaved measurements."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_RESAMPLES = 4000


@dataclass(frozen=True)
class Interval:
    """A median with its 95 % interval, by resampling."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} [{self.low:.2f}–{self.high:.2f}]"


def interval(values: Sequence[float]) -> Interval:
    """Return the median of `values`, one of each round, with its interval."""
    array = np.asarray(values, float)
    picks = np.random.default_rng(0).integers(0, len(array), (_RESAMPLES, len(array)))
    low, high = np.percentile(np.median(array[picks], axis=1), [2.5, 97.5])
    return Interval(statistics.median(values), float(low), float(high))


def ratios(ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]]) -> Interval:
    """Return ours over theirs; each is a list of rounds, each round its two measurements.

    Within a round the order is A B B A, so what drifts over the round cancels out.
    """
    return interval([sum(a) / sum(b) for a, b in zip(ours, theirs, strict=True)])


def control(rounds: Sequence[Sequence[float]]) -> Interval:
    """Return first over second measurement of the same server: 1 but for noise."""
    return interval([first / second for first, second in rounds])
