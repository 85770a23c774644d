"""Backups: the registry at one moment, and every blob that it refers to.

A backup is a directory: ``registry-….sqlite`` with the rows of the registry, whether it lies in
SQLite or in PostgreSQL, ``blobs/`` as a store keeps them, and ``backup.json``, which is written
last and names the registry with its digest. A backup into the same directory again adds the blobs
that are new, and replaces the registry in one step. ``lock`` is held by who writes or restores it.

Not kept: what is under way (uploads, leases, holds), which belongs to managers that run.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import hashlib
import json
import os
import secrets
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from sqlalchemy import delete, func, insert, select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from pollard.runtime.bundle import sync_directory, write_durably
from pollard.runtime.digests import sha256_file
from pollard.runtime.disk import disk_full
from pollard.services.common.errors import DataLoss, ResourceExhausted, StartupError
from pollard.services.models import ownership
from pollard.services.models.blobs import OWNER, Blobs
from pollard.services.models.blobs_local import LocalBlobs
from pollard.services.models.database import Database, PostgresDatabase, SqliteDatabase
from pollard.services.models.schema import Base, BlobHold, BundleFile, Event, Lease, Model, Upload
from pollard.services.models.store import DATABASE

INFO = "backup.json"
LOCK = "lock"
_FORMAT = 1
_LEFT_OUT = {table.__tablename__ for table in (BlobHold, Lease, Upload)}
_ROWS = 500
_ROUNDS = 5
_SCRATCH = "pollard-blobs-"
_HELD = (errno.EWOULDBLOCK, errno.EACCES)

Progress = Callable[[int, int], None]
"""Told the bytes that are done, and all."""


@dataclass(frozen=True)
class Info:
    """What a backup says of itself."""

    format: int
    registry: str
    """Name of the file with the rows."""
    registry_sha256: str
    create_time: float
    """Seconds since the epoch."""
    models: int
    blobs: int
    blob_bytes: int
    damaged: tuple[str, ...]
    """Digests of blobs that were damaged or missing, and are not in it."""


def back_up(
    database: Database, blobs: Blobs, directory: Path, progress: Progress | None = None
) -> Info:
    """Write a backup of a registry and its blobs, beside managers that run or without them.

    Args:
        database: Not open.
        blobs: Of the same installation.
        directory: Where to; new, empty, or an earlier backup.
        progress: Told how far it is.

    Raises:
        StartupError: the registry cannot be opened, the directory holds something else, or another
            backup is being written there.
        ServiceError: the blobs cannot be read.
        ResourceExhausted: the disk is full.
        OSError: the backup cannot be written.
    """
    _check_target(directory)
    directory.mkdir(parents=True, exist_ok=True)
    with _room(directory, "a backup that was there is as it was"), _alone(directory):
        return _back_up(database, blobs, directory, progress)


def _back_up(database: Database, blobs: Blobs, directory: Path, progress: Progress | None) -> Info:
    kept = LocalBlobs(directory / "blobs")
    kept.check()
    _remove_leftovers(kept, directory)
    with _opened(database):
        for _ in range(_ROUNDS):
            registry = directory / f"registry-{secrets.token_hex(6)}.sqlite"
            try:
                models = _copy_out(database, registry)
                wanted = _wanted(registry)
                damaged = _copy_blobs(blobs, kept, wanted, progress)
                # What is missing may have been deleted for good since the rows were read.
                if not damaged or all(_is_known(database, digest) for digest in damaged):
                    break
            except BaseException:
                registry.unlink(missing_ok=True)
                raise
            registry.unlink()
        else:
            raise DataLoss(
                f"blobs disappeared from {blobs.name} while they were copied; try again",
                reason="BLOB_MISSING",
            )
    info = Info(
        format=_FORMAT,
        registry=registry.name,
        registry_sha256=sha256_file(registry),
        create_time=time.time(),
        models=models,
        blobs=len(wanted) - len(damaged),
        blob_bytes=sum(size for digest, size in wanted.items() if digest not in damaged),
        damaged=tuple(sorted(damaged)),
    )
    write_durably(directory / INFO, (json.dumps(asdict(info), indent=1) + "\n").encode())
    for other in directory.glob("registry-*.sqlite*"):
        if other.name != info.registry:
            other.unlink()
    for digest in list(kept):
        if digest not in wanted:
            kept.delete(digest)
    return info


def restore(
    directory: Path,
    store: Path,
    open_database: Callable[[Path], Database],
    open_blobs: Callable[[Path], Blobs],
    progress: Progress | None = None,
    *,
    skip_damaged: bool = False,
) -> Info:
    """Make a store from a backup. It is whole when it has its name, and is not there before.

    Args:
        directory: The backup.
        store: Where to; must not exist, or be empty.
        open_database: Returns the database of a store at a path, not open; it must be empty.
        open_blobs: Returns the blobs of a store at a path.
        progress: Told how far it is.
        skip_damaged: Leave out blobs of the backup that are damaged, instead of restoring nothing.

    Returns:
        What the backup says of itself; with `skip_damaged` those that were left out are among its
        damaged blobs.

    Raises:
        StartupError: there is no whole backup, what is restored to is not empty, or the backup is
            being written.
        ServiceError: the blobs cannot be written.
        DataLoss: a blob of the backup is damaged.
        ResourceExhausted: the disk is full.
        OSError: the store cannot be written.
    """
    with _room(store.parent, "nothing was restored"), _unchanging(directory):
        return _restore(directory, store, open_database, open_blobs, progress, skip_damaged)


def _restore(
    directory: Path,
    store: Path,
    open_database: Callable[[Path], Database],
    open_blobs: Callable[[Path], Blobs],
    progress: Progress | None,
    skip_damaged: bool,
) -> Info:
    info = read_info(directory)
    if store.exists() and (not store.is_dir() or any(store.iterdir())):
        raise StartupError(
            f"{store} is not empty; restore into a new directory, and move the old one away first"
        )
    store.parent.mkdir(parents=True, exist_ok=True)
    with _workplace(store) as folder:
        made = folder / "store"
        made.mkdir()
        source = SqliteDatabase(folder / "registry.sqlite")
        shutil.copyfile(directory / info.registry, source.path)
        blobs, database = open_blobs(made), open_database(made)
        blobs.check()
        if blobs.shared and blobs.owner():
            raise StartupError(
                f"the blobs in {blobs.name} belong to an installation of Pollard already; restore "
                f"to another prefix, or, if that one is gone for good, delete {OWNER!r} "
                "there"
            )
        # An older backup is brought up to date here, in the copy.
        with _opened(source, migrate=True), _opened(database, migrate=True):
            _refuse_rows(database)
            wanted = _read(source, _digests)
            for digest in info.damaged:
                wanted.pop(digest, None)
            kept = LocalBlobs(directory / "blobs")
            damaged = _copy_blobs(kept, blobs, wanted, progress)
            if damaged and not skip_damaged:
                raise DataLoss(
                    f"the backup {directory} is damaged: {len(damaged)} blobs are missing or not "
                    f"what their names say, such as {min(damaged)}. Nothing was restored; take "
                    "another backup, or restore what is whole of this one (--skip-damaged)",
                    reason="BACKUP_DAMAGED",
                )
            info = _without(info, {digest: wanted[digest] for digest in damaged})
            # The rows come last: they say that everything they refer to is there.
            _copy_in(source, database)
        _flatten(made / DATABASE)
        for path in (made, *made.rglob("*")):
            if path.is_dir():
                sync_directory(path)
        try:
            if store.exists():
                store.rmdir()
            made.rename(store)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            raise StartupError(
                f"{store} is not empty any more: somebody else has made it meanwhile, and it is "
                "left as it is. Restore into another directory if it is not what you want"
            ) from error
        sync_directory(store.parent)
    return info


def _without(info: Info, damaged: dict[str, int]) -> Info:
    """Return what a backup says of itself without some of its blobs, whose sizes are given."""
    return replace(
        info,
        blobs=info.blobs - len(damaged),
        blob_bytes=info.blob_bytes - sum(damaged.values()),
        damaged=tuple(sorted({*info.damaged, *damaged})),
    )


def read_info(directory: Path) -> Info:
    """Return what a backup says of itself, if its registry is whole.

    Raises:
        StartupError: there is no whole backup.
    """
    try:
        said = json.loads((directory / INFO).read_text("utf-8"))
        if said["format"] != _FORMAT:
            raise StartupError(
                f"the backup {directory} has the format {said['format']}, which a newer version of "
                "Pollard writes; restore it with that version"
            )
        info = Info(**said | {"damaged": tuple(said["damaged"])})
        actual = sha256_file(directory / info.registry)
    except FileNotFoundError as error:
        raise StartupError(
            f"{directory} is no whole backup: {error.filename} is missing. `pollard store backup` "
            f"writes {INFO} last"
        ) from error
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise StartupError(
            f"{INFO} of the backup {directory} cannot be read: {error}; take another backup"
        ) from error
    if actual != info.registry_sha256:
        raise StartupError(
            f"the backup {directory} is damaged: the SHA-256 of {info.registry} is {actual} and "
            f"not {info.registry_sha256}; take another backup"
        )
    return info


def _check_target(directory: Path) -> None:
    if directory.exists() and not directory.is_dir():
        raise StartupError(f"{directory} is not a directory; name one for the backup")
    if not directory.exists() or (directory / INFO).is_file():
        return
    # What an interrupted first backup has left may stay.
    if any(
        entry.name not in ("blobs", LOCK) and not entry.name.startswith(("registry-", f".{INFO}."))
        for entry in directory.iterdir()
    ):
        raise StartupError(
            f"{directory} holds something that is no backup; name a new directory, or that of an "
            "earlier backup"
        )


@contextmanager
def _room(directory: Path, kept: str) -> Iterator[None]:
    """Say of which disk it is that it is full, and what became of what was there."""
    try:
        yield
    except OSError as error:
        if not disk_full(error):
            raise
        raise ResourceExhausted(
            f"the disk of {directory} is full; {kept}. Free some space and run the command again",
            reason="DISK_FULL",
        ) from error


@contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Write a backup that nobody else writes or restores."""
    with (directory / LOCK).open("ab") as lock:
        if not _take(lock.fileno(), fcntl.LOCK_EX):
            raise StartupError(
                f"the backup {directory} is being written or restored by another command; wait "
                "until that has ended, or name another directory"
            )
        yield


