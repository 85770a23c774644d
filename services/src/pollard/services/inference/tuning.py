"""Measuring how a model is best run on this machine: threads, workers, and whether joining pays.

What is found is kept by the model's digest, the processor and ONNX Runtime's version, so each model
is measured once on a kind of machine. The measurement takes all cores for a moment; it gives up as
soon as there are requests to answer, for which it must not be in the way, and which would falsify
it.
"""

from __future__ import annotations

import json
import statistics
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import structlog

from pollard.runtime.bundle import write_durably
from pollard.runtime.digests import sha256_bytes, sha256_file
from pollard.runtime.machine import Machine
from pollard.runtime.sessions import Array, Session

_log = structlog.get_logger("pollard.inference.tuning")

_ROUNDS = 3
"""The candidates take turns, so that what else the machine does hits all of them."""

_SLICE_SECONDS = 0.01

_JOINING_GAIN = 1.05
"""Joining must make a row at least this much faster. It costs little: only what waits is joined."""

_THREADS_GAIN = 1.15
"""More threads must be at least this much better than one: they suffer more from a busy machine."""

_BATCHES = (1, 4, 8, 16, 32, 64)

_LONGEST_BATCH_SECONDS = 0.02
"""A joined batch keeps the first of its requests waiting no longer than this."""

_KEPT = 256

Aim = Literal["latency", "throughput"]


@dataclass(frozen=True)
class Tuning:
    """How a model is best run."""

    threads: int
    """Threads of one run."""
    workers: int
    """Runs at a time."""
    joined_batch: int
    """Largest batch made of several requests; 1 joins none."""
    row_seconds: float
    """Time of a row alone, with one caller."""


class Tunings:
    """What was found so far, in one file."""

    def __init__(self, machine: Machine, path: Path | None = None) -> None:
        """Read the file; without a path everything is forgotten at the end."""
        self._machine = machine
        self._path = path
        self._known: dict[str, Tuning] = {}
        if path is not None:
            self._known = _read(path)

    def find(self, model: Path | bytes, digest: str, aim: Aim) -> Tuning | None:
        """Return how a model is best run, if that was measured on such a machine."""
        return self._known.get(self._key(model, digest, aim))

    def keep(self, model: Path | bytes, digest: str, aim: Aim, tuning: Tuning) -> None:
        """Remember a measurement."""
        key = self._key(model, digest, aim)
        self._known.pop(key, None)
        self._known[key] = tuning
        for oldest in list(self._known)[:-_KEPT]:
            del self._known[oldest]
        if self._path is None:
            return
        content = {key: asdict(tuning) for key, tuning in self._known.items()}
        try:
            write_durably(self._path, json.dumps(content, indent=1).encode("utf-8"))
        except OSError as error:
            # It will be measured again after a restart; that is no reason to refuse a model.
            _log.warning("measurements cannot be kept", path=str(self._path), error=str(error))

    def _key(self, model: Path | bytes, digest: str, aim: Aim) -> str:
        if not digest:
            digest = sha256_bytes(model) if isinstance(model, bytes) else sha256_file(model)
        machine = self._machine
        return " ".join((digest, machine.processor, str(machine.cores), machine.onnxruntime, aim))


def measure(
    open_with: Callable[[int], Session],
    feeds_of: Callable[[int], Mapping[str, Array]],
    *,
    aim: Aim,
    cores: int,
    max_batch: int,
    threads: int = 0,
    stop: Callable[[], bool],
) -> Tuning | None:
    """Measure how a model is best run.

    Args:
        open_with: Opens it with so many threads of a run.
        feeds_of: Returns inputs of so many rows.
        aim: What is best: a row answered soonest, or the most rows in a second.
        cores: Cores of this machine.
        max_batch: Largest batch; 1 if the model does not batch.
        threads: Threads of a run, if that is settled; 0 measures.
        stop: Tells that there is something better to do.

    Returns:
        None if it was told to stop.
    """
    candidates = [threads] if threads else sorted({1, cores})
    sessions = {count: open_with(count) for count in candidates}
    single = feeds_of(1)
    for session in sessions.values():
        session.run(single)
    callers = {count: 1 if aim == "latency" else max(1, cores // count) for count in candidates}
    rates = _take_turns(
        {count: _rate_of(sessions[count], single, callers[count]) for count in candidates}, stop
    )
    if rates is None:
        return None
    best = min(candidates)
    for count in candidates:
        if rates[count] > _THREADS_GAIN * rates[best]:
            best = count
    alone = _take_turns({1: _rate_of(sessions[best], single, 1)}, stop)
    if alone is None:
        return None
    row_seconds = 1 / alone[1]
    sizes = [
        size
        for size in _BATCHES
        if size <= max_batch and size * row_seconds <= _LONGEST_BATCH_SECONDS
    ]
    joined = 1
    if len(sizes) > 1:
        by_size = _take_turns(
            {size: _rate_of(sessions[best], feeds_of(size), 1, size) for size in sizes}, stop
        )
        if by_size is None:
            return None
        fastest = max(sizes, key=lambda size: by_size[size])
        if by_size[fastest] > _JOINING_GAIN * by_size[1]:
            joined = fastest
    return Tuning(best, max(1, cores // best), joined, row_seconds)


def _take_turns(
    candidates: Mapping[int, Callable[[], float]], stop: Callable[[], bool]
) -> dict[int, float] | None:
    """Return the median of each candidate's rates; None if told to stop."""
    rates: dict[int, list[float]] = {key: [] for key in candidates}
    for _ in range(_ROUNDS):
        for key, rate in candidates.items():
            if stop():
                return None
            rates[key].append(rate())
    return None if stop() else {key: statistics.median(found) for key, found in rates.items()}


def _rate_of(
    session: Session, feeds: Mapping[str, Array], callers: int, rows: int = 1
) -> Callable[[], float]:
    """Return a function that runs a slice and returns its rows per second."""

    def rate() -> float:
        counts = [0] * callers
        started = time.perf_counter()
        until = started + _SLICE_SECONDS

        def call(number: int) -> None:
            while True:
                session.run(feeds)
                counts[number] += 1
                if time.perf_counter() >= until:
                    return

        others = [
            threading.Thread(target=call, args=(number,), daemon=True)
            for number in range(1, callers)
        ]
        for other in others:
            other.start()
        call(0)
        for other in others:
            other.join()
        return rows * sum(counts) / (time.perf_counter() - started)

    return rate


def _read(path: Path) -> dict[str, Tuning]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {
            str(key): Tuning(
                threads=max(1, int(value["threads"])),
                workers=max(1, int(value["workers"])),
                joined_batch=max(1, int(value["joined_batch"])),
                row_seconds=max(1e-7, float(value["row_seconds"])),
            )
            for key, value in content.items()
        }
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        _log.warning("measurements cannot be read", path=str(path), error=str(error))
        return {}
