"""A server's side of FleetService.Sync, shared by inference and preprocess servers.

The agent keeps the stream to the manager, hands each desired state to the service, answers it, and
reports. The data path never waits for it: with the manager away the service runs what it ran, and
after a restart what the cache holds.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import grpc
import structlog
from google.protobuf import timestamp_pb2

from pollard.client._channel import checked_address
from pollard.models.v1 import fleet_service_pb2 as fleet_pb
from pollard.models.v1 import fleet_service_pb2_grpc as fleet_grpc
from pollard.runtime.errors import RuntimeFault
from pollard.services.common.auth import Gate
from pollard.services.common.auth.own import OwnToken
from pollard.services.common.auth.wire import table_of
from pollard.services.common.bundle_cache import BundleCache
from pollard.services.common.bundle_source import BundleSource
from pollard.services.common.errors import FailedPrecondition, ServiceError, StartupError
from pollard.services.common.lifecycle import cancel, raise_if_cancelled, to_its_end
from pollard.services.common.retries import Pauses, may_pass, promise, promised
from pollard.services.common.sealed import FileDamaged
from pollard.services.common.status import to_proto
from pollard.services.common.tls import open_channel
from pollard.services.common.tls_files import PLAIN, TlsFiles

_log = structlog.get_logger("pollard.fleet")

_FIRST_PAUSE_SECONDS = 0.1
"""Before the stream is opened again; it doubles while the manager is away."""

_LAST_WORDS_SECONDS = 1.0
"""How long a stream to which nothing can be sent any more has to say why."""

_CHANNEL_OPTIONS = [
    ("grpc.max_receive_message_length", 64 * 1024 * 1024),
    # A manager whose machine vanished is noticed while a successor still waits for this server.
    ("grpc.keepalive_time_ms", 5_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    # That is for the kernel. The answer to a ping a busy process may owe for seconds; gRPC
    # waits a minute for it unless told otherwise.
    ("grpc.http2.ping_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
    # The channel would wait up to two minutes by itself; the agent has its own backoff.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 2_000),
]


RevisionKey = tuple[str, int]
"""Model and revision."""

_NONE: Mapping[RevisionKey, BaseException] = MappingProxyType({})


@dataclass(frozen=True)
class Failure:
    """One revision that could not be brought to run."""

    model: str
    revision: int
    error: BaseException


@dataclass(frozen=True)
class Applied:
    """What came of a desired state."""

    running: fleet_pb.DesiredState
    """What the service runs now, in the form of a desired state; saved for the next start."""
    failures: tuple[Failure, ...] = ()
    """Empty if the desired state runs entirely."""


class FleetMember(Protocol):
    """A service that runs what the manager wants."""

    async def apply(
        self,
        state: fleet_pb.DesiredState,
        bundles: BundleSource,
        hopeless: Mapping[RevisionKey, BaseException] = _NONE,
    ) -> Applied:
        """Bring `state` to run as far as possible, getting bundles from `bundles`.

        A newer state cancels the call. What fails is returned, not raised; for that part the
        service keeps running what it ran. Applying a state that runs already changes nothing.

        Args:
            state: What the manager wants.
            bundles: Where bundles come from.
            hopeless: Revisions of this same state that are not tried again, and why they failed.
        """

    def statuses(self) -> list[fleet_pb.RevisionStatus]:
        """Return the state of every revision that is wanted or still there."""


@dataclass(frozen=True)
class AgentOptions:
    """How a server takes part in the fleet."""

    kind: fleet_pb.ServerKind.ValueType
    manager: str
    """gRPC target of the manager, or of several, with commas between, of which the next is tried
    when one does not answer; empty runs from the cache alone."""
    cache_dir: Path
    address: str = ""
    """gRPC target under which others reach this server; may be set later by `advertise`."""
    server_id: str = ""
    """Unique in the fleet; empty makes one up and keeps it in the cache."""
    software_version: str = ""
    capabilities: fleet_pb.Capabilities = field(default_factory=fleet_pb.Capabilities)
    keep_unused_bundles: int = 4
    """Bundles kept in the cache after their use, so that going back is quick."""
    cache_bytes: int = 0
    """Most that bundles in the cache take, in bytes; then what was used is kept as long as it fits.
    0 for no limit."""
    report_seconds: float = 5.0
    """Longest time between reports, unless the manager says otherwise."""
    max_backoff_seconds: float = 5.0
    """Longest pause before the stream is opened again."""
    tls: TlsFiles = PLAIN
    """How the managers are reached."""
    gate: Gate | None = None
    """Told which tokens the manager knows."""
    token: OwnToken = field(default_factory=lambda: OwnToken(None))
    """What is shown to the managers."""


class FleetAgent:
    """Keeps one server in step with the manager."""

    def __init__(self, member: FleetMember, options: AgentOptions) -> None:
        """Take the cache; `start` does the rest.

        Raises:
            StartupError: a manager is no address, or the cache is in use or cannot be written.
        """
        self._managers = _checked_managers(options.manager)
        self._member = member
        self._options = options
        self._address = options.address
        self.cache = BundleCache(options.cache_dir, options.cache_bytes)
        prefix = fleet_pb.ServerKind.Name(options.kind).removeprefix("SERVER_KIND_").lower()
        self.server_id = options.server_id or self.cache.server_id(prefix)
        self.settled = asyncio.Event()
        """Set once a state, from the cache or the manager, has been applied as far as it can be."""
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._current = 0
        self.bundles = BundleSource(self.cache, lambda: self._channel, options.token.metadata)
        self._run_id = secrets.token_hex(8)
        self._saved = fleet_pb.DesiredState()
        self._order: fleet_pb.DesiredState | None = None
        self._ordered = asyncio.Event()
        self._failures: tuple[Failure, ...] = ()
        """Of the newest order, as far as it has been applied."""
        self._retry_seconds: float | None = None
        """The pause before what may pass of them is tried again; None when nothing is."""
        self._outbox: asyncio.Queue[fleet_pb.SyncRequest] | None = None
        self._report_wanted = asyncio.Event()
        self._report_seconds = options.report_seconds
        self._tls = options.tls
        self._heard = False
        self._tasks: list[asyncio.Task[None]] = []

    def advertise(self, address: str) -> None:
        """Set the target under which others reach this server; before `start`."""
        self._address = address

    async def start(self) -> None:
        """Run what the cache holds, then follow the manager.

        Returns when the cached state has been applied as far as it can be; does not wait for the
        manager.
        """
        for manager in self._managers:
            self._channels[manager] = open_channel(manager, self._tls, _CHANNEL_OPTIONS)
        await self._remember_access()
        damaged = False
        try:
            saved = await asyncio.to_thread(self.cache.load_state)
        except FileDamaged as error:
            saved, damaged = None, True
            until = "the manager sends it" if self._managers else "--manager names one to send it"
            _log.error(
                f"the saved state cannot be read; nothing is served until {until}",
                path=str(self.cache.state_path),
                error=str(error),
            )
        if saved is not None:
            _log.info("starting from the cache", version=saved.version, models=len(saved.models))
            self._saved.CopyFrom(saved)
            self.cache.protect(_bundles_of(saved))
            applied = await self._member.apply(saved, self.bundles)
            if applied.failures:
                # It does not run entirely, so it must not be claimed in Hello.
                self._saved.version = 0
                _log.warning("the cached state does not run entirely", error=_words(applied))
            self.settled.set()
        elif self._channel is None and not damaged:
            # Nobody will ever say anything else.
            await self._member.apply(fleet_pb.DesiredState(), self.bundles)
            self.settled.set()
        if self._channel is not None:
            self._tasks = [
                asyncio.create_task(self._follow(), name="fleet-stream"),
                asyncio.create_task(self._apply_orders(), name="fleet-apply"),
            ]

    async def stop(self) -> None:
        """Close the stream and let the cache go. What runs is not touched."""
        await cancel(*self._tasks)
        self.bundles.close()
        for channel in self._channels.values():
            await channel.close()
        self.cache.close()

    @property
    def manager(self) -> str:
        """The manager that is talked to, or tried next."""
        return self._managers[self._current] if self._managers else ""

    @property
    def _channel(self) -> grpc.aio.Channel | None:
        return self._channels.get(self.manager)

    def report_soon(self) -> None:
        """Send a report now, because a revision's state has changed."""
        self._report_wanted.set()

    # The stream.

    async def _follow(self) -> None:
        """Keep a stream open for ever."""
        pause = _FIRST_PAUSE_SECONDS
        while True:
            self._heard, opened = False, time.monotonic()
            try:
                await self._stream_once()
                _log.info("the manager closed the stream")
            except grpc.aio.AioRpcError as error:
                _log.warning(
                    "no stream to the manager; serving on",
                    manager=self.manager,
                    code=error.code().name,
                    details=error.details(),
                )
            except ConnectionError as error:
                _log.warning(
                    "no stream to the manager; serving on", manager=self.manager, details=str(error)
                )
            except Exception as error:
                _log.error("the stream to the manager failed", exc_info=error)
            raise_if_cancelled()
            if self._heard and time.monotonic() - opened > 1.0:
                # It was there a moment ago: it has just died, or is being started anew. Streams
                # that end at once have another reason, such as a second server of the same id.
                pause = _FIRST_PAUSE_SECONDS
            # Downloads that are under way keep their channel, and take the next when they fail.
            self._current = (self._current + 1) % len(self._managers)
            await asyncio.sleep(pause * random.uniform(0.5, 1.5))
            if self._current == 0:
                pause = min(2 * pause, self._options.max_backoff_seconds)

    async def _stream_once(self) -> None:
        assert self._channel is not None  # noqa: S101 - set before the task was started
        outbox: asyncio.Queue[fleet_pb.SyncRequest] = asyncio.Queue()
        outbox.put_nowait(
            fleet_pb.SyncRequest(
                hello=fleet_pb.Hello(
                    server_id=self.server_id,
                    kind=self._options.kind,
                    address=self._address,
                    capabilities=self._options.capabilities,
                    applied_version=self._saved.version,
                    software_version=self._options.software_version,
                    wants_access=True,
                )
            )
        )
        outbox.put_nowait(self._report())
        call: Any = fleet_grpc.FleetServiceStub(self._channel).Sync(
            metadata=self._options.token.metadata()
        )
        self._outbox = outbox
        reporter = asyncio.create_task(self._report_regularly(outbox), name="fleet-report")
        listening = asyncio.create_task(self._listen(call), name="fleet-listen")
        # Given to the call to write by itself, it would stop at an error without a word, and the
        # manager would hear nothing more of a server that still hears it.
        saying = asyncio.create_task(_say(call, outbox), name="fleet-say")
        try:
            await asyncio.wait({listening, saying}, return_when=asyncio.FIRST_COMPLETED)
            if not listening.done():
                # It says why the stream has ended, if it has.
                await asyncio.wait({listening}, timeout=_LAST_WORDS_SECONDS)
            if listening.done():
                listening.result()
            else:
                raise ConnectionError("nothing can be sent to it any more")
        finally:
            self._outbox = None
            await cancel(reporter, saying, listening)
            call.cancel()

    async def _listen(self, call: Any) -> None:
        async for response in call:
            self._heard = True
            if response.HasField("access"):
                await self._take_access(response.access)
            if not response.HasField("desired_state"):
                continue
            state = response.desired_state
            if state.HasField("report_interval"):
                seconds = state.report_interval.ToTimedelta().total_seconds()
                self._report_seconds = max(0.1, seconds)
                self._report_wanted.set()
            self._order = state
            self._ordered.set()

    async def _remember_access(self) -> None:
        """Let those in whom the cache knows."""
        try:
            known = await asyncio.to_thread(self.cache.load_access)
            if known is not None and self._options.gate is not None:
                self._options.gate.know(table_of(known))
        except (FileDamaged, ValueError) as error:
            _log.error(
                "the tokens in the cache cannot be read; where one is asked for, callers are told "
                "to try again until a manager sends them",
                path=str(self.cache.access_path),
                error=str(error),
            )

    async def _take_access(self, access: fleet_pb.AccessList) -> None:
        if self._options.gate is not None:
            self._options.gate.know(table_of(access))
        try:
            await asyncio.to_thread(self.cache.save_access, access)
        except OSError as error:
            # What was revoked is refused now; after a restart the manager is asked again.
            _log.error("the tokens cannot be kept in the cache", error=str(error))

    async def _report_regularly(self, outbox: asyncio.Queue[fleet_pb.SyncRequest]) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._report_seconds):
                    await self._report_wanted.wait()
            self._report_wanted.clear()
            outbox.put_nowait(self._report())
            # Changes that come in a burst share one report.
            await asyncio.sleep(0.02)

    def _report(self) -> fleet_pb.SyncRequest:
        now = timestamp_pb2.Timestamp()
        now.GetCurrentTime()
        statuses = self._member.statuses()
        for status in statuses:
            if status.HasField("counters"):
                status.counters.run_id = self._run_id
        report = fleet_pb.Report(revisions=statuses, time=now)
        if self._retry_seconds is not None:
            retried = self._retried()
            for status in report.revisions:
                key = (status.model, status.revision)
                if status.state == fleet_pb.REVISION_STATE_FAILED and key in retried:
                    promise(status.error, self._retry_seconds)
        return fleet_pb.SyncRequest(report=report)

    # Applying.

    async def _apply_orders(self) -> None:
        """Apply the newest order; a newer one overtakes it.

        What fails for a reason that may pass is tried again, after pauses that grow.
        """
        pauses = Pauses()
        order: fleet_pb.DesiredState | None = None
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._retry_seconds):
                    await self._ordered.wait()
            self._retry_seconds = None
            if self._ordered.is_set():
                pauses.begin_anew()
                self._failures = ()
                order = self._order
            self._ordered.clear()
            if order is None:
                continue
            hopeless = {
                (failure.model, failure.revision): failure.error
                for failure in self._failures
                if not may_pass(failure.error)
            }
            running = asyncio.create_task(self._apply(order, hopeless), name="fleet-apply-one")
            await self._until_overtaken(running, order)
            if running.cancelled():
                continue
            if (error := running.exception()) is not None:
                _log.error("a desired state could not be applied", exc_info=error)
                self._failures = (Failure("", 0, error),)
            else:
                self._failures = running.result()
            if any(may_pass(failure.error) for failure in self._failures):
                self._retry_seconds = pauses.take()
            self._answer(order, self._failures)
            if not self._failures:
                # Between two orders: a thread would go on while the next one took from the cache
                # what is being removed.
                await self._tidy()

    async def _until_overtaken(
        self, running: asyncio.Task[tuple[Failure, ...]], order: fleet_pb.DesiredState
    ) -> None:
        """Wait until an order has been applied, or cancel that for a newer one."""
        newer = asyncio.create_task(self._ordered.wait())
        try:
            await asyncio.wait({running, newer}, return_when=asyncio.FIRST_COMPLETED)
            while not running.done() and self._order is not None:
                if not _same_content(self._order, order):
                    _log.info("a newer desired state overtakes", version=self._order.version)
                    break
                # The same state sent again, after the stream was opened anew: only the answer
                # must name the new sending.
                order.nonce = self._order.nonce
                order.version = self._order.version
                self._ordered.clear()
                newer = asyncio.create_task(self._ordered.wait())
                await asyncio.wait({running, newer}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            await cancel(newer)
            if not running.done():
                await cancel(running)

    def _retried(self) -> set[RevisionKey]:
        """Return the revisions that are tried again."""
        return {
            (failure.model, failure.revision)
            for failure in self._failures
            if may_pass(failure.error)
        }

    async def _tidy(self) -> None:
        try:
            await asyncio.to_thread(
                self.cache.discard_unused, keep=self._options.keep_unused_bundles
            )
        except OSError as error:
            # What is left takes room, and goes with the next.
            _log.error("unused bundles cannot be removed", error=str(error))

    async def _apply(
        self, order: fleet_pb.DesiredState, hopeless: Mapping[RevisionKey, BaseException]
    ) -> tuple[Failure, ...]:
        """Apply an order; return what failed."""
        started = time.perf_counter()
        # Beside what it runs now, which an order that was overtaken may have changed in part.
        self.cache.protect(_bundles_of(order), also=True)
        applied = await self._member.apply(order, self.bundles, hopeless)
        running = fleet_pb.DesiredState()
        running.CopyFrom(applied.running)
        running.version = self._saved.version if applied.failures else order.version
        running.nonce = ""
        failures = applied.failures

        def save() -> None:
            self.cache.save_state(running)
            self._saved = running

        # Saved before it is acknowledged: what the manager was told survives a crash. To its end,
        # though a newer order overtakes this one: two that save at the same time would take each
        # other's file away, and the older might come last.
        try:
            await to_its_end(asyncio.to_thread(save))
        except OSError as error:
            why = FailedPrecondition(
                f"what runs cannot be noted in the cache: {error}", reason="CACHE_FAULT"
            )
            failures = (*failures, Failure("", 0, why))
        self.settled.set()
        _log.info(
            "applied",
            version=order.version,
            failures=len(failures),
            seconds=round(time.perf_counter() - started, 3),
        )
        self.cache.protect(_bundles_of(running) | _bundles_of(order))
        return failures

    def _answer(self, order: fleet_pb.DesiredState, failures: tuple[Failure, ...]) -> None:
        if self._outbox is None:
            return  # The manager will send the state again on the next stream.
        # The report comes first: it tells which revision failed, and why.
        self._outbox.put_nowait(self._report())
        if not failures:
            answer = fleet_pb.SyncRequest(
                ack=fleet_pb.Ack(version=order.version, nonce=order.nonce)
            )
        else:
            error = _summary(failures, self._retry_seconds)
            _log.warning("refusing a desired state", version=order.version, error=error.message)
            answer = fleet_pb.SyncRequest(
                nack=fleet_pb.Nack(version=order.version, nonce=order.nonce, status=to_proto(error))
            )
        self._outbox.put_nowait(answer)


def _checked_managers(text: str) -> list[str]:
    try:
        return [checked_address(part) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise StartupError(f"setting manager: {error}; give another --manager") from None


async def _say(call: Any, outbox: asyncio.Queue[fleet_pb.SyncRequest]) -> None:
    """Send what comes, until the stream takes no more."""
    # A call that has ended says InvalidStateError.
    with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
        while True:
            await call.write(await outbox.get())


def _bundles_of(state: fleet_pb.DesiredState) -> set[str]:
    return {revision.bundle_sha256 for model in state.models for revision in model.revisions}


def _same_content(one: fleet_pb.DesiredState, other: fleet_pb.DesiredState) -> bool:
    left, right = fleet_pb.DesiredState(), fleet_pb.DesiredState()
    left.CopyFrom(one)
    right.CopyFrom(other)
    for state in (left, right):
        state.nonce = ""
        state.version = 0
    return left == right


def _summary(failures: tuple[Failure, ...], retry_seconds: float | None) -> ServiceError:
    """Return one error for all: the words of each, the reason and details of the first.

    Args:
        failures: At least one.
        retry_seconds: When those that may pass are tried again.
    """
    first = failures[0]
    reason = first.error.reason if isinstance(first.error, (ServiceError, RuntimeFault)) else ""
    return FailedPrecondition(
        "; ".join(_one(failure, retry_seconds) for failure in failures),
        reason=reason or "REVISION_FAILED",
        model=first.model,
        revision=first.revision,
    )


def _words(applied: Applied) -> str:
    return "; ".join(_one(failure) for failure in applied.failures)


def _one(failure: Failure, retry_seconds: float | None = None) -> str:
    message = getattr(failure.error, "message", None) or str(failure.error)
    if retry_seconds is not None and may_pass(failure.error):
        message = promised(message, retry_seconds)
    return f"{failure.model}/{failure.revision}: {message}" if failure.model else message
