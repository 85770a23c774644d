"""Turns of callers: whoever asks for little does not wait behind whoever asks for much."""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pollard.services.inference.workers import Work


_MOST_KNOWN = 1024


class Turns:
    """Requests that wait, of callers who get the same share each; as a deque, but for the order.

    Start-time fair queueing (Goyal, Vin and Cheng, 1996): a request's place is where its caller's
    one before it ends, in rows, but never before what has begun already. A caller that asks for one
    thing at a time so waits for one turn of each other caller at most.
    """

    def __init__(self) -> None:
        """Begin with none."""
        self._heap: list[_Place] = []
        self._by_caller: dict[str, deque[_Place]] = {}
        self._ends: dict[str, float] = {}
        """Where the last request of each caller ends."""
        self._now = 0.0
        """Where what was taken last begins."""
        self._count = 0
        self._numbers = itertools.count()

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Work]:
        """List what waits, in the order in which it would be taken."""
        for place in sorted(self._heap):
            if place.work is not None:
                yield place.work

    def append(self, work: Work) -> None:
        """Add a request."""
        start = max(self._now, self._ends.get(work.who, 0.0))
        self._ends[work.who] = start + work.batch
        place = _Place(start, next(self._numbers), work)
        heapq.heappush(self._heap, place)
        self._by_caller.setdefault(work.who, deque()).append(place)
        self._count += 1

    def extend(self, works: Iterable[Work]) -> None:
        """Add several."""
        for work in works:
            self.append(work)

    def popleft(self) -> Work:
        """Take what comes next.

        Raises:
            IndexError: nothing waits.
        """
        while True:
            place = heapq.heappop(self._heap)
            work = place.work
            if work is None:
                continue
            self._now = place.start
            self._count -= 1
            own = self._by_caller[work.who]
            own.popleft()
            if not own:
                del self._by_caller[work.who]
                self._forget()
            if not self._count:
                # Nobody waits, so nobody has anything over another; places that were given up are
                # all that may be left.
                self.clear()
            return work

    def _forget(self) -> None:
        """Forget callers for whom nothing waits, once there are many; each owes a turn at most."""
        if len(self._ends) > _MOST_KNOWN + len(self._by_caller):
            self._ends = {who: self._ends[who] for who in self._by_caller}

    def clear(self) -> None:
        """Forget all that wait."""
        self._heap.clear()
        self._by_caller.clear()
        self._ends.clear()
        self._now, self._count = 0.0, 0

    def give_way(self, who: str) -> Work | None:
        """Take out the last request of who has most waiting, for one of a caller with fewer.

        Args:
            who: For whose request.

        Returns:
            What was taken out; None if nobody has more than that caller would have.
        """
        most = max(self._by_caller, key=lambda caller: len(self._by_caller[caller]), default=who)
        if len(self._by_caller.get(most, ())) <= len(self._by_caller.get(who, ())) + 1:
            return None
        place = self._by_caller[most].pop()
        work, place.work = place.work, None
        assert work is not None  # noqa: S101 - only those that wait are listed
        self._ends[most] -= work.batch
        self._count -= 1
        return work


class _Place:
    """A request in the order; without one, it was taken out."""

    __slots__ = ("number", "start", "work")

    def __init__(self, start: float, number: int, work: Work) -> None:
        self.start, self.number = start, number
        self.work: Work | None = work

    def __lt__(self, other: _Place) -> bool:
        return (self.start, self.number) < (other.start, other.number)
