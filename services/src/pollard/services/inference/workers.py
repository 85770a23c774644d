"""The threads that run one revision's requests.

All workers share one session: onnxruntime releases the GIL while it runs, and the weights are held
once. Requests wait in one queue. A worker takes what waits and, where joining pays, several
requests at a time; it never waits for more to come.
"""

from __future__ import annotations

import asyncio
import math
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from pollard.runtime.sessions import Array, Session
from pollard.services.inference.errors import (
    ExecutionFailed,
    QueueTimeout,
    RequestExpired,
    ServerStopping,
)
from pollard.services.inference.scheduling import PriorityQueue, Scheduling, queue_full
from pollard.services.inference.statistics import Timing

Outputs = dict[str, Array]


@dataclass(eq=False, slots=True)
class Work:
    """One request on its way through the workers."""

    feeds: dict[str, Array]
    outputs: tuple[str, ...]
    batch: int
    """Size of the first dimension; 1 if the model does not batch."""
    deadline: float
    """On the clock of `time.monotonic`."""
    done: asyncio.Future[Outputs]
    joins_with: object = None
    """Requests with equal values may run as one batch; None runs alone."""
    level: int = 1
    """Its priority; 1 is the highest."""
    queue_until: float = math.inf
    """When it has waited too long, on the clock of `time.monotonic`."""
    loop: asyncio.AbstractEventLoop = field(init=False)
    queued_at: float = field(init=False)
    """On the clock of `time.monotonic`."""
    timing: Timing | None = field(init=False, default=None)
    """Of the run that it was part of; set before `done`."""

    def __post_init__(self) -> None:
        self.loop = self.done.get_loop()
        self.queued_at = time.monotonic()