@contextmanager
def _unchanging(directory: Path) -> Iterator[None]:
    """Read a backup that nobody writes meanwhile, as far as that can be known."""
    with contextlib.ExitStack() as stack:
        # An older version leaves none, and whoever may only read the others need not this one.
        with contextlib.suppress(OSError):
            lock = stack.enter_context((directory / LOCK).open("rb"))
            if not _take(lock.fileno(), fcntl.LOCK_SH):
                raise StartupError(
                    f"the backup {directory} is being written; restore it when that has ended"
                )
        yield


def _take(descriptor: int, how: int) -> bool:
    try:
        fcntl.flock(descriptor, how | fcntl.LOCK_NB)
    except OSError as error:
        # Some network disks have no locks.
        return error.errno not in _HELD
    return True


@contextmanager
def _workplace(store: Path) -> Iterator[Path]:
    """Return a folder beside a store that is to be; what killed restores have left there goes."""
    prefix = f".{store.name}-"
    for other in store.parent.glob(f"{glob.escape(prefix)}*/{LOCK}"):
        with contextlib.suppress(OSError), other.open("rb") as lock:
            if _take(lock.fileno(), fcntl.LOCK_EX):
                shutil.rmtree(other.parent, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=prefix, dir=store.parent) as made:
        folder = Path(made)
        with (folder / "new").open("wb") as lock:
            # Has its name once it is held: others would take it for one that was left.
            _take(lock.fileno(), fcntl.LOCK_EX)
            (folder / "new").rename(folder / LOCK)
            yield folder


