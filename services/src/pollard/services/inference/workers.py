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
from typing import Protocol

import numpy as np

from pollard.runtime.errors import DeviceFault
from pollard.runtime.sessions import Array, Session
from pollard.services.common.telemetry.traces import Span
from pollard.services.inference.errors import (
    DeviceFailed,
    ExecutionFailed,
    QueueTimeout,
    RequestExpired,
    ServerStopping,
)
from pollard.services.inference.scheduling import PriorityQueue, Scheduling, queue_full
from pollard.services.inference.statistics import Timing

Outputs = dict[str, Array]

Outcome = Outputs | Exception
"""What a request gets."""


class Caller(Protocol):
    """Who waits for a request. Front ends differ in the thread on which they wait."""

    @property
    def gone(self) -> bool:
        """Whether nobody waits any more. Asked on any thread."""

    def settle(self, work: Work, outcome: Outcome) -> None:
        """Take the outcome, on the caller's own thread; it may have gone meanwhile."""

    def hand_over(self, settled: Sequence[tuple[Work, Outcome]]) -> None:
        """Have `settle` called for requests whose callers are of this kind. On any thread."""


class LoopCaller:
    """A caller that awaits a future on an event loop."""

    __slots__ = ("_loop", "done")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        """Make the future; on the loop's thread."""
        self._loop = loop
        self.done: asyncio.Future[Outputs] = loop.create_future()

    @property
    def gone(self) -> bool:
        """Whether the future was cancelled."""
        return self.done.cancelled()

    def settle(self, work: Work, outcome: Outcome) -> None:
        """Resolve the future."""
        if self.done.done():
            return
        if isinstance(outcome, Exception):
            self.done.set_exception(outcome)
        else:
            self.done.set_result(outcome)

    def hand_over(self, settled: Sequence[tuple[Work, Outcome]]) -> None:
        """Wake the event loop, once for all of them: that costs more than to answer a request."""
        try:
            self._loop.call_soon_threadsafe(_settle_all, settled)
        except RuntimeError:
            # The event loop is closed: nobody waits for the answers any more.
            return


@dataclass(eq=False, slots=True)
class Work:
    """One request on its way through the workers."""

    feeds: dict[str, Array]
    outputs: tuple[str, ...]
    batch: int
    """Size of the first dimension; 1 if the model does not batch."""
    deadline: float
    """On the clock of `time.monotonic`."""
    caller: Caller
    joins_with: object = None
    """Requests with equal values may run as one batch; None runs alone."""
    level: int = 1
    """Its priority; 1 is the highest."""
    queue_until: float = math.inf
    """When it has waited too long, on the clock of `time.monotonic`."""
    arrived: int = field(init=False)
    """On the clock of `time.perf_counter_ns`."""
    queued_at: float = field(init=False)
    """On the clock of `time.monotonic`."""
    queued: bool = field(init=False, default=False)
    """Whether it was given to the workers."""
    timing: Timing | None = field(init=False, default=None)
    """Of the run that it was part of; set before the caller gets the outcome."""
    who: str = field(init=False, default="")
    """Whose it is, where callers take turns."""
    span: Span | None = field(init=False, default=None)
    """Of the call that it belongs to, if that is traced."""

    def __post_init__(self) -> None:
        self.arrived = time.perf_counter_ns()
        self.queued_at = time.monotonic()


