"""How requests wait: priorities, limits and timeouts, and how long a batch may form."""

from __future__ import annotations

import collections
import math
import queue
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pollard.services.inference.errors import QueueFull
from pollard.services.inference.turns import Turns

if TYPE_CHECKING:
    from pollard.services.inference.workers import Work


_RECENT, _USUAL = 0.3, 0.03
"""How far one run moves what is known of the last few runs, and of many."""

_CAUTION = 1.2
"""Runs do not all take the same time; better one refused too many than one kept waiting."""


@dataclass(frozen=True)
class QueuePolicy:
    """What happens to the requests of one priority that wait."""

    max_size: int = 1024
    """Most requests that wait; 0 means no limit."""
    timeout_seconds: float = 0.0
    """Longest wait; 0 means no limit."""
    allow_override: bool = True
    """Whether a request may ask for a shorter wait."""
    delay: bool = False
    """Whether a request that has waited too long waits on behind all others, and does not fail."""

    def wait_seconds(self, asked: float) -> float:
        """Return the longest wait of a request that asks for `asked`; 0 asks for none."""
        limit = self.timeout_seconds or math.inf
        return min(limit, asked) if asked > 0 and self.allow_override else limit


@dataclass(frozen=True)
class Scheduling:
    """How the requests of one model are put in order and joined."""

    policy: QueuePolicy = QueuePolicy()
    """Of every priority that has none of its own."""
    levels: int = 0
    """Number of priorities, 1 being the highest; 0 means that there are none."""
    default_level: int = 0
    """Priority of requests that name none, or one that there is not; 0 means the middle one."""
    level_policies: tuple[tuple[int, QueuePolicy], ...] = ()
    """Pairs of priority and policy."""
    exact: bool = False
    """Whether the queue's limit counts only requests that are still wanted. Costs a little for
    each request."""
    delay_seconds: float = 0.0
    """How long a request may be held back so that a batch fills."""
    fair: bool = False
    """Whether callers take turns; else requests leave the queue as they came."""

    @property
    def plain(self) -> bool:
        """Whether there is one order for all requests, and they are counted roughly."""
        special = self.exact or self.policy.delay or self.level_policies
        return self.levels <= 1 and not special

    @property
    def same_for_all(self) -> bool:
        """Whether requests that ask for nothing special have one priority and wait for ever."""
        return self.plain and self.levels == 0 and not self.policy.timeout_seconds

    def level(self, asked: int) -> int:
        """Return the priority of a request that asks for `asked`; 0 asks for none."""
        if self.levels <= 0:
            return 1
        if 1 <= asked <= self.levels:
            return asked
        return self.default_level or (self.levels + 1) // 2

    def policy_of(self, level: int) -> QueuePolicy:
        """Return the policy of one priority."""
        if not self.level_policies:
            return self.policy
        return dict(self.level_policies).get(level, self.policy)


class Backlog:
    """The work that waits for a revision's workers, to tell early who would wait in vain.

    Guarded by the lock of its revision.
    """

    def __init__(self, workers: int) -> None:
        """Start with no work and no idea how long it takes.

        Args:
            workers: Number of threads that share it.
        """
        self.rows = 0
        """Waiting or running."""
        self.rows_of: dict[str, int] = {}
        """By caller, where callers take turns."""
        self.workers = workers
        """Number of threads that share it."""
        self._recent = 0.0
        self._usual = 0.0
        """Seconds that a row takes, over the last few runs and over many."""

    def learn(self, seconds: float, rows: int) -> None:
        """Note how long a run took."""
        each = seconds / max(1, rows)
        self._recent += _RECENT * (each - self._recent) if self._recent else each
        self._usual += _USUAL * (each - self._usual) if self._usual else each

    def wait_seconds(self) -> float:
        """Return about how long a request that comes now is here; infinite before the first run."""
        row = max(self._recent, self._usual)
        return row * (self.rows / self.workers + 1) if row else math.inf

    def enter(self, rows: int, who: str, *, fair: bool) -> None:
        """Count the rows of a request."""
        self.rows += rows
        if fair:
            self.rows_of[who] = self.rows_of.get(who, 0) + rows

    def leave(self, rows: int, who: str) -> None:
        """Count them no more."""
        self.rows -= rows
        if self.rows_of:
            left = self.rows_of.get(who, 0) - rows
            if left > 0:
                self.rows_of[who] = left
            else:
                self.rows_of.pop(who, None)

    def before(self, rows: int, who: str) -> int:
        """Return the rows that are run before a request, or run already."""
        if not self.rows_of:
            return self.rows
        own = self.rows_of.get(who, 0)
        others = sum(min(n, own + rows) for caller, n in self.rows_of.items() if caller != who)
        return min(self.rows, max(own + others, self.workers))

    def check(self, rows: int, seconds_left: float, who: str = "") -> None:
        """Refuse a request at once that could not be answered in time.

        Raises:
            QueueFull: the work before it, and its own, take longer than it has.
        """
        ahead = self.before(rows, who)
        waiting = ahead - self.workers
        if waiting < 0:
            # A worker is free: whatever was learnt before, this run brings it up to date.
            return
        # Half a row, on average, is left of each that runs now.
        row = max(self._recent, self._usual)
        needed = _CAUTION * row * ((waiting + 0.5 * self.workers) / self.workers + rows)
        if needed > seconds_left:
            raise QueueFull(
                f"Exceeds maximum queue size: {ahead} requests are before it, so that it would "
                f"take {needed:.3f} s, and {max(0.0, seconds_left):.3f} s are left to it",
                needed_seconds=f"{needed:.3f}",
            )


