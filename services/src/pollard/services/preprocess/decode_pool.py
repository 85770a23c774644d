"""Decode workers: processes that may hang or crash without harm.

Images come from strangers and are decoded by C code, so that happens in child
processes with limits. A worker that takes too long is killed, one that ends is
replaced, and an image whose worker ended is tried once more.

When every worker has an image in hand, a small one is given to a worker whose
image is small too, so that it finds its next one waiting. Should the first take
long, or hang, the second goes back to the head of the queue, and whichever worker
answers for it first has answered.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import numpy as np
import structlog
from numpy.typing import NDArray

from pollard.runtime import errors as runtime_errors
from pollard.runtime.transforms import Geometry, Transformed
from pollard.services.common.call_metrics import Buckets
from pollard.services.common.errors import StartupError
from pollard.services.common.lifecycle import spawn
from pollard.services.common.telemetry.traces import current_span
from pollard.services.preprocess.errors import (
    DecoderCrashed,
    DecodersBusy,
    DecodeTimeout,
    WorkerLost,
)
from pollard.services.preprocess.worker import WorkerLimits
from pollard.services.preprocess.worker_process import Job, WorkerProcess

_log = structlog.get_logger("pollard.preprocess.decode")

OUTCOMES = ("decoded", "refused", "timeout", "crashed", "busy", "canceled")

_START_SECONDS = 30.0
_ATTEMPTS = 2

_AHEAD = 2
"""Images that a worker has at most: one in hand and the next."""

_SMALL_BYTES = 192 * 1024
"""Largest image that is given ahead: it waits in a socket, which holds little more, and behind
one that is about as soon done."""

_MALFORMED = (
    *(KeyError, TypeError, ValueError, AttributeError),
    *(OverflowError, RecursionError),
)
"""What reading the answer of a decoder that was taken over may raise."""

_MAX_MESSAGES = 10_000
"""Most lines of one image's decoder that are believed."""

_KINDS: tuple[type[runtime_errors.RuntimeFault], ...] = (
    runtime_errors.ImageInvalid,
    *runtime_errors.ImageInvalid.__subclasses__(),
    runtime_errors.StepsInvalid,
    runtime_errors.TensorInvalid,
)
_FAULTS = {kind.reason: kind for kind in _KINDS}


