"""The store: one directory of one manager, and the database.

``lock`` keeps a second manager away, ``registry.sqlite`` is the registry unless that is in
PostgreSQL, ``manager-id`` names the manager there, ``blobs/`` holds the files of the bundles
unless they are kept elsewhere, ``uploads/`` what is still arriving.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import Session

from pollard.services.common.errors import StartupError, Unavailable
from pollard.services.common.folder_lock import FolderInUse, FolderLock
from pollard.services.common.lifecycle import to_its_end
from pollard.services.models.blobs_local import LocalBlobs
from pollard.services.models.database import READERS, make_database, outcome_unknown

T = TypeVar("T")

DATABASE = "registry.sqlite"

RETRY_SECONDS = 5.0
"""How long work is tried again while the database cannot be reached."""


def now_us() -> int:
    """Return the time in microseconds since the epoch."""
    return time.time_ns() // 1000


class Store:
    """The store of one manager, locked against others while it is open.

    Args:
        directory: Where it lies.
        database_url: PostgreSQL that other managers may use too; empty keeps the registry in
            the directory.

    Raises:
        StartupError: the URL is not acceptable, or its driver is not installed.
    """

    def __init__(self, directory: Path, database_url: str = "") -> None:
        self.directory = directory
        self.blobs = directory / "blobs"
        self.uploads = directory / "uploads"
        self.database = make_database(database_url, directory, DATABASE)
        self.manager_id = ""
        """Names this store among those of a shared database; known once it is open."""
        self._lock: FolderLock | None = None
        # One at a time; waiting here is fair and never times out.
        self._writing = threading.Lock()
        self.after_write: list[Callable[[], None]] = []
        """Called after every transaction that was committed, in the thread of its writer."""
        self._writer: ThreadPoolExecutor | None = None
        self._readers: ThreadPoolExecutor | None = None

    def open(self) -> None:
        """Lock the directory, bring the database up to date and check it.

        Raises:
            StartupError: another manager has the store, or it is damaged,
                newer than this version, or cannot be written.
        """
        try:
            for path in (self.directory, self.blobs, self.uploads):
                path.mkdir(parents=True, exist_ok=True)
            self._lock = FolderLock(self.directory)
            self._refuse_lost_registry()
            self.manager_id = self._own_id()
        except StartupError:
            self.close()
            raise
        except FolderInUse as error:
            self.close()
            raise StartupError(
                f"another manager (process {error.holder}) is using the store "
                f"{self.directory}; stop it, or choose another --store"
            ) from error
        except OSError as error:
            self.close()
            raise StartupError(
                f"the store {self.directory} cannot be used: {error.strerror or error}. See that "
                "its disk can be written and has room"
            ) from error
        try:
            self.database.open()
        except BaseException:
            self.close()
            raise
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="store-writer")
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="store-reader")

    def close(self) -> None:
        """Close the database and give up the lock."""
        for threads in (self._writer, self._readers):
            if threads is not None:
                threads.shutdown()
        self._writer = self._readers = None
        self.database.close()
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _refuse_lost_registry(self) -> None:
        """Refuse to begin with an empty registry in SQLite where there are bundles of another."""
        registry = self.directory / DATABASE
        there = registry.exists()
        if self.database.shared or (there and registry.stat().st_size > 0):
            return
        if next(iter(LocalBlobs(self.blobs)), None) is not None:
            raise StartupError(
                f"the store {self.directory} holds bundles, and its registry {DATABASE} is "
                f"{'empty' if there else 'missing'}: an empty one would have them all deleted. "
                "Nothing was changed. Move the store away and restore a backup (pollard store "
                "restore), or, to begin with nothing, start with a new --store"
            )

    def _own_id(self) -> str:
        path = self.directory / "manager-id"
        # One that is damaged is made anew: what was held in its name ends by itself.
        with contextlib.suppress(FileNotFoundError, UnicodeDecodeError):
            known = path.read_text("ascii").strip()
            if known.isprintable() and known:
                return known
        made = f"manager-{secrets.token_hex(6)}"
        temporary = path.with_suffix(".new")
        temporary.write_text(made + "\n", "ascii")
        temporary.replace(path)
        return made

    def read_now(self, work: Callable[[Session], T]) -> T:
        """Run ``work`` on a consistent view of the registry, in this thread.

        Raises:
            Unavailable: the database cannot be reached.
            DataLoss: it is damaged.
        """
        return self._until_reached(lambda: self._read_once(work))

    def write_now(self, work: Callable[[Session], T], *, in_turn: bool = True) -> T:
        """Run ``work`` in a transaction, in this thread; it is on disk when this returns.

        Where the database goes away meanwhile, ``work`` may run again, in a new transaction.

        Args:
            work: What to do.
            in_turn: Wait until no other writer is at work, here or in another manager. Without,
                only what is one statement is safe.

        Raises:
            ResourceExhausted: the disk is full; nothing was changed.
            FailedPrecondition: the database can only be read.
            Unavailable: it cannot be reached; the reason says whether the change may have happened.
            DataLoss: it is damaged.
        """
        if not in_turn:
            return self._until_reached(lambda: self._write_once(work, in_turn=False))
        with self._writing:
            return self._until_reached(lambda: self._write_once(work, in_turn=True))

    def _until_reached(self, attempt: Callable[[], T]) -> T:
        give_up = time.monotonic() + RETRY_SECONDS
        pause = 0.05
        while True:
            try:
                return attempt()
            except DBAPIError as error:
                if not self.database.is_interruption(error) or time.monotonic() >= give_up:
                    raise self.database.translated(error) from error
            except PoolTimeout as error:
                raise Unavailable(
                    f"{self.database.name} answers too slowly: every connection is in use; try "
                    "again",
                    reason="DATABASE_BUSY",
                ) from error
            time.sleep(pause)
            pause = min(2 * pause, 0.5)

    def _read_once(self, work: Callable[[Session], T]) -> T:
        with self.database.reading() as session:
            try:
                return work(session)
            finally:
                # The end of a transaction would empty the rows that were found.
                session.expunge_all()
                session.rollback()

    def _write_once(self, work: Callable[[Session], T], *, in_turn: bool) -> T:
        session, transaction = self.database.writing(in_turn=in_turn)
        with session:
            try:
                result = work(session)
                session.flush()
            except BaseException:
                session.rollback()
                raise
            try:
                session.commit()
            except DBAPIError as error:
                with contextlib.suppress(DBAPIError):
                    session.rollback()
                if not self.database.is_interruption(error):
                    raise
                committed = self._ask_outcome(transaction)
                if committed is None:
                    raise outcome_unknown(self.database) from error
                if not committed:
                    raise
        if in_turn:
            for note in tuple(self.after_write):
                note()
        return result

    def _ask_outcome(self, transaction: int) -> bool | None:
        """Find out whether a transaction happened whose commit broke off."""
        give_up = time.monotonic() + RETRY_SECONDS
        while True:
            with contextlib.suppress(DBAPIError):
                found = self.database.was_committed(transaction)
                if found is not None:
                    return found
            if time.monotonic() >= give_up:
                return None
            time.sleep(0.1)

    async def read(self, work: Callable[[Session], T]) -> T:
        """Run ``work`` as :meth:`read_now` in another thread."""
        return await self._run(self._readers, lambda: self.read_now(work))

    async def write(self, work: Callable[[Session], T], *, in_turn: bool = True) -> T:
        """Run ``work`` as :meth:`write_now` in another thread, to its end.

        A caller that is cancelled meanwhile leaves only afterwards: otherwise
        it would not know whether the transaction happened.
        """
        # Writers wait in a queue rather than in threads, which readers need.
        threads = self._writer if in_turn else self._readers
        return await to_its_end(self._run(threads, lambda: self.write_now(work, in_turn=in_turn)))

    @staticmethod
    def _run(threads: ThreadPoolExecutor | None, work: Callable[[], T]) -> asyncio.Future[T]:
        if threads is None:
            raise RuntimeError("the store is not open")
        return asyncio.get_running_loop().run_in_executor(threads, work)