def _remove_leftovers(kept: LocalBlobs, directory: Path) -> None:
    """Remove what killed backups have left, but for blobs and rows, which may be needed."""
    for folder in kept.directory.glob(f"{_SCRATCH}*"):
        shutil.rmtree(folder, ignore_errors=True)
    kept.remove_leftovers(time.time())
    for file in directory.glob(f".{INFO}.*"):
        file.unlink(missing_ok=True)


@contextmanager
def _opened(database: Database, *, migrate: bool = False) -> Iterator[None]:
    database.open(migrate=migrate)
    try:
        yield
    except DBAPIError as error:
        raise database.translated(error) from error
    finally:
        database.close()


def _read(database: Database, work: Callable[[Session], dict[str, int]]) -> dict[str, int]:
    with database.reading() as session:
        return work(session)


def _digests(session: Session) -> dict[str, int]:
    """Return the sizes of all blobs that the registry refers to, by digest."""
    rows = session.execute(select(BundleFile.sha256, BundleFile.size_bytes).distinct())
    return {row.sha256: row.size_bytes for row in rows}


def _wanted(registry: Path) -> dict[str, int]:
    database = SqliteDatabase(registry)
    with _opened(database):
        found = _read(database, _digests)
    _flatten(registry)
    return found


def _is_known(database: Database, sha256: str) -> bool:
    statement = select(func.count()).where(BundleFile.sha256 == sha256)
    with database.reading() as session:
        return bool(session.scalar(statement))


