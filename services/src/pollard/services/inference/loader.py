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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import structlog

from pollard.bundle.v1 import bundle_pb2
from pollard.runtime.bundle import Bundle
from pollard.runtime.machine import Machine, available_memory_bytes, select_variant
from pollard.runtime.sessions import (
    Array,
    Session,
    TensorInfo,
    check_golden,
    check_signature,
    open_session,
)
from pollard.services.inference.errors import LoadRefused, MemoryShort
from pollard.services.inference.revision import LoadedRevision, RevisionInfo
from pollard.services.inference.tensors import batches, declared, zeros

_log = structlog.get_logger("pollard.inference.loader")

_NICENESS = 10

_MEBIBYTE = 1 << 20

_TIMED_RUNS = 5

_JOINING_GAIN = 1.10
"""Joining requests must make an image at least this much faster to be worth its latency."""


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

    def __init__(self, machine: Machine, options: EngineOptions) -> None:
        """Start the loader's thread.

        Args:
            machine: What this machine can run.
            options: How revisions are run.
        """
        self._machine = machine
        self._options = options
        self._workers, self._threads = options.threads(machine.cores)
        self._executor = ThreadPoolExecutor(
            1, thread_name_prefix="loader", initializer=self._lower_priority
        )

    async def load(
        self, model: str, revision: int, digest: str, size_bytes: int, path: Path
    ) -> LoadedRevision:
        """Load the bundle at `path` and return it ready to run.

        Cancelling the call abandons the load at its next step.

        Args:
            model: Name of the model.
            revision: Number of the revision.
            digest: SHA-256 that the bundle's manifest must have.
            size_bytes: Size of the bundle's files.
            path: The bundle's directory.

        Raises:
            MemoryShort: there is not enough memory beside what runs.
            LoadRefused: the server cannot carry the model's tensors, or it fails on zeros.
            RuntimeFault: the bundle is damaged, needs another machine, does not load, has other
                inputs or outputs than it says, or gives other golden outputs.
        """
        abandoned = threading.Event()
        loop = asyncio.get_running_loop()
        started = time.perf_counter()
        running = loop.run_in_executor(self._executor, self._prepare, path, digest, abandoned)
        try:
            bundle, variant, session, row_seconds = await running
        except asyncio.CancelledError:
            abandoned.set()
            raise
        seconds = time.perf_counter() - started
        inputs, outputs = _signature(session, bundle.manifest)
        info = RevisionInfo(
            model=model,
            revision=revision,
            digest=digest,
            size_bytes=size_bytes,
            variant=variant.name,
            target=variant.target,
            inputs=inputs,
            outputs=outputs,
            max_batch_size=_max_batch(variant),
            load_seconds=seconds,
        )
        joined = self._options.joined_batch or best_joined_batch(variant)
        _log.info(
            "loaded",
            model=model,
            revision=revision,
            variant=variant.name,
            seconds=round(seconds, 3),
            workers=self._workers,
            threads=self._threads,
            joined_batch=joined,
        )
        return LoadedRevision(
            info,
            session,
            workers=self._workers,
            joined_batch=min(joined, info.max_batch_size),
            max_queue=self._options.max_queue,
            inline_rows=int(self._options.inline_seconds / row_seconds),
        )

    def close(self) -> None:
        """Stop the thread; a load under way is abandoned."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _prepare(
        self, path: Path, digest: str, abandoned: threading.Event
    ) -> tuple[Bundle, bundle_pb2.Variant, Session, float]:
        """Do the work of a load on the loader's thread; the last is the time of one row."""
        bundle = Bundle.open(path, verify=False, expect=digest)
        variant = select_variant(bundle.manifest, self._machine)
        for spec in (*bundle.manifest.inputs, *bundle.manifest.outputs):
            declared(spec)
        # Before anything is loaded: running out of memory would take down what runs.
        self._check_memory(bundle, variant)
        _continue(abandoned)
        bundle.verify()
        _continue(abandoned)
        session = open_session(
            bundle.model_path(variant),
            target=variant.target,
            intra_op_threads=self._threads,
            spinning=False,
        )
        check_signature(session, bundle.manifest)
        _continue(abandoned)
        check_golden(session, bundle, variant)
        _continue(abandoned)
        row_seconds = _warm(session, bundle.manifest, _max_batch(variant), abandoned)
        return bundle, variant, session, row_seconds

    def _check_memory(self, bundle: Bundle, variant: bundle_pb2.Variant) -> None:
        needed = variant.requirements.memory_bytes
        if not needed:
            # No figure: the file once as read, once as laid out for the processor.
            needed = 2 * bundle.model_path(variant).stat().st_size + 16 * _MEBIBYTE
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
        # On Linux niceness belongs to the thread. Threads that onnxruntime starts inherit it and
        # could not get it back, so a session with threads of its own is loaded at full priority.
        if self._threads == 1 and hasattr(os, "setpriority"):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)


