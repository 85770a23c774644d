"""The store on disk: one directory, one manager, one database.

``lock`` keeps a second manager away, ``registry.sqlite`` is the registry,
``blobs/`` the files of the bundles, ``uploads/`` what is still arriving and
``staging/`` what is being checked.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy import Engine, create_engine, event
from sqlalchemy.engine import Connection
from sqlalchemy.exc import DatabaseError, OperationalError
from sqlalchemy.orm import Session
from sqlalchemy.pool import ConnectionPoolEntry

from pollard.services.common.errors import ResourceExhausted, StartupError

T = TypeVar("T")

DATABASE = "registry.sqlite"


def now_us() -> int:
    """Return the time in microseconds since the epoch."""
    return time.time_ns() // 1000


class Store:
    """The store of one manager, locked against others while it is open."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.blobs = directory / "blobs"
        self.uploads = directory / "uploads"
        self.staging = directory / "staging"
        self._lock_file: int | None = None
        self._engine: Engine | None = None
        # SQLite has one writer at a time; waiting here is fair and never times out.
        self._writing = threading.Lock()
        self.after_write: list[Callable[[], None]] = []
        """Called after every transaction that was committed, in the thread of its writer."""

    def open(self) -> None:
        """Lock the directory, bring the database up to date and check it.

        Raises:
            StartupError: another manager has the store, or it is damaged,
                newer than this version, or cannot be written.
        """
        try:
            for path in (self.directory, self.blobs, self.uploads, self.staging):
                path.mkdir(parents=True, exist_ok=True)
            self._take_lock()
        except OSError as error:
            raise StartupError(f"the store {self.directory} cannot be used: {error}") from error
        try:
            self._engine = _make_engine(self.directory / DATABASE)
            with self._engine.connect() as connection:
                _check_integrity(connection, self.directory)
                _migrate(connection, self.directory)
        except DatabaseError as error:
            self.close()
            raise StartupError(
                f"the registry {self.directory / DATABASE} cannot be opened: {error.orig}; "
                "restore it from a backup, or move it away to begin with an empty one"
            ) from error
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the database and give up the lock."""
        if self._engine is not None:
            self._engine.dispose()
            self._engine = None
        if self._lock_file is not None:
            os.close(self._lock_file)
            self._lock_file = None

    def _take_lock(self) -> None:
        path = self.directory / "lock"
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.read(descriptor, 32).decode("ascii", "replace").strip()
            os.close(descriptor)
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise
            raise StartupError(
                f"another manager (process {holder or 'unknown'}) is using the store "
                f"{self.directory}; stop it, or choose another --store"
            ) from error
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        self._lock_file = descriptor

    def read_now(self, work: Callable[[Session], T]) -> T:
        """Run ``work`` on a consistent view of the registry, in this thread."""
        with self._session() as session:
            try:
                return work(session)
            finally:
                # The end of a transaction would empty the rows that were found.
                session.expunge_all()
                session.rollback()

    def write_now(self, work: Callable[[Session], T]) -> T:
        """Run ``work`` in a transaction, in this thread; it is on disk when this returns.

        Raises:
            ResourceExhausted: the disk is full; nothing was changed.
        """
        with self._writing, self._session() as session:
            try:
                session.connection(execution_options={"pollard_write": True})
                result = work(session)
                session.commit()
            except OperationalError as error:
                session.rollback()
                raise _translated(error) from error
            except BaseException:
                session.rollback()
                raise
        for note in tuple(self.after_write):
            note()
        return result

    async def read(self, work: Callable[[Session], T]) -> T:
        """Run ``work`` as :meth:`read_now` in another thread."""
        return await asyncio.to_thread(self.read_now, work)

    async def write(self, work: Callable[[Session], T]) -> T:
        """Run ``work`` as :meth:`write_now` in another thread, to its end.

        A caller that is cancelled meanwhile leaves only afterwards: otherwise
        it would not know whether the transaction happened.
        """
        task = asyncio.ensure_future(asyncio.to_thread(self.write_now, work))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            await asyncio.wait({task})
            if not task.cancelled():
                task.exception()  # marks it as seen
            raise

    def _session(self) -> Session:
        if self._engine is None:
            raise RuntimeError("the store is not open")
        # Rows are used after the transaction as plain records.
        return Session(self._engine, expire_on_commit=False)


def _translated(error: OperationalError) -> BaseException:
    text = str(error.orig)
    if "full" in text or "disk I/O" in text:
        return ResourceExhausted(
            "the disk of the store is full; nothing was changed. Free some space and try again",
            reason="DISK_FULL",
        )
    return error


def _make_engine(path: Path) -> Engine:
    engine = create_engine(
        f"sqlite:///{path}",
        connect_args={"timeout": 30.0, "check_same_thread": False},
        pool_size=8,
        max_overflow=32,
    )

    @event.listens_for(engine, "connect")
    def configure(connection: Any, _: ConnectionPoolEntry) -> None:
        # The driver would begin transactions by itself, and too late for a
        # consistent view; the listener below begins them.
        connection.isolation_level = None
        cursor = connection.cursor()
        cursor.execute("PRAGMA journal_mode=WAL")
        # FULL makes every commit reach the disk: an acknowledged change
        # survives a power cut, not only a killed process.
        cursor.execute("PRAGMA synchronous=FULL")
        cursor.execute("PRAGMA foreign_keys=ON")
        cursor.close()

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        # A transaction that reads first and then writes could otherwise find
        # the database locked in the middle.
        write = connection.get_execution_options().get("pollard_write", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")

    return engine


def _check_integrity(connection: Connection, directory: Path) -> None:
    rows = [row[0] for row in connection.exec_driver_sql("PRAGMA integrity_check(5)")]
    broken = connection.exec_driver_sql("PRAGMA foreign_key_check").fetchmany(5)
    connection.rollback()
    if rows != ["ok"] or broken:
        found = "; ".join([*(row for row in rows if row != "ok"), *(str(row) for row in broken)])
        raise StartupError(
            f"the registry {directory / DATABASE} is damaged: {found}. Nothing was changed; "
            "restore it from a backup"
        )


def _migrate(connection: Connection, directory: Path) -> None:
    config = Config()
    config.set_main_option("script_location", "pollard.services.models:migrations")
    config.set_main_option("path_separator", "os")
    head = ScriptDirectory.from_config(config).get_current_head()
    current = MigrationContext.configure(connection).get_current_revision()
    connection.rollback()
    if current == head:
        return
    config.attributes["connection"] = connection
    try:
        command.upgrade(config, "head")
    except CommandError as error:
        raise StartupError(
            f"the registry in {directory} was made by a newer version of Pollard "
            f"(schema {current}); install that version or a newer one"
        ) from error
