"""Rollouts: began, looked at, and told what to do. What they do by themselves is elsewhere."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

from sqlalchemy import and_, func, or_, select
from sqlalchemy.orm import Session

from pollard.models.v1 import model_service_pb2 as pb
from pollard.services.common.errors import (
    Conflict,
    FailedPrecondition,
    InvalidRequest,
    NotFound,
)
from pollard.services.models import aliases, names, registry
from pollard.services.models.events import check_etag
from pollard.services.models.quorum import Quorum
from pollard.services.models.rollout_rows import (
    change,
    end,
    moving_state,
    rollout_name,
    running,
    share_of,
)
from pollard.services.models.rollout_shadow import Comparison
from pollard.services.models.schema import Model, Rollout
from pollard.services.models.store import now_us

DEFAULT_STEPS = (5.0, 25.0, 50.0, 100.0)
DEFAULT_HOLD_SECONDS = 60.0
DEFAULT_MIN_REQUESTS = 200
DEFAULT_MAX_ERROR_RATE = 0.005
DEFAULT_MAX_P99_RATIO = 1.2

MAX_STEPS = 20
MIN_SHARE_PERCENT = 0.01
MAX_HOLD_SECONDS = 30 * 86400.0
MAX_MIN_REQUESTS = 10**12


@dataclass(frozen=True)
class Plan:
    """How a rollout should go. Checked when it is made."""

    alias: str
    revision: int
    steps: tuple[float, ...] = DEFAULT_STEPS
    """Shares in percent, growing, the last of them 100."""
    hold_seconds: float = DEFAULT_HOLD_SECONDS
    min_requests: int = DEFAULT_MIN_REQUESTS
    max_error_rate: float = DEFAULT_MAX_ERROR_RATE
    max_p99_ratio: float = DEFAULT_MAX_P99_RATIO
    shadow_percent: float = 0.0
    """Share of the base revision's requests that are copied."""
    min_agreement: float | None = None
    """Smallest share of items that agree; None takes the measured one, 0 does not judge it."""
    quorum: Quorum | None = None
    """How many inference servers are enough; None for all."""

    def __post_init__(self) -> None:
        """Refuse what cannot be done.

        Raises:
            InvalidRequest: a value is out of its range.
        """
        steps = self.steps
        growing = all(before < after for before, after in itertools.pairwise(steps))
        if (
            not 1 <= len(steps) <= MAX_STEPS
            or not growing
            or steps[-1] != 100
            or not steps[0] >= MIN_SHARE_PERCENT
            or (len(steps) > 1 and not steps[-2] <= 100 - MIN_SHARE_PERCENT)
        ):
            raise _invalid(
                "steps",
                list(steps),
                f"must be 1 to {MAX_STEPS} growing shares in percent, {MIN_SHARE_PERCENT:g} or "
                "more, the last of them 100",
            )
        if not 0 <= self.hold_seconds <= MAX_HOLD_SECONDS:
            raise _invalid("hold", f"{self.hold_seconds:g} s", "must be 0 s to 30 days")
        if not 0 < self.min_requests <= MAX_MIN_REQUESTS:
            raise _invalid("gates.min_requests", self.min_requests, "must be 1 or more")
        if not 0 < self.max_error_rate <= 1:
            raise _invalid("gates.max_error_rate", self.max_error_rate, "must be above 0, up to 1")
        if not 1 <= self.max_p99_ratio < math.inf:
            raise _invalid("gates.max_p99_ratio", self.max_p99_ratio, "must be 1 or more")
        if self.shadow_percent and not MIN_SHARE_PERCENT <= self.shadow_percent <= 100:
            raise _invalid(
                "shadow_percent",
                self.shadow_percent,
                f"must be 0 for no shadows, or {MIN_SHARE_PERCENT:g} to 100",
            )
        if self.min_agreement is not None and not 0 <= self.min_agreement <= 1:
            raise _invalid("gates.min_agreement", self.min_agreement, "must be 0 to 1")
        if self.min_agreement and not self.shadow_percent:
            raise _invalid(
                "gates.min_agreement",
                self.min_agreement,
                "needs shadows to be compared: set shadow_percent, or leave it out",
            )


@dataclass(frozen=True)
class Shadow:
    """How the answers of copies are compared."""

    base_revision: int
    """Whose requests are copied."""
    how: Comparison


