"""Measure written files as they are served, choose among them, and confirm the choice.

Choices are made on the choosing part. The chosen file and the parent are then
opened anew and judged on the held-out part, which nothing has been chosen by, and
timed again, because the fastest of several is in part the luckiest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pollard.compress import accelerator
from pollard.compress.candidates import PARENT_FLOAT, Candidate
from pollard.compress.data import Dataset, Part
from pollard.compress.devices import PROCESSOR, Device, open_on
from pollard.compress.errors import GateRefused
from pollard.compress.evaluate import (
    Accuracy,
    Drop,
    predict_part,
    session_predictor,
    torch_predictor,
    wilson_share,
)
from pollard.compress.tasks import Task, Verdict, task_of
from pollard.runtime.measure import Ratio, interleaved, ratio, time_calls
from pollard.runtime.sessions import Session

# Lower bound of the speed-up from which a model counts as faster.
MIN_SPEEDUP = 1.03

# The largest batch that a file is checked with.
MAX_BATCH = 32

# From how many points, and standard errors, a parent is far better on one part than on another.
_FAR_POINTS, _FAR_ERRORS = 2.0, 3.5


@dataclass(frozen=True)
class Timing:
    """Latency of one batch size with one thread, in microseconds."""

    batch_size: int
    p50_us: float
    p99_us: float
    samples: int


@dataclass(frozen=True)
class Measured:
    """A candidate and its figures on one part of the data."""

    candidate: Candidate
    accuracy: Accuracy
    drop: Drop
    """Against the parent's float file."""
    timings: list[Timing]
    """Empty where the device that the file is for is not here."""
    speedup: Ratio | None
    """How many times faster than the parent's float file: one image with one thread, or the
    batch that a GPU is judged by. None where nothing was timed."""
    agreement: float
    """Share of the answers that are the PyTorch model's, too: of images, boxes, or pixels."""
    parent_agreement: Accuracy
    """Share of the answers that are the parent's float file's, too."""
    confusion: NDArray[np.int64] = field(repr=False)
    judged_batch: int = 1
    """Batch whose time is compared."""

    @property
    def timed(self) -> bool:
        """Whether it was timed on the device that it is for."""
        return bool(self.timings)

    @property
    def latency_us(self) -> float:
        """Median of the batch that is compared; infinite where nothing was timed."""
        return next((t.p50_us for t in self.timings if t.batch_size == self.judged_batch), math.inf)

    @property
    def is_faster(self) -> bool:
        """Whether it is clearly faster than the parent; what was not timed is not slower."""
        return self.speedup is None or self.speedup.lower >= MIN_SPEEDUP

    def to_json(self) -> dict[str, Any]:
        """Return the figures."""
        return {
            "name": self.candidate.name,
            "target": self.candidate.target,
            "accuracy": self.accuracy.to_json(),
            "drop_points": _interval(self.drop.points, self.drop.lower, self.drop.upper),
            "size_bytes": self.candidate.size_bytes,
            "macs": self.candidate.macs,
            "parameters": self.candidate.parameters,
            "latency": [vars(timing) for timing in self.timings],
            "judged_batch": self.judged_batch,
            "speedup": (
                None
                if self.speedup is None
                else _interval(self.speedup.estimate, self.speedup.lower, self.speedup.upper)
            ),
            "parity": self.candidate.parity,
            "quantization": self.candidate.quantization,
            "ranges": self.candidate.ranges,
            "agreement_with_torch": self.agreement,
            "agreement_with_parent": self.parent_agreement.to_json(),
        }


def _interval(estimate: float, lower: float, upper: float) -> dict[str, float]:
    return {"estimate": estimate, "lower": lower, "upper": upper}


