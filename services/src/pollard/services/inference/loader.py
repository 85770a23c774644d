"""Loading a revision beside those that run: checks first, then a session that is warm.

Loads run one at a time on a thread of low priority, so that they take the processor time that
requests leave. Between its steps a load looks whether it is still wanted.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import structlog

from pollard.runtime.device_session import DeviceSession
from pollard.runtime.keys import TrustedKeys
from pollard.runtime.machine import Machine, available_memory_bytes
from pollard.runtime.sessions import Array, Session, open_session
from pollard.services.common.call_metrics import Buckets
from pollard.services.inference.description import (
    BundleModel,
    ModelDescription,
    ModelSource,
    Outline,
    best_joined_batch,
)
from pollard.services.inference.devices import check_device_memory, cuda_options, warm_on_device
from pollard.services.inference.errors import LoadRefused, MemoryShort
from pollard.services.inference.idle_tuning import IdleTuner, Subject, lower_priority
from pollard.services.inference.options import (
    EngineOptions,
    Given,
    counts,
    given_by,
    largest_batch,
    running,
    usable,
)
from pollard.services.inference.replicas import Replicas
from pollard.services.inference.revision import LoadedRevision, RevisionInfo
from pollard.services.inference.scheduling import Scheduling
from pollard.services.inference.tensors import batches, zeros
from pollard.services.inference.tuning import Tuning, Tunings, worth_handing_over_seconds

__all__ = ["EngineOptions", "Loader", "best_joined_batch"]

_log = structlog.get_logger("pollard.inference.loader")

_MEBIBYTE = 1 << 20

_TIMED_RUNS = 5

_LOAD_BOUNDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)

_LONG_SECONDS = 0.01
"""A run that takes longer than this is timed once: it is none to be run without a worker."""


@dataclass
class _Prepared:
    """What the loader's thread made of a version."""

    outline: Outline
    description: ModelDescription
    session: Session
    given: Given
    row_seconds: float
    """Time of a run of one row; infinite if unknown."""
    key: str
    """Under what a measurement is kept; empty if it is not measured."""
    tuning: Tuning | None
    """What was measured of it before."""


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
        replicas: Replicas | None = None,
    ) -> None:
        """Start the loader's thread.

        Args:
            machine: What this machine can run.
            options: How revisions are run.
            tunings: What was measured so far; without it nothing is measured.
            busy: Tells from any thread whether requests are being answered; revisions are measured
                while they are not and nothing is loaded.
            trusted: Keys of which one must have signed a bundle; None asks for no signature.
            replicas: Servers that load the same on this machine; None if there are no others.
        """
        self._trusted = trusted
        self._replicas = replicas or Replicas()
        self._machine = machine
        if options.inline_seconds is None:
            worth = worth_handing_over_seconds(machine.cores)
            options = replace(options, inline_seconds=worth)
            _log.info("requests run inline", longest_microseconds=round(worth * 1e6))
        self._options = options
        self._tunings = tunings
        self.outcomes = dict.fromkeys(("loaded", "failed", "abandoned"), 0)
        """Loads that have ended, by how."""
        self.durations = Buckets(_LOAD_BOUNDS)
        """Of the loads that succeeded, in seconds."""
        self._loads = 0
        """Under way or waiting for the loader's thread."""
        self.on_measured: Callable[[], None] = lambda: None
        """Called on the event loop's thread when a revision has been measured, and is run so."""
        self._tuner: IdleTuner | None = None
        if tunings is not None:
            self._tuner = IdleTuner(
                tunings,
                aim=options.optimize,
                cores=machine.cores,
                open_model=self._open,
                check_memory=self._check_memory,
                occupied=lambda: self._loads > 0 or busy(),
            )
        self._executor = ThreadPoolExecutor(
            1, thread_name_prefix="loader", initializer=lower_priority
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

        Cancelling the call abandons the load at its next step. How the version is best run is
        measured later, if it was not before, when the server has nothing else to do.

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
        self._loads += 1
        if self._tuner is not None:
            self._tuner.interrupt()
        try:
            prepared = await loop.run_in_executor(self._executor, self._prepare, source, abandoned)
        except asyncio.CancelledError:
            abandoned.set()
            self.outcomes["abandoned"] += 1
            raise
        except Exception:
            self.outcomes["failed"] += 1
            raise
        finally:
            self._loads -= 1
        outline, description, tuning = prepared.outline, prepared.description, prepared.tuning
        how = running(
            self._options,
            self._machine.cores,
            prepared.given,
            description,
            tuning,
            prepared.row_seconds,
            on_device=outline.on_device,
        )
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
            threads=how.threads,
            tuning=tuning,
            set_by_hand=prepared.given.names,
            labels=description.labels,
            config=description.config,
        )
        self.outcomes["loaded"] += 1
        self.durations.add(info.load_seconds)
        scheduling = description.scheduling
        _log.info(
            "loaded",
            model=info.model,
            revision=info.revision,
            variant=info.variant,
            seconds=round(info.load_seconds, 3),
            workers=how.workers,
            threads=how.threads,
            joined_batch=how.joined_batch,
            measured=tuning is not None,
        )
        loaded = LoadedRevision(
            info,
            prepared.session,
            workers=how.workers,
            joined_batch=how.joined_batch,
            max_queue=scheduling.policy.max_size if scheduling else self._options.max_queue,
            inline_rows=how.inline_rows,
            inline_seconds=how.inline_seconds,
            scheduling=replace(scheduling or Scheduling(), fair=self._options.fair),
        )
        self._replicas.holds(outline.digest, loaded)
        self._measure_later(loaded, source, prepared)
        return loaded

    def close(self) -> None:
        """Stop the thread; a load under way is abandoned."""
        if self._tuner is not None:
            self._tuner.close()
        self._executor.shutdown(wait=False, cancel_futures=True)
        self._opener.shutdown(wait=False, cancel_futures=True)

    def _prepare(self, source: ModelSource, abandoned: threading.Event) -> _Prepared:
        """Do the work of a load on the loader's thread."""
        outline = source.outline(self._machine)
        # Before anything is loaded: running out of memory would take down what runs.
        to_come = self._replicas.still_to_load(outline.digest)
        try:
            self._check_memory(outline, to_come)
        except MemoryShort:
            if self._tuner is None:
                raise
            # A measurement may hold copies of its model; it ends now that something is loaded.
            self._tuner.wait()
            self._check_memory(outline, to_come)
        if outline.on_device:
            check_device_memory(self._options, outline, to_come)
        _continue(abandoned)
        source.verify()
        _continue(abandoned)
        key, tuning = self._measured(outline)
        threads = counts(self._options, self._machine.cores, given_by(self._options, outline))[1]
        session = self._open(outline, tuning.threads if tuning else threads)
        try:
            return self._checked(source, abandoned, outline, session, key, tuning)
        except BaseException:
            session.close()
            raise

    def _checked(
        self,
        source: ModelSource,
        abandoned: threading.Event,
        outline: Outline,
        session: Session,
        key: str,
        tuning: Tuning | None,
    ) -> _Prepared:
        """Check and warm an open model on the loader's thread."""
        description = source.describe(session)
        _continue(abandoned)
        if isinstance(session, DeviceSession):
            # Before the check, which so looks at batches as they are served.
            warm_on_device(session, description, lambda: _continue(abandoned))
            row_seconds = math.inf
            source.check(session)
        else:
            source.check(session)
            _continue(abandoned)
            row_seconds = _warm(session, description, abandoned)
        given = given_by(self._options, outline, description)
        return _Prepared(outline, description, session, given, row_seconds, key, tuning)

    def _measured(self, outline: Outline) -> tuple[str, Tuning | None]:
        """Return under what a measurement of a version is kept, and what was found before."""
        if self._tunings is None or outline.on_device:
            return "", None
        key = self._tunings.key(outline.model_file, outline.digest, self._options.optimize)
        return key, usable(self._tunings.find(key), given_by(self._options, outline))

    def _measure_later(
        self, revision: LoadedRevision, source: ModelSource, prepared: _Prepared
    ) -> None:
        description, tuning = prepared.description, prepared.tuning
        # With batches as large as may be joined now.
        known = tuning is not None and tuning.max_batch >= largest_batch(description)
        if (
            known
            or self._tuner is None
            or not (prepared.key and math.isfinite(prepared.row_seconds))
        ):
            return

        def apply(found: Tuning, session: Session | None) -> Session | None:
            how = running(
                self._options,
                self._machine.cores,
                prepared.given,
                description,
                found,
                prepared.row_seconds,
            )
            unused = revision.tune(found, how, session)
            self.on_measured()
            return unused

        self._tuner.want(
            Subject(
                revision,
                source,
                prepared.outline,
                description,
                prepared.given,
                prepared.key,
                apply,
            )
        )

    def _open(self, outline: Outline, threads: int) -> Session:
        cuda = cuda_options(self._options, outline) if outline.on_device else None

        def opened() -> Session:
            return open_session(
                outline.model_file,
                target=outline.target,
                intra_op_threads=threads,
                spinning=False,
                cuda=cuda,
            )

        if threads == 1 and cuda is None:
            return opened()
        # Threads that onnxruntime starts inherit the loader's low priority, which cannot be raised
        # again.
        return self._opener.submit(opened).result()

    def _check_memory(self, outline: Outline, copies: int = 1) -> None:
        needed = 0 if outline.on_device else outline.needed_bytes
        if not needed:
            # No figure: the file once as read, once as laid out for the processor.
            file = outline.model_file
            size = len(file) if isinstance(file, bytes) else file.stat().st_size
            needed = 2 * size + 16 * _MEBIBYTE
        needed *= copies
        available = available_memory_bytes() - self._options.memory_headroom_bytes
        if needed > available:
            raise MemoryShort(
                f"loading it{f' {copies} times' if copies > 1 else ''} beside what runs takes "
                f"{needed // _MEBIBYTE} MiB and "
                f"{max(0, available) // _MEBIBYTE} MiB are available; free memory on this server "
                "or unload a revision",
                needed_bytes=needed,
                available_bytes=max(0, available),
            )


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
