"""Loading a revision beside those that run: checks first, then a session that is warm.

Loads run one at a time on a thread of low priority, so that they take the processor time that
requests leave. Between its steps a load looks whether it is still wanted.
"""

from __future__ import annotations

import asyncio
import math
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import structlog

from pollard.runtime.keys import TrustedKeys
from pollard.runtime.machine import Machine, available_memory_bytes
from pollard.runtime.sessions import Array, Session, open_session
from pollard.services.inference.description import (
    BundleModel,
    ModelDescription,
    ModelSource,
    Outline,
    best_joined_batch,
)
from pollard.services.inference.errors import LoadRefused, MemoryShort
from pollard.services.inference.revision import LoadedRevision, RevisionInfo
from pollard.services.inference.tensors import batches, zeros
from pollard.services.inference.tuning import Tuning, Tunings, measure

__all__ = ["EngineOptions", "Loader", "best_joined_batch"]

_log = structlog.get_logger("pollard.inference.loader")

_NICENESS = 10

_MEBIBYTE = 1 << 20

_TIMED_RUNS = 5

_LONG_SECONDS = 0.01
"""A run that takes longer than this is timed once: it is none to be run without a worker."""


@dataclass(frozen=True)
class EngineOptions:
    """How revisions are run."""

    optimize: Literal["latency", "throughput"] = "throughput"
    """One caller with all cores, or one caller a core."""
    workers: int = 0
    """Threads that run requests of a revision; 0 chooses by `optimize`."""
    intra_op_threads: int = 0
    """Threads that one run uses; 0 chooses by `optimize`."""
    joined_batch: int = 0
    """Largest batch made of waiting requests; 1 joins none; 0 lets the bundle's figures decide."""
    inline_seconds: float = 100e-6
    """Requests that take no longer than this are run without a worker; 0 runs none so."""
    max_queue: int = 1024
    """Most requests of a revision that wait."""
    memory_headroom_bytes: int = 64 * _MEBIBYTE
    """Memory that must be left after a load."""

    def threads(self, cores: int) -> tuple[int, int]:
        """Return the number of workers and of threads of one run, on so many cores."""
        if self.optimize == "latency":
            return self.workers or 1, self.intra_op_threads or cores
        threads = self.intra_op_threads or 1
        return self.workers or max(1, cores // threads), threads


class Loader:
    """Loads revisions, one at a time."""

    def __init__(
        self,
        machine: Machine,
        options: EngineOptions,
        *,
        tunings: Tunings | None = None,
        busy: Callable[[], bool] = lambda: True,
        trusted: TrustedKeys | None = None,
    ) -> None:
        """Start the loader's thread.

        Args:
            machine: What this machine can run.
            options: How revisions are run.
            tunings: What was measured so far; without it nothing is measured.
            busy: Tells from any thread whether requests are being answered; a model is only
                measured while they are not.
            trusted: Keys of which one must have signed a bundle; None asks for no signature.
        """
        self._trusted = trusted
        self._machine = machine
        self._options = options
        self._tunings = tunings
        self._busy = busy
        self._workers, self._threads = options.threads(machine.cores)
        self._executor = ThreadPoolExecutor(
            1, thread_name_prefix="loader", initializer=self._lower_priority
        )
        # Its thread starts now and here: threads inherit the priority of the one that starts them.
        self._opener = ThreadPoolExecutor(1, thread_name_prefix="opener")
        self._opener.submit(int)

    async def load(
        self, model: str, revision: int, digest: str, size_bytes: int, path: Path
    ) -> LoadedRevision:
        """Load the bundle at `path` and return it ready to run; see `load_source`.

        Args:
            model: Name of the model.
            revision: Number of the revision.
            digest: SHA-256 that the bundle's manifest must have.
            size_bytes: Size of the bundle's files.
            path: The bundle's directory.
        """
        return await self.load_source(
            BundleModel(model, revision, digest, size_bytes, path, self._trusted)
        )

    async def load_source(self, source: ModelSource) -> LoadedRevision:
        """Load one version of a model and return it ready to run.

        Cancelling the call abandons the load at its next step.

        Raises:
            MemoryShort: there is not enough memory beside what runs.
            LoadRefused: the server cannot carry the model's tensors, it fails on zeros, or its
                configuration does not fit it.
            RuntimeFault: its files are damaged, it needs another machine, does not load, has other
                inputs or outputs than it says, or gives other golden outputs.
        """
        abandoned = threading.Event()
        loop = asyncio.get_running_loop()
        started = time.perf_counter()
        running = loop.run_in_executor(self._executor, self._prepare, source, abandoned)
        try:
            outline, description, session, row_seconds, tuning = await running
        except asyncio.CancelledError:
            abandoned.set()
            raise
        info = RevisionInfo(
            model=outline.model,
            revision=outline.version,
            digest=outline.digest,
            size_bytes=outline.size_bytes,
            variant=outline.variant,
            target=outline.target,
            inputs=description.inputs,
            outputs=description.outputs,
            max_batch_size=description.max_batch_size,
            load_seconds=time.perf_counter() - started,
            labels=description.labels,
            config=description.config,
        )
        joined = self._options.joined_batch or description.joined_batch or 1
        workers, threads = self._workers, self._threads
        if tuning is not None:
            threads = tuning.threads
            workers = self._options.workers or tuning.workers
            if not self._options.joined_batch and description.config is None:
                joined = tuning.joined_batch
        workers = outline.workers or workers
        scheduling = description.scheduling
        inline_rows = int(self._options.inline_seconds / row_seconds)
        if scheduling is not None and (scheduling.delay_seconds or not scheduling.plain):
            # What is run where it is neither waits for others nor lets others go first.
            inline_rows = 0
        _log.info(
            "loaded",
            model=info.model,
            revision=info.revision,
            variant=info.variant,
            seconds=round(info.load_seconds, 3),
            workers=workers,
            threads=threads,
            joined_batch=joined,
            measured=tuning is not None,
        )
        return LoadedRevision(
            info,
            session,
            workers=workers,
            joined_batch=min(joined, max(1, info.max_batch_size)),
            max_queue=scheduling.policy.max_size if scheduling else self._options.max_queue,
            inline_rows=inline_rows,
            scheduling=scheduling,
        )

    def close(self) -> None:
        """Stop the thread; a load under way is abandoned."""
        self._executor.shutdown(wait=False, cancel_futures=True)
        self._opener.shutdown(wait=False, cancel_futures=True)

    def _prepare(
        self, source: ModelSource, abandoned: threading.Event
    ) -> tuple[Outline, ModelDescription, Session, float, Tuning | None]:
        """Do the work of a load on the loader's thread; the fourth is the time of one row."""
        outline = source.outline(self._machine)
        # Before anything is loaded: running out of memory would take down what runs.
        self._check_memory(outline)
        _continue(abandoned)
        source.verify()
        _continue(abandoned)
        tuning = self._find(outline)
        session = self._open(outline, tuning.threads if tuning else self._threads)
        description = source.describe(session)
        _continue(abandoned)
        source.check(session)
        _continue(abandoned)
        row_seconds = _warm(session, description, abandoned)
        if tuning is None and self._tunings is not None and math.isfinite(row_seconds):
            tuning = self._measure(outline, description, abandoned)
            _continue(abandoned)
            if tuning is not None and tuning.threads != self._threads:
                session = self._open(outline, tuning.threads)
                source.check(session)
                row_seconds = _warm(session, description, abandoned)
        return outline, description, session, row_seconds, tuning

    def _find(self, outline: Outline) -> Tuning | None:
        if self._tunings is None or not outline.target.startswith("cpu"):
            return None
        found = self._tunings.find(outline.model_file, outline.digest, self._options.optimize)
        settled = self._options.intra_op_threads
        # A measurement with another number of threads than is asked for says nothing.
        return None if found and settled and found.threads != settled else found

    def _measure(
        self, outline: Outline, description: ModelDescription, abandoned: threading.Event
    ) -> Tuning | None:
        if self._tunings is None or not outline.target.startswith("cpu"):
            return None
        inputs = description.inputs
        batching = description.max_batch_size > 0 and all(
            batches(info) for info in (*inputs, *description.outputs)
        )
        tuning = measure(
            lambda threads: self._open(outline, threads),
            lambda rows: {info.name: zeros(info, rows) for info in inputs},
            aim=self._options.optimize,
            cores=self._machine.cores,
            max_batch=description.max_batch_size if batching else 1,
            threads=self._options.intra_op_threads,
            stop=lambda: abandoned.is_set() or self._busy(),
        )
        if tuning is not None:
            self._tunings.keep(outline.model_file, outline.digest, self._options.optimize, tuning)
        return tuning

    def _open(self, outline: Outline, threads: int) -> Session:
        def opened() -> Session:
            return open_session(
                outline.model_file, target=outline.target, intra_op_threads=threads, spinning=False
            )

        if threads == 1:
            return opened()
        # Threads that onnxruntime starts inherit the loader's low priority, which cannot be raised
        # again.
        return self._opener.submit(opened).result()

    def _check_memory(self, outline: Outline) -> None:
        needed = outline.needed_bytes
        if not needed:
            # No figure: the file once as read, once as laid out for the processor.
            file = outline.model_file
            size = len(file) if isinstance(file, bytes) else file.stat().st_size
            needed = 2 * size + 16 * _MEBIBYTE
        available = available_memory_bytes() - self._options.memory_headroom_bytes
        if needed > available:
            raise MemoryShort(
                f"loading it beside what runs takes {needed // _MEBIBYTE} MiB and "
                f"{max(0, available) // _MEBIBYTE} MiB are available; free memory on this server "
                "or unload a revision",
                needed_bytes=needed,
                available_bytes=max(0, available),
            )

    def _lower_priority(self) -> None:
        # On Linux niceness belongs to the thread.
        if hasattr(os, "setpriority"):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)