def measure(
    candidates: Sequence[Candidate],
    part: Part,
    data: Dataset,
    device: Device = PROCESSOR,
    *,
    rounds: int,
) -> list[Measured]:
    """Measure candidates against the first one, the parent's float file.

    Every file is opened anew, in the way in which it is served.

    Args:
        candidates: The parent's float file, then the others.
        part: Which images to answer.
        data: Names the classes.
        device: What to run them on.
        rounds: Turns of the interleaved timing.
    """
    accelerator.free(accelerator.used())
    sessions = [open_on(device, candidate) for candidate in candidates]
    timings, medians = _time_all(sessions, part, device, rounds)
    task, classes = task_of(part.task), len(data.classes)
    results: list[Measured] = []
    parent: tuple[Verdict, NDArray[np.float32]] | None = None
    answers: dict[int, NDArray[np.float32]] = {}
    rows = zip(candidates, sessions, timings, medians, strict=True)
    for candidate, session, timing, times in rows:
        given = predict_part(session_predictor(session), part, MAX_BATCH)
        verdict = task.judge(given, part, classes)
        parent = parent or (verdict, given)
        if id(candidate.module) not in answers:
            predict = torch_predictor(candidate.module, candidate.spec)
            answers[id(candidate.module)] = predict_part(predict, part, MAX_BATCH)
        results.append(
            Measured(
                candidate,
                verdict.accuracy(part),
                verdict.drop_from(parent[0]),
                timing,
                ratio(medians[0], times) if device.timed else None,
                _agreement(task, given, answers[id(candidate.module)], part).value,
                _agreement(task, given, parent[1], part),
                task.confusion(given, part, classes),
                device.judged_batch,
            )
        )
    return results


def _agreement(
    task: Task, given: NDArray[np.float32], wanted: NDArray[np.float32], part: Part
) -> Accuracy:
    same, total = task.agreement(given, wanted, part)
    return wilson_share(same, total, part.name)


def _call(session: Session, images: NDArray[np.uint8]) -> Any:
    feeds = {session.inputs[0].name: images}
    if session.stages:
        return lambda: session.run(feeds)
    run = session.raw.run
    return lambda: run(None, feeds)


