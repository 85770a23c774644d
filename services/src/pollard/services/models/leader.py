"""Which of the managers on one database leads: takes the steps of switches and rollouts.

The leader holds a row of the database, and makes it grow while it lives. Whoever sees it not grow
for as long as a lease, by a monotonic clock of his own, takes the row. So no clock is compared
with another machine's, and one that is set changes nothing.

Nobody acts who does not lead: a leader that cannot reach the database gives up before another may
take the row, and each of its transactions looks whether the row is still its own, while whoever
takes the row waits for his turn as every writer does.

With SQLite there is one manager, and it leads.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import structlog
from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from pollard.services.common.errors import ServiceError, Unavailable
from pollard.services.common.lifecycle import cancel
from pollard.services.models.schema import Event, Lease
from pollard.services.models.store import Store

_log = structlog.get_logger("pollard.leader")

T = TypeVar("T")

_NAME = "leader"
LEASE_SECONDS = 5.0
"""How long the row may stand still before another manager takes it."""

RENEW_SECONDS = 1.0
"""How often the leader makes it grow."""

LOOK_SECONDS = 0.2
"""How often the leader looks for changes of another manager, and the others at the row."""

_GIVE_UP = 0.8
"""Part of the lease after which a leader that could not renew it stops leading."""


@dataclass(frozen=True)
class _Seen:
    """What the database says."""

    holder: str = ""
    address: str = ""
    term: int = 0
    renewals: int = 0
    newest_event: int = 0


class Leadership:
    """The part of one manager in deciding who leads.

    Args:
        store: Holds the row.
        begin: Called when this manager begins to lead, with whether another led before.
        end: Called when it no longer does, with what to tell those who rely on it.
        changed: Called when there are changes that another manager may have made.
        lease_seconds: How long the row may stand still.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        store: Store,
        *,
        begin: Callable[[bool], Awaitable[None]],
        end: Callable[[ServiceError], Awaitable[None]],
        changed: Callable[[], None],
        lease_seconds: float = LEASE_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.leading = False
        """Whether this manager leads."""
        self._store = store
        self._begin, self._end, self._changed = begin, end, changed
        self._lease_seconds = lease_seconds
        self._clock = clock
        self._address = ""
        self._seen = _Seen()
        self._seen_at = 0.0
        self._renewed_at = 0.0
        self._term = 0
        self._looked = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def start(self, address: str) -> None:
        """Lead, if no other manager does, and look after it from now on.

        Args:
            address: gRPC target under which other managers reach this one.
        """
        self._address = address
        if not self._store.database.shared:
            await self._begin(False)
            self.leading = True
            return
        await self._stand_by()
        self._task = asyncio.create_task(self._run(), name="leadership")

    async def stop(self) -> None:
        """Stop leading in good order, so that another manager need not wait for the lease."""
        await cancel(self._task)
        stopping = Unavailable("the manager is stopping", reason="SHUTTING_DOWN")
        leading, self.leading = self.leading, False
        await self._end(stopping)
        if leading and self._store.database.shared:
            try:
                await self._store.write(self._release, in_turn=False)
            except ServiceError as error:
                _log.warning("the lead could not be given up; others wait", error=error.message)

    def check(self, session: Session) -> None:
        """Make sure that the transaction happens only if this manager leads.

        Raises:
            Unavailable: another manager leads.
        """
        if not self._store.database.shared:
            return
        row = session.get(Lease, _NAME, populate_existing=True)
        if row is None or (row.holder, row.term) != (self._store.manager_id, self._term):
            raise _not_leading()

    async def leader(self) -> str:
        """Return the address of the leader, empty if that is this manager; wait for one to be.

        Raises:
            Unavailable: there is none for longer than a lease.
        """
        give_up = self._clock() + self._lease_seconds + 3.0
        while not self.leading:
            alive = self._clock() - self._seen_at < 2.5 * RENEW_SECONDS
            if alive and self._seen.holder not in ("", self._store.manager_id):
                return self._seen.address
            left = give_up - self._clock()
            if left <= 0:
                raise Unavailable(
                    "no manager leads at the moment; see that the database is there, and try again",
                    reason="NO_LEADER",
                )
            self._looked.clear()
            await asyncio.wait({asyncio.ensure_future(self._looked.wait())}, timeout=left)
        return ""

    async def _run(self) -> None:
        while True:
            try:
                if self.leading:
                    await self._lead()
                else:
                    await self._stand_by()
            except ServiceError as error:
                _log.warning("the database cannot be asked who leads", error=error.message)
            except Exception:
                _log.exception("cannot find out who leads; trying again")
            self._looked.set()
            await asyncio.sleep(LOOK_SECONDS)

    async def _stand_by(self) -> None:
        """Look whether the leader lives, and take its place if not."""
        seen = await self._store.read(_look)
        if (seen.term, seen.renewals) != (self._seen.term, self._seen.renewals):
            self._seen_at = self._clock()
        self._seen = seen
        mine = self._store.manager_id
        stands_still = self._clock() - self._seen_at >= self._lease_seconds
        # What this store held when its manager died is nobody else's: the store is locked.
        if seen.holder not in ("", mine) and not stands_still:
            return
        asked_at = self._clock()
        term = await self._store.write(lambda session: self._take(session, seen))
        if term is None:
            return  # another was quicker
        self._term = term
        self._renewed_at = asked_at
        _log.info("leading", term=term, after=seen.holder)
        await self._begin(seen.holder not in ("", mine))
        self.leading = True

    async def _lead(self) -> None:
        """Stay the leader, and look for changes that another manager made."""
        if self._clock() - self._renewed_at >= RENEW_SECONDS:
            asked_at = self._clock()
            renewed = await self._in_time(self._store.write(self._renew, in_turn=False))
            if renewed is False:
                await self._step_down("another manager has taken the lead")
            if renewed:
                self._renewed_at = asked_at
        seen = await self._in_time(self._store.read(_look)) if self.leading else None
        if seen is not None:
            if seen.newest_event != self._seen.newest_event:
                self._changed()
            self._seen = seen

    async def _in_time(self, work: Awaitable[T]) -> T | None:
        """Wait for the database; stop leading, and return None, when it takes too long."""
        task = asyncio.ensure_future(work)
        try:
            left = self._renewed_at + _GIVE_UP * self._lease_seconds - self._clock()
            await asyncio.wait({task}, timeout=max(0.0, left))
            if task.done() and task.exception() is None:
                return task.result()
            if not task.done():
                await self._step_down("the database does not answer")
                await asyncio.wait({task})
            if task.exception() is not None:
                _log.warning("the database cannot be reached", error=str(task.exception()))
            return None
        finally:
            task.cancel()

    async def _step_down(self, why: str) -> None:
        self.leading = False
        self._seen = _Seen()
        _log.warning("no longer leading", why=why)
        await self._end(_not_leading())

    def _take(self, session: Session, seen: _Seen) -> int | None:
        row = session.get(Lease, _NAME, with_for_update=True)
        if row is None:
            row = Lease(name=_NAME, holder="", address="", term=0, renewals=0)
            session.add(row)
        if (row.term, row.renewals) != (seen.term, seen.renewals):
            return None
        row.holder = self._store.manager_id
        row.address = self._address
        row.term += 1
        row.renewals += 1
        return row.term

    def _mine(self) -> tuple[Any, ...]:
        return (
            Lease.name == _NAME,
            Lease.holder == self._store.manager_id,
            Lease.term == self._term,
        )

    def _renew(self, session: Session) -> bool:
        values: dict[Any, Any] = {Lease.renewals: Lease.renewals + 1}
        done: Any = session.execute(update(Lease).where(*self._mine()).values(values))
        return bool(done.rowcount)

    def _release(self, session: Session) -> None:
        session.execute(update(Lease).where(*self._mine()).values(holder="", address=""))


def _look(session: Session) -> _Seen:
    row = session.get(Lease, _NAME)
    newest = session.scalar(select(func.max(Event.sequence))) or 0
    if row is None:
        return _Seen(newest_event=newest)
    return _Seen(row.holder, row.address, row.term, row.renewals, newest)


def _not_leading() -> Unavailable:
    return Unavailable(
        "another manager on the database leads, or none can be found; connect again",
        reason="NOT_LEADER",
    )
