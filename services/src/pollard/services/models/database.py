"""The database of the registry: SQLite in the store, or PostgreSQL that managers share.

Both give the same promises. Writers take turns, so each sees all that was written before it, and
events are committed in the order of their sequences: who has seen one has seen all before it. A
reader sees one moment. What was acknowledged is on disk.
"""

from __future__ import annotations

import os
import sqlite3
import time
from abc import ABC, abstractmethod
from importlib import resources
from pathlib import Path
from typing import Any

import structlog
from sqlalchemy import Engine, create_engine, event, inspect
from sqlalchemy.engine import URL, Connection, make_url
from sqlalchemy.exc import ArgumentError, DataError, DBAPIError, InterfaceError, OperationalError
from sqlalchemy.orm import Session
from sqlalchemy.pool import ConnectionPoolEntry

from pollard.services.common.errors import (
    DataLoss,
    FailedPrecondition,
    InvalidRequest,
    ResourceExhausted,
    ServiceError,
    StartupError,
    Unavailable,
)
from pollard.services.models.sqlite_files import UNOPENED, why_unopened

_log = structlog.get_logger("pollard.store")

READERS = 8
"""Connections for reading; there is one more for writing, and one for what must not wait."""

_WRITER_LOCK = 0x706F6C6C617264
"""Key of the advisory lock that writers on PostgreSQL take in turn: "pollard"."""

_MIGRATION_LOCK = _WRITER_LOCK + 1


class Database(ABC):
    """One database, opened and brought up to date."""

    shared: bool
    """Whether other managers may use it at the same time."""

    def __init__(self) -> None:
        self._engine: Engine | None = None

    @property
    @abstractmethod
    def name(self) -> str:
        """How messages call it; without secrets."""

    @abstractmethod
    def _make_engine(self) -> Engine:
        """Return an engine; nothing is connected yet."""

    @abstractmethod
    def _check(self, connection: Connection) -> None:
        """Look whether it is whole and fit, before anything is changed.

        Raises:
            StartupError: it is not.
        """

    @abstractmethod
    def _cannot_open(self, error: DBAPIError) -> StartupError:
        """Return what to tell of an error while opening."""

    @abstractmethod
    def reading(self) -> Session:
        """Return a session that sees one moment and can change nothing."""

    @abstractmethod
    def writing(self, *, in_turn: bool = True) -> tuple[Session, int]:
        """Return a session in a transaction, and a number by which to ask for its outcome.

        Args:
            in_turn: Wait until no other writer is at work. Otherwise only rows are locked.
        """

    @abstractmethod
    def translated(self, error: DBAPIError) -> BaseException:
        """Return an error as the callers of the store know it."""

    def is_interruption(self, error: DBAPIError) -> bool:
        """Tell whether the transaction did not happen for a reason that may pass by itself."""
        return False

    def was_committed(self, transaction: int) -> bool | None:
        """Tell what became of a transaction whose commit broke off; None while it is not known.

        Raises:
            DBAPIError: the database cannot be asked.
        """
        return False

    def open(self, *, migrate: bool = True) -> None:
        """Connect, check, and bring the tables up to date.

        Args:
            migrate: Without it, tables that are not up to date are an error: another process of
                an earlier version may be using them.

        Raises:
            StartupError: it cannot be reached, is damaged, or newer than this version.
        """
        if not migrate:
            self._check_there()
        self._engine = self._make_engine()
        try:
            with self._engine.connect() as connection:
                self._check(connection)
                self._migrate(connection, allowed=migrate)
        except DBAPIError as error:
            raise self._cannot_open(error) from error

    def close(self) -> None:
        """Give up every connection."""
        if self._engine is not None:
            self._engine.dispose()
            self._engine = None

    @property
    def engine(self) -> Engine:
        """The engine, while it is open."""
        if self._engine is None:
            raise RuntimeError("the store is not open")
        return self._engine

    @abstractmethod
    def _check_there(self) -> None:
        """Refuse to make a database that is only to be read.

        Raises:
            StartupError: there is none.
        """

    def _migrate(self, connection: Connection, *, allowed: bool) -> None:
        head, current = newest_schema(), _schema_of(connection)
        connection.rollback()
        if current == head:
            return
        if not allowed:
            raise StartupError(
                f"{self.name} has the schema {current}, and this version of Pollard uses {head}; "
                "do this with the version that the manager runs"
            )
        # Takes a tenth of a manager's start to import, and is needed after an upgrade only.
        from alembic import command
        from alembic.config import Config
        from alembic.util import CommandError

        config = Config()
        config.set_main_option("script_location", "pollard.services.models:migrations")
        config.set_main_option("path_separator", "os")
        self._begin_migration(connection)
        config.attributes["connection"] = connection
        try:
            command.upgrade(config, "head")
        except CommandError as error:
            raise StartupError(
                f"{self.name} was made by a newer version of Pollard (schema {current}); install "
                "that version or a newer one"
            ) from error

    @abstractmethod
    def _begin_migration(self, connection: Connection) -> None:
        """Keep others from migrating at the same time; the end of the transaction ends it."""


