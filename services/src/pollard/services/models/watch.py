"""Watching the audit log: every event once, in order, to any number of watchers.

A watcher is a position in the table of events and nothing else, so one that reads slowly costs no
memory, and one that comes back names its position. What is new is read from the table once for all
of them and kept for a while in memory; whoever is further behind reads pages of the table.

The table is looked at after every change of this manager, and now and then for those of another
manager on the same database.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice

import structlog
from sqlalchemy import delete, func, select
from sqlalchemy.orm import Session

from pollard.models.v1 import model_service_pb2 as pb
from pollard.services.common.errors import OutOfRange, Unavailable
from pollard.services.common.lifecycle import cancel
from pollard.services.models import encode
from pollard.services.models.events import DAY_US
from pollard.services.models.schema import Event, Meta
from pollard.services.models.store import Store, now_us

SIGN_OF_LIFE_SECONDS = 30.0
"""Longest silence on a watch."""

POLL_SECONDS = 1.0
"""How often the table is looked at for what another manager wrote."""

RECENT = 2048
"""Events kept in memory for all watchers together."""

PAGE = 256
"""Events read from the table at once."""

_FORGOTTEN = "events_forgotten"
_FORGET_AT_ONCE = 5000

_log = structlog.get_logger("pollard.watch")


@dataclass(frozen=True)
class Bounds:
    """Which events there are."""

    forgotten: int
    """Events up to this sequence are no longer kept."""
    newest: int
    """Sequence of the newest event ever written."""


def bounds(session: Session) -> Bounds:
    """Return which events there are."""
    meta = session.get(Meta, _FORGOTTEN)
    forgotten = meta.number if meta is not None else 0
    newest = session.scalar(select(func.max(Event.sequence))) or 0
    return Bounds(forgotten, max(newest, forgotten))


def forget(session: Session, retention_days: float) -> int:
    """Forget some of the events that are older than the retention; return how many.

    Events are forgotten from the oldest on, without gaps, so that one number says what is gone;
    where the clock went back, they are kept until the newest of them is old enough. Call it again
    until it returns 0: no single transaction holds other writers up for long.
    """
    horizon = now_us() - int(retention_days * DAY_US)
    kept = session.scalar(select(func.min(Event.sequence)).where(Event.time >= horizon))
    last = kept - 1 if kept is not None else (session.scalar(select(func.max(Event.sequence))) or 0)
    oldest = session.scalar(select(func.min(Event.sequence)))
    if oldest is None or oldest > last:
        return 0
    last = min(last, oldest + _FORGET_AT_ONCE - 1)
    gone = session.execute(delete(Event).where(Event.sequence <= last)).rowcount  # type: ignore[attr-defined]  # of a DELETE it has one
    meta = session.get(Meta, _FORGOTTEN)
    if meta is None:
        session.add(Meta(key=_FORGOTTEN, number=last, content=b""))
    else:
        meta.number = max(meta.number, last)
    return int(gone)


@dataclass(frozen=True)
class Step:
    """What a watcher is told."""

    sequence: int
    """All events up to this one that it wants have been told."""
    event: pb.Event | None = None
    """None in a sign of life."""


@dataclass(frozen=True)
class _Read:
    """An event as it is kept for all watchers."""

    model: str
    event: pb.Event


class EventFeed:
    """Tells watchers about events.

    Args:
        store: Holds the table.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._recent: deque[_Read] = deque()
        # All events after `_floor` up to `_newest` are in `_recent`; None while nobody watches.
        self._floor = 0
        self._newest: int | None = None
        self._watchers = 0
        self._wake = asyncio.Event()
        self._arrived: asyncio.Future[None] | None = None
        self._stopping = False
        self._task: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def watchers(self) -> int:
        """How many watch now."""
        return self._watchers

    def start(self) -> None:
        """Begin to look at the table; inside the event loop."""
        self._loop = asyncio.get_running_loop()
        self._store.after_write.append(self._written)
        self._task = asyncio.create_task(self._run(), name="events")

    async def stop(self) -> None:
        """End every watch with UNAVAILABLE."""
        self._stopping = True
        with contextlib.suppress(ValueError):
            self._store.after_write.remove(self._written)
        await cancel(self._task)
        self._tell()

    async def watch(self, start_sequence: int, model: str) -> AsyncIterator[Step]:
        """Yield a sign of life at once, then every event, in order.

        Args:
            start_sequence: First event wanted; 0 for those from now on.
            model: Only events of this model; empty for all.

        Raises:
            OutOfRange: events that the watcher has not seen are forgotten, or it begins after
                events that never were.
            Unavailable: the manager is stopping.
        """
        there = await self._store.read(bounds)
        if start_sequence > there.newest + 1:
            raise OutOfRange(
                f"start_sequence {start_sequence} lies in the future: the newest event is "
                f"{there.newest}. If the registry was restored from a backup, list again and watch "
                f"from {there.newest + 1}",
                reason="EVENTS_AHEAD",
                start_sequence=start_sequence,
                newest=there.newest,
            )
        seen = start_sequence - 1 if start_sequence else there.newest
        _check_kept(seen, there)
        self._watchers += 1
        self._wake.set()
        try:
            yield Step(seen)
            told = time.monotonic()
            while True:
                # Asked for before looking: what comes in between is not missed.
                arrival = self._next_arrival()
                found, upto = await self._after(seen, model)
                for read in found:
                    yield Step(read.event.sequence, read.event)
                if found:
                    told = time.monotonic()
                if upto > seen:
                    seen = upto
                    continue
                if self._stopping:
                    raise Unavailable("the manager is stopping", reason="SHUTTING_DOWN")
                left = told + SIGN_OF_LIFE_SECONDS - time.monotonic()
                if left > 0:
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(left):
                            await asyncio.shield(arrival)
                    continue
                yield Step(seen)
                told = time.monotonic()
        finally:
            self._watchers -= 1

    async def _after(self, seen: int, model: str) -> tuple[Sequence[_Read], int]:
        """Return a page of the events after `seen`, and up to where there are no others."""
        if self._newest is not None and self._floor <= seen:
            if seen >= self._newest:
                return (), seen
            # Sequences may have gaps, so the place is searched for, from the end on.
            fresh = 0
            for known in reversed(self._recent):
                if known.event.sequence <= seen:
                    break
                fresh += 1
            start = len(self._recent) - fresh
            page = list(islice(self._recent, start, start + PAGE))
            upto = page[-1].event.sequence if fresh > PAGE else self._newest
            return [known for known in page if model in ("", known.model)], upto

        def read(session: Session) -> tuple[list[_Read], int]:
            there = bounds(session)
            _check_kept(seen, there)
            found = _read_after(session, seen, model)
            return found, found[-1].event.sequence if len(found) == PAGE else there.newest

        return await self._store.read(read)

    def _next_arrival(self) -> asyncio.Future[None]:
        if self._arrived is None:
            self._arrived = asyncio.get_running_loop().create_future()
        return self._arrived

    def _tell(self) -> None:
        if self._arrived is not None and not self._arrived.done():
            self._arrived.set_result(None)
        self._arrived = None

    def _written(self) -> None:
        """Note, in the thread of a writer, that something may be new."""
        if self._watchers and self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self._wake.set)

    async def _run(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(POLL_SECONDS if self._watchers else None):
                    await self._wake.wait()
            self._wake.clear()
            if not self._watchers:
                self._recent.clear()
                self._newest = None
                continue
            try:
                await self._look()
            except Exception:
                # Watchers wait meanwhile; nothing is lost, because their positions stand.
                _log.exception("the events cannot be read; trying again")
                await asyncio.sleep(POLL_SECONDS)

    async def _look(self) -> None:
        """Take in what is new."""
        if self._newest is None:
            there = await self._store.read(bounds)
            self._floor = self._newest = there.newest
            self._tell()
        while True:
            reading = partial(_read_after, seen=self._newest, model="")
            found = await self._store.read(reading)
            if not found:
                return
            self._recent.extend(found)
            self._newest = found[-1].event.sequence
            while len(self._recent) > RECENT:
                self._floor = self._recent.popleft().event.sequence
            self._tell()


def _read_after(session: Session, seen: int, model: str) -> list[_Read]:
    statement = select(Event).where(Event.sequence > seen).order_by(Event.sequence).limit(PAGE)
    if model:
        statement = statement.where(Event.model == model)
    return [_Read(row.model, encode.event(row)) for row in session.scalars(statement)]


def _check_kept(seen: int, there: Bounds) -> None:
    if seen < there.forgotten:
        raise OutOfRange(
            f"events up to {there.forgotten} are no longer kept, and the watch asks for "
            f"{seen + 1} and later ones. List again what you follow, then watch from "
            f"{there.newest + 1}",
            reason="EVENTS_FORGOTTEN",
            start_sequence=seen + 1,
            forgotten=there.forgotten,
            newest=there.newest,
        )
