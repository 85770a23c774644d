"""The switch of aliases across the suite: a state machine whose states are on disk.

Make before break::

    SetAlias stores      every expected server     every expected server     nothing can be
    the intention        has loaded it             has the new routes        in flight any more
        │                     │                         │                         │
    LOADING ── desired ──► routes change ── desired ──► ACTIVE ── drain time ──► the old revision
               state v+1   (SWITCHING)      state v+2                            leaves the desired
        │                                                                        state (v+3)
        └── a server refuses, or the time is over ──► FAILED; the routes are as before

:meth:`Switch.step` takes whatever steps are possible in one transaction. It
knows nothing of streams: what the servers said comes in as a snapshot, and what
they should run goes out as a version. A crash before or after the transaction
leaves the old state or the new one, and the next step goes on from there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from google.rpc import status_pb2
from sqlalchemy.orm import Session

from pollard.models.v1 import fleet_service_pb2 as fleet_pb
from pollard.models.v1 import model_service_pb2 as pb
from pollard.services.common.retries import given_up
from pollard.services.models import registry
from pollard.services.models.aliases import alias_name, change_route
from pollard.services.models.events import MANAGER, record
from pollard.services.models.fleet_view import FleetView, Key, loading_of
from pollard.services.models.quorum import Quorum, Verdict, judge, refused, too_late
from pollard.services.models.refusals import Refusals, encoded
from pollard.services.models.rollout_rows import shadow, weights
from pollard.services.models.rollout_steps import RolloutSteps
from pollard.services.models.schema import Alias, Meta, Revision
from pollard.services.models.standing import Standing, not_ready
from pollard.services.models.store import now_us

_DESIRED = "desired_state"


@dataclass(frozen=True)
class StepResult:
    """What came of a step."""

    version: int
    """Of the desired state that is in force now."""
    state: fleet_pb.DesiredState
    """It, with the endpoints, without nonce and report interval."""
    next_deadline: float | None
    """When time alone makes another step possible, by the switch's clock."""
    watching: bool = False
    """Whether a rollout runs, so that every report counts."""