class SqliteDatabase(Database):
    """A file in the store, used by one manager."""

    shared = False

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self._opened: tuple[int, int] | None = None
        """Which file was opened, by device and inode."""

    @property
    def name(self) -> str:
        """How messages call it."""
        return f"the registry {self.path}"

    def open(self, *, migrate: bool = True) -> None:
        """Open, check, and bring the tables up to date.

        Raises:
            StartupError: it cannot be opened, is damaged, or newer than this version.
        """
        super().open(migrate=migrate)
        self._opened = self._file_there()

    def _file_there(self) -> tuple[int, int] | None:
        try:
            found = self.path.stat()
        except OSError:
            return None
        return found.st_dev, found.st_ino

    def _check_there(self) -> None:
        if not self.path.is_file():
            raise StartupError(
                f"{self.path.parent} is not the store of a manager: it holds no {self.path.name}"
            )

    def _make_engine(self) -> Engine:
        engine = create_engine(
            f"sqlite:///{self.path}",
            connect_args={"timeout": 30.0, "check_same_thread": False},
            pool_size=READERS + 2,
            max_overflow=32,
        )

        @event.listens_for(engine, "do_connect")
        def look(*_: Any) -> None:
            # SQLite would make an empty one in its place.
            if self._opened is not None and self._file_there() != self._opened:
                raise sqlite3.OperationalError(UNOPENED)

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
            # Pages that make no sense are an error rather than an answer.
            cursor.execute("PRAGMA cell_size_check=ON")
            cursor.close()

        @event.listens_for(engine, "begin")
        def begin(connection: Connection) -> None:
            # A transaction that reads first and then writes could otherwise find
            # the database locked in the middle.
            write = connection.get_execution_options().get("pollard_write", False)
            connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")

        return engine

    def _check(self, connection: Connection) -> None:
        if not os.access(self.path, os.W_OK) or not os.access(self.path.parent, os.W_OK):
            raise StartupError(
                f"{self.name} cannot be written; give this user the right to, or mount the disk "
                "for writing"
            )
        mode = connection.exec_driver_sql("PRAGMA journal_mode").scalar()
        rows = [row[0] for row in connection.exec_driver_sql("PRAGMA integrity_check(5)")]
        broken = connection.exec_driver_sql("PRAGMA foreign_key_check").fetchmany(5)
        connection.rollback()
        if rows != ["ok"] or broken:
            found = "; ".join(
                [*(row for row in rows if row != "ok"), *(str(row) for row in broken)]
            )
            raise StartupError(
                f"{self.name} is damaged: {found}. Nothing was changed; restore it from a backup"
            )
        if mode != "wal":
            raise StartupError(
                f"{self.name} is on a disk that cannot keep a write-ahead log (SQLite uses {mode} "
                "there), as network disks cannot; choose a --store on a local disk, or a "
                "--database-url of PostgreSQL"
            )

    def _cannot_open(self, error: DBAPIError) -> StartupError:
        text = str(error.orig)
        if UNOPENED in text:
            return StartupError(f"{self.name} cannot be opened: {why_unopened(self.path) or text}")
        if "readonly" in text or "read-only" in text:
            what = "give this user the right to write it, or mount the disk for writing"
        elif "full" in text:
            what = "free some space on its disk"
        else:
            what = (
                f"move {self.path.parent} away and restore a backup (pollard store restore), or "
                "begin with a new --store"
            )
        return StartupError(f"{self.name} cannot be opened: {error.orig}; {what}")

    def _begin_migration(self, connection: Connection) -> None:
        """There are no others: the store is locked."""

    def reading(self) -> Session:
        """Return a session that sees one moment."""
        # Rows are used after the transaction as plain records.
        return Session(self.engine, expire_on_commit=False)

    def writing(self, *, in_turn: bool = True) -> tuple[Session, int]:
        """Return a session in a transaction; SQLite has one writer at a time anyway.

        Raises:
            Unavailable: the file has been removed, or another has taken its place.
        """
        if self._file_there() != self._opened:
            # SQLite would write on where nobody will ever find it.
            raise self._unavailable()
        session = Session(self.engine, expire_on_commit=False)
        try:
            session.connection(execution_options={"pollard_write": True})
        except BaseException:
            session.close()
            raise
        return session, 0

    def translated(self, error: DBAPIError) -> BaseException:
        """Return an error as the callers of the store know it."""
        text = str(error.orig)
        if "malformed" in text or "not a database" in text:
            _log.error("the registry is damaged", registry=str(self.path), error=text)
            return DataLoss(
                f"{self.name} is damaged: {text}. Stop the manager and restore the registry from "
                "a backup; servers go on with what they run",
                reason="REGISTRY_DAMAGED",
                registry=str(self.path),
            )
        if isinstance(error, OperationalError):
            if UNOPENED in text:
                return self._unavailable()
            if "readonly" in text or "read-only" in text:
                return FailedPrecondition(
                    f"{self.name} can only be read: {text}; nothing was changed. Mount its disk "
                    "for writing, or give the manager's user the right to write it",
                    reason="REGISTRY_READ_ONLY",
                    registry=str(self.path),
                )
            if "full" in text or "disk I/O" in text:
                return ResourceExhausted(
                    f"the disk of {self.path.parent} is full; nothing was changed. Free some "
                    "space and try again",
                    reason="DISK_FULL",
                )
        return error

    def _unavailable(self) -> Unavailable:
        why = why_unopened(self.path)
        if not why:
            moved = self._file_there() != self._opened
            why = "another file has taken its place" if moved else UNOPENED
        return Unavailable(
            f"{self.name} cannot be opened: {why}; nothing was changed. Servers go on with what "
            "they run",
            reason="DATABASE_UNAVAILABLE",
            registry=str(self.path),
        )


