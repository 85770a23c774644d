"""Deleting blobs that nothing refers to, safe beside uploads, in this manager and in others.

Whoever is about to refer to a blob first holds it, in the registry, and only then looks whether
it is there. The collector condemns, in one transaction, what is neither referred to nor held;
only then deletes it; and then takes the condemnation back. Who wants to hold what is condemned
waits until then. What a manager held when it died is let go when it starts again, and otherwise
ends by itself.

Times are those of the database, so the clocks of managers need not agree.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Iterable, Sequence

import structlog
from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from pollard.services.common.errors import ServiceError, Unavailable
from pollard.services.models.blobs import Blobs
from pollard.services.models.database import clock_us
from pollard.services.models.events import DAY_US
from pollard.services.models.schema import BlobHold, BundleFile
from pollard.services.models.store import Store

_COLLECTOR = "collector"
_BATCH = 100
_DELETE_SECONDS = 20.0
"""Longest time from condemning a blob until its deletion begins."""
_CONDEMNED_US = 120 * 1_000_000
"""After it, whoever condemned a blob is dead: it lasts far longer than deleting takes."""
_WAIT_SECONDS = 30.0

_log = structlog.get_logger("pollard.collector")


class Collector:
    """Keeps blobs from being deleted, and deletes those that nobody needs."""

    def __init__(self, store: Store, blobs: Blobs) -> None:
        self._store = store
        self._blobs = blobs
        self._stopped = False

    def stop(self) -> None:
        """Let a collection that is under way end soon; nothing is collected any more."""
        self._stopped = True

    async def hold(self, digests: Iterable[str]) -> str:
        """Keep blobs from being deleted until :func:`release`, or for a day.

        Args:
            digests: Of the blobs, which may not be there yet.

        Returns:
            What to release.

        Raises:
            Unavailable: they are being deleted for longer than that should take.
        """
        holder = str(uuid.uuid4())
        wanted = sorted(set(digests))
        give_up = time.monotonic() + _WAIT_SECONDS
        while not await self._store.write(
            lambda session: _hold(session, holder, self._store.manager_id, wanted)
        ):
            if time.monotonic() >= give_up:
                raise Unavailable(
                    "files of this bundle are being deleted from the store at this moment; try "
                    "again in a minute",
                    reason="BLOB_BEING_DELETED",
                )
            await asyncio.sleep(0.05)
        return holder

    def collect(self, among: Iterable[str] | None = None) -> list[str]:
        """Delete blobs that nothing refers to; safe beside running uploads.

        Args:
            among: Digests to look at; None for all.

        Returns:
            The digests that were deleted.
        """
        deleted: list[str] = []
        batch: list[str] = []
        for digest in self._blobs if among is None else sorted(set(among)):
            if self._stopped:
                return deleted
            batch.append(digest)
            if len(batch) == _BATCH:
                deleted += self._collect(batch)
                batch = []
        return deleted + self._collect(batch)

    def _collect(self, batch: Sequence[str]) -> list[str]:
        # Most of the time there is nothing to do, which a reader finds out too.
        if not batch or not self._store.read_now(lambda session: _unneeded(session, batch)):
            return []
        condemned = self._store.write_now(
            lambda session: _condemn(session, batch, self._store.manager_id)
        )
        since = time.monotonic()
        deleted = []
        try:
            for digest in condemned:
                if time.monotonic() - since > _DELETE_SECONDS:
                    break
                try:
                    self._blobs.delete(digest)
                except (OSError, ServiceError) as error:
                    _log.warning("a blob was not deleted", sha256=digest, error=str(error))
                else:
                    deleted.append(digest)
        finally:
            self._store.write_now(lambda session: _release(session, _COLLECTOR, condemned))
        return deleted


def release(session: Session, holder: str) -> None:
    """Let go of what is held."""
    session.execute(delete(BlobHold).where(BlobHold.holder == holder))


def release_dead(session: Session, manager: str = "") -> None:
    """Let go of what nobody can be holding any more.

    Args:
        session: Transaction.
        manager: A manager that has just started, so that nothing is under way in it yet.
    """
    session.execute(delete(BlobHold).where(BlobHold.time < clock_us(session) - DAY_US))
    if manager:
        session.execute(delete(BlobHold).where(BlobHold.manager == manager))


def _hold(session: Session, holder: str, manager: str, digests: Sequence[str]) -> bool:
    now = clock_us(session)
    for batch in _batches(digests):
        condemned = select(BlobHold.sha256).where(
            BlobHold.sha256.in_(batch),
            BlobHold.holder == _COLLECTOR,
            BlobHold.time > now - _CONDEMNED_US,
        )
        if session.scalars(condemned).first() is not None:
            return False
    for batch in _batches(digests):
        _release(session, _COLLECTOR, batch)
    session.add_all(
        BlobHold(sha256=digest, holder=holder, manager=manager, time=now) for digest in digests
    )
    return True


def _condemn(session: Session, batch: Sequence[str], manager: str) -> list[str]:
    unneeded = _unneeded(session, batch)
    session.execute(delete(BlobHold).where(BlobHold.sha256.in_(unneeded)))
    now = clock_us(session)
    session.add_all(
        BlobHold(sha256=digest, holder=_COLLECTOR, manager=manager, time=now) for digest in unneeded
    )
    return unneeded


def _unneeded(session: Session, batch: Sequence[str]) -> list[str]:
    now = clock_us(session)
    referred = session.scalars(select(BundleFile.sha256).where(BundleFile.sha256.in_(batch)))
    needed = set(referred)
    for hold in session.scalars(select(BlobHold).where(BlobHold.sha256.in_(batch))):
        lasts = _CONDEMNED_US if hold.holder == _COLLECTOR else DAY_US
        if hold.time > now - lasts:
            needed.add(hold.sha256)
    return [digest for digest in batch if digest not in needed]


def _release(session: Session, holder: str, digests: Sequence[str]) -> None:
    session.execute(delete(BlobHold).where(BlobHold.holder == holder, BlobHold.sha256.in_(digests)))


def _batches(digests: Sequence[str]) -> Iterable[Sequence[str]]:
    for start in range(0, len(digests), _BATCH):
        yield digests[start : start + _BATCH]