class Switch:
    """Moves aliases. One thread at a time.

    Args:
        drain_seconds: How long a request can be in flight.
        load_timeout_seconds: Longest time for all servers to load a revision.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        *,
        drain_seconds: float,
        load_timeout_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._drain_seconds = drain_seconds
        self._load_timeout_seconds = load_timeout_seconds
        self._clock = clock
        # Clocks are not on disk: a restart begins them anew, which only waits longer.
        self._loading_since: dict[tuple[str, str, int, int], float] = {}
        self._draining_since: dict[tuple[str, int, int], float] = {}
        self._refusals = Refusals()
        self._rollouts = RolloutSteps(
            load_timeout_seconds=load_timeout_seconds,
            settled=self._settled,
            refusals=self._refusals,
            clock=clock,
        )

    def begin_anew(self) -> None:
        """Forget every clock and what was seen in rollouts: another manager may have gone on."""
        self._loading_since = {}
        self._draining_since = {}
        self._rollouts.begin_anew()

    def step(self, session: Session, view: FleetView) -> StepResult:
        """Take every step that is possible now."""
        _note_revision_states(session, view)
        meta = session.get(Meta, _DESIRED)
        if meta is None:
            meta = Meta(key=_DESIRED, number=0, content=b"")
            session.add(meta)
        # After a restore from a backup, servers may have seen higher versions.
        seen = max((server.applied_version for server in view.servers), default=0)
        if seen > meta.number:
            meta.number = seen
            meta.content = b""
        standing = Standing.read(session)
        self._rollouts.observe(session, view, standing)
        while True:
            # After every step, because routes lead to other revisions then.
            self._refusals.observe(session, view, standing)
            self._publish(session, view, standing, meta)
            if not self._advance(session, view, standing):
                break
            standing = Standing.read(session)
        state = fleet_pb.DesiredState.FromString(meta.content)
        state.version = meta.number
        return StepResult(
            meta.number, state, self._next_deadline(), watching=self._rollouts.watching
        )

    def _publish(self, session: Session, view: FleetView, standing: Standing, meta: Meta) -> None:
        """Make what the tables say the desired state, with a new version if it differs."""
        content = _desired_state(view, standing, self._refusals).SerializeToString(
            deterministic=True
        )
        if content != meta.content or meta.number == 0:
            before = _revisions_in(meta.content)
            meta.number += 1
            meta.content = content
            for model, number in before - _revisions_in(content):
                gone = session.get(Revision, (model, number))
                if gone is not None:
                    gone.removed_version = meta.number
        for alias in standing.aliases:
            if alias.pending_version is None and alias.pending_revision:
                alias.pending_version = meta.number
            if alias.routes_version is None and alias.revision:
                alias.routes_version = meta.number
        for row in standing.draining:
            if row.routes_version is None:
                row.routes_version = meta.number
        for rollout in standing.running():
            if rollout.pending_version is None:
                rollout.pending_version = meta.number
            if rollout.loaded and rollout.routes_version is None:
                rollout.routes_version = meta.number
        session.flush()

    def _advance(self, session: Session, view: FleetView, standing: Standing) -> bool:
        """Take the steps that the servers' words and the clock allow; tell whether any was."""
        now = self._clock()
        progress = False
        loading: dict[tuple[str, str, int, int], float] = {}
        for alias in standing.aliases:
            if not alias.pending_revision:
                continue
            key = (alias.model, alias.name, alias.pending_revision, alias.pending_version or 0)
            since = loading[key] = self._loading_since.get(key, now)
            progress |= self._advance_loading(session, view, alias, now - since)
        self._loading_since = loading
        progress |= self._rollouts.advance(session, view, standing)
        for alias in standing.aliases:
            if alias.state != pb.Alias.STATE_SWITCHING or alias.routes_version is None:
                continue
            if self._settled(standing, view, alias.model, alias.routes_version):
                alias.state = pb.Alias.STATE_ACTIVE
                without = ", ".join(failure["server_id"] for failure in alias.failures)
                detail = f"every server sends requests to revision {alias.revision}"
                if without:
                    detail += f", except {without}"
                _touch(session, alias, "ALIAS_ACTIVE", detail)
                # ACTIVE is not part of the desired state, so there is no need to go round again.
        draining: dict[tuple[str, int, int], float] = {}
        for row in standing.draining:
            if row.routes_version is None:
                continue
            drain_key = (row.model, row.revision, row.routes_version)
            if not self._settled(standing, view, row.model, row.routes_version):
                continue  # and the clock begins anew once it is
            since = draining[drain_key] = self._draining_since.get(drain_key, now)
            if now - since >= self._drain_seconds:
                del draining[drain_key]
                session.delete(row)
                progress = True
        self._draining_since = draining
        session.flush()
        return progress

    def _advance_loading(
        self, session: Session, view: FleetView, alias: Alias, waited: float
    ) -> bool:
        if alias.pending_version is None:
            return False
        number = alias.pending_revision
        key = (alias.model, number)
        revision = session.get_one(Revision, key)
        loading = loading_of(view, key, alias.pending_version, revision)
        quorum = Quorum.of(alias.quorum)
        verdict, refusals = judge(loading, quorum)
        error = None
        if verdict is Verdict.WAIT and waited >= self._load_timeout_seconds:
            error = too_late(number, loading, self._load_timeout_seconds)
            verdict, refusals = judge(loading, quorum, late=error)
        if verdict is Verdict.WAIT:
            return False
        if verdict is Verdict.REFUSED:
            _fail(session, alias, error or refused(number, loading, quorum, refusals), refusals)
            return True
        self._refusals.add(key, refusals)
        change_route(session, alias, number, actor=MANAGER, refusals=refusals)
        return True

    def _settled(self, standing: Standing, view: FleetView, model: str, version: int) -> bool:
        """Tell whether every expected server has the routes of ``version``."""
        routed: list[Key] | None = None
        for server in view.servers:
            if server.acked >= version:
                continue
            if server.nacked < version:
                return False
            # Something of that version does not run there. The routes of this
            # model do if every revision they lead to is ready. An inference
            # server that refuses one keeps what it ran, and is not waited for:
            # nothing is freed there while its own routes lead to it.
            if routed is None:
                routed = [key for key in standing.routed() if key[0] == model]
            for key in routed:
                if self._refusals.excuses(server.server_id, key):
                    continue
                report = server.report_of(key, standing.stored[key])
                if report is None or report.state != fleet_pb.REVISION_STATE_READY:
                    return False
        return True

    def _next_deadline(self) -> float | None:
        deadlines = [since + self._load_timeout_seconds for since in self._loading_since.values()]
        deadlines += [since + self._drain_seconds for since in self._draining_since.values()]
        deadlines += self._rollouts.deadlines()
        return min(deadlines, default=None)


