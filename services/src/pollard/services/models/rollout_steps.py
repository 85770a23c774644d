"""The steps of rollouts: a state machine that the switch takes along in its transaction.

::

    every expected server,    this step was held,           the last share below 100 %
    or the quorum, has it     seen and judged               has passed
        │                         │                           │
    loading ──► SHADOW ──► CANARY 5 % ──► 25 % ──► 50 % ──► the alias switches: PROMOTED,
        │      (if wanted)           │                        and the base revision drains
        └── too many refuse ─────────┴── a gate fails ──► ROLLED_BACK; the routes go back at once

Which step a rollout is at, and what was seen in it, are on disk (`rollout_evidence`): a manager
that was killed in the middle of a step goes on with it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from google.rpc import status_pb2
from sqlalchemy.orm import Session

from pollard.models.v1 import model_service_pb2 as pb
from pollard.services.common.status import to_proto
from pollard.services.models import rollout_evidence
from pollard.services.models.aliases import change_route
from pollard.services.models.events import MANAGER
from pollard.services.models.fleet_view import FleetView, Key, loading_of
from pollard.services.models.quorum import Quorum, Verdict, judge, refused, too_late
from pollard.services.models.refusals import Refusals, encoded
from pollard.services.models.rollout_gates import Judge
from pollard.services.models.rollout_rows import change, end, moving_state, share_of
from pollard.services.models.schema import Alias, Revision, Rollout, RolloutEvidence
from pollard.services.models.standing import Standing

_LOOK_SECONDS = 10.0
"""Longest time between two looks that counts as holding a step."""

Settled = Callable[[Standing, FleetView, str, int], bool]
"""Whether every expected server has the routes of a model of a desired state."""


@dataclass
class _Watch:
    """What is known of a rollout beyond what is on disk: clocks, which a restart begins anew."""

    loading_since: float
    looked: float | None = None
    """When the held time of the step was brought up to date last."""
    hold_ends: float | None = None


class RolloutSteps:
    """Moves rollouts. One thread at a time.

    Args:
        load_timeout_seconds: Longest time for all servers to load a revision.
        settled: Whether every expected server has the routes of a state.
        refusals: Which servers refuse what routes lead to.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        *,
        load_timeout_seconds: float,
        settled: Settled,
        refusals: Refusals,
        clock: Callable[[], float],
    ) -> None:
        self._load_timeout_seconds = load_timeout_seconds
        self._settled = settled
        self._refusals = refusals
        self._clock = clock
        self._watches: dict[Key, _Watch] = {}

    @property
    def watching(self) -> bool:
        """Whether a rollout runs."""
        return bool(self._watches)

    def begin_anew(self) -> None:
        """Forget what was seen."""
        self._watches = {}

    def observe(self, session: Session, view: FleetView, standing: Standing) -> None:
        """Take in what the servers have counted since the last call."""
        rows = {(row.model, row.number): row for row in standing.running()}
        self._watches = {key: self._watches.get(key) or _Watch(self._clock()) for key in rows}
        for row in rows.values():
            rollout_evidence.observe(session, row, view, standing)

    def advance(self, session: Session, view: FleetView, standing: Standing) -> bool:
        """Take every step that is possible now; tell whether any was."""
        progress = False
        for row in standing.running():
            # One that began after the last look at the counters waits for the next.
            watch = self._watches.get((row.model, row.number))
            if watch is not None and row.pending_version is not None:
                progress |= self._advance(session, view, standing, row, watch)
        still = {(row.model, row.number) for row in standing.running()}
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
            if watch.looked is None and watch.loading_since + self._load_timeout_seconds > now
        ]

    def _advance(
        self,
        session: Session,
        view: FleetView,
        standing: Standing,
        row: Rollout,
        watch: _Watch,
    ) -> bool:
        revision = session.get_one(Revision, (row.model, row.revision))
        loading = loading_of(view, (row.model, row.revision), row.pending_version or 0, revision)
        quorum = Quorum.of(row.quorum)
        verdict, refusals = judge(loading, quorum)
        error = None
        waited = self._clock() - watch.loading_since
        if not row.loaded and verdict is Verdict.WAIT and waited >= self._load_timeout_seconds:
            error = too_late(row.revision, loading, self._load_timeout_seconds)
            verdict, refusals = judge(loading, quorum, late=error)
        if verdict is Verdict.REFUSED:
            _roll_back(session, row, error or refused(row.revision, loading, quorum, refusals))
            return True
        key = (row.model, row.revision)
        if not row.loaded:
            if verdict is Verdict.WAIT or row.state == pb.Rollout.STATE_PAUSED:
                return False
            self._refusals.add(key, refusals)
            row.failures = encoded(refusals)
            row.loaded = True
            row.routes_version = None
            _say_step(session, row)
            return True
        if (now := encoded(self._refusals.of_revision(key))) != row.failures:
            row.failures = now
        if row.step >= 0 and row.steps[row.step] >= 100:
            alias = session.get_one(Alias, (row.model, row.alias))
            alias.quorum = dict(row.quorum)
            change_route(
                session,
                alias,
                row.revision,
                actor=MANAGER,
                refusals=self._refusals.of_revision(key),
            )
            detail = f"all requests go to revision {row.revision}"
            state = pb.Rollout.STATE_PROMOTED
            end(session, row, state, actor=MANAGER, action="ROLLOUT_PROMOTED", detail=detail)
            return True
        if row.routes_version is None:
            return False
        evidence = rollout_evidence.find(session, row)
        if evidence is None or evidence.step != row.step:
            watch.looked = watch.hold_ends = None
            if not self._settled(standing, view, row.model, row.routes_version):
                return False
            evidence = rollout_evidence.begin(session, row)
        self._hold(row, watch, evidence)
        return self._judge(session, row, evidence)

    def _hold(self, row: Rollout, watch: _Watch, evidence: RolloutEvidence) -> None:
        """Count the time since the last look as part of the step."""
        now = self._clock()
        if watch.looked is not None:
            # Never more at once: another manager may have gone on meanwhile.
            evidence.held_us += round(min(now - watch.looked, _LOOK_SECONDS) * 1e6)
        watch.looked = now
        left = (row.hold_us - evidence.held_us) / 1e6
        watch.hold_ends = now + min(left, _LOOK_SECONDS) if left > 0 else None

    def _judge(self, session: Session, row: Rollout, evidence: RolloutEvidence) -> bool:
        gates = rollout_evidence.judge_of(row, evidence)
        failed = gates.verdict()
        evidence.seen = gates.to_json()  # a look at the latencies is spent
        if failed is not None:
            _roll_back(session, row, to_proto(failed))
            return True
        if row.state == pb.Rollout.STATE_PAUSED or evidence.held_us < row.hold_us:
            return False
        if seen_in_step(row, gates) < row.min_requests:
            return False
        row.step += 1
        row.state = moving_state(row)
        row.routes_version = None
        _say_step(session, row)
        return True


def seen_in_step(row: Rollout, judge: Judge) -> int:
    """Return how many requests, or copies, the step has seen that it must see."""
    return judge.copies.compared if row.step < 0 else judge.canary.requests


def _say_step(session: Session, row: Rollout) -> None:
    share = share_of(row)
    detail = f"{share:g} % of the requests of {row.alias!r} go to revision {row.revision}"
    if row.step < 0:
        detail = (
            f"{row.shadow_ppm / 1e4:g} % of the requests of revision {row.base_revision} are also "
            f"run on revision {row.revision}"
        )
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
