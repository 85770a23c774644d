"""Latencies that can be compared: interleaved, so that both sides meet the same
machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Ratio:
    """How many times faster ``b`` is than ``a``, with a 95 % interval."""

    estimate: float
    lower: float
    upper: float


def interleaved(
    calls: Sequence[Callable[[], object]],
    *,
    rounds: int = 60,
    calls_per_round: int = 0,
    round_seconds: float = 0.005,
    warmup: int = 10,
) -> list[NDArray[np.float64]]:
    """Time several calls in turn: A B C, C B A, A B C …

    Args:
        calls: What to time.
        rounds: How often each has its turn.
        calls_per_round: Calls in one turn; 0 chooses as many as fill
            ``round_seconds``, for each of ``calls`` by itself.
        warmup: Untimed calls before.

    Returns:
        For each of ``calls`` the medians of its turns, in microseconds, shape
        ``[rounds]``; entry i of all of them was taken at about the same time.
    """
    counts: list[int] = []
    for call in calls:
        for _ in range(warmup):
            call()
        started = time.perf_counter()
        call()
        once = max(time.perf_counter() - started, 1e-7)
        counts.append(calls_per_round or max(1, min(1000, int(round_seconds / once))))
    results = [np.empty(rounds, np.float64) for _ in calls]
    order = list(range(len(calls)))
    for turn in range(rounds):
        for index in order if turn % 2 == 0 else reversed(order):
            results[index][turn] = float(np.median(time_calls(calls[index], counts[index])))
    return results


def time_calls(call: Callable[[], object], count: int) -> NDArray[np.float64]:
    """Return the duration of each of ``count`` calls, in microseconds."""
    durations = np.empty(count, np.float64)
    clock = time.perf_counter_ns
    for index in range(count):
        started = clock()
        call()
        durations[index] = clock() - started
    return durations / 1000.0


def ratio(baseline: NDArray[np.float64], candidate: NDArray[np.float64], *, seed: int = 0) -> Ratio:
    """Return how many times faster ``candidate`` is than ``baseline``.

    The estimate is the median of the paired ratios of :func:`interleaved`; the
    interval is its percentile bootstrap (Efron, 1979) with 2,000 resamples.
    """
    paired = baseline / candidate
    generator = np.random.default_rng(seed)
    picks = generator.integers(0, len(paired), size=(2000, len(paired)))
    medians = np.median(paired[picks], axis=1)
    lower, upper = np.quantile(medians, [0.025, 0.975])
    return Ratio(float(np.median(paired)), float(lower), float(upper))
