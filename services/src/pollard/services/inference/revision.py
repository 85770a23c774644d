"""One loaded revision: what it takes and gives, and its requests in flight."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import structlog

from pollard.inference import model_config_pb2
from pollard.runtime.sessions import Array, Session, TensorInfo
from pollard.services.common.auth.callers import current_caller
from pollard.services.common.counters import RequestCounters
from pollard.services.common.memory import return_memory
from pollard.services.common.telemetry.traces import Span, current_span
from pollard.services.inference.errors import (
    DeviceFailed,
    ExecutionFailed,
    QueueFull,
    QueueTimeout,
    RequestExpired,
    ServerStopping,
)
from pollard.services.inference.options import Running
from pollard.services.inference.scheduling import Backlog, Scheduling
from pollard.services.inference.shadowing import Shadowing
from pollard.services.inference.statistics import (
    BACKEND,
    CANCELED,
    OTHER,
    REJECTED,
    RevisionStatistics,
)
from pollard.services.inference.tensors import batches
from pollard.services.inference.tuning import Tuning
from pollard.services.inference.workers import Caller, LoopCaller, Outputs, Work, Workers

_log = structlog.get_logger("pollard.inference.revision")

_INLINE_PATIENCE = 8
"""How many times as long as it may a request on its caller's thread takes before that ends."""


@dataclass(frozen=True)
class RevisionInfo:
    """What does not change while a revision is loaded."""

    model: str
    revision: int
    digest: str
    """SHA-256 of the bundle's manifest."""
    size_bytes: int
    """Size of the bundle's files."""
    variant: str
    target: str
    inputs: tuple[TensorInfo, ...]
    """In the order of the graph, with the manifest's shapes."""
    outputs: tuple[TensorInfo, ...]
    max_batch_size: int
    """Largest first dimension of a request; 0 if the first dimension is not a batch."""
    load_seconds: float = 0.0
    threads: int = 1
    """Threads that one run uses."""
    tuning: Tuning | None = None
    """What was measured of it; None if nothing was."""
    set_by_hand: tuple[str, ...] = ()
    """Which of workers, threads and joined_batch were."""
    labels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Names of the classes, by output."""
    config: model_config_pb2.ModelConfig | None = None
    """The model's own configuration; None if it has none."""

    @cached_property
    def batches(self) -> bool:
        """Whether every input and every output has the batch as its first dimension."""
        return self.max_batch_size > 0 and all(
            batches(info) for info in (*self.inputs, *self.outputs)
        )


