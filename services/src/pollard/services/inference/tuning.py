"""Measuring how a model is best run on this machine: threads, workers, and whether joining pays.

What is found is kept by the model's digest, the processor and ONNX Runtime's version, so each model
is measured once on a kind of machine. The measurement takes all cores for a moment; it gives up as
soon as there are requests to answer, for which it must not be in the way, and which would falsify
it.
"""

from __future__ import annotations

import json
import queue
import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import structlog

from pollard.runtime.digests import sha256_bytes, sha256_file
from pollard.runtime.machine import Machine
from pollard.runtime.sessions import Array, Session
from pollard.services.common import sealed
from pollard.services.common.sealed import FileDamaged

_log = structlog.get_logger("pollard.inference.tuning")

K = TypeVar("K")

Aim = Literal["latency", "throughput"]

_ROUNDS = 3
"""The candidates take turns, so that what else the machine does hits all of them."""

_SLICE_SECONDS = 0.01

_JOINING_GAIN = 1.05
"""Joining must make a row at least this much faster. It costs little: only what waits is joined."""

_THREADS_GAIN = 1.15
"""More threads must be at least this much better than one: they suffer more from a busy machine."""

_BATCHES = (1, 2, 4, 8, 16, 32, 64)

_NEARLY = 0.99
"""Of the batches that come so near to the fastest one, the smallest is taken: its first request
waits less."""

_LONGEST_BATCH_SECONDS: Mapping[Aim, float] = {"latency": 0.02, "throughput": 0.2}
"""A joined batch keeps its first request waiting no longer than about this. Only requests are
joined that wait anyway, so the last of them is answered sooner than one by one."""

_KEPT = 256

_HAND_OVERS = 18
"""Processor time that it takes to hand over a request and have another thread send the answer, in
round trips between two threads that do nothing else: they also wake each other for the interpreter
and the connection, and fewer requests run as one batch."""

_HAND_OVERS_FEW_CORES = 3 * _HAND_OVERS
"""On one or two cores clients, and the reading of requests, take what the other thread would run
on: there a run must take longer to be worth it."""

_LONGEST_INLINE_SECONDS = 500e-6
"""Meanwhile nothing else is read or sent, for whatever model."""

_HANDED_OVER = (5, 40)
"""How often something is handed over to find out how long that takes, in groups of so many: a few
milliseconds in all."""


@dataclass(frozen=True)
class Point:
    """One way to run a model, and how fast that was."""

    threads: int
    """Threads of a run."""
    callers: int
    """Runs at a time."""
    rows: int
    """Rows of a run."""
    rows_per_second: float
    """By all callers together."""

    @property
    def run_seconds(self) -> float:
        """Mean time of a run."""
        return self.callers * self.rows / self.rows_per_second


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
    max_batch: int = 1
    """Largest batch that was allowed when it was measured."""
    aim: Aim = "throughput"
    """What was looked for."""
    processor: str = ""
    """Where it was measured, as the operating system names it."""
    cores: int = 0
    """Cores that could be used there."""
    onnxruntime: str = ""
    """Version that it was measured with."""
    measured_at: float = 0.0
    """When, in seconds since 1970; 0 if unknown."""
    points: tuple[Point, ...] = ()
    """What was measured."""


class Tunings:
    """What was found so far, in one file."""

    def __init__(self, machine: Machine, path: Path | None = None) -> None:
        """Read the file; without a path everything is forgotten at the end."""
        self._machine = machine
        self._path = path
        self._known: dict[str, Tuning] = {}
        # Loads look things up while another thread measures.
        self._lock = threading.Lock()
        if path is not None:
            self._known = _read(path)

    def key(self, model: Path | bytes, digest: str, aim: Aim) -> str:
        """Return under what a model's measurement is kept.

        Args:
            model: Its file, or the bytes of it; read if there is no digest.
            digest: What names its contents; may be empty.
            aim: What is looked for.
        """
        if not digest:
            digest = sha256_bytes(model) if isinstance(model, bytes) else sha256_file(model)
        machine = self._machine
        return " ".join((digest, machine.processor, str(machine.cores), machine.onnxruntime, aim))

    def find(self, key: str) -> Tuning | None:
        """Return how a model is best run, if that was measured on such a machine."""
        with self._lock:
            return self._known.get(key)

    def keep(self, key: str, tuning: Tuning) -> Tuning:
        """Remember a measurement of now, on this machine; return it with that noted."""
        machine = self._machine
        tuning = replace(
            tuning,
            processor=machine.processor,
            cores=machine.cores,
            onnxruntime=machine.onnxruntime,
            measured_at=round(time.time(), 3),
        )
        with self._lock:
            self._known.pop(key, None)
            self._known[key] = tuning
            for oldest in list(self._known)[:-_KEPT]:
                del self._known[oldest]
            content = {key: asdict(tuning) for key, tuning in self._known.items()}
        if self._path is None:
            return tuning
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            sealed.write_json(self._path, json.dumps(content, indent=1))
        except OSError as error:
            # It will be measured again after a restart; that is no reason to refuse a model.
            _log.warning("measurements cannot be kept", path=str(self._path), error=str(error))
        return tuning


