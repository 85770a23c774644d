"""The fleet: which servers there are, what they should run, and what they say.

Of the managers on one database, the one that leads has it; the others hand the streams of servers
on to it. So what servers say is always where the steps are taken.

All methods run in the event loop; one task takes the steps of the switch, so
that steps never overlap and a state is sent only after the transaction that
made it.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncIterator, Callable

import structlog
from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from pollard.models.v1 import fleet_service_pb2 as pb
from pollard.services.common.errors import Conflict, InvalidRequest, ServiceError, Unavailable
from pollard.services.common.lifecycle import cancel
from pollard.services.common.telemetry.traces import Noted, tracer
from pollard.services.models import names
from pollard.services.models.events import DAY_US
from pollard.services.models.fleet_view import FleetView, RevisionReport
from pollard.services.models.known_server import KnownServer, Row, save
from pollard.services.models.schema import Server as ServerRow
from pollard.services.models.store import Store, now_us
from pollard.services.models.switch import StepResult, Switch

_log = structlog.get_logger("pollard.fleet")

MAX_REPORTED_REVISIONS = 10_000
MAX_VERSION = 2**53
RETRY_SECONDS = 1.0

SAID_SECONDS = 60.0
"""How long nothing is said of steps that fail for the reason that was said last."""

MOVE_SECONDS = 15.0
"""How much longer servers are waited for that come over from another manager: one whose machine
is gone is noticed by its servers only after a while."""

WATCHING_REPORT_SECONDS = 1.0
"""Longest time between two reports while a rollout is judged by them."""

REPORTS_PER_SECOND = 200
"""Of all servers together: more of them report less often, so that one core has time for others."""

SEEN_US = 3_600_000_000
"""So often it is written down that a server is still there, though nothing else of it is new."""

UNPACED_SECONDS = 0.02
"""After a step that took longer, the next one is taken no sooner than as much later."""


class Connection:
    """One open stream of a server."""

    def __init__(self, fleet: Fleet, server: KnownServer) -> None:
        self._fleet = fleet
        self.server = server
        self.heard = time.monotonic()
        """When something was heard last."""
        self._changed = asyncio.Event()
        self._told_seconds = fleet.report_interval_seconds
        self._secret = secrets.token_hex(8)
        self._nonces: dict[int, str] = {}
        self._ended = False
        self._error: ServiceError | None = None

    def notify(self) -> None:
        """Look again for a newer state."""
        self._changed.set()

    def end(self, error: ServiceError | None) -> None:
        """End the stream, with ``error`` or as the server wished."""
        if not self._ended:
            self._ended, self._error = True, error
            self._changed.set()

    async def messages(self) -> AsyncIterator[pb.SyncResponse]:
        """Yield what the server must know now and after every change, until the stream is ended.

        That is the desired state and, if the server wants it, whose calls to take. What was
        overtaken before it could be sent is left out.

        Raises:
            ServiceError: why the stream was ended.
        """
        sent, told = 0, -1
        while True:
            self._changed.clear()
            if self._ended:
                if self._error is not None:
                    raise self._error
                return
            access = self._fleet.access
            if access is not None and access.version != told and self.server.hello.wants_access:
                # First: with the state it begins to be asked.
                told = access.version
                yield pb.SyncResponse(access=access)
                continue
            state = self._fleet.state_for(self.server.hello.kind)
            if state.version > sent:
                sent = state.version
                yield pb.SyncResponse(desired_state=self._address(state))
                continue
            await self._changed.wait()

    def _address(self, state: pb.DesiredState) -> pb.DesiredState:
        message = pb.DesiredState()
        message.CopyFrom(state)
        message.nonce = self._nonces[state.version] = f"{self._secret}-{state.version}"
        for old in list(self._nonces)[:-64]:
            del self._nonces[old]
        self._told_seconds = self._fleet.report_seconds()
        message.report_interval.FromNanoseconds(int(self._told_seconds * 1e9))
        return message

    def end_if_silent(self) -> None:
        """End the stream if nothing was heard for too long."""
        limit = self._fleet.silence_of(self._told_seconds)
        if time.monotonic() - self.heard > limit:
            self.end(
                Unavailable(
                    f"nothing was heard for {limit:g} s; servers report at least every "
                    f"{self._told_seconds:g} s",
                    reason="SERVER_SILENT",
                )
            )

    def received(self, message: pb.SyncRequest) -> None:
        """Take in one message after the Hello.

        Raises:
            InvalidRequest: it makes no sense here.
        """
        server = self.server
        if server.connection is not self:
            return
        server.last_seen_us = now_us()
        server.changed()
        self.heard = time.monotonic()
        kind = message.WhichOneof("message")
        if kind == "ack":
            self._acked(message.ack)
        elif kind == "nack":
            self._nacked(message.nack)
        elif kind == "report":
            self._reported(message.report)
        elif kind == "hello":
            raise InvalidRequest(
                "a Hello comes only once, as the first message", reason="HELLO_TWICE"
            )
        else:
            # A later version of the server may say more than this one of the manager knows.
            _log.debug("a message of an unknown kind", server=server.hello.server_id)

    def _is_ours(self, version: int, nonce: str) -> bool:
        known = self._nonces.get(version) == nonce
        if not known:
            _log.debug(
                "answer to no state of this stream",
                server=self.server.hello.server_id,
                version=version,
            )
        return known

    def _acked(self, ack: pb.Ack) -> None:
        if not self._is_ours(ack.version, ack.nonce):
            return
        server = self.server
        server.acked = max(server.acked, ack.version)
        server.acked_version = ack.version
        server.serving = True
        if server.last_nack is not None and server.last_nack.version <= ack.version:
            server.last_nack = None
        self._fleet.server_changed(server)

    def _nacked(self, nack: pb.Nack) -> None:
        if not self._is_ours(nack.version, nack.nonce):
            return
        server = self.server
        server.nacked = max(server.nacked, nack.version)
        server.last_nack = nack
        server.serving = True
        _log.warning(
            "a server refused part of a state",
            server=server.hello.server_id,
            version=nack.version,
            why=nack.status.message,
        )
        self._fleet.server_changed(server)

    def _reported(self, report: pb.Report) -> None:
        if len(report.revisions) > MAX_REPORTED_REVISIONS:
            raise InvalidRequest(
                f"a report of {len(report.revisions)} revisions is too long",
                reason="REPORT_TOO_LONG",
                revisions=len(report.revisions),
            )
        server = self.server
        server.report = report
        before = (server.revisions, server.answered_before_report)
        server.revisions = {
            (entry.model, entry.revision): RevisionReport(
                entry.state,
                entry.error if entry.HasField("error") else None,
                entry.counters if entry.HasField("counters") else None,
                entry.bundle_sha256,
            )
            for entry in report.revisions
        }
        server.answered_before_report = max(server.acked, server.nacked)
        # Most reports only bring new counters, which matter only to a rollout.
        now = (server.revisions, server.answered_before_report)
        if now != before or self._fleet.watching:
            self._fleet.poke()


class Fleet:
    """All servers, and the task that moves them along.

    Args:
        store: Where everything is kept.
        switch: Takes the steps.
        lease_seconds: How long a server whose stream broke is waited for.
        report_interval_seconds: Longest time between two reports of a server.
        clock: Monotonic seconds; the switch's.
        check: Called in every transaction; raises when this manager no longer leads.
    """

    def __init__(
        self,
        store: Store,
        switch: Switch,
        *,
        lease_seconds: float,
        report_interval_seconds: float,
        clock: Callable[[], float] = time.monotonic,
        check: Callable[[Session], None] = lambda session: None,
    ) -> None:
        self.report_interval_seconds = report_interval_seconds
        self.state = pb.DesiredState()
        """The desired state in force; version 0 before :meth:`start`."""
        self.access: pb.AccessList | None = None
        """Whose calls servers should take; None before :meth:`tell_access`."""
        self.watching = False
        """Whether a rollout runs, so that every report counts."""
        self._store = store
        self._switch = switch
        self._lease_seconds = lease_seconds
        self._clock = clock
        self._check = check
        self._servers: dict[str, KnownServer] = {}
        self._dirty: set[KnownServer] = set()
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._watch: asyncio.Task[None] | None = None
        self._arrivals: list[asyncio.Future[None]] = []
        """Of streams that wait until their servers are on disk."""
        self._states: dict[bool, pb.DesiredState] = {}
        self._connected = 0
        self._closed: ServiceError | None = _stopping()
        self._next_step: float | None = None

    async def start(self, *, after_another: bool = False) -> None:
        """Remember the servers, take the first step and begin to move; also after a stop.

        Args:
            after_another: Another manager led until now, and servers come over from it.
        """
        horizon = now_us() - DAY_US

        def load(session: Session) -> list[ServerRow]:
            self._check(session)
            # Not those that were here when a manager was killed: of a server that was connected for
            # long, and had nothing new to say, the time on disk is an old one.
            gone = ~ServerRow.present & (ServerRow.last_seen_time < horizon)
            session.execute(delete(ServerRow).where(gone))
            return list(session.scalars(select(ServerRow)))

        self._servers, self._dirty = {}, set()
        self._switch.begin_anew()
        rows = await self._store.write(load)
        lease_ends = self._clock() + self._lease_seconds
        if after_another:
            lease_ends += MOVE_SECONDS
        for row in rows:
            # Whoever was here when the last manager died gets time to come back.
            self._servers[row.server_id] = KnownServer.of_row(row, lease_ends)
        self._apply(await self._step())
        self._closed = None
        self._task = asyncio.create_task(self._run(), name="fleet")
        self._watch = asyncio.create_task(self._end_silent_streams(), name="fleet silence")

    async def stop(self, why: ServiceError | None = None) -> None:
        """End every stream, with ``why``, and stop moving."""
        self._closed = why or _stopping()
        # The streams first: the rest may have to wait for the database.
        for server in self._servers.values():
            if server.connection is not None:
                self._dirty.add(server)
                server.connection.end(self._closed)
        task, self._task = self._task, None
        watch, self._watch = self._watch, None
        await cancel(watch)
        await cancel(task)
        self._arrived(self._take_arrivals(), self._closed)
        dirty = self._take_dirty()
        for server in self._servers.values():
            server.disconnected()
        if dirty:
            with contextlib.suppress(Exception):  # only the times of last sight would be lost
                await self._store.write(lambda session: self._save(session, dirty))

    def tell_access(self, access: pb.AccessList) -> None:
        """Tell every server, now and when it comes, whose calls to take."""
        self.access = access
        for server in self._servers.values():
            if server.connection is not None:
                server.connection.notify()

    def poke(self) -> None:
        """Something changed: look whether a step is possible."""
        self._wake.set()

    def server_changed(self, server: KnownServer) -> None:
        """Write the server down with the next step, and take one."""
        self._dirty.add(server)
        self.poke()

    def report_seconds(self) -> float:
        """Return the longest time between two reports that servers are to keep to."""
        seconds = self.report_interval_seconds
        if self.watching:
            seconds = min(seconds, WATCHING_REPORT_SECONDS)
        return max(seconds, self._connected / REPORTS_PER_SECOND)

    @property
    def silence_seconds(self) -> float:
        """A stream on which nothing was heard for so long is ended."""
        return self.silence_of(self.report_seconds())

    def silence_of(self, report_seconds: float) -> float:
        """Return it for a server that was told to report so often."""
        return max(6 * report_seconds, 6 * self.report_interval_seconds, self._lease_seconds)

    def state_for(self, kind: pb.ServerKind.ValueType) -> pb.DesiredState:
        """Return the state in force as servers of a kind are told, without nonce and interval."""
        whole = kind == pb.SERVER_KIND_PREPROCESS
        found = self._states.get(whole)
        if found is None:
            found = self.state
            if not whole:
                # Made once, not for each of thousands.
                found = pb.DesiredState()
                found.CopyFrom(self.state)
                del found.inference_endpoints[:]
            self._states[whole] = found
        return found

    async def connect(self, hello: pb.Hello) -> Connection:
        """Take in a server that has opened a stream; an older stream of its is ended.

        Raises:
            InvalidRequest: the Hello is not acceptable.
            Unavailable: the manager is stopping.
        """
        _check_hello(hello)
        if self._closed is not None:
            raise self._closed
        server = self._servers.get(hello.server_id)
        if server is None:
            server = self._servers[hello.server_id] = KnownServer(hello=hello)
        older = server.connection
        server.disconnected()
        if older is not None:
            older.end(
                Conflict(
                    f"another stream of the server {hello.server_id!r} has replaced this one",
                    reason="STREAM_REPLACED",
                    server_id=hello.server_id,
                )
            )
        if not server.present or hello.address != server.hello.address:
            server.serving = False
        server.hello = hello
        server.present = True
        server.report = None
        server.last_seen_us = now_us()
        connection = server.connection = Connection(self, server)
        # On disk before it gets a state: a manager that dies now must know
        # afterwards that there is a server to wait for. The next step writes it.
        written = asyncio.get_running_loop().create_future()
        self._arrivals.append(written)
        self.server_changed(server)
        try:
            await written
        except BaseException:
            self.disconnect(connection)
            raise
        connection.heard = time.monotonic()
        _log.info("server connected", server=hello.server_id, address=hello.address)
        return connection

    def disconnect(self, connection: Connection) -> None:
        """Note that a stream has ended; may be called more than once."""
        connection.end(None)
        server = connection.server
        if server.connection is not connection:
            return
        server.disconnected()
        server.lease_ends = self._clock() + self._lease_seconds
        _log.info("server disconnected", server=server.hello.server_id)
        self.server_changed(server)

    def list_servers(self, *, page_size: int, page_token: str) -> tuple[list[pb.Server], str]:
        """Return a page of servers by id, and the token of the next page.

        Raises:
            InvalidRequest: page size or token is not valid.
        """
        limit = names.page_limit(page_size, default=100)
        query = {"list": "servers"}
        last = names.read_page_token(query, page_token, str)
        after = last[0] if last else ""
        ids = sorted(server_id for server_id in self._servers if server_id > after)
        page = ids[:limit]
        token = names.make_page_token(query, [page[-1]]) if len(ids) > limit else ""
        return [self._servers[server_id].to_proto() for server_id in page], token

    def servers(self) -> list[pb.Server]:
        """Return every server that is known."""
        return [server.to_proto() for server in self._servers.values()]

    async def _run(self) -> None:
        retry, said, said_at = False, "", 0.0
        while True:
            if retry:
                # No sooner, whoever asks: each server that comes would find the same again.
                await asyncio.sleep(RETRY_SECONDS)
            else:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._until_deadline()):
                        await self._wake.wait()
            self._wake.clear()
            began = self._clock()
            try:
                self._apply(await self._step())
                if retry:
                    _log.info("the fleet moves on again")
                retry, said = False, ""
            except ServiceError as error:
                # The database is away or its disk full, or another manager has taken the lead:
                # everything stays as it is, and is tried again.
                retry = True
                if error.message != said or began - said_at >= SAID_SECONDS:
                    said, said_at = error.message, began
                    _log.warning("the fleet cannot move on", error=error.message)
            except Exception:
                _log.exception("the fleet cannot move on")
                retry = True
            # Of thousands of servers each step takes in what many have said, rather than one.
            await asyncio.sleep(min(max(0.0, self._clock() - began - UNPACED_SECONDS), 1.0))

    async def _end_silent_streams(self) -> None:
        """End streams on which nothing is heard any more: a timer for each message costs more."""
        while True:
            await asyncio.sleep(self.silence_seconds / 8)
            for server in list(self._servers.values()):
                if server.connection is not None:
                    server.connection.end_if_silent()
                    if server.last_seen_us - server.written_us > SEEN_US:
                        self.server_changed(server)

    async def _step(self) -> StepResult:
        self._expire_leases()
        view = self._view()
        dirty = self._take_dirty()
        arrivals = self._take_arrivals()

        began, noted = time.perf_counter_ns(), Noted()

        def work(session: Session) -> StepResult:
            self._save(session, dirty)
            with noted:
                return self._switch.step(session, view)

        try:
            result = await self._store.write(work)
        except BaseException as error:
            self._dirty.update(
                self._servers[row["server_id"]]
                for row in dirty
                if row["server_id"] in self._servers
            )
            self._arrived(arrivals, error)
            raise
        self._arrived(arrivals, None)
        self._next_step = result.next_deadline
        maker = tracer()
        if noted.things and maker is not None:
            # Most steps find nothing to do, and are worth no trace.
            maker.root(
                "pollard.models/step",
                began,
                time.perf_counter_ns(),
                {
                    "pollard.actions": ", ".join(action for action, _ in noted.things),
                    "pollard.resource": noted.things[0][1],
                },
            )
        return result

    def _apply(self, result: StepResult) -> None:
        self.watching = result.watching
        self._connected = sum(server.connection is not None for server in self._servers.values())
        if result.version == self.state.version:
            return
        self.state = result.state
        self._states = {}
        for server in self._servers.values():
            if server.connection is not None:
                server.connection.notify()

    def _until_deadline(self) -> float | None:
        deadlines = [
            server.lease_ends
            for server in self._servers.values()
            if server.present and server.connection is None
        ]
        if self._next_step is not None:
            deadlines.append(self._next_step)
        return max(0.0, min(deadlines) - self._clock()) if deadlines else None

    def _expire_leases(self) -> None:
        now = self._clock()
        for server in self._servers.values():
            if server.present and server.connection is None and now >= server.lease_ends:
                server.present = False
                self._dirty.add(server)
                _log.warning("going on without a server", server=server.hello.server_id)

    def _view(self) -> FleetView:
        day_ago = now_us() - DAY_US
        fallback = sorted(
            (server.hello.server_id, server.hello.address)
            for server in self._servers.values()
            if server.hello.kind == pb.SERVER_KIND_INFERENCE
            and server.serving
            and not server.present
            and server.last_seen_us > day_ago
        )
        present = [server.view() for server in self._servers.values() if server.present]
        return FleetView(present, fallback)

    def _save(self, session: Session, rows: list[Row]) -> None:
        self._check(session)
        save(session, rows)

    def _take_dirty(self) -> list[Row]:
        rows = [server.row() for server in self._dirty]
        self._dirty.clear()
        return rows

    def _take_arrivals(self) -> list[asyncio.Future[None]]:
        arrivals, self._arrivals = self._arrivals, []
        return arrivals

    @staticmethod
    def _arrived(arrivals: list[asyncio.Future[None]], error: BaseException | None) -> None:
        """Let streams go on whose servers are on disk, or end them with what was in the way."""
        for written in arrivals:
            if written.done():
                continue
            if error is None:
                written.set_result(None)
            elif isinstance(error, Exception):
                written.set_exception(error)
            else:
                written.set_exception(_stopping())


def _stopping() -> Unavailable:
    return Unavailable("the manager is stopping", reason="SHUTTING_DOWN")


def _check_hello(hello: pb.Hello) -> None:
    names.check_server_id(hello.server_id)
    if hello.kind not in (pb.SERVER_KIND_INFERENCE, pb.SERVER_KIND_PREPROCESS):
        raise InvalidRequest(
            f"hello.kind {hello.kind} is neither inference nor preprocess",
            reason="HELLO_INVALID",
            field="kind",
        )
    if hello.kind == pb.SERVER_KIND_INFERENCE and not hello.address:
        raise InvalidRequest(
            "hello.address is empty; preprocess servers need it to reach an inference server",
            reason="HELLO_INVALID",
            field="address",
        )
    if not 0 <= hello.applied_version < MAX_VERSION:
        raise InvalidRequest(
            f"hello.applied_version {hello.applied_version} is not a version",
            reason="HELLO_INVALID",
            field="applied_version",
        )
