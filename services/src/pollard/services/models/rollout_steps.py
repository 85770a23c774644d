"""The steps of rollouts: a state machine that the switch takes along in its transaction.

::

    every expected server     the share of this step      the last share below 100 %
    has loaded the revision   was held, seen and judged   has passed
        │                         │                           │
    loading ─── desired ──► CANARY 5 % ──► 25 % ──► 50 % ──► the alias switches: PROMOTED,
               state                 │                        and the base revision drains
        └── a server refuses ────────┴── a gate fails ──► ROLLED_BACK; the routes go back at once

Which step a rollout is at is on disk. What was seen in the step is not: after a restart of the
manager the step begins anew, which only takes longer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from google.rpc import code_pb2, status_pb2
from sqlalchemy.orm import Session

from pollard.models.v1 import fleet_service_pb2 as fleet_pb
from pollard.models.v1 import model_service_pb2 as pb
from pollard.services.common.errors import DeadlineExceeded
from pollard.services.common.status import to_proto
from pollard.services.models.aliases import change_route
from pollard.services.models.events import MANAGER
from pollard.services.models.fleet_view import FleetView, Key, loading_of
from pollard.services.models.histograms import Latencies
from pollard.services.models.rollout_gates import Judge, Limits, Tally
from pollard.services.models.rollout_rows import change, end, running
from pollard.services.models.schema import Alias, Revision, Rollout

Settled = Callable[[Session, FleetView, str, int], bool]
"""Whether every expected server has the routes of a model of a desired state."""


@dataclass
class _Step:
    """What was seen in the present step of a rollout."""

    step: int
    judge: Judge
    since: float


@dataclass
class _Watch:
    """What is known of a rollout beyond its row."""

    loading_since: float
    current: _Step | None = None
    hold_ends: float | None = None
    seen: dict[tuple[str, Key], Tally] = field(default_factory=dict)
    """The counters that each server reported last."""


class RolloutSteps:
    """Moves rollouts. One thread at a time.

    Args:
        load_timeout_seconds: Longest time for all servers to load a revision.
        settled: Whether every expected server has the routes of a state.
        clock: Monotonic seconds.
    """

    def __init__(
        self, *, load_timeout_seconds: float, settled: Settled, clock: Callable[[], float]
    ) -> None:
        self._load_timeout_seconds = load_timeout_seconds
        self._settled = settled
        self._clock = clock
        self._watches: dict[Key, _Watch] = {}

    @property
    def watching(self) -> bool:
        """Whether a rollout runs."""
        return bool(self._watches)

    def observe(self, session: Session, view: FleetView) -> None:
        """Take in what the servers have counted since the last call."""
        rows = {(row.model, row.number): row for row in running(session)}
        self._watches = {key: self._watches.get(key) or _Watch(self._clock()) for key in rows}
        for key, row in rows.items():
            watch = self._watches[key]
            for server in view.servers:
                if server.kind != fleet_pb.SERVER_KIND_INFERENCE:
                    continue
                added = []
                for number in (row.revision, row.base_revision):
                    revision = (row.model, number)
                    report = server.revisions.get(revision)
                    counters = report.counters if report is not None else None
                    added.append(_added(watch.seen, (server.server_id, revision), counters))
                if watch.current is not None and watch.current.step == row.step:
                    watch.current.judge.observe(*added)

    def advance(self, session: Session, view: FleetView) -> bool:
        """Take every step that is possible now; tell whether any was."""
        progress = False
        for row in running(session):
            # One that began after the last look at the counters waits for the next.
            watch = self._watches.get((row.model, row.number))
            if watch is not None and row.pending_version is not None:
                progress |= self._advance(session, view, row, watch)
        still = {(row.model, row.number) for row in running(session)}
        self._watches = {key: watch for key, watch in self._watches.items() if key in still}
        return progress

    def deadlines(self) -> list[float]:
        """Return when time alone makes another step possible."""
        now = self._clock()
        ends = [watch.hold_ends for watch in self._watches.values() if watch.hold_ends is not None]
        # A time that is over made its step possible already; more requests are missing.
        ends = [moment for moment in ends if moment > now]
        return ends + [
            watch.loading_since + self._load_timeout_seconds
            for watch in self._watches.values()
            if watch.current is None and watch.loading_since + self._load_timeout_seconds > now
        ]

    def _advance(self, session: Session, view: FleetView, row: Rollout, watch: _Watch) -> bool:
        revision = session.get_one(Revision, (row.model, row.revision))
        loading = loading_of(
            view, (row.model, row.revision), row.pending_version or 0, revision.removed_version
        )
        if loading.refusals:
            first = next(iter(loading.refusals))
            error = status_pb2.Status(
                code=code_pb2.FAILED_PRECONDITION,
                message=f"revision {row.revision} was refused by {', '.join(loading.refusals)}: "
                f"{loading.refusals[first].message}",
            )
            _roll_back(session, row, error)
            return True
        if not row.loaded:
            return self._advance_loading(session, row, watch, list(loading.waiting))
        if row.steps[row.step] >= 100:
            alias = session.get_one(Alias, (row.model, row.alias))
            change_route(session, alias, row.revision, actor=MANAGER)
            detail = f"all requests go to revision {row.revision}"
            state = pb.Rollout.STATE_PROMOTED
            end(session, row, state, actor=MANAGER, action="ROLLOUT_PROMOTED", detail=detail)
            return True
        if row.routes_version is None:
            return False
        if watch.current is None or watch.current.step != row.step:
            watch.hold_ends = None
            if not self._settled(session, view, row.model, row.routes_version):
                return False
            judged = sum(share < 100 for share in row.steps)
            limits = Limits(row.max_error_rate, row.max_p99_ratio, judged)
            judge = Judge(limits, row.revision, row.base_revision)
            watch.current = _Step(row.step, judge, self._clock())
            watch.hold_ends = watch.current.since + row.hold_us / 1e6
        return self._judge(session, row, watch, watch.current)

    def _advance_loading(
        self, session: Session, row: Rollout, watch: _Watch, waiting: list[str]
    ) -> bool:
        if not waiting:
            if row.state == pb.Rollout.STATE_PAUSED:
                return False
            row.loaded = True
            row.routes_version = None
            _say_step(session, row)
            return True
        if self._clock() - watch.loading_since < self._load_timeout_seconds:
            return False
        error = to_proto(
            DeadlineExceeded(
                f"revision {row.revision} was not ready on {', '.join(waiting)} within "
                f"{self._load_timeout_seconds:g} s",
                reason="LOAD_TIMEOUT",
                revision=row.revision,
                servers=",".join(waiting),
                timeout_seconds=f"{self._load_timeout_seconds:g}",
            )
        )
        _roll_back(session, row, error)
        return True

    def _judge(self, session: Session, row: Rollout, watch: _Watch, current: _Step) -> bool:
        failed = current.judge.verdict()
        if failed is not None:
            _roll_back(session, row, to_proto(failed))
            return True
        held = watch.hold_ends is not None and self._clock() >= watch.hold_ends
        enough = current.judge.canary.requests >= row.min_requests
        if row.state == pb.Rollout.STATE_PAUSED or not held or not enough:
            return False
        row.step += 1
        row.routes_version = None
        _say_step(session, row)
        return True


def _added(
    seen: dict[tuple[str, Key], Tally],
    key: tuple[str, Key],
    counters: fleet_pb.Counters | None,
) -> Tally:
    """Return what was counted since the last look, and remember where it stands now."""
    if counters is None:
        return Tally()
    now = Tally(counters.succeeded, counters.failed, Latencies.of(counters.latency))
    before = seen.get(key)
    seen[key] = now
    if before is None:
        return Tally()  # what was before the rollout is not its doing
    latencies = now.latencies.since(before.latencies)
    if now.succeeded < before.succeeded or now.failed < before.failed or latencies is None:
        # The server has started anew.
        return Tally(now.succeeded, now.failed, Latencies.of(counters.latency))
    return Tally(now.succeeded - before.succeeded, now.failed - before.failed, latencies)


def _say_step(session: Session, row: Rollout) -> None:
    share = row.steps[row.step]
    detail = f"{share:g} % of the requests of {row.alias!r} go to revision {row.revision}"
    change(session, row, actor=MANAGER, action="ROLLOUT_STEP", detail=detail)


def _roll_back(session: Session, row: Rollout, error: status_pb2.Status) -> None:
    end(
        session,
        row,
        pb.Rollout.STATE_ROLLED_BACK,
        actor=MANAGER,
        action="ROLLOUT_ROLLED_BACK",
        detail=error.message,
        error=error,
    )
