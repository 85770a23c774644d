"""Aliases as their users change them: the intention is stored here, and the
switch (:mod:`.switch`) carries it out."""

from __future__ import annotations

import json
from collections.abc import Mapping

from google.rpc.status_pb2 import Status
from sqlalchemy import select
from sqlalchemy.orm import Session

from pollard.models.v1 import model_service_pb2 as pb
from pollard.services.common.errors import FailedPrecondition, NotFound
from pollard.services.models import bundle_rows, names, registry
from pollard.services.models.events import check_etag, record
from pollard.services.models.quorum import Quorum
from pollard.services.models.refusals import encoded
from pollard.services.models.rollout_rows import drain, end, rollout_name, running
from pollard.services.models.schema import Alias
from pollard.services.models.store import now_us


def alias_name(model: str, alias: str) -> str:
    """Return the resource name of an alias."""
    return f"models/{model}/aliases/{alias}"


def find_alias(session: Session, model: str, alias: str) -> Alias:
    """Return an alias.

    Raises:
        NotFound: there is no such model or alias.
    """
    registry.find_model(session, model)
    row = session.get(Alias, (model, alias))
    if row is None:
        raise NotFound(
            f"model {model!r} has no alias {alias!r}",
            reason="ALIAS_NOT_FOUND",
            model=model,
            alias=alias,
        )
    return row


def list_aliases(
    session: Session, model: str, *, page_size: int, page_token: str
) -> tuple[list[Alias], str]:
    """Return a page of a model's aliases by name, and the token of the next page.

    Raises:
        NotFound: there is no such model.
        InvalidRequest: page size or token is not valid.
    """
    registry.find_model(session, model)
    limit = names.page_limit(page_size)
    query = {"list": "aliases", "model": model}
    last = names.read_page_token(query, page_token, str)
    statement = select(Alias).where(Alias.model == model).order_by(Alias.name).limit(limit + 1)
    if last is not None:
        statement = statement.where(Alias.name > last[0])
    found = list(session.scalars(statement))
    token = names.make_page_token(query, [found[limit - 1].name]) if len(found) > limit else ""
    return found[:limit], token


def set_alias(
    session: Session,
    model: str,
    alias: str,
    number: int,
    *,
    etag: str,
    allow_signature_change: bool,
    actor: str,
    quorum: Quorum | None = None,
) -> Alias:
    """Store the intention to point an alias at a revision; a newer one overtakes an older one.

    Raises:
        NotFound: there is no such model or revision.
        Conflict: the etag is another one.
        FailedPrecondition: the inputs differ from the current revision's, or a
            rollout moves the alias.
    """
    revision = registry.find_revision(session, model, number)
    row = session.get(Alias, (model, alias))
    name = alias_name(model, alias)
    if row is None:
        check_etag(etag, 0, name)
        row = Alias(
            model=model,
            name=alias,
            revision=0,
            pending_revision=0,
            previous_revision=0,
            error=b"",
            failures=[],
            quorum={},
        )
    else:
        check_etag(etag, row.etag, name)
        _refuse_while_rolling_out(session, row)
        if row.revision and not allow_signature_change:
            check_signature(session, row, number)
    stored = quorum.stored() if quorum is not None else {}
    if number == row.pending_revision and stored == row.quorum:
        return row  # it is on its way
    if number == row.pending_revision:
        row.quorum = stored
        detail = f"to revision {number} as soon as {_enough(quorum)} have it"
        row.update_time = now_us()
        row.etag = record(session, actor, "ALIAS_SET", name, detail, model=model)
        session.flush()
        return row
    if number == row.revision and not row.pending_revision and row.state != pb.Alias.STATE_FAILED:
        return row  # it is there already
    row.quorum = stored
    overtaken = f", overtaking {row.pending_revision}" if row.pending_revision else ""
    row.error = b""
    row.failures = []
    row.pending_version = None
    if number == row.revision:
        # Only what was on its way is given up; the routes are as they should be.
        row.pending_revision = 0
        row.state = pb.Alias.STATE_SWITCHING
    else:
        row.pending_revision = number
        row.state = pb.Alias.STATE_LOADING
    row.update_time = now_us()
    detail = f"to revision {revision.number} from {row.revision or 'none'}{overtaken}"
    if quorum is not None:
        detail += f", as soon as {_enough(quorum)} have it"
    row.etag = record(session, actor, "ALIAS_SET", name, detail, model=model)
    session.add(row)
    session.flush()
    return row


def _enough(quorum: Quorum | None) -> str:
    return "all servers" if quorum is None else f"{quorum} of the inference servers"


