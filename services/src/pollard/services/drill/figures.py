"""The figures of a drill."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pollard.client.load import IMAGE, TENSOR, Answers, Traffic
from pollard.services.drill.options import AROUND_SECONDS

_MEBIBYTE = 1 << 20


@dataclass(frozen=True)
class Swap:
    """One swap, on the monotonic clock."""

    revision: int
    """Where it led."""
    started: float
    """When it was ordered."""
    ended: float
    """When the manager said that every server has the new routes."""


@dataclass
class Record:
    """What a drill has seen so far."""

    traffic: Traffic = field(default_factory=Traffic)
    swaps: list[Swap] = field(default_factory=list)
    kills: list[dict[str, Any]] = field(default_factory=list)
    """What was killed in the middle of which step, and what came of it."""
    problems: list[str] = field(default_factory=list)
    """Everything else that is not as it should be: something lost, something damaged."""
    capacity: float = 0.0
    """Requests a second that the services can answer; 0 if it was not measured."""
    rate: float = 0.0
    """Requests a second that were sent; 0 where each client asked without pause."""
    began: float = 0.0
    """When the load began that is judged."""
    ended: float = 0.0
    memory: list[tuple[int, Mapping[str, int]]] = field(default_factory=list)
    """Bytes of each service, and after how many swaps."""
    stopped: str = ""
    """Why it ended before its time; empty if it did not."""

    @property
    def passed(self) -> bool:
        """Whether everything was done, and nothing went wrong."""
        answered = len(self.traffic.answered) > 0
        return answered and not (self.traffic.bad or self.problems or self.stopped)


def swap_windows(swaps: Sequence[Swap]) -> NDArray[np.float64]:
    """Return from when to when each swap counts, (swaps, 2)."""
    return np.array(
        [(swap.started - AROUND_SECONDS, swap.ended + AROUND_SECONDS) for swap in swaps]
    ).reshape(-1, 2)


def during(answered: Answers, windows: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Say for each request whether it was on its way within one of the windows.

    Args:
        answered: The requests.
        windows: Begin and end, each growing, (windows, 2).
    """
    if not len(windows):
        return np.zeros(len(answered), np.bool_)
    first = np.searchsorted(windows[:, 1], answered.started)
    begins = np.append(windows[:, 0], np.inf)[first]
    found: NDArray[np.bool_] = np.less_equal(begins, answered.ended)
    return found


def answering_seconds(
    answered: Answers, swaps: Sequence[Swap], until_end: float = np.inf
) -> list[float]:
    """Return for each swap how long it took until every server answered with the new revision.

    That is until the last of them, inference and vision, has given its first such answer, and at
    least until the last request was sent that the revision before still answered.

    Args:
        answered: The requests.
        swaps: In their order.
        until_end: Up to when the last swap is looked at.
    """
    started, ended, revisions = answered.started, answered.ended, answered.revisions
    kinds = [mask for kind in (IMAGE, TENSOR) if (mask := answered.are(kind)).any()]
    found = []
    for index, swap in enumerate(swaps):
        until = swaps[index + 1].started if index + 1 < len(swaps) else until_end
        # They are in the order of their ends.
        part = slice(*np.searchsorted(ended, (swap.started, until)))
        is_new = revisions[part] == swap.revision
        moment = swap.started
        for kind in kinds:
            new, old = kind[part] & is_new, kind[part] & ~is_new
            if new.any():
                moment = max(moment, float(ended[part][new].min()))
            if old.any():
                moment = max(moment, float(started[part][old].max()))
        found.append(moment - swap.started)
    return found


def figures(record: Record) -> dict[str, Any]:
    """Return everything as JSON holds it; times in milliseconds, memory in MiB."""
    traffic, answered = record.traffic, record.traffic.answered
    latency = (answered.ended - answered.started) * 1e3
    swapping = during(answered, swap_windows(record.swaps))
    judged = (answered.started >= record.began) & (answered.started <= record.ended)
    inside, outside = spread(latency[swapping & judged]), spread(latency[~swapping & judged])
    duration = [(swap.ended - swap.started) * 1e3 for swap in record.swaps]
    answering = [
        seconds * 1e3 for seconds in answering_seconds(answered, record.swaps, record.ended)
    ]
    ratio = inside["p99"] / outside["p99"] if outside["p99"] and inside["p99"] else None
    return {
        "passed": record.passed,
        "stopped": record.stopped,
        "requests": traffic.total,
        "failed": traffic.failed,
        "wrong": traffic.wrong,
        "stale": traffic.stale,
        "sent_again": traffic.retried,
        "late": traffic.late,
        "requests_by_revision": {
            str(number): int(count)
            for number, count in zip(
                *np.unique(answered.revisions, return_counts=True), strict=True
            )
        },
        "problems": [*traffic.problems, *record.problems],
        "seconds": record.ended - record.began,
        "capacity_per_second": record.capacity,
        "rate_per_second": record.rate,
        "swaps": len(record.swaps),
        "swap_ms": spread(np.array(duration)),
        "first_swap_ms": duration[0] if duration else None,
        "swap_answering_ms": spread(np.array(answering)),
        "latency_in_swaps_ms": inside,
        "latency_out_of_swaps_ms": outside,
        "latency_by_kind_ms": {
            kind: {
                "in_swaps": spread(latency[swapping & judged & answered.are(kind)]),
                "out_of_swaps": spread(latency[~swapping & judged & answered.are(kind)]),
            }
            for kind in (IMAGE, TENSOR)
        },
        "p99_ratio": ratio,
        "kills": record.kills,
        "memory_mib": memory_figures(record),
    }


def spread(values: NDArray[np.float64]) -> dict[str, float]:
    """Return how many values there are, their median, 99th percentile and maximum."""
    if not len(values):
        return {"count": 0, "p50": 0.0, "p99": 0.0, "max": 0.0}
    p50, p99 = np.percentile(values, (50, 99))
    return {"count": len(values), "p50": float(p50), "p99": float(p99), "max": float(values.max())}


def memory_figures(record: Record) -> dict[str, dict[str, float]]:
    """Return for each service its memory at the first look, at the last, and the growth."""
    if not record.memory:
        return {}
    (_, first), (_, last) = record.memory[0], record.memory[-1]
    return {
        name: {
            "first": first[name] / _MEBIBYTE,
            "last": last[name] / _MEBIBYTE,
            "growth": (last[name] - first[name]) / _MEBIBYTE,
        }
        for name in first
        if name in last
    }