def _invalid(field: str, value: object, why: str) -> InvalidRequest:
    return InvalidRequest(
        f"rollout.{field} {value} {why}",
        reason="ROLLOUT_INVALID",
        field=f"rollout.{field}",
        value=value,
    )


def create(
    session: Session, model: str, plan: Plan, shadow: Shadow | None = None, *, actor: str
) -> Rollout:
    """Begin a rollout.

    Args:
        session: Transaction.
        model: Name of the model.
        plan: How it should go.
        shadow: How answers are compared, if the plan wants shadows.
        actor: Who asks.

    Raises:
        Conflict: the alias has moved since the comparison was made.
        NotFound: there is no such model, alias or revision.
        FailedPrecondition: the alias is moved already, is there already or
            leads nowhere, or the inputs differ.
    """
    alias = aliases.find_alias(session, model, plan.alias)
    registry.find_revision(session, model, plan.revision)
    name = aliases.alias_name(model, plan.alias)
    for other in running(session, model, plan.alias):
        used = rollout_name(model, other.number)
        raise FailedPrecondition(
            f"{used} is moving {plan.alias!r} to revision {other.revision}; abort it first, or "
            "promote it",
            reason="ROLLOUT_RUNNING",
            alias=name,
            rollout=used,
        )
    if alias.pending_revision or not alias.revision:
        raise FailedPrecondition(
            f"{name} is on its way to revision {alias.pending_revision or 'none'}; begin when it "
            "is there",
            reason="ALIAS_MOVING",
            alias=name,
            pending_revision=alias.pending_revision,
        )
    if alias.revision == plan.revision:
        raise FailedPrecondition(
            f"{name} leads to revision {plan.revision} already",
            reason="ALIAS_THERE",
            alias=name,
            revision=plan.revision,
        )
    aliases.check_signature(
        session,
        alias,
        plan.revision,
        "when they are ready for it, move the alias at once instead, with allow_signature_change",
    )
    if shadow is not None and shadow.base_revision != alias.revision:
        raise Conflict(
            f"{name} has moved to revision {alias.revision} meanwhile; begin again",
            reason="ALIAS_MOVED",
            alias=name,
            revision=alias.revision,
        )
    last = session.scalar(select(func.max(Rollout.number)).where(Rollout.model == model))
    row = Rollout(
        model=model,
        number=(last or 0) + 1,
        alias=plan.alias,
        revision=plan.revision,
        base_revision=alias.revision,
        steps=list(plan.steps),
        hold_us=round(plan.hold_seconds * 1e6),
        min_requests=plan.min_requests,
        max_error_rate=plan.max_error_rate,
        max_p99_ratio=plan.max_p99_ratio,
        shadow_ppm=round(plan.shadow_percent * 1e4) if shadow is not None else 0,
        shadow_output=shadow.how.output if shadow is not None else "",
        shadow_transforms=shadow.how.transform_again if shadow is not None else False,
        min_agreement=shadow.how.min_agreement if shadow is not None else 0.0,
        state=pb.Rollout.STATE_CANARY if shadow is None else pb.Rollout.STATE_SHADOW,
        loaded=False,
        step=0 if shadow is None else -1,
        error=b"",
        quorum={} if plan.quorum is None else plan.quorum.stored(),
        failures=[],
        creator=actor,
        create_time=now_us(),
        etag=0,
    )
    session.add(row)
    shares = ", ".join(f"{share:g}" for share in plan.steps)
    detail = (
        f"{plan.alias!r} from revision {alias.revision} to {plan.revision} in steps of {shares} %"
    )
    if shadow is not None:
        detail += f", {plan.shadow_percent:g} % as shadows"
    if plan.quorum is not None:
        detail += f", as soon as {plan.quorum} of the inference servers have it"
    change(session, row, actor=actor, action="ROLLOUT_CREATED", detail=detail)
    return row


def find(session: Session, model: str, number: int) -> Rollout:
    """Return a rollout.

    Raises:
        NotFound: there is no such model or rollout.
    """
    registry.find_model(session, model, deleted=True)
    row = session.get(Rollout, (model, number))
    if row is None:
        raise NotFound(
            f"model {model!r} has no rollout {number}",
            reason="ROLLOUT_NOT_FOUND",
            model=model,
            rollout=number,
        )
    return row


