"""Rollouts as rows: which run, how they split requests, and how they end."""

from __future__ import annotations

from google.rpc import status_pb2
from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from pollard.models.v1 import fleet_service_pb2 as fleet_pb
from pollard.models.v1 import model_service_pb2 as pb
from pollard.services.models.events import record
from pollard.services.models.schema import Draining, Rollout, RolloutBaseline
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
    if not row.loaded or row.step < 0:
        return []
    share = round(row.steps[row.step] / 100 * WEIGHTS)
    targets = [(row.base_revision, WEIGHTS - share), (row.revision, share)]
    return sorted(target for target in targets if target[1])


def shadow(row: Rollout) -> fleet_pb.Shadow | None:
    """Return which requests are copied; None for none."""
    if not row.loaded or not row.shadow_ppm or share_of(row) >= 100:
        return None
    return fleet_pb.Shadow(
        revision=row.revision,
        base_revision=row.base_revision,
        share_ppm=row.shadow_ppm,
        output=row.shadow_output,
        transform_again=row.shadow_transforms,
    )


def share_of(row: Rollout) -> float:
    """Return the share of the requests that go to the revision at this step, in percent."""
    return row.steps[row.step] if row.loaded and row.step >= 0 else 0.0


def moving_state(row: Rollout) -> pb.Rollout.State.ValueType:
    """Return the state of a rollout that goes on at its step."""
    return pb.Rollout.STATE_SHADOW if row.step < 0 else pb.Rollout.STATE_CANARY


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
    # What was seen is kept; where the counters stood is of no use any more.
    session.execute(
        delete(RolloutBaseline).where(
            RolloutBaseline.model == row.model, RolloutBaseline.number == row.number
        )
    )
    change(session, row, actor=actor, action=action, detail=detail)


def drain(session: Session, model: str, number: int) -> None:
    """Keep a revision loaded, from which a route was just taken, for requests in flight."""
    row = session.get(Draining, (model, number))
    if row is None:
        session.add(Draining(model=model, revision=number))
    else:
        row.routes_version = None  # the clock starts anew with the next desired state
    session.flush()