class DecodePool:
    """A fixed number of decode workers. Belongs to the event loop's thread."""

    def __init__(
        self,
        workers: int = 0,
        limits: WorkerLimits | None = None,
        max_waiting_bytes: int = 512 * 1024**2,
    ) -> None:
        """Prepare the pool; `start` starts it.

        Args:
            workers: Number of processes; 0 means one for each usable core.
            limits: What each image may use.
            max_waiting_bytes: Largest sum of the sizes of the images that wait
                for a worker, in bytes.
        """
        self.workers = workers or len(os.sched_getaffinity(0))
        self.limits = limits or WorkerLimits()
        self._max_waiting_bytes = max_waiting_bytes
        self._waiting_bytes = 0
        self._waiting = 0
        self.outcomes = dict.fromkeys(OUTCOMES, 0)
        """Images that were given to the pool, by what became of them."""
        self.replaced = 0
        """Workers that ended or were killed, and were replaced."""
        self.messages = 0
        """Lines that decoders' libraries would have printed."""
        self.durations = Buckets()
        """Time to decode and transform an image, without waiting, in seconds."""
        self._starting: set[WorkerProcess] = set()
        self._alive: set[WorkerProcess] = set()
        # Last in, first out: with little to do, few workers stay warm in the caches.
        self._idle: list[WorkerProcess] = []
        self._queue: OrderedDict[Job, None] = OrderedDict()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._closing = False

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers that are alive."""
        return [worker.process.pid for worker in self._alive]

    @property
    def places(self) -> int:
        """Number of images that keep every worker busy."""
        return _AHEAD * self.workers

    @property
    def in_work(self) -> int:
        """Number of images that workers have in hand."""
        return sum(worker.jobs > 0 for worker in self._alive)

    @property
    def waiting(self) -> int:
        """Number of images that wait for a worker."""
        return self._waiting

    @property
    def waiting_bytes(self) -> int:
        """Size of the images that wait for a worker."""
        return self._waiting_bytes

    @property
    def has_idle_worker(self) -> bool:
        """Whether a worker has nothing to do."""
        return bool(self._idle)

    async def start(self) -> None:
        """Start every worker and wait until they are ready.

        Raises:
            StartupError: a worker could not be started.
        """
        try:
            await asyncio.gather(*(self._start_worker() for _ in range(self.workers)))
        except (OSError, TimeoutError, WorkerLost) as error:
            await self.close()
            raise StartupError(f"a decode worker could not be started: {error!r}") from error

    async def close(self) -> None:
        """Kill the workers. Images in work or waiting fail with DecoderCrashed."""
        self._closing = True
        workers = [*self._starting, *self._alive]
        for worker in workers:
            worker.kill()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(worker.reap() for worker in workers))
        for job in list(self._queue):
            _fail(job, _stopped())
        self._queue.clear()
        self._idle.clear()
        self._alive.clear()

    async def transform(self, steps: bytes, content: bytes) -> Transformed:
        """Decode and transform one image in a worker.

        A caller that is cancelled while it waits costs nothing; one that is
        cancelled later leaves the worker to finish, or to be killed in time.

        Args:
            steps: A serialised Manifest that holds the steps and nothing else.
            content: The encoded image.

        Raises:
            ImageInvalid: what `Pipeline.apply` says of the image.
            DecodeTimeout: it took too long.
            DecoderCrashed: the worker ended while it worked on it, twice.
            DecodersBusy: too many images wait already.
        """
        try:
            transformed = await self._transform(steps, content)
        except runtime_errors.RuntimeFault:
            self.outcomes["refused"] += 1
            raise
        except DecodeTimeout:
            self.outcomes["timeout"] += 1
            raise
        except DecoderCrashed:
            self.outcomes["crashed"] += 1
            raise
        except DecodersBusy:
            self.outcomes["busy"] += 1
            raise
        except asyncio.CancelledError:
            self.outcomes["canceled"] += 1
            raise
        self.outcomes["decoded"] += 1
        return transformed

    async def _transform(self, steps: bytes, content: bytes) -> Transformed:
        if len(content) > self.limits.max_image_bytes:
            # Not worth the way to a worker.
            raise runtime_errors.ImageTooLarge(
                f"the image has {len(content)} bytes; "
                f"at most {self.limits.max_image_bytes} are allowed",
                size_bytes=len(content),
                limit_bytes=self.limits.max_image_bytes,
            )
        if self._closing:
            raise _stopped()
        if not self._idle and self._waiting_bytes + len(content) > self._max_waiting_bytes:
            raise DecodersBusy(
                f"images of {self._waiting_bytes} bytes wait for a decoder already; "
                "try again later",
                waiting_bytes=self._waiting_bytes,
            )
        outcome: asyncio.Future[Transformed] = asyncio.get_running_loop().create_future()
        job = Job(steps, content, outcome, current_span())
        self._enqueue(job)
        self._dispatch()
        try:
            return await outcome
        finally:
            # Whoever goes away while the image waits leaves nothing behind.
            self._queue.pop(job, None)
            self._waits(job, False)

    def _enqueue(self, job: Job, *, first: bool = False) -> None:
        self._queue[job] = None
        if first:
            self._queue.move_to_end(job, last=False)
        self._waits(job, True)

    def _waits(self, job: Job, waits: bool) -> None:
        if job.waits != waits:
            job.waits = waits
            self._waiting += 1 if waits else -1
            self._waiting_bytes += len(job.content) if waits else -len(job.content)

    def _dispatch(self) -> None:
        """Give away what waits, as far as there are places."""
        while self._queue:
            job = next(iter(self._queue))
            worker = self._idle.pop() if self._idle else self._next_free(job)
            if worker is None:
                return
            del self._queue[job]
            worker.give(job)

    def _next_free(self, job: Job) -> WorkerProcess | None:
        """Return the worker that will most likely be done first, if the image may go to it now."""
        if len(job.content) > _SMALL_BYTES or job.attempts:
            return None
        found, began = None, float("inf")
        for worker in self._alive:
            current = worker.current
            if (
                current is not None
                and worker.jobs < _AHEAD
                and not worker.late
                and len(current.content) <= _SMALL_BYTES
                and not current.attempts
                and current.began < began
            ):
                found, began = worker, current.began
        return found

    def begun(self, job: Job) -> None:
        """A worker has turned to an image (called by the worker's end)."""
        self._waits(job, False)
        if job.span is not None:
            job.span.mark("a decoder is free")

    def answered(
        self, worker: WorkerProcess, job: Job, head: bytes, tensor: NDArray[np.uint8]
    ) -> bool:
        """A worker has answered (called by the worker's end)."""
        try:
            outcome, messages = _parse(head, tensor)
        except _MALFORMED as error:
            # A decoder that was taken over may answer anything.
            _log.error("decode worker gave a malformed answer", pid=worker.pid, error=repr(error))
            return False
        self.messages += messages
        self.durations.add(time.perf_counter() - job.began)
        if isinstance(outcome, Exception):
            _fail(job, outcome)
        elif not job.outcome.done():
            job.outcome.set_result(outcome)
        # It may wait for another worker as well.
        self._queue.pop(job, None)
        worker.done()
        if not worker.jobs and worker in self._alive:
            self._idle.append(worker)
        self._dispatch()
        return True

    def held_up(self, worker: WorkerProcess, behind: list[Job]) -> None:
        """A worker takes long (called by the worker's end): others may take what it has besides."""
        self._again(behind)

    def expired(self, worker: WorkerProcess, job: Job, behind: list[Job]) -> None:
        """A worker took too long and is being killed (called by the worker's end)."""
        _log.warning("image took too long, its decode worker was killed", pid=worker.pid)
        self.durations.add(time.perf_counter() - job.began)
        _fail(
            job,
            DecodeTimeout(
                f"decoding the image took longer than {self.limits.timeout_seconds:g} s",
                timeout_seconds=self.limits.timeout_seconds,
            ),
        )
        self._again(behind)

    def lost(self, worker: WorkerProcess, jobs: list[Job]) -> None:
        """A worker ended (called by the worker's end): put another one in its place."""
        if self._closing:
            for job in jobs:
                _fail(job, _stopped())
            return
        if worker not in self._alive:
            return
        self._alive.discard(worker)
        if worker in self._idle:
            self._idle.remove(worker)
        spawn(self._tasks, self._replace(worker), "replace decode worker")
        if jobs:
            self.durations.add(time.perf_counter() - jobs[0].began)
            jobs[0].attempts += 1
            if jobs[0].attempts >= _ATTEMPTS:
                _fail(
                    jobs[0],
                    DecoderCrashed(
                        f"the decoder crashed on the image {_ATTEMPTS} times; "
                        "send another encoding of it",
                        attempts=_ATTEMPTS,
                    ),
                )
        self._again(jobs)

    def _again(self, jobs: Iterable[Job]) -> None:
        for job in reversed(list(jobs)):
            if not job.outcome.done():
                self._enqueue(job, first=True)
        self._dispatch()

    async def _start_worker(self) -> None:
        worker = WorkerProcess(self.limits, self)
        self._starting.add(worker)
        try:
            async with asyncio.timeout(_START_SECONDS):
                await worker.connect()
        except BaseException:
            await worker.reap()
            raise
        finally:
            self._starting.discard(worker)
        self._alive.add(worker)
        self._idle.append(worker)
        self._dispatch()

    async def _replace(self, worker: WorkerProcess) -> None:
        code = await worker.reap()
        self.replaced += 1
        _log.warning("decode worker ended and is replaced", pid=worker.pid, exit_code=code)
        pause = 0.1
        while True:
            try:
                return await self._start_worker()
            except (OSError, TimeoutError, WorkerLost) as error:
                _log.error("decode worker could not be started", error=repr(error))
            await asyncio.sleep(pause)
            pause = min(pause * 2, 5.0)


def _fail(job: Job, error: Exception) -> None:
    if not job.outcome.done():
        job.outcome.set_exception(error)


def _stopped() -> DecoderCrashed:
    return DecoderCrashed("the decoders are stopped; send the image to another server")


def _parse(head: bytes, tensor: NDArray[np.uint8]) -> tuple[Transformed | Exception, int]:
    """Return what came of an image, and how many lines its decoder would have printed."""
    answer = json.loads(head)
    messages = max(0, min(int(answer["messages"]), _MAX_MESSAGES))
    if "error" in answer:
        kind = _FAULTS.get(answer["error"], runtime_errors.ImageInvalid)
        metadata = {str(key): value for key, value in answer["metadata"].items()}
        return kind(str(answer["message"]), **metadata), messages
    # Not a view: this refuses types that hold references.
    array = np.frombuffer(tensor, np.dtype(answer["dtype"])).reshape(answer["shape"])
    transformed = Transformed(
        array,
        Geometry(**answer["geometry"]),
        tuple(Geometry(**geometry) for geometry in answer["geometries"]),
    )
    return transformed, messages