def _refuse_while_rolling_out(session: Session, row: Alias) -> None:
    for rollout in running(session, row.model, row.name):
        name = rollout_name(row.model, rollout.number)
        raise FailedPrecondition(
            f"{name} is moving {row.name!r} to revision {rollout.revision}; abort it first, or "
            "promote it",
            reason="ROLLOUT_RUNNING",
            alias=alias_name(row.model, row.name),
            rollout=name,
        )


def check_signature(
    session: Session,
    row: Alias,
    number: int,
    advice: str = "set allow_signature_change if they are ready for it",
) -> None:
    """Compare the inputs of a revision with those of an alias's current one.

    Args:
        session: Reads the registry.
        row: The alias.
        number: The revision that it is to lead to.
        advice: What the error says to do.

    Raises:
        NotFound: there is no such revision.
        FailedPrecondition: they differ.
    """
    current = registry.find_revision(session, row.model, row.revision, deleted=True)
    wanted = registry.find_revision(session, row.model, number)
    bundles = bundle_rows.bundles_of(session, [current, wanted])
    before = bundles[current.bundle_sha256].signature
    after = bundles[wanted.bundle_sha256].signature
    if before != after:
        raise FailedPrecondition(
            f"the inputs of revision {number} differ from those of revision {row.revision}, which "
            f"{row.name!r} serves: {_inputs(after)} instead of {_inputs(before)}. Clients that "
            f"send tensors would fail; {advice}",
            reason="SIGNATURE_CHANGED",
            model=row.model,
            alias=row.name,
            revision=number,
            current_revision=row.revision,
            inputs=_inputs(after),
            current_inputs=_inputs(before),
        )


def _inputs(signature: str) -> str:
    described = (
        f"{name} {data_type}[{','.join(str(size) for size in shape)}]"
        for name, data_type, *shape in json.loads(signature)
    )
    return ", ".join(described)


def roll_back(
    session: Session,
    model: str,
    alias: str,
    *,
    etag: str,
    actor: str,
    quorum: Quorum | None = None,
) -> Alias:
    """Store the intention to go back to the revision before.

    A switch that is still loading is given up instead: requests never went to
    its revision, so the revision to be back at is the current one. Signatures
    are not compared, because clients could use the earlier revision before.

    Raises:
        NotFound: there is no such model or alias, or the revision was deleted.
        Conflict: the etag is another one.
        FailedPrecondition: there is nothing to go back to, or a rollout moves
            the alias.
    """
    row = find_alias(session, model, alias)
    name = alias_name(model, alias)
    check_etag(etag, row.etag, name)
    target = row.revision if row.pending_revision else row.previous_revision
    if not target:
        raise FailedPrecondition(
            f"{name} pointed at no other revision before",
            reason="NO_PREVIOUS_REVISION",
            alias=name,
        )
    return set_alias(
        session,
        model,
        alias,
        target,
        etag="",
        allow_signature_change=True,
        actor=actor,
        quorum=quorum,
    )


def delete_alias(session: Session, model: str, alias: str, *, etag: str, actor: str) -> None:
    """Remove an alias; its revision is drained, and a rollout of it ends.

    Raises:
        NotFound: there is no such model or alias.
        Conflict: the etag is another one.
    """
    row = find_alias(session, model, alias)
    name = alias_name(model, alias)
    check_etag(etag, row.etag, name)
    for rollout in running(session, model, alias):
        end(
            session,
            rollout,
            pb.Rollout.STATE_ROLLED_BACK,
            actor=actor,
            action="ROLLOUT_ABORTED",
            detail=f"the alias {alias!r} was deleted",
        )
    if row.revision:
        drain(session, model, row.revision)
    session.delete(row)
    detail = f"it pointed at revision {row.revision or 'none'}"
    record(session, actor, "ALIAS_DELETED", name, detail, model=model)


def change_route(
    session: Session,
    row: Alias,
    number: int,
    *,
    actor: str,
    refusals: Mapping[str, Status] | None = None,
) -> None:
    """Point an alias at a revision that every server has, but for ``refusals``.

    The revision before is drained.
    """
    before = row.revision
    if before:
        drain(session, row.model, before)
        row.previous_revision = before
    row.revision = number
    row.pending_revision = 0
    row.pending_version = None
    row.routes_version = None
    row.state = pb.Alias.STATE_SWITCHING
    row.error = b""
    row.failures = encoded(refusals or {})
    row.update_time = now_us()
    name = alias_name(row.model, row.name)
    detail = f"from revision {before or 'none'} to {number}"
    if refusals:
        detail += f", without {', '.join(sorted(refusals))}"
    row.etag = record(session, actor, "ALIAS_SWITCHED", name, detail, model=row.model)
    session.flush()