def _fail(
    session: Session,
    alias: Alias,
    error: status_pb2.Status,
    failures: Mapping[str, status_pb2.Status],
) -> None:
    alias.pending_revision = 0
    alias.pending_version = None
    alias.state = pb.Alias.STATE_FAILED
    alias.error = error.SerializeToString()
    alias.failures = encoded(failures)
    _touch(session, alias, "ALIAS_FAILED", error.message)


def _touch(session: Session, alias: Alias, action: str, detail: str) -> None:
    alias.update_time = now_us()
    name = alias_name(alias.model, alias.name)
    alias.etag = record(session, MANAGER, action, name, detail, model=alias.model)
    session.flush()


def _note_revision_states(session: Session, view: FleetView) -> None:
    """Write down which revisions a server has loaded, or could not load."""
    ended = (fleet_pb.REVISION_STATE_READY, fleet_pb.REVISION_STATE_FAILED)
    said = [
        (server, key, report)
        for server in view.servers
        if server.kind == fleet_pb.SERVER_KIND_INFERENCE
        for key, report in server.revisions.items()
        if report.state in ended
    ]
    rows = not_ready(session, {key for _, key, _ in said})
    for server, key, report in said if rows else ():
        row = rows.get(key)
        if row is None or row.state == pb.Revision.STATE_READY:
            continue  # one server that could load it is enough
        if server.report_of(key, row) is None:
            continue
        ready = report.state == fleet_pb.REVISION_STATE_READY
        # Whether it is tried again, and when, is the server's and changes each time.
        said_error = None if ready or report.error is None else given_up(report.error)
        error = b"" if said_error is None else said_error.SerializeToString()
        state = pb.Revision.STATE_READY if ready else pb.Revision.STATE_FAILED
        if (row.state, row.error) == (state, error):
            continue
        row.state, row.error = state, error
        row.etag = record(
            session,
            f"servers/{server.server_id}",
            "REVISION_READY" if ready else "REVISION_FAILED",
            registry.revision_name(*key),
            "loaded" if said_error is None else said_error.message,
            model=row.model,
        )


def _desired_state(
    view: FleetView, standing: Standing, refusals: Refusals
) -> fleet_pb.DesiredState:
    """Return what the tables and the fleet say, with models, revisions and aliases sorted."""
    wanted: dict[str, set[int]] = {}
    routes: dict[str, list[fleet_pb.Route]] = {}
    rollouts = {(row.model, row.alias): row for row in standing.running()}
    for alias in standing.aliases:
        numbers = wanted.setdefault(alias.model, set())
        numbers.update(number for number in (alias.revision, alias.pending_revision) if number)
        if alias.revision:
            rollout = rollouts.get((alias.model, alias.name))
            route = fleet_pb.Route(alias=alias.name)
            targets = [(alias.revision, 1)]
            if rollout is not None:
                numbers.add(rollout.revision)
                targets = weights(rollout) or targets
                if (copies := shadow(rollout)) is not None:
                    route.shadow.CopyFrom(copies)
            for number, weight in targets:
                route.targets.add(revision=number, weight=weight)
            routes.setdefault(alias.model, []).append(route)
    for row in standing.draining:
        wanted.setdefault(row.model, set()).add(row.revision)
    state = fleet_pb.DesiredState()
    for model in sorted(wanted):
        desired = state.models.add(model=model)
        for number in sorted(wanted[model]):
            kept = standing.stored[model, number]
            desired.revisions.add(
                revision=number, bundle_sha256=kept.bundle_sha256, size_bytes=kept.size_bytes
            )
        desired.routes.extend(routes.get(model, []))
    for server_id, address in _endpoints(view):
        endpoint = state.inference_endpoints.add(server_id=server_id, address=address)
        for model, number in refusals.of_server(server_id):
            endpoint.refused.add(model=model, revision=number)
    return state


def _endpoints(view: FleetView) -> Iterable[tuple[str, str]]:
    """Return where inference servers are reached, the connected ones first.

    One that has not answered any desired state yet has nothing loaded.
    """
    serving = [
        server
        for server in view.servers
        if server.kind == fleet_pb.SERVER_KIND_INFERENCE and server.serving
    ]
    serving.sort(key=lambda server: (not server.connected, server.server_id))
    found = [(server.server_id, server.address) for server in serving]
    return found or view.fallback_endpoints


def _revisions_in(content: bytes) -> set[Key]:
    state = fleet_pb.DesiredState.FromString(content)
    return {(model.model, r.revision) for model in state.models for r in model.revisions}