class Workers:
    """A queue and the threads that empty it."""

    def __init__(
        self,
        session: Session,
        *,
        count: int,
        joined_batch: int,
        max_queue: int,
        name: str,
        on_closed: Callable[[], None] | None = None,
        scheduling: Scheduling | None = None,
    ) -> None:
        """Start the threads.

        Args:
            session: Shared by all of them.
            count: Number of threads.
            joined_batch: Largest batch made of several requests; 1 joins none.
            max_queue: Most requests that wait.
            name: For the threads' names.
            on_closed: Called by the last thread, after the session has been let go.
            scheduling: Priorities, and how long a batch may form; its queue limits go before
                `max_queue` where it has priorities.
        """
        self._session: Session | None = session
        self._count = count
        self._joined_batch = joined_batch
        self._max_queue = max_queue
        scheduling = scheduling or Scheduling()
        self._delay = scheduling.delay_seconds
        self._queue: queue.SimpleQueue[Work | None] | PriorityQueue = queue.SimpleQueue()
        if not scheduling.plain:
            self._queue = PriorityQueue(scheduling)
            self._max_queue = 0  # The queue has limits of its own.
        self._closed = False
        self._alive = count
        self._lock = threading.Lock()
        self._on_closed = on_closed
        for number in range(count):
            # Daemon: a run that never ends must not keep the process from exiting.
            threading.Thread(target=self._run, name=f"{name}-{number}", daemon=True).start()

    @property
    def joins(self) -> bool:
        """Whether requests are joined into batches."""
        return self._joined_batch > 1

    def submit(self, work: Work) -> None:
        """Queue a request; its future is resolved on its own event loop.

        Raises:
            QueueFull: too many wait already.
            ServerStopping: the workers are closed.
        """
        if self._closed:
            raise ServerStopping("the revision is being unloaded; send the request again")
        if self._max_queue and self._queue.qsize() >= self._max_queue:
            raise queue_full(self._max_queue)
        self._queue.put(work)

    def run_now(self, feeds: dict[str, Array], outputs: tuple[str, ...]) -> Outputs:
        """Run a request on the calling thread.

        Raises:
            ExecutionFailed: onnxruntime failed on it.
            ServerStopping: the workers are closed.
        """
        session = self._session
        if session is None:
            raise ServerStopping("the revision is being unloaded; send the request again")
        try:
            return session.run(feeds, outputs)
        except Exception as error:
            raise _execution_failed(error) from error

    def close(self) -> None:
        """Let the threads finish what waits and end. Returns at once."""
        if not self._closed:
            self._closed = True
            for _ in range(self._count):
                self._queue.put(None)

    def _run(self) -> None:
        carried: Work | None = None
        while True:
            work = carried if carried is not None else self._queue.get()
            carried = None
            if work is None:
                break
            if not _still_wanted(work):
                continue
            batch = [work]
            ended = False
            if self._joined_batch > 1 and work.joins_with is not None:
                batch, carried, ended = self._gather(work)
            self._execute(batch)
            del work, batch
            if ended:
                break
        self._end()

    def _gather(self, first: Work) -> tuple[list[Work], Work | None, bool]:
        """Take what waits and fits with `first`, but no more than this worker's share.

        Returns:
            The batch, a request that did not fit and comes next, and whether the end was met.
        """
        batch, size = [first], first.batch
        share = -(-self._queue.qsize() // self._count)
        until = first.queued_at + self._delay
        while size < self._joined_batch:
            try:
                if share > 0:
                    share -= 1
                    work = self._queue.get_nowait()
                elif self._delay:
                    work = self._queue.get(timeout=max(0.0, until - time.monotonic()))
                else:
                    break
            except queue.Empty:
                if share > 0:
                    share = 0
                    continue
                break
            if work is None:
                return batch, None, True
            if not _still_wanted(work):
                continue
            if work.joins_with != first.joins_with or size + work.batch > self._joined_batch:
                return batch, work, False
            batch.append(work)
            size += work.batch
        return batch, None, False

    def _execute(self, batch: Sequence[Work]) -> None:
        assert self._session is not None  # noqa: S101 - let go only after the last run
        if len(batch) == 1:
            self._execute_one(batch[0])
            return
        total = sum(work.batch for work in batch)
        timing = Timing(total, time.perf_counter_ns())
        try:
            feeds = {
                name: np.concatenate([work.feeds[name] for work in batch])
                for name in batch[0].feeds
            }
            timing.ready = time.perf_counter_ns()
            outputs = self._session.run(feeds, batch[0].outputs)
            timing.run = time.perf_counter_ns()
            if any(array.shape[:1] != (total,) for array in outputs.values()):
                raise ValueError("an output does not follow the batch")
        except Exception:
            # One request's values must not fail the others: each runs alone and gets its own error.
            for work in batch:
                self._execute_one(work)
            return
        parts, start = [], 0
        for work in batch:
            end = start + work.batch
            parts.append({name: array[start:end] for name, array in outputs.items()})
            start = end
        timing.split = time.perf_counter_ns()
        for work, part in zip(batch, parts, strict=True):
            work.timing = timing
            _resolve(work, part)

    def _execute_one(self, work: Work) -> None:
        assert self._session is not None  # noqa: S101 - let go only after the last run
        started = time.perf_counter_ns()
        try:
            outputs = self._session.run(work.feeds, work.outputs)
        except Exception as error:
            _fail(work, _execution_failed(error))
            return
        ended = time.perf_counter_ns()
        work.timing = Timing(work.batch, started, started, ended, ended)
        _resolve(work, outputs)

    def _end(self) -> None:
        with self._lock:
            self._alive -= 1
            last = self._alive == 0
        if last:
            self._session = None
            if self._on_closed is not None:
                self._on_closed()


def _still_wanted(work: Work) -> bool:
    """Drop work whose caller has gone or whose deadline has passed, before it costs any time."""
    if work.done.cancelled():
        return False
    now = time.monotonic()
    if now >= work.deadline:
        _fail(work, RequestExpired("Request timeout expired: its deadline passed in the queue"))
        return False
    if now >= work.queue_until:
        _fail(work, QueueTimeout("Request timeout expired: it waited longer than it may"))
        return False
    return True


def _execution_failed(error: Exception) -> ExecutionFailed:
    # onnxruntime's exceptions share no base class but Exception.
    first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return ExecutionFailed(f"onnxruntime could not run the request: {first_line}")


def _resolve(work: Work, outputs: Outputs) -> None:
    _call(work, lambda: None if work.done.done() else work.done.set_result(outputs))


def _fail(work: Work, error: Exception) -> None:
    _call(work, lambda: None if work.done.done() else work.done.set_exception(error))


def _call(work: Work, callback: Callable[[], None]) -> None:
    try:
        work.loop.call_soon_threadsafe(callback)
    except RuntimeError:
        # The event loop is closed: nobody waits for the answer any more.
        return