def _copy_out(database: Database, registry: Path) -> int:
    """Write the rows of one moment into a new file; return how many models there are."""
    target = SqliteDatabase(registry)
    with _opened(target, migrate=True):
        session, _ = target.writing()
        with session, database.reading() as reading:
            _copy_rows(reading, session)
            session.commit()
            models = session.scalar(select(func.count()).select_from(Model)) or 0
    _flatten(registry)
    return models


def _copy_in(source: Database, database: Database) -> None:
    session, _ = database.writing()
    with session, source.reading() as reading:
        _copy_rows(reading, session)
        # It is another installation: the first one may live on.
        ownership.renew(session)
        if isinstance(database, PostgresDatabase):
            last = session.scalar(select(func.max(Event.sequence))) or 0
            session.execute(
                text("SELECT setval(pg_get_serial_sequence('events', 'sequence'), :last)"),
                {"last": max(last, 1)},
            )
        session.commit()


def _copy_rows(source: Session, target: Session) -> None:
    for table in reversed(Base.metadata.sorted_tables):
        target.execute(delete(table))
    for table in Base.metadata.sorted_tables:
        if table.name in _LEFT_OUT:
            continue
        rows = source.execute(select(table).execution_options(yield_per=_ROWS)).mappings()
        for batch in rows.partitions(_ROWS):
            target.execute(insert(table), [dict(row) for row in batch])


def _refuse_rows(database: Database) -> None:
    with database.reading() as session:
        if session.scalar(select(func.count()).select_from(Event)):
            raise StartupError(
                f"{database.name} holds a registry already; restore into an empty database"
            )


def _copy_blobs(
    source: Blobs, target: Blobs, wanted: dict[str, int], progress: Progress | None
) -> set[str]:
    """Copy what the target lacks; return what the source has not, or not whole."""
    damaged: set[str] = set()
    total, done = sum(wanted.values()), 0
    there = set(target) & wanted.keys()
    with tempfile.TemporaryDirectory(prefix=_SCRATCH, dir=_scratch(target)) as folder:
        for sha256, size in sorted(wanted.items()):
            if sha256 not in there or not _is_whole(target, sha256):
                file = Path(folder) / sha256
                if _fetch(source, sha256, file):
                    target.adopt(file, sha256)
                else:
                    damaged.add(sha256)
                file.unlink(missing_ok=True)
            done += size
            if progress is not None:
                progress(done, total)
    return damaged


def _scratch(target: Blobs) -> Path | None:
    return target.directory if isinstance(target, LocalBlobs) else None


def _is_whole(blobs: Blobs, sha256: str) -> bool:
    try:
        return blobs.rehash(sha256) == sha256
    except OSError:
        return False


def _fetch(source: Blobs, sha256: str, file: Path) -> bool:
    """Copy a blob into a file, on disk; tell whether it was there and whole."""
    digest = hashlib.sha256()
    pieces = source.pieces(sha256)
    with file.open("wb", buffering=0) as writing:
        while True:
            try:
                piece = next(pieces, b"")
            except OSError:
                return False
            if not piece:
                break
            digest.update(piece)
            writing.write(piece)
        os.fsync(writing.fileno())
    return digest.hexdigest() == sha256


def _flatten(registry: Path) -> None:
    """Leave one file, without a log beside it, all of it on disk."""
    if not registry.exists():
        return
    connection = sqlite3.connect(registry)
    try:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        connection.execute("PRAGMA journal_mode=DELETE")
    finally:
        connection.close()
    for path in (registry, registry.parent):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