class LoadedRevision:
    """A revision that can be run.

    Requests come in two ways: `infer` on the event loop, or, from a thread that carries requests
    itself, `enter`, `work`, `run_here` or `submit`, and `finish`. The rest belongs to the event
    loop's thread.
    """

    def __init__(
        self,
        info: RevisionInfo,
        session: Session,
        *,
        workers: int,
        joined_batch: int,
        max_queue: int,
        inline_rows: int = 0,
        inline_seconds: float = math.inf,
        scheduling: Scheduling | None = None,
    ) -> None:
        """Start the workers; the session must be checked and warm.

        Args:
            info: What the revision is.
            session: Its session, handed over: it is freed with the revision.
            workers: Number of threads that run requests.
            joined_batch: Largest batch made of several requests; 1 joins none.
            max_queue: Most requests that wait.
            inline_rows: Requests of up to so many rows are run on the event loop's thread, joined
                with those that came with them: handing them to a worker and back would take longer
                than they do.
            inline_seconds: As long as such a request may take. Once they take much longer, none is
                run so any more.
            scheduling: Priorities, queue limits and how long a batch may form; without it there
                are no priorities and the only limit is `max_queue`.
        """
        self.info = info
        self.counters = RequestCounters()
        self.statistics = RevisionStatistics()
        self.shadow: Shadowing | None = None
        """Copies requests to another revision; None while that is not wanted."""
        self._scheduling = scheduling or Scheduling()
        self._same_for_all = self._scheduling.same_for_all
        self.in_flight = 0
        self.last_request = -math.inf
        """When the last request came, on the clock of `time.monotonic`."""
        self.workers = workers
        """Number of threads that run requests."""
        self.joined_batch = joined_batch if info.batches else 1
        """Largest batch made of several requests."""
        self._inline_rows = inline_rows
        self._inline_seconds = inline_seconds
        self._gathered: list[Work] = []
        self._in_turn = False
        self._come_alone = False
        # Where only the batch is free, all requests for the same outputs fit together.
        self._shapes_differ = any(-1 in spec.shape[1:] for spec in info.inputs)
        self._backlog = Backlog(workers)
        self._loop = asyncio.get_running_loop()
        # Over the counts: requests begin and end on several threads.
        self._lock = threading.Lock()
        self._retiring = False
        self._idle = asyncio.Event()
        self._closed = asyncio.Event()
        self.on_lost: Callable[[], None] = lambda: None
        """Called on the event loop's thread when its device is found to be gone."""
        self.freed = asyncio.Event()
        """Set when the session has been freed."""
        self._workers = Workers(
            session,
            count=workers,
            joined_batch=self.joined_batch,
            max_queue=max_queue,
            name=f"{info.model}-{info.revision}",
            on_closed=self._on_workers_closed,
            on_lost=lambda: _call_on(self._loop, lambda: self.on_lost()),
            scheduling=self._scheduling,
        )

    async def infer(
        self,
        feeds: dict[str, Array],
        outputs: Sequence[TensorInfo],
        deadline: float,
        *,
        wait_seconds: float = 0.0,
        priority: int = 0,
    ) -> Outputs:
        """Run one request and return its outputs by name.

        Args:
            feeds: Checked inputs by name.
            outputs: Outputs wanted.
            deadline: When to give up, on the clock of `time.monotonic`.
            wait_seconds: Longest that it may wait for a worker; 0 leaves that to the policy.
            priority: 1 is the highest; 0 leaves it to the model.

        Raises:
            QueueFull: too many requests wait, or so many that it could not be answered in time.
            QueueTimeout: it waited longer than it may.
            RequestExpired: the deadline passed before it was run.
            ExecutionFailed: onnxruntime failed on it.
        """
        if not self.enter():
            raise ServerStopping("the revision is being unloaded; send the request again")
        caller = LoopCaller(self._loop)
        work: Work | None = None
        error: BaseException | None = None
        answer: Outputs | None = None
        try:
            work = self.work(
                feeds, outputs, deadline, caller, wait_seconds=wait_seconds, priority=priority
            )
            span = current_span()
            if span is not None and span.recorded:
                work.span = span
            if self._scheduling.fair:
                work.who = current_caller().key
            if self.runs_inline(work):
                self._gather(work)
            else:
                self.submit(work)
            answer = await caller.done
            return answer
        except BaseException as raised:
            error = raised
            raise
        finally:
            self.finish(work, error, answer)

    def enter(self) -> bool:
        """Keep the revision until the `finish` of a request; False if it is being freed."""
        with self._lock:
            if self._retiring:
                return False
            self.in_flight += 1
            return True

    def work(
        self,
        feeds: dict[str, Array],
        outputs: Sequence[TensorInfo],
        deadline: float,
        caller: Caller,
        *,
        wait_seconds: float = 0.0,
        priority: int = 0,
    ) -> Work:
        """Return a request in the form in which it is run; see `infer`."""
        batch = next(iter(feeds.values())).shape[0] if self.info.batches else 1
        names = tuple([output.name for output in outputs])
        joins_with: object = None
        if self._workers.joins:
            joins_with = names
            if self._shapes_differ:
                joins_with = (names, *(feeds[spec.name].shape[1:] for spec in self.info.inputs))
        work = Work(feeds, names, batch, deadline, caller, joins_with)
        self.last_request = work.queued_at
        if wait_seconds > 0 or not self._same_for_all:
            work.level = self._scheduling.level(priority)
            wait = self._scheduling.policy_of(work.level).wait_seconds(wait_seconds)
            work.queue_until = work.queued_at + wait
        return work

    def runs_inline(self, work: Work) -> bool:
        """Tell whether a request is to be run on its caller's thread."""
        return work.batch <= self._inline_rows

    def run_here(self, works: Sequence[Work]) -> None:
        """Run requests on the calling thread, joined where that is possible.

        How long a model takes was seen with zeros; where it takes much longer with other values, it
        would keep this thread from everybody else's requests, and is left to the workers from then
        on. Processor time is what counts: a busy machine is not the model's doing.
        """
        begin = time.thread_time()
        self._workers.run_here(works)
        took = time.thread_time() - begin
        if took > _INLINE_PATIENCE * len(works) * self._inline_seconds and self._inline_rows:
            self._inline_rows = 0
            _log.warning(
                "requests take longer than expected and are left to the workers from now on",
                model=self.info.model,
                revision=self.info.revision,
                seconds=round(took / len(works), 4),
            )

    def wait_seconds(self) -> float:
        """Return about how long a request that comes now is here; infinite if that is unknown."""
        return self._backlog.wait_seconds()

    def submit(self, work: Work) -> None:
        """Give a request to the workers; its caller gets the outcome.

        Raises:
            QueueFull: too many requests wait, or so many that it could not be answered in time.
            ServerStopping: the revision has been freed.
        """
        with self._lock:
            if self._scheduling.plain:
                left = min(work.deadline, work.queue_until) - work.queued_at
                self._backlog.check(work.batch, left, work.who)
            self._backlog.enter(work.batch, work.who, fair=self._scheduling.fair)
            work.queued = True
        self._workers.submit(work)

    def finish(
        self,
        work: Work | None,
        error: BaseException | None = None,
        answer: Outputs | None = None,
    ) -> None:
        """Count the end of a request that was entered, and let the revision go.

        Args:
            work: The request; None if it did not come so far.
            error: Why it failed; None if it was answered.
            answer: With what it was answered, so that it can be copied; None copies nothing.
        """
        with self._lock:
            if work is not None:
                self._count(work, error)
            self.in_flight -= 1
            if self._retiring and self.in_flight == 0:
                _call_on(self._loop, self._idle.set)
        if work is not None and work.span is not None:
            self._draw(work, work.span)
        shadow = self.shadow  # a switch may take it away meanwhile
        if shadow is not None and work is not None and answer is not None:
            shadow.offer(work.feeds, answer)

    def _draw(self, work: Work, span: Span) -> None:
        """Draw the way of a request that is traced."""
        timing = work.timing
        span.set(model=self.info.model, revision=self.info.revision)
        if timing is None:
            span.draw("queue", work.arrived, time.perf_counter_ns())
            return
        span.draw("queue", work.arrived, timing.started)
        span.draw(
            "batch",
            timing.started,
            timing.split,
            {
                "pollard.model": self.info.model,
                "pollard.revision": self.info.revision,
                "pollard.rows": timing.batch,
                "pollard.requests": timing.requests,
            },
            # Of all whose requests ran with it, its own too: whichever trace is looked at leads to
            # the others.
            timing.spans,
            (("inputs joined", timing.ready), ("model has run", timing.run)),
        )

    def reject(self) -> None:
        """Count a request that failed for a reason of the client's before it was entered."""
        with self._lock:
            self.counters.reject()
            self.statistics.failures[OTHER] += 1

    def _count(self, work: Work, error: BaseException | None) -> None:
        if work.queued:
            self._backlog.leave(work.batch, work.who)
        if error is None:
            self.counters.succeed((time.perf_counter_ns() - work.arrived) * 1e-9)
            timing = work.timing
            if timing is not None:
                if not timing.counted:
                    self._backlog.learn((timing.split - timing.started) * 1e-9, timing.batch)
                self.statistics.succeed(work.batch, work.arrived, timing)
        elif isinstance(error, asyncio.CancelledError):
            self.counters.reject()
            self.statistics.failures[CANCELED] += 1
        else:
            if isinstance(error, (RequestExpired, QueueTimeout)):
                self.counters.reject()
            else:
                self.counters.fail()
            self.statistics.fail(work.arrived, _reason(error))

    def _gather(self, work: Work) -> None:
        """Run a request at the end of the event loop's turn, with those that come in it.

        While they come one in a turn, it is run at once instead.
        """
        if self._in_turn:
            self._gathered.append(work)
            return
        self._in_turn = True
        self._loop.call_soon(self._end_turn)
        if self._come_alone:
            self.run_here((work,))
        else:
            self._gathered.append(work)

    def _end_turn(self) -> None:
        self._in_turn = False
        gathered, self._gathered = self._gathered, []
        self._come_alone = len(gathered) <= (0 if self._come_alone else 1)
        if gathered:
            self.run_here(gathered)

    @property
    def retiring(self) -> bool:
        """Whether it gets no new requests any more."""
        return self._retiring

    @property
    def lost(self) -> str:
        """Why it cannot run any more, if its device is gone; empty while it can."""
        session = self._workers.session
        return session.lost if session is not None else ""

    @property
    def waiting(self) -> int:
        """About how many requests wait for a worker."""
        return self._workers.waiting

    @property
    def session(self) -> Session | None:
        """The session, for copies that need no worker; None once it was let go."""
        return self._workers.session

    def tune(self, tuning: Tuning, how: Running, session: Session | None = None) -> Session | None:
        """Run requests in a way that was measured to be better, from the next one on.

        Args:
            tuning: What was measured.
            how: What follows from it.
            session: The model with as many threads of a run; None keeps the one there is, which
                has them.

        Returns:
            The session that is not used any more, to be freed where it disturbs nobody; None if
            there is none.
        """
        self.info = replace(self.info, tuning=tuning, threads=how.threads)
        self.workers = how.workers
        self.joined_batch = how.joined_batch if self.info.batches else 1
        self._workers.joined_batch = self.joined_batch
        self._inline_rows = how.inline_rows
        self._inline_seconds = how.inline_seconds
        with self._lock:
            self._backlog.workers = how.workers
        return self._workers.change(session=session, count=how.workers)

    async def retire(self) -> None:
        """Wait for the requests in flight, then free the session.

        The revision must not be reachable by new requests any more.
        """
        with self._lock:
            self._retiring = True
            idle = self.in_flight == 0
        if not idle:
            await self._idle.wait()
        self._workers.close()
        await self._closed.wait()
        await asyncio.to_thread(return_memory)
        self.freed.set()

    def _on_workers_closed(self) -> None:
        _call_on(self._loop, self._closed.set)


def _reason(error: BaseException) -> str:
    if isinstance(error, (QueueFull, QueueTimeout, RequestExpired, ServerStopping)):
        return REJECTED
    return BACKEND if isinstance(error, (ExecutionFailed, DeviceFailed)) else OTHER


def _call_on(loop: asyncio.AbstractEventLoop, callback: Callable[[], None]) -> None:
    try:
        loop.call_soon_threadsafe(callback)
    except RuntimeError:
        # The event loop is closed, and with it everybody who could wait.
        return