def _time_all(
    sessions: Sequence[Session], part: Part, device: Device, rounds: int
) -> tuple[list[list[Timing]], list[NDArray[np.float64]]]:
    """Time all sessions in turn; return their figures, and the turns of the batch that counts."""
    timings: list[list[Timing]] = [[] for _ in sessions]
    judged: list[NDArray[np.float64]] = [np.empty(0) for _ in sessions]
    for batch in device.batches:
        shape = (batch, *part.images.shape[1:])
        images = np.ascontiguousarray(np.resize(part.images[:batch], shape))
        calls = [_call(session, images) for session in sessions]
        # The others are for information: fewer turns.
        counts = batch == device.judged_batch
        turns = interleaved(calls, rounds=rounds if counts else max(10, rounds // 4))
        judged = turns if counts else judged
        for found, call, medians in zip(timings, calls, turns, strict=True):
            p50 = float(np.median(medians))
            count = int(np.clip(300_000 / p50, 20, 500))
            tail = float(np.quantile(time_calls(call, count), 0.99))
            found.append(Timing(batch, p50, max(p50, tail), count))
    return timings, judged


def select(
    measured: Sequence[Measured], max_drop: float, overruns: Mapping[str, str] | None = None
) -> Measured:
    """Return the fastest that holds the gate on the choosing part.

    Two that are within 3 % of each other are equally fast; the smaller file wins. Where nothing
    could be timed, the one with the least to compute is taken for the fastest.

    Args:
        measured: The parent's float file, then the others.
        max_drop: Points that may be lost.
        overruns: Files that take more than the budgets allow, and what they take.

    Raises:
        GateRefused: none holds the gate and the budgets and is faster than the parent; the
            numbers of all of them are in the message.
    """
    overruns = overruns or {}
    rivals = [m for m in measured if m.candidate.name != PARENT_FLOAT]
    holding = [
        m for m in rivals if m.drop.points <= max_drop + 1e-9 and m.candidate.name not in overruns
    ]
    beyond = "".join(f"; {told}" for told in overruns.values())
    if not holding:
        raise GateRefused(
            f"no candidate loses at most {max_drop:g} points"
            f"{' within the budget' if overruns else ''}: {_numbers(rivals)}{beyond}. "
            f"{'Allow more' if overruns else 'Remove less'}, recover longer, or allow a larger "
            "drop",
            _figures(measured),
        )
    if not all(m.timed for m in holding):
        return min(holding, key=lambda m: (m.candidate.macs, m.candidate.size_bytes))
    fastest = min(holding, key=lambda m: m.latency_us)
    equals = [m for m in holding if m.latency_us <= fastest.latency_us * MIN_SPEEDUP]
    chosen = min(equals, key=lambda m: (m.candidate.size_bytes, m.latency_us))
    if not chosen.is_faster:
        raise GateRefused(
            f"nothing that holds {max_drop:g} points is faster than the parent (the lower bound "
            f"of the speed-up must reach {MIN_SPEEDUP:g}): {_numbers(rivals)}{beyond}",
            _figures(measured),
        )
    return chosen


def confirm(parent: Measured, chosen: Measured, max_drop: float) -> None:
    """Check the figures of the held-out part against the gates.

    Raises:
        GateRefused: the choice does not hold on data it was not chosen by.
    """
    if chosen.drop.points > max_drop + 1e-9:
        raise GateRefused(
            f"{chosen.candidate.name} held the gate of {max_drop:g} points where it was chosen, "
            f"but not on the held-out data: {_numbers([chosen])}. Remove less or recover longer",
            _figures([parent, chosen]),
        )
    if not chosen.is_faster:
        raise GateRefused(
            f"{chosen.candidate.name} is not faster than the parent when timed again (the lower "
            f"bound of the speed-up must reach {MIN_SPEEDUP:g}): {_numbers([chosen])}",
            _figures([parent, chosen]),
        )


def seen_before(choosing: Accuracy, held_out: Accuracy) -> str:
    """Say that the parent seems to have been trained on one of the parts; empty if it does not.

    Images of both parts are as hard as each other, so a parent that has seen neither is about
    as good on one as on the other.

    Args:
        choosing: The parent's accuracy on the part that choices are made on.
        held_out: On the part that figures are reported of.
    """
    points = 100 * (choosing.value - held_out.value)
    right = choosing.value * choosing.samples + held_out.value * held_out.samples
    both = right / (choosing.samples + held_out.samples)
    error = math.sqrt(both * (1 - both) * (1 / choosing.samples + 1 / held_out.samples))
    if abs(points) < _FAR_POINTS or abs(points) < 100 * _FAR_ERRORS * error:
        return ""
    better, worse = (choosing, held_out) if points > 0 else (held_out, choosing)
    what = (
        "what holds the gate there may not hold it on new images, and layers, ranges and epochs "
        "were chosen by it"
        if points > 0
        else "the figures reported of it say little of new images"
    )
    return (
        f"the parent is far better on {better.dataset} ({better.value:.2%} of {better.samples}) "
        f"than on {worse.dataset} ({worse.value:.2%} of {worse.samples}): it was probably trained "
        f"on {better.dataset}; {what}. Keep images that the parent has not seen in a folder "
        f"{'val/' if points > 0 else 'test/'}"
    )


def explain_dropped(
    measured: Sequence[Measured],
    chosen: Measured,
    max_drop: float,
    overruns: Mapping[str, str] | None = None,
) -> list[dict[str, str]]:
    """Say which stages are not in the chosen file, and why, in numbers."""
    dropped: list[dict[str, str]] = []

    def why(rival: Measured) -> str:
        if told := (overruns or {}).get(rival.candidate.name):
            return told
        if rival.drop.points > max_drop + 1e-9:
            return (
                f"{rival.candidate.name} lost {rival.drop.points:.2f} points, "
                f"{max_drop:g} are allowed"
            )
        if not rival.timed:
            return f"{rival.candidate.name} has more to compute"
        return (
            f"{rival.candidate.name} takes {rival.latency_us:.1f} µs, "
            f"{chosen.candidate.name} {chosen.latency_us:.1f} µs"
        )

    by_name = {m.candidate.name: m for m in measured}
    kind = "pruned" if chosen.candidate.pruned else "parent"
    if chosen.candidate.target == "cpu-fp32" and (rival := by_name.get(f"{kind}-int8")):
        dropped.append({"stage": "quantize", "why": why(rival)})
    suffix = chosen.candidate.name.rpartition("-")[2]
    if not chosen.candidate.pruned and (rival := by_name.get(f"pruned-{suffix}")):
        dropped.append({"stage": "prune", "why": why(rival)})
    return dropped


def _numbers(measured: Sequence[Measured]) -> str:
    return "; ".join(
        f"{m.candidate.name} lost {m.drop.points:.2f} points"
        + (
            f" at {m.latency_us:.1f} µs ({m.speedup.estimate:.2f} × as fast, lower bound "
            f"{m.speedup.lower:.2f})"
            if m.speedup is not None
            else ""
        )
        for m in measured
    )


def _figures(measured: Sequence[Measured]) -> dict[str, Any]:
    return {"candidates": [m.to_json() for m in measured]}
