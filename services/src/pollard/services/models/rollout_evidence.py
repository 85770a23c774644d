"""The evidence of rollouts on disk: what was seen in a step, and from where counters go on.

Servers report counters that only grow. Where they stood when they were looked at last is stored in
the same transaction as what was added since, so that nothing is counted twice or lost when the
manager is killed, and another one goes on from there.
"""

from __future__ import annotations

from sqlalchemy import select
from sqlalchemy.orm import Session

from pollard.models.v1 import fleet_service_pb2 as fleet_pb
from pollard.services.models.fleet_view import FleetView, ServerView
from pollard.services.models.rollout_gates import Judge, Limits
from pollard.services.models.rollout_tallies import Seen
from pollard.services.models.schema import Rollout, RolloutBaseline, RolloutEvidence
from pollard.services.models.standing import Standing

Baselines = dict[tuple[str, int], RolloutBaseline]
"""By server and revision."""


def find(session: Session, row: Rollout) -> RolloutEvidence | None:
    """Return what was seen last; None before the first step."""
    return session.get(RolloutEvidence, (row.model, row.number))


def judge_of(row: Rollout, evidence: RolloutEvidence | None) -> Judge:
    """Return the judge of a step as it stands."""
    steps = sum(share < 100 for share in row.steps) + (row.shadow_ppm > 0)
    limits = Limits(row.max_error_rate, row.max_p99_ratio, steps, row.min_agreement)
    judge = Judge(limits, row.revision, row.base_revision)
    if evidence is not None:
        judge.restore(evidence.seen)
    return judge


def begin(session: Session, row: Rollout) -> RolloutEvidence:
    """Begin a step: nothing was seen yet."""
    evidence = find(session, row)
    if evidence is None:
        evidence = RolloutEvidence(model=row.model, number=row.number)
        session.add(evidence)
    evidence.step, evidence.held_us = row.step, 0
    evidence.seen = judge_of(row, None).to_json()
    session.flush()
    return evidence


def observe(session: Session, row: Rollout, view: FleetView, standing: Standing) -> None:
    """Take in what the servers have counted since the last call, for the step that is judged."""
    baselines: Baselines = {
        (each.server_id, each.revision): each
        for each in session.scalars(
            select(RolloutBaseline).where(
                RolloutBaseline.model == row.model, RolloutBaseline.number == row.number
            )
        )
    }
    evidence = find(session, row)
    judged = evidence is not None and evidence.step == row.step
    judge = judge_of(row, evidence) if judged else None
    for server in view.servers:
        canary = _added(session, row, baselines, server, row.revision, standing)
        base = _added(session, row, baselines, server, row.base_revision, standing)
        if judge is None:
            continue
        if server.kind == fleet_pb.SERVER_KIND_INFERENCE:
            judge.observe(canary.tally, base.tally)
        else:
            judge.images.add(canary.tally, base.tally)
        judge.copies.add(canary.copies)
    if judge is not None and evidence is not None:
        evidence.seen = judge.to_json()
    session.flush()


def _added(
    session: Session,
    row: Rollout,
    baselines: Baselines,
    server: ServerView,
    revision: int,
    standing: Standing,
) -> Seen:
    """Return what a server has counted since the last look, and store where it stands now."""
    key = (row.model, revision)
    report, kept = server.revisions.get(key), standing.stored.get(key)
    if report is not None and kept is not None and not report.is_of(kept.bundle_sha256):
        return Seen()  # the requests of another bundle that had the number before
    counters = report.counters if report is not None else None
    if counters is None:
        return Seen()
    now = Seen.of(counters)
    before = baselines.get((server.server_id, revision))
    if before is None:
        # What was before the rollout is not its doing.
        before = RolloutBaseline(
            model=row.model, number=row.number, server_id=server.server_id, revision=revision
        )
        session.add(before)
        added = Seen()
    else:
        same_run = before.run_id in ("", counters.run_id)
        earlier = Seen.of(fleet_pb.Counters.FromString(before.counters))
        # A server that has started anew has counted all of it since.
        added = (now.since(earlier) if same_run else None) or now
    before.run_id = counters.run_id[:64]
    before.counters = counters.SerializeToString(deterministic=True)
    return added