def measure(
    open_with: Callable[[int], Session],
    feeds_of: Callable[[int], Mapping[str, Array]],
    *,
    aim: Aim,
    cores: int,
    max_batch: int,
    threads: int = 0,
    workers: int = 0,
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
        workers: Runs at a time, if that is settled; 0 gives each run its cores.
        stop: Tells that there is something better to do; asked between runs.

    Returns:
        None if it was told to stop.
    """
    candidates = [threads] if threads else sorted({1, cores})
    sessions: dict[int, Session] = {}
    single = feeds_of(1)
    for count in candidates:
        if stop():
            return None
        sessions[count] = open_with(count)
        sessions[count].run(single)
    points: list[Point] = []

    def rates_of(
        candidates: Sequence[tuple[int, int, int]],
    ) -> dict[tuple[int, int, int], float] | None:
        """Measure combinations of threads, callers and rows."""
        rates = _take_turns(
            {each: _rate_of(sessions[each[0]], feeds_of(each[2]), *each) for each in candidates},
            stop,
        )
        points.extend(Point(*each, rate) for each, rate in (rates or {}).items())
        return rates

    at_a_time = {count: workers or max(1, cores // count) for count in candidates}
    callers = dict.fromkeys(candidates, 1) if aim == "latency" else at_a_time
    rates = rates_of([(count, callers[count], 1) for count in candidates])
    if rates is None:
        return None
    best = min(candidates)
    for count in candidates:
        if rates[count, callers[count], 1] > _THREADS_GAIN * rates[best, callers[best], 1]:
            best = count
    if callers[best] > 1:
        rates = rates_of([(best, 1, 1)])
        if rates is None:
            return None
    row_seconds = 1 / rates[best, 1, 1]
    joined = 1
    longest = _LONGEST_BATCH_SECONDS[aim]
    sizes = [size for size in _BATCHES if size <= max_batch and size * row_seconds <= longest]
    if len(sizes) > 1:
        # With as many callers as there will be workers: they share caches and memory.
        rates = rates_of([(best, callers[best], size) for size in sizes])
        if rates is None:
            return None
        by_size = {size: rates[best, callers[best], size] for size in sizes}
        enough = max(_JOINING_GAIN * by_size[1], _NEARLY * max(by_size.values()))
        joined = next((size for size in sizes if by_size[size] >= enough), 1)
    # One row with as many callers was measured twice; the later one stands.
    found = {(point.threads, point.callers, point.rows): point for point in points}
    return Tuning(
        best, at_a_time[best], joined, row_seconds, max_batch, aim, points=tuple(found.values())
    )


def hand_over_seconds() -> float:
    """Measure the processor time of having another thread do nothing, and hearing of it."""
    there: queue.SimpleQueue[object] = queue.SimpleQueue()
    back: queue.SimpleQueue[object] = queue.SimpleQueue()

    def serve() -> None:
        while there.get() is not None:
            back.put(0)

    threading.Thread(target=serve, daemon=True).start()
    groups, times = _HANDED_OVER
    least = float("inf")
    for _ in range(groups):
        started = time.process_time()
        for _ in range(times):
            there.put(0)
            back.get()
        least = min(least, (time.process_time() - started) / times)
    there.put(None)
    return least


def worth_handing_over_seconds(cores: int) -> float:
    """Return from how long on a run is worth being handed to another thread, on this machine.

    Shorter ones are run by whoever has read the request.
    """
    times = _HAND_OVERS if cores > 2 else _HAND_OVERS_FEW_CORES
    return min(_LONGEST_INLINE_SECONDS, times * hand_over_seconds())


def _take_turns(
    candidates: Mapping[K, Callable[[], float]], stop: Callable[[], bool]
) -> dict[K, float] | None:
    """Return the median of each candidate's rates; None if told to stop."""
    rates: dict[K, list[float]] = {key: [] for key in candidates}
    for _ in range(_ROUNDS):
        for key, rate in candidates.items():
            if stop():
                return None
            rates[key].append(rate())
    return None if stop() else {key: statistics.median(found) for key, found in rates.items()}


def _rate_of(
    session: Session, feeds: Mapping[str, Array], threads: int, callers: int, rows: int
) -> Callable[[], float]:
    """Return a function that runs a slice and returns its rows per second.

    A run of one thread is timed by its processor time, so that other programs on the machine do not
    count.
    """
    clock = time.perf_counter if threads > 1 else time.thread_time

    def rate() -> float:
        rates = [0.0] * callers
        until = time.perf_counter() + _SLICE_SECONDS

        def call(number: int) -> None:
            count, started = 0, clock()
            while True:
                session.run(feeds)
                count += 1
                if time.perf_counter() >= until:
                    break
            rates[number] = rows * count / max(clock() - started, 1e-9)

        others = [
            threading.Thread(target=call, args=(number,), daemon=True)
            for number in range(1, callers)
        ]
        for other in others:
            other.start()
        call(0)
        for other in others:
            other.join()
        return sum(rates)

    return rate


def _read(path: Path) -> dict[str, Tuning]:
    try:
        return {key: _parsed(value) for key, value in sealed.read_json(path).items()}
    except FileNotFoundError:
        return {}
    except (FileDamaged, ValueError, KeyError, TypeError, AttributeError) as error:
        _log.warning(
            "measurements cannot be read; models are measured again",
            path=str(path),
            error=str(error),
        )
        return {}


def _parsed(value: Mapping[str, Any]) -> Tuning:
    known = {each.name for each in fields(Tuning)}
    given = {name: each for name, each in value.items() if name in known}
    given["points"] = tuple(Point(**point) for point in value.get("points", ()))
    tuning = Tuning(**given)
    return replace(
        tuning,
        threads=max(1, int(tuning.threads)),
        workers=max(1, int(tuning.workers)),
        joined_batch=max(1, int(tuning.joined_batch)),
        row_seconds=max(1e-7, float(tuning.row_seconds)),
        max_batch=max(1, int(tuning.max_batch)),
        measured_at=float(tuning.measured_at),
    )
