"""How a revision is run: by what was set, by what was measured, or by default, in this order."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from pollard.runtime.cuda import CudaOptions
from pollard.services.inference.description import ModelDescription, Outline
from pollard.services.inference.tensors import batches
from pollard.services.inference.tuning import Tuning

_MEBIBYTE = 1 << 20

_DEVICE_WORKERS = 2
"""On a GPU: one copies while the other computes; four gave hardly more than two on an H200."""


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
    """Largest batch made of waiting requests; 1 joins none; 0 lets figures decide."""
    inline_seconds: float | None = None
    """Requests that take no longer than this are run without a worker; 0 runs none so; None
    measures from how long on it is worth to hand them over."""
    max_queue: int = 1024
    """Most requests of a revision that wait."""
    fair: bool = False
    """Whether callers take turns where requests wait."""
    memory_headroom_bytes: int = 64 * _MEBIBYTE
    """Memory that must be left after a load."""
    cuda: CudaOptions = field(default_factory=CudaOptions)
    """How revisions are run on a GPU; `instances` is set for each revision."""
    device_headroom_bytes: int = 256 * _MEBIBYTE
    """Memory of the GPU that must be left after a load."""

    def threads(self, cores: int) -> tuple[int, int]:
        """Return the number of workers and of threads of one run, on so many cores."""
        if self.optimize == "latency":
            return self.workers or 1, self.intra_op_threads or cores
        threads = self.intra_op_threads or 1
        return self.workers or max(1, cores // threads), threads


@dataclass(frozen=True)
class Given:
    """What was set by hand for a revision, by its configuration or for the whole server."""

    workers: int = 0
    """0 if it was not."""
    threads: int = 0
    """0 if it was not."""
    joined_batch: int = 0
    """0 if it was not."""

    @property
    def names(self) -> tuple[str, ...]:
        """What was set."""
        return tuple(name for name, value in vars(self).items() if value)


@dataclass(frozen=True)
class Running:
    """How a revision is run."""

    workers: int
    """Threads that run requests."""
    threads: int
    """Threads that one run uses."""
    joined_batch: int
    """Largest batch made of several requests; 1 joins none."""
    inline_rows: int
    """Requests of up to so many rows are run without a worker."""
    inline_seconds: float = 0.0
    """As long as each of them may take."""


def given_by(
    options: EngineOptions, outline: Outline, description: ModelDescription | None = None
) -> Given:
    """Return what was set by hand; a model's own configuration goes before the server's.

    Args:
        options: Of the server.
        outline: Of the revision.
        description: Of the revision; without it nothing is known of joining.
    """
    joined = options.joined_batch
    if description is not None and description.joining_settled:
        joined = joined or description.joined_batch or 1
    return Given(
        workers=outline.workers or options.workers,
        threads=outline.threads or options.intra_op_threads,
        joined_batch=joined,
    )


def usable(tuning: Tuning | None, given: Given) -> Tuning | None:
    """Return a measurement if it says something of a revision for which that was set by hand.

    How many threads are best depends on how many runs there are at a time, and the other way round.
    """
    if tuning is None or given.threads not in (0, tuning.threads):
        return None
    return tuning if given.workers in (0, tuning.workers) else None


def running(
    options: EngineOptions,
    cores: int,
    given: Given,
    description: ModelDescription,
    tuning: Tuning | None,
    row_seconds: float,
    *,
    on_device: bool = False,
) -> Running:
    """Decide how a revision is run.

    Args:
        options: Of the server; nothing in them is left to be measured.
        cores: Of this machine.
        given: What was set by hand.
        description: Of the revision.
        tuning: What was measured of it; None if nothing was.
        row_seconds: Time of a run of one row, if it was not measured; infinite if unknown.
        on_device: Whether it runs on a GPU, of which nothing is measured.
    """
    if on_device:
        return Running(
            device_workers(given),
            1,
            # Larger batches are where a GPU is fast; they form from what waits.
            min(given.joined_batch or largest_batch(description), largest_batch(description)),
            0,
        )
    workers, threads = counts(options, cores, given)
    joined = given.joined_batch or description.joined_batch or 1
    if tuning is not None:
        threads = tuning.threads
        workers = given.workers or tuning.workers
        joined = given.joined_batch or tuning.joined_batch
        row_seconds = tuning.row_seconds
    inline_rows = int((options.inline_seconds or 0.0) / row_seconds)
    scheduling = description.scheduling
    if scheduling is not None and (scheduling.delay_seconds or not scheduling.plain):
        # What is run where it is neither waits for others nor lets others go first.
        inline_rows = 0
    return Running(
        workers,
        threads,
        min(joined, largest_batch(description)),
        inline_rows,
        options.inline_seconds or 0.0,
    )


def device_workers(given: Given) -> int:
    """Return the workers, and so the instances, of a revision on a GPU."""
    return given.workers or _DEVICE_WORKERS


def counts(options: EngineOptions, cores: int, given: Given) -> tuple[int, int]:
    """Return the workers and the threads of a run, as far as nothing was measured."""
    chosen = EngineOptions(
        optimize=options.optimize, workers=given.workers, intra_op_threads=given.threads
    )
    return chosen.threads(cores)


def largest_batch(description: ModelDescription) -> int:
    """Return the largest batch that requests could be joined to; 1 if they cannot be."""
    tensors = (*description.inputs, *description.outputs)
    if description.max_batch_size > 0 and all(batches(info) for info in tensors):
        return description.max_batch_size
    return 1