class PostgresDatabase(Database):
    """A database on a server, which several managers may use at the same time."""

    shared = True

    def __init__(self, url: URL) -> None:
        super().__init__()
        self._url = url
        self._reader: Engine | None = None

    @property
    def name(self) -> str:
        """How messages call it, without the password."""
        return f"the database {self._url.render_as_string(hide_password=True)}"

    def _make_engine(self) -> Engine:
        # A machine or a network that is gone is noticed within about ten seconds on either side,
        # so that it holds up nobody for long who waits for his turn to write.
        keepalive = {"keepalives_idle": 3, "keepalives_interval": 2, "keepalives_count": 3}
        settings = {
            "idle_in_transaction_session_timeout": "8s",
            "tcp_keepalives_idle": "3",
            "tcp_keepalives_interval": "2",
            "tcp_keepalives_count": "3",
            "application_name": "pollard-manager",
            "timezone": "UTC",
        }
        words = [f"-c {key}={value}" for key, value in settings.items()]
        given = self._url.query.get("options", "")
        words += [given] if isinstance(given, str) else list(given)
        engine = create_engine(
            self._url.difference_update_query(["options"]),
            connect_args={
                "connect_timeout": 5,
                "tcp_user_timeout": 8000,
                "options": " ".join(words),
                **keepalive,
            },
            pool_size=READERS + 2,
            max_overflow=4,
            pool_timeout=10,
            pool_pre_ping=True,
            pool_recycle=1800,
            hide_parameters=True,
        )

        @event.listens_for(engine, "connect")
        def configure(connection: Any, _: ConnectionPoolEntry) -> None:
            # Where the server does not wait for the disk by default, this does: what is
            # acknowledged survives a power cut.
            with connection.cursor() as cursor:
                cursor.execute(
                    "SELECT set_config('synchronous_commit', 'on', false)"
                    " WHERE current_setting('synchronous_commit') = 'off'"
                )
            connection.commit()

        return engine

    def _check(self, connection: Connection) -> None:
        encoding, version, fsync, replica = connection.exec_driver_sql(
            "SELECT current_setting('server_encoding'), current_setting('server_version_num'),"
            " current_setting('fsync'), pg_is_in_recovery()"
        ).one()
        connection.rollback()
        if int(version) < 130_000:
            raise StartupError(f"{self.name} is PostgreSQL {version}; 13 or newer is needed")
        if replica:
            raise StartupError(f"{self.name} is a replica that can only be read; name the primary")
        if encoding != "UTF8":
            raise StartupError(
                f"{self.name} has the encoding {encoding}, which cannot hold every name; create "
                "it with ENCODING 'UTF8'"
            )
        if fsync != "on":
            _log.warning("the database does not wait for its disk (fsync = off): a power cut loses")

    def _check_there(self) -> None:
        """Leave it to the server to say so."""

    def _begin_migration(self, connection: Connection) -> None:
        """Wait for a manager that is migrating."""
        connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_MIGRATION_LOCK})")

    def _cannot_open(self, error: DBAPIError) -> StartupError:
        return StartupError(
            f"{self.name} cannot be used: {_one_line(error)}; see that it runs, that the "
            "database exists, and that --database-url names host, user and password"
        )

    def close(self) -> None:
        """Give up every connection."""
        super().close()
        self._reader = None

    def reading(self) -> Session:
        """Return a session that sees one moment and can change nothing."""
        if self._reader is None:
            self._reader = self.engine.execution_options(
                isolation_level="REPEATABLE READ", postgresql_readonly=True
            )
        return Session(self._reader, expire_on_commit=False)

    def writing(self, *, in_turn: bool = True) -> tuple[Session, int]:
        """Return a session in a transaction, after those before it.

        Under READ COMMITTED every statement sees what was committed before it began, and while
        the lock is held nobody else commits: so all of them see the same.
        """
        session = Session(self.engine, expire_on_commit=False)
        try:
            connection = session.connection()
            if in_turn:
                connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_WRITER_LOCK})")
            transaction = connection.exec_driver_sql(
                "SELECT pg_current_xact_id()::text::bigint"
            ).scalar_one()
        except BaseException:
            session.close()
            raise
        return session, int(transaction)

    def is_interruption(self, error: DBAPIError) -> bool:
        """Tell whether the transaction did not happen for a reason that may pass by itself."""
        state = _sqlstate(error)
        return (
            error.connection_invalidated
            # Connection failures, serialization and deadlock, shutdown and start of the server.
            or state[:2] in ("08", "40", "57")
            or state in ("53300", "25P03", "55P03")
            or (isinstance(error, (OperationalError, InterfaceError)) and not state)
        )

    def was_committed(self, transaction: int) -> bool | None:
        """Ask what became of a transaction."""
        with self.engine.connect() as connection:
            state = connection.exec_driver_sql(
                f"SELECT pg_xact_status('{transaction:d}'::xid8)"
            ).scalar()
        return {"committed": True, "aborted": False}.get(str(state))

    def translated(self, error: DBAPIError) -> BaseException:
        """Return an error as the callers of the store know it."""
        state = _sqlstate(error)
        if self.is_interruption(error):
            return Unavailable(
                f"{self.name} cannot be reached: {_one_line(error)}; nothing was changed. Servers "
                "go on with what they run; try again",
                reason="DATABASE_UNAVAILABLE",
            )
        if state in ("53100", "53200"):
            return ResourceExhausted(
                f"{self.name} has no room: {_one_line(error)}; nothing was changed. Free some "
                "space there and try again",
                reason="DISK_FULL",
            )
        if state in ("25006", "42501"):
            return FailedPrecondition(
                f"{self.name} refuses to be written: {_one_line(error)}; nothing was changed. "
                "Name the primary in --database-url, with a user who may write",
                reason="REGISTRY_READ_ONLY",
            )
        if state in ("XX001", "XX002"):
            return DataLoss(
                f"{self.name} is damaged: {_one_line(error)}. Restore it from a backup; servers go "
                "on with what they run",
                reason="REGISTRY_DAMAGED",
            )
        if isinstance(error, DataError) or state[:2] == "22":
            return InvalidRequest(
                f"a value of the request cannot be kept or compared: {_one_line(error)}",
                reason="VALUE_INVALID",
            )
        return error


