"""Verification: every stored file is read again and compared with its digest."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import structlog
from sqlalchemy import select
from sqlalchemy.orm import Session

from pollard.services.models import registry
from pollard.services.models.blobs import Blobs
from pollard.services.models.schema import BundleFile, Revision
from pollard.services.models.store import Store

_EVERY_SECONDS = 1.0

_log = structlog.get_logger("pollard.verify")


@dataclass(frozen=True)
class Damaged:
    """A stored file that is not what its digest says."""

    sha256: str
    actual: str
    """Empty when it cannot be read."""
    message: str
    uses: tuple[str, ...]
    """Resource names of revisions, each with the path within its bundle."""


@dataclass(frozen=True)
class Progress:
    """How far a verification is."""

    checked_files: int
    checked_bytes: int
    total_files: int
    total_bytes: int
    damaged: tuple[Damaged, ...]
    """Found since the last one."""


@dataclass
class _Blob:
    size_bytes: int
    uses: list[str] = field(default_factory=list)


async def verify(store: Store, blobs: Blobs, model: str = "") -> AsyncIterator[Progress]:
    """Hash every blob that a bundle has, and tell what is damaged; nothing is changed.

    Args:
        store: Holds the registry.
        blobs: Hold the files.
        model: Only the revisions of this model; empty for all.

    Raises:
        NotFound: there is no such model.
    """
    todo = await store.read(lambda session: _blobs(session, model))
    total = sum(blob.size_bytes for blob in todo.values())
    done = done_bytes = 0
    found: list[Damaged] = []
    told = time.monotonic()
    for sha256, blob in sorted(todo.items()):
        damaged = await asyncio.to_thread(_check, blobs, sha256, blob)
        # What was deleted for good meanwhile is not missing.
        if damaged is not None and await store.read(lambda s, d=sha256: _is_known(s, d)):  # type: ignore[misc]  # bound now
            _log.error("a blob is damaged", sha256=sha256, message=damaged.message)
            found.append(damaged)
        done += 1
        done_bytes += blob.size_bytes
        if found or time.monotonic() - told >= _EVERY_SECONDS:
            yield Progress(done, done_bytes, len(todo), total, tuple(found))
            found, told = [], time.monotonic()
    yield Progress(done, done_bytes, len(todo), total, ())


def _blobs(session: Session, model: str) -> dict[str, _Blob]:
    statement = select(BundleFile, Revision.model, Revision.number).join(
        Revision, Revision.bundle_sha256 == BundleFile.bundle_sha256
    )
    if model:
        registry.find_model(session, model, deleted=True)
        statement = statement.where(Revision.model == model)
    found: dict[str, _Blob] = {}
    for file, owner, number in session.execute(statement):
        blob = found.setdefault(file.sha256, _Blob(file.size_bytes))
        blob.uses.append(f"{registry.revision_name(owner, number)}/{file.path}")
    return found


def _is_known(session: Session, sha256: str) -> bool:
    return (
        session.scalars(select(BundleFile).where(BundleFile.sha256 == sha256)).first() is not None
    )


def _check(blobs: Blobs, sha256: str, blob: _Blob) -> Damaged | None:
    uses = tuple(sorted(blob.uses))
    try:
        actual = blobs.rehash(sha256)
    except FileNotFoundError:
        return Damaged(sha256, "", "it is missing", uses)
    except OSError as error:
        return Damaged(sha256, "", f"it cannot be read: {error.strerror}", uses)
    if actual == sha256:
        return None
    return Damaged(sha256, actual, f"its SHA-256 is {actual}", uses)