_Settled = tuple[Work, Outcome]
"""A request and what it gets."""


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
        on_lost: Callable[[], None] | None = None,
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
            on_lost: Called on any thread, after a run found that its device is gone.
            scheduling: Priorities, and how long a batch may form; its queue limits go before
                `max_queue` where it has priorities.
        """
        self._session: Session | None = session
        self._count = count
        self.joined_batch = joined_batch
        """Largest batch made of several requests; may be changed while they run."""
        self._max_queue = max_queue
        scheduling = scheduling or Scheduling()
        self._delay = scheduling.delay_seconds
        self._queue: queue.SimpleQueue[Work | None] | PriorityQueue = queue.SimpleQueue()
        if not scheduling.plain or scheduling.fair:
            self._queue = PriorityQueue(scheduling, max_queue if scheduling.plain else None)
            self._max_queue = 0  # The queue has limits of its own.
        self._closed = False
        self._alive = count
        self._lock = threading.Lock()
        self._on_closed = on_closed
        self._on_lost = on_lost
        self._name = name
        self._started = 0
        """Threads that were ever started."""
        for _ in range(count):
            self._start_thread()

    def change(self, *, session: Session | None = None, count: int) -> Session | None:
        """Run requests with another session from now on, and with another number of threads.

        Requests that run keep the session with which they began.

        Args:
            session: Takes the place of the one there is; None keeps that.
            count: Number of threads. Where there are more, each ends after what waits now.

        Returns:
            The session that is not used any more, for the caller to free; None if none was given,
            and `session` itself if the workers are closed.
        """
        with self._lock:
            if self._closed:
                return session
            before, self._session = self._session, session or self._session
            more = count - self._count
            self._count = count
            self._alive += max(0, more)
            for _ in range(-more):
                self._queue.put(None)
            for _ in range(more):
                self._start_thread()
            return before if session is not None else None

    def _start_thread(self) -> None:
        name = f"{self._name}-{self._started}"
        self._started += 1
        # Daemon: a run that never ends must not keep the process from exiting.
        threading.Thread(target=self._run, name=name, daemon=True).start()

    @property
    def waiting(self) -> int:
        """About how many requests wait for a thread."""
        return self._queue.qsize()

    @property
    def joins(self) -> bool:
        """Whether requests are joined into batches."""
        return self.joined_batch > 1

    @property
    def session(self) -> Session | None:
        """The session; None once the last worker has ended."""
        return self._session

    def submit(self, work: Work) -> None:
        """Queue a request; its caller gets the outcome on its own thread.

        Raises:
            QueueFull: too many wait already.
            ServerStopping: the workers are closed.
        """
        if self._closed:
            raise ServerStopping("the revision is being unloaded; send the request again")
        if self._max_queue and self._queue.qsize() >= self._max_queue:
            raise queue_full(self._max_queue)
        self._queue.put(work)

    def run_here(self, works: Sequence[Work]) -> None:
        """Run requests on the calling thread, which must be that of their callers.

        They are joined as the workers join them, in the order in which they came. Requests that
        cannot be joined run one after another; each gets its own outcome.
        """
        session = self._session
        batch: list[Work] = []
        size = 0
        for work in works:
            if session is None:
                work.caller.settle(
                    work, ServerStopping("the revision is being unloaded; send it again")
                )
                continue
            if not _still_wanted(work):
                continue
            fits = (
                work.joins_with is not None
                and size + work.batch <= self.joined_batch
                and bool(batch)
                and work.joins_with == batch[0].joins_with
            )
            if batch and not fits:
                _settle_all(self._outcomes(session, batch))
                batch, size = [], 0
            batch.append(work)
            size += work.batch
        if batch and session is not None:
            _settle_all(self._outcomes(session, batch))

    def close(self) -> None:
        """Let the threads finish what waits and end. Returns at once."""
        with self._lock:
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
            if self.joined_batch > 1 and work.joins_with is not None:
                batch, carried, ended = self._gather(work)
            self._execute(batch)
            del work, batch
            if ended:
                break
        self._end()

    def _gather(self, first: Work) -> tuple[list[Work], Work | None, bool]:
        """Take what waits and fits with `first`, but no more than this worker's share.

        Where batches are padded, the rows of the padding are computed too: requests that wait take
        their place, beyond the share.

        Returns:
            The batch, a request that did not fit and comes next, and whether the end was met.
        """
        batch, size = [first], first.batch
        share = -(-self._queue.qsize() // self._count)
        until = first.queued_at + self._delay
        session, room = self._session, 0
        while size < self.joined_batch:
            try:
                if share > 0:
                    share -= 1
                    work = self._queue.get_nowait()
                elif self._delay:
                    work = self._queue.get(timeout=max(0.0, until - time.monotonic()))
                else:
                    if not room:
                        room = session.padded(size) if session is not None else size
                        room = min(room, self.joined_batch)
                    # One that is taken and does not fit would wait for the whole run.
                    if size + first.batch > room:
                        break
                    work = self._queue.get_nowait()
            except queue.Empty:
                if share > 0:
                    share = 0
                    continue
                break
            if work is None:
                return batch, None, True
            if not _still_wanted(work):
                continue
            if work.joins_with != first.joins_with or size + work.batch > self.joined_batch:
                return batch, work, False
            batch.append(work)
            size += work.batch
        return batch, None, False

    def _execute(self, batch: Sequence[Work]) -> None:
        assert self._session is not None  # noqa: S101 - let go only after the last run
        session = self._session
        _hand_over(self._outcomes(session, batch))
        if session.lost and self._on_lost is not None:
            on_lost, self._on_lost = self._on_lost, None
            on_lost()

    def _outcomes(self, session: Session, batch: Sequence[Work]) -> list[_Settled]:
        """Run requests as one batch and return what each of them gets."""
        if len(batch) == 1:
            return [self._run_one(session, batch[0])]
        total = sum(work.batch for work in batch)
        spans = [work.span for work in batch if work.span is not None]
        timing = Timing(total, time.perf_counter_ns(), requests=len(batch), spans=spans)
        try:
            if session.stages:
                timing.ready = timing.started
                outputs = session.run_parts([work.feeds for work in batch], batch[0].outputs)
            else:
                feeds = {
                    name: np.concatenate([work.feeds[name] for work in batch])
                    for name in batch[0].feeds
                }
                timing.ready = time.perf_counter_ns()
                outputs = session.run(feeds, batch[0].outputs)
            timing.run = time.perf_counter_ns()
            if any(array.shape[:1] != (total,) for array in outputs.values()):
                raise ValueError("an output does not follow the batch")
        except Exception:
            # One request's values must not fail the others: each runs alone and gets its own error.
            return [self._run_one(session, work) for work in batch]
        outcomes: list[_Settled] = []
        start = 0
        for work in batch:
            end = start + work.batch
            work.timing = timing
            outcomes.append((work, {name: array[start:end] for name, array in outputs.items()}))
            start = end
        timing.split = time.perf_counter_ns()
        return outcomes

    @staticmethod
    def _run_one(session: Session, work: Work) -> _Settled:
        started = time.perf_counter_ns()
        try:
            outputs = session.run(work.feeds, work.outputs)
        except Exception as error:
            return work, _execution_failed(error)
        ended = time.perf_counter_ns()
        work.timing = Timing(work.batch, started, started, ended, ended)
        if work.span is not None:
            work.timing.spans = (work.span,)
        return work, outputs

    def _end(self) -> None:
        with self._lock:
            self._alive -= 1
            last = self._alive == 0
        if last:
            session, self._session = self._session, None
            if session is not None:
                session.close()
            del session
            if self._on_closed is not None:
                self._on_closed()


def _still_wanted(work: Work) -> bool:
    """Drop work whose caller has gone or whose deadline has passed, before it costs any time."""
    if work.caller.gone:
        return False
    now = time.monotonic()
    if now >= work.deadline:
        _fail(work, RequestExpired("Request timeout expired: its deadline passed in the queue"))
        return False
    if now >= work.queue_until:
        _fail(work, QueueTimeout("Request timeout expired: it waited longer than it may"))
        return False
    return True


def _execution_failed(error: Exception) -> DeviceFailed | ExecutionFailed:
    if isinstance(error, DeviceFault):
        return DeviceFailed(error.message, reason=error.reason, **error.metadata)
    # onnxruntime's exceptions share no base class but Exception.
    first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return ExecutionFailed(f"onnxruntime could not run the request: {first_line}")


def _fail(work: Work, error: Exception) -> None:
    work.caller.hand_over([(work, error)])


def _hand_over(settled: Sequence[_Settled]) -> None:
    """Give requests their outcomes; they may have callers of more than one kind."""
    first = settled[0][0].caller
    kind = type(first)
    others = [each for each in settled if type(each[0].caller) is not kind]
    if others:
        _hand_over(others)
        settled = [each for each in settled if type(each[0].caller) is kind]
    first.hand_over(settled)


def _settle_all(settled: Sequence[_Settled]) -> None:
    for work, outcome in settled:
        work.caller.settle(work, outcome)