def newest_schema() -> str:
    """Return the schema that this version uses: the number of the last migration."""
    scripts = resources.files("pollard.services.models.migrations") / "versions"
    return max(item.name[:4] for item in scripts.iterdir() if item.name[:4].isdigit())


def _schema_of(connection: Connection) -> str | None:
    """Return the schema of a database; None of an empty one."""
    if not inspect(connection).has_table("alembic_version"):
        return None
    found = connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalar()
    return None if found is None else str(found)


def clock_us(session: Session) -> int:
    """Return the database's time in microseconds since the epoch, which all managers share."""
    if session.get_bind().dialect.name != "postgresql":
        return time.time_ns() // 1000
    text = "SELECT (extract(epoch FROM clock_timestamp()) * 1000000)::bigint"
    return int(session.connection().exec_driver_sql(text).scalar_one())


def outcome_unknown(database: Database) -> ServiceError:
    """Return the error of a change of which nobody can tell whether it happened."""
    return Unavailable(
        f"{database.name} went away while the change was being stored, and cannot be asked whether "
        "it was. Read it again when the database is back, or repeat the request with the same "
        "request_id: it happens once",
        reason="OUTCOME_UNKNOWN",
    )


def _sqlstate(error: DBAPIError) -> str:
    return getattr(error.orig, "sqlstate", None) or ""


