"""How much each caller may store."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import AsyncIterator

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from pollard.services.common.auth import Caller
from pollard.services.common.auth.errors import LimitReached
from pollard.services.models.schema import Bundle, Revision
from pollard.services.models.store import Store


def stored_bytes(session: Session, creator: str) -> int:
    """Return the sizes of all bundles that somebody has stored, in bytes.

    What is deleted counts as long as it can be brought back.
    """
    mine = select(Revision.bundle_sha256).where(Revision.creator == creator).distinct()
    found = session.scalar(
        select(func.coalesce(func.sum(Bundle.size_bytes), 0)).where(Bundle.sha256.in_(mine))
    )
    return int(found or 0)


class Quotas:
    """Looks before an upload whether its caller may store so much."""

    def __init__(self, store: Store) -> None:
        """Count what is in `store`."""
        self._store = store
        self._arriving: Counter[str] = Counter()

    @contextlib.asynccontextmanager
    async def room_for(self, caller: Caller, size: int) -> AsyncIterator[None]:
        """Keep room for an upload of `size` bytes while the block runs.

        Raises:
            LimitReached: the caller may not store so much.
        """
        limit = caller.limits.stored_bytes
        if not limit:
            yield
            return
        # Before the look, so that two at once do not both find the last room.
        self._arriving[caller.key] += size
        try:
            stored = await self._store.read(lambda session: stored_bytes(session, caller.actor))
            if stored + self._arriving[caller.key] > limit:
                raise LimitReached(
                    f"{caller.name} has stored {stored} bytes and may store {limit}: {size} more "
                    "do not fit. Delete revisions, or ask for a higher limit",
                    reason="STORAGE_LIMIT",
                    stored=stored,
                    limit=limit,
                    size=size,
                    caller=caller.key,
                )
            yield
        finally:
            self._arriving[caller.key] -= size
            if self._arriving[caller.key] <= 0:
                del self._arriving[caller.key]
