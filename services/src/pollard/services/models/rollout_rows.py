"""Rollouts as rows: which run, how they split requests, and how they end."""

from __future__ import annotations

from google.rpc import status_pb2
from sqlalchemy import select
from sqlalchemy.orm import Session

from pollard.models.v1 import model_service_pb2 as pb
from pollard.services.models.events import record
from pollard.services.models.schema import Draining, Rollout
from pollard.services.models.store import now_us

WEIGHTS = 100_000
"""Sum of the weights of a split route: thousandths of a percent."""


def rollout_name(model: str, number: int) -> str:
    """Return the resource name of a rollout."""
    return f"models/{model}/rollouts/{number}"


def running(session: Session, model: str = "", alias: str = "") -> list[Rollout]:
    """Return the rollouts that have not ended, of all models or of one, or of one alias."""
    statement = select(Rollout).where(Rollout.end_time.is_(None))
    if model:
        statement = statement.where(Rollout.model == model)
    if alias:
        statement = statement.where(Rollout.alias == alias)
    return list(session.scalars(statement.order_by(Rollout.model, Rollout.number)))


def weights(row: Rollout) -> list[tuple[int, int]]:
    """Return the targets of the alias's route; empty while no request goes to the revision.

    The sum is always the same, and routing goes by the order of the revisions: so a sticky key
    that has come to the new revision stays there while its share grows.
    """
    if not row.loaded:
        return []
    share = round(row.steps[row.step] / 100 * WEIGHTS)
    targets = [(row.base_revision, WEIGHTS - share), (row.revision, share)]
    return sorted(target for target in targets if target[1])


def change(session: Session, row: Rollout, *, actor: str, action: str, detail: str) -> None:
    """Write down that a rollout was changed."""
    name = rollout_name(row.model, row.number)
    row.etag = record(session, actor, action, name, detail, model=row.model)
    session.flush()


def end(
    session: Session,
    row: Rollout,
    state: pb.Rollout.State.ValueType,
    *,
    actor: str,
    action: str,
    detail: str,
    error: status_pb2.Status | None = None,
) -> None:
    """End a rollout. Where it is rolled back, its revision is drained."""
    row.state = state
    row.end_time = now_us()
    row.error = b"" if error is None else error.SerializeToString()
    if state == pb.Rollout.STATE_ROLLED_BACK and row.loaded:
        drain(session, row.model, row.revision)
    change(session, row, actor=actor, action=action, detail=detail)


def drain(session: Session, model: str, number: int) -> None:
    """Keep a revision loaded, from which a route was just taken, for requests in flight."""
    row = session.get(Draining, (model, number))
    if row is None:
        session.add(Draining(model=model, revision=number))
    else:
        row.routes_version = None  # the clock starts anew with the next desired state
    session.flush()