def _one_line(error: DBAPIError) -> str:
    return "; ".join(line.strip() for line in str(error.orig).splitlines() if line.strip())


def make_database(url: str, directory: Path, file: str) -> Database:
    """Return the database that a URL names, or the one in the store.

    Args:
        url: ``postgresql://…``; empty for SQLite in the store.
        directory: The store.
        file: Name of the file in the store.

    Raises:
        StartupError: the URL is not one of PostgreSQL, or the driver is not installed.
    """
    if not url:
        return SqliteDatabase(directory / file)
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        # Without its cause, which quotes what it takes for the port: part of the password, where
        # that holds a "/".
        raise StartupError(
            "--database-url is not of the form postgresql://USER:PASSWORD@HOST:PORT/DATABASE; "
            "write characters such as / and @ in a password as %2F and %40"
        ) from None
    if parsed.drivername not in ("postgresql", "postgresql+psycopg", "postgres"):
        raise StartupError(
            f"--database-url names {parsed.drivername!r}; it can be postgresql://…, or empty for "
            "SQLite in the store"
        )
    try:
        import psycopg  # noqa: F401 - only to say what is missing
    except ImportError as error:
        raise StartupError(
            f"PostgreSQL needs its driver ({error}): pip install 'pollard-services[postgres]'"
        ) from error
    return PostgresDatabase(parsed.set(drivername="postgresql+psycopg"))