class _Abandoned(Exception):
    """The load is not wanted any more; nobody waits for this."""


def _continue(abandoned: threading.Event) -> None:
    if abandoned.is_set():
        raise _Abandoned


def _signature(
    session: Session, manifest: bundle_pb2.Manifest
) -> tuple[tuple[TensorInfo, ...], tuple[TensorInfo, ...]]:
    """Return inputs and outputs in the graph's order with the manifest's shapes."""
    inputs = {spec.name: declared(spec) for spec in manifest.inputs}
    outputs = {spec.name: declared(spec) for spec in manifest.outputs}
    return (
        tuple(inputs[info.name] for info in session.inputs),
        tuple(outputs[info.name] for info in session.outputs),
    )


def _max_batch(variant: bundle_pb2.Variant) -> int:
    return max(1, variant.max_batch_size)


def _warm(
    session: Session, manifest: bundle_pb2.Manifest, max_batch: int, abandoned: threading.Event
) -> float:
    """Run batch 1 and the largest, so that no request pays for what only the first run does.

    Returns:
        The time of a batch of 1 in seconds; infinite if it could not be run.
    """
    inputs = [declared(spec) for spec in manifest.inputs]
    sizes = {1, max_batch} if all(batches(info) for info in inputs) else {1}
    for size in sorted(sizes, reverse=True):
        _continue(abandoned)
        feeds = {info.name: zeros(info, size) for info in inputs}
        try:
            session.run(feeds)
        except Exception as error:
            if any(-1 in info.shape[1:] for info in inputs):
                # Zeros with free dimensions of 1 need not be a valid input.
                _log.warning("cannot be warmed", batch=size, error=str(error))
                return math.inf
            first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise LoadRefused(
                f"the model fails on a batch of {size} zeros: {first_line}", batch=size
            ) from error
    if any(-1 in info.shape[1:] for info in inputs):
        # Larger inputs take longer; there is no telling how long.
        return math.inf
    # The best of a few: on a busy machine the others measure something else.
    return min(_seconds(session, feeds) for _ in range(_TIMED_RUNS))


def _seconds(session: Session, feeds: dict[str, Array]) -> float:
    started = time.perf_counter()
    session.run(feeds)
    return max(time.perf_counter() - started, 1e-7)


def best_joined_batch(variant: bundle_pb2.Variant) -> int:
    """Return the batch to which waiting requests should be joined, by the bundle's own figures.

    On a processor a batch often makes an image no faster and the first of its requests slower, so
    without figures that speak for it nothing is joined.
    """
    per_image: dict[int, float] = {}
    for latency in variant.measurement.latencies:
        if latency.intra_op_threads <= 1 and latency.p50_us > 0:
            per_image[max(1, latency.batch_size)] = latency.p50_us / max(1, latency.batch_size)
    single = per_image.get(1)
    if single is None:
        return 1
    paying = [size for size, each in per_image.items() if single / each >= _JOINING_GAIN]
    return min(paying, key=lambda size: per_image[size], default=1)