class PriorityQueue:
    """As `queue.SimpleQueue`, but the highest priority leaves first and those too late last.

    Within a priority callers take turns, where that is wanted. None, the sign to end, leaves after
    everything else.
    """

    def __init__(self, scheduling: Scheduling, max_queue: int | None = None) -> None:
        """Make an empty queue.

        Args:
            scheduling: The order.
            max_queue: Most requests that wait; None takes the limits of the priorities' policies.
        """
        self._scheduling = scheduling
        self._max_queue = max_queue
        self._waiting: list[collections.deque[Work] | Turns] = [
            Turns() if scheduling.fair else collections.deque()
            for _ in range(max(1, scheduling.levels))
        ]
        self._late: collections.deque[Work] = collections.deque()
        self._ends = 0
        self._changed = threading.Condition()

    def qsize(self) -> int:
        """Return how many requests wait."""
        return sum(map(len, self._waiting)) + len(self._late)

    def put(self, work: Work | None) -> None:
        """Add a request, or a sign to end.

        Raises:
            QueueFull: too many of its priority wait.
        """
        refused: Work | None = None
        with self._changed:
            if work is None:
                self._ends += 1
            else:
                level = self._waiting[work.level - 1]
                limit = self._max_queue
                if limit is None:
                    limit = self._scheduling.policy_of(work.level).max_size
                if limit and len(level) >= limit:
                    refused = self._make_room(level, work, limit)
                level.append(work)
            self._changed.notify()
        if refused is not None:
            refused.caller.hand_over([(refused, queue_full(limit or 0))])

    def _make_room(
        self, level: collections.deque[Work] | Turns, work: Work, limit: int
    ) -> Work | None:
        """Make room for one more; return whose place it takes, if it takes somebody's.

        Raises:
            QueueFull: there is none.
        """
        if self._max_queue is None:
            # Those whose callers have gone take no places.
            wanted = [each for each in level if not each.caller.gone]
            if len(wanted) < limit:
                level.clear()
                level.extend(wanted)
                return None
        refused = level.give_way(work.who) if isinstance(level, Turns) else None
        if refused is None:
            raise queue_full(limit)
        return refused

    def get(self, block: bool = True, timeout: float | None = None) -> Work | None:
        """Take what comes next.

        Raises:
            queue.Empty: nothing came in time.
        """
        until = None if timeout is None else time.monotonic() + timeout
        with self._changed:
            while True:
                found, work = self._next()
                if found:
                    return work
                left = None if until is None else until - time.monotonic()
                if not block or (left is not None and left <= 0):
                    raise queue.Empty
                self._changed.wait(left)

    def get_nowait(self) -> Work | None:
        """Take what comes next.

        Raises:
            queue.Empty: nothing waits.
        """
        return self.get(block=False)

    def _next(self) -> tuple[bool, Work | None]:
        now = time.monotonic()
        for level, waiting in enumerate(self._waiting, start=1):
            delay = self._scheduling.policy_of(level).delay
            while waiting:
                work = waiting.popleft()
                if delay and now >= work.queue_until:
                    # From now on only its own deadline ends it.
                    work.queue_until = math.inf
                    self._late.append(work)
                    continue
                return True, work
        if self._late:
            return True, self._late.popleft()
        if self._ends:
            self._ends -= 1
            return True, None
        return False, None


def queue_full(limit: int) -> QueueFull:
    """Return the error of a request for which the queue has no place."""
    return QueueFull(f"Exceeds maximum queue size: {limit} requests wait already", max_queue=limit)