class _Abandoned(Exception):
    """The load is not wanted any more; nobody waits for this."""


def _continue(abandoned: threading.Event) -> None:
    if abandoned.is_set():
        raise _Abandoned


def _warm(session: Session, description: ModelDescription, abandoned: threading.Event) -> float:
    """Run batch 1 and the largest, so that no request pays for what only the first run does.

    Returns:
        The time of a batch of 1 in seconds; infinite if it could not be run.
    """
    inputs = description.inputs
    batching = description.max_batch_size > 0 and all(batches(info) for info in inputs)
    for warmup in description.warmups:
        _continue(abandoned)
        try:
            session.run(warmup)
        except Exception as error:
            raise LoadRefused(f"the model fails on its warm-up: {_first_line(error)}") from error
    sizes = {1, description.max_batch_size} if batching else {1}
    for size in sorted(sizes, reverse=True):
        _continue(abandoned)
        feeds = {info.name: zeros(info, size) for info in inputs}
        try:
            session.run(feeds)
        except Exception as error:
            if _free(description):
                # Zeros with free dimensions of 1 need not be a valid input.
                _log.warning("cannot be warmed", batch=size, error=str(error))
                return math.inf
            raise LoadRefused(
                f"the model fails on a batch of {size} zeros: {_first_line(error)}", batch=size
            ) from error
    if _free(description):
        # Larger inputs take longer; there is no telling how long.
        return math.inf
    # The best of a few: on a busy machine the others measure something else.
    best = math.inf
    for _ in range(_TIMED_RUNS):
        _continue(abandoned)
        best = min(best, _seconds(session, feeds))
        if best > _LONG_SECONDS:
            break
    return best


def _seconds(session: Session, feeds: dict[str, Array]) -> float:
    started = time.perf_counter()
    session.run(feeds)
    return max(time.perf_counter() - started, 1e-7)


def _free(description: ModelDescription) -> bool:
    """Tell whether requests choose more than the batch: zeros of size 1 then need not be valid."""
    first = 1 if description.max_batch_size else 0
    return any(-1 in info.shape[first:] for info in description.inputs)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