def list_rollouts(
    session: Session,
    model: str | None,
    *,
    running_only: bool = False,
    page_size: int,
    page_token: str,
) -> tuple[list[Rollout], str]:
    """Return a page of rollouts, the newest of each model first, and the token of the next page.

    Args:
        session: What is read by.
        model: Whose; None for those of all models that are not deleted.
        running_only: Leave out those that have ended.
        page_size, page_token: Of the request.

    Raises:
        NotFound: there is no such model.
        InvalidRequest: page size or token is not valid.
    """
    limit = names.page_limit(page_size)
    query = {"list": "rollouts", "model": model, "running": running_only}
    last = names.read_page_token(query, page_token, str, int)
    statement = select(Rollout)
    if model is None:
        statement = statement.join(Model).where(Model.delete_time.is_(None))
    else:
        registry.find_model(session, model, deleted=True)
        statement = statement.where(Rollout.model == model)
    if running_only:
        statement = statement.where(Rollout.end_time.is_(None))
    if last is not None:
        after, number = last
        statement = statement.where(
            or_(Rollout.model > after, and_(Rollout.model == after, Rollout.number < number))
        )
    statement = statement.order_by(Rollout.model, Rollout.number.desc()).limit(limit + 1)
    found = list(session.scalars(statement))
    if len(found) <= limit:
        return found, ""
    end = found[limit - 1]
    return found[:limit], names.make_page_token(query, [end.model, end.number])


def pause(session: Session, model: str, number: int, *, etag: str, actor: str) -> Rollout:
    """Keep a rollout at its step; its gates are judged all the same.

    Raises:
        NotFound: there is no such rollout.
        Conflict: the etag is another one.
        FailedPrecondition: it has ended.
    """
    row = _find_running(session, model, number, etag)
    if row.state != pb.Rollout.STATE_PAUSED:
        row.state = pb.Rollout.STATE_PAUSED
        detail = f"at {share_of(row):g} %"
        change(session, row, actor=actor, action="ROLLOUT_PAUSED", detail=detail)
    return row


def resume(session: Session, model: str, number: int, *, etag: str, actor: str) -> Rollout:
    """Go on with a paused rollout.

    Raises:
        NotFound: there is no such rollout.
        Conflict: the etag is another one.
        FailedPrecondition: it has ended.
    """
    row = _find_running(session, model, number, etag)
    if row.state == pb.Rollout.STATE_PAUSED:
        row.state = moving_state(row)
        change(session, row, actor=actor, action="ROLLOUT_RESUMED", detail="goes on")
    return row


def promote(session: Session, model: str, number: int, *, etag: str, actor: str) -> Rollout:
    """Send all requests to the revision as soon as every server has it.

    Raises:
        NotFound: there is no such rollout.
        Conflict: the etag is another one.
        FailedPrecondition: it has ended.
    """
    row = _find_running(session, model, number, etag)
    row.state = pb.Rollout.STATE_CANARY
    if row.step < 0 or row.steps[row.step] < 100:
        row.step = len(row.steps) - 1
        row.routes_version = None
    change(session, row, actor=actor, action="ROLLOUT_PROMOTE", detail="goes to 100 % now")
    return row


def abort(session: Session, model: str, number: int, *, etag: str, actor: str) -> Rollout:
    """End a rollout; all requests go to the base revision.

    Raises:
        NotFound: there is no such rollout.
        Conflict: the etag is another one.
        FailedPrecondition: it has ended.
    """
    row = _find_running(session, model, number, etag)
    state = pb.Rollout.STATE_ROLLED_BACK
    detail = f"all requests go to revision {row.base_revision}"
    end(session, row, state, actor=actor, action="ROLLOUT_ABORTED", detail=detail)
    return row


def _find_running(session: Session, model: str, number: int, etag: str) -> Rollout:
    row = find(session, model, number)
    name = rollout_name(model, number)
    check_etag(etag, row.etag, name)
    if row.end_time is not None:
        state = pb.Rollout.State.Name(pb.Rollout.State.ValueType(row.state))
        raise FailedPrecondition(
            f"{name} has ended: {state.removeprefix('STATE_').lower().replace('_', ' ')}",
            reason="ROLLOUT_ENDED",
            rollout=name,
            state=state,
        )
    return row
