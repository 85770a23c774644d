"""Models and their revisions. Every function works in the caller's transaction."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from sqlalchemy import delete, select, tuple_
from sqlalchemy.orm import Session

from pollard.models.v1 import model_service_pb2 as pb
from pollard.services.common.errors import FailedPrecondition, NotFound
from pollard.services.models import bundle_rows, filters, names
from pollard.services.models.events import DAY_US, MANAGER, check_etag, record
from pollard.services.models.rollout_rows import rollout_name, running
from pollard.services.models.schema import Alias, Bundle, Draining, Model, Revision
from pollard.services.models.store import now_us

KEEP_DELETED_US = 30 * DAY_US
"""How long what was deleted can be brought back."""


def model_name(model: str) -> str:
    """Return the resource name of a model."""
    return f"models/{model}"


def revision_name(model: str, number: int) -> str:
    """Return the resource name of a revision."""
    return f"models/{model}/revisions/{number}"


def find_model(session: Session, model: str, *, deleted: bool = False) -> Model:
    """Return a model.

    Args:
        session: Transaction.
        model: Its name.
        deleted: Also return one that is deleted.

    Raises:
        NotFound: there is none.
    """
    row = session.get(Model, model)
    if row is None:
        raise NotFound(f"there is no model {model!r}", reason="MODEL_NOT_FOUND", model=model)
    if row.delete_time is not None and not deleted:
        raise NotFound(
            f"model {model!r} was deleted; UndeleteModel brings it back",
            reason="MODEL_DELETED",
            model=model,
        )
    return row


def list_models(
    session: Session,
    *,
    page_size: int,
    page_token: str,
    show_deleted: bool,
    order_by: str,
    filter_text: str,
) -> tuple[list[Model], str]:
    """Return a page of models and the token of the next page.

    Raises:
        InvalidRequest: page size, token, order or filter is not valid.
    """
    limit = names.page_limit(page_size)
    columns = {
        "name": Model.name,
        "create_time": Model.create_time,
        "update_time": Model.update_time,
    }
    field, down = filters.parse_order(order_by, columns, "name")
    column = columns[field]
    query = {
        "list": "models",
        "deleted": show_deleted,
        "order": [field, down],
        "filter": filter_text,
    }
    last = names.read_page_token(query, page_token, str if field == "name" else int, str)
    statement = select(Model).where(*filters.model_conditions(filter_text)).limit(limit + 1)
    statement = statement.order_by(
        column.desc() if down else column, Model.name.desc() if down else Model.name
    )
    if not show_deleted:
        statement = statement.where(Model.delete_time.is_(None))
    if last is not None:
        key = tuple_(column, Model.name)
        statement = statement.where(key < tuple(last) if down else key > tuple(last))
    found = list(session.scalars(statement))
    token = ""
    if len(found) > limit:
        end = found[limit - 1]
        token = names.make_page_token(query, [getattr(end, field), end.name])
    return found[:limit], token


def update_model(
    session: Session,
    model: str,
    *,
    description: str | None,
    labels: dict[str, str] | None,
    etag: str,
    actor: str,
) -> Model:
    """Change what is not None.

    Raises:
        NotFound: there is no such model.
        Conflict: the etag is another one.
    """
    row = find_model(session, model)
    check_etag(etag, row.etag, model_name(model))
    changed = []
    if description is not None:
        row.description = names.check_text(description, "description")
        changed.append("description")
    if labels is not None:
        row.labels = names.check_labels(labels)
        changed.append("labels")
    if changed:
        row.update_time = now_us()
        detail = f"changed {' and '.join(changed)}"
        row.etag = record(session, actor, "MODEL_UPDATED", model_name(model), detail, model=model)
    return row


def delete_model(session: Session, model: str, *, etag: str, actor: str) -> Model:
    """Mark a model and its revisions as deleted.

    Raises:
        NotFound: there is no such model.
        Conflict: the etag is another one.
        FailedPrecondition: an alias points at a revision.
    """
    row = find_model(session, model)
    check_etag(etag, row.etag, model_name(model))
    aliases = list(session.scalars(select(Alias.name).where(Alias.model == model)))
    if aliases:
        raise FailedPrecondition(
            f"model {model!r} is served: the aliases {', '.join(sorted(aliases))} point at it. "
            "Delete them first, or set force",
            reason="MODEL_IN_USE",
            model=model,
            aliases=",".join(sorted(aliases)),
        )
    row.delete_time = row.update_time = now_us()
    row.etag = record(session, actor, "MODEL_DELETED", model_name(model), "deleted", model=model)
    for revision in _revisions(session, model, deleted=False):
        revision.delete_time = row.delete_time
        revision.etag = row.etag
    return row


def undelete_model(session: Session, model: str, *, actor: str) -> Model:
    """Bring back a model with the revisions that were deleted with it.

    Raises:
        NotFound: there is no such model, or its time is over.
        FailedPrecondition: it is not deleted.
    """
    row = find_model(session, model, deleted=True)
    if row.delete_time is None:
        raise FailedPrecondition(
            f"model {model!r} is not deleted", reason="NOT_DELETED", model=model
        )
    _check_not_expired(row.delete_time, model_name(model))
    for revision in _revisions(session, model, deleted=True):
        if revision.delete_time == row.delete_time:
            revision.delete_time = None
    row.delete_time = None
    row.update_time = now_us()
    row.etag = record(
        session, actor, "MODEL_UNDELETED", model_name(model), "brought back", model=model
    )
    return row


def _check_not_expired(delete_time: int, resource: str) -> None:
    if delete_time < now_us() - KEEP_DELETED_US:
        raise NotFound(
            f"{resource} was deleted more than 30 days ago", reason="EXPIRED", resource=resource
        )


def _revisions(session: Session, model: str, *, deleted: bool) -> Iterable[Revision]:
    gone = Revision.delete_time.is_not(None) if deleted else Revision.delete_time.is_(None)
    return session.scalars(select(Revision).where(Revision.model == model, gone)).all()


def find_revision(session: Session, model: str, number: int, *, deleted: bool = False) -> Revision:
    """Return a revision.

    Raises:
        NotFound: there is none, or it is deleted and ``deleted`` is not set.
    """
    find_model(session, model, deleted=deleted)
    row = session.get(Revision, (model, number))
    if row is None:
        raise NotFound(
            f"model {model!r} has no revision {number}",
            reason="REVISION_NOT_FOUND",
            model=model,
            revision=number,
        )
    if row.delete_time is not None and not deleted:
        raise NotFound(
            f"revision {number} of model {model!r} was deleted; UndeleteRevision brings it back",
            reason="REVISION_DELETED",
            model=model,
            revision=number,
        )
    return row


def resolve(session: Session, model: str, target: int | str, *, deleted: bool = False) -> Revision:
    """Return the revision that a number or an alias names.

    Args:
        session: Transaction.
        model: Model.
        target: Number or alias.
        deleted: Also return a number that is deleted.

    Raises:
        NotFound: there is none, or the alias leads nowhere yet.
    """
    if isinstance(target, int):
        return find_revision(session, model, target, deleted=deleted)
    find_model(session, model)
    alias = session.get(Alias, (model, target))
    if alias is None or not alias.revision:
        why = "no server has loaded its first revision yet" if alias else "there is no such alias"
        raise NotFound(
            f"alias {target!r} of model {model!r} leads nowhere: {why}",
            reason="ALIAS_NOT_FOUND",
            model=model,
            alias=target,
        )
    return find_revision(session, model, alias.revision)


def list_revisions(
    session: Session,
    model: str,
    *,
    page_size: int,
    page_token: str,
    show_deleted: bool,
    order_by: str,
    filter_text: str,
) -> tuple[list[Revision], str]:
    """Return a page of revisions, newest first by default, and the token of the next page.

    Raises:
        NotFound: there is no such model.
        InvalidRequest: page size, token, order or filter is not valid.
    """
    find_model(session, model, deleted=show_deleted)
    limit = names.page_limit(page_size)
    columns = {"revision": Revision.number, "create_time": Revision.create_time}
    field, down = filters.parse_order(order_by, columns, "revision desc")
    column = columns[field]
    query = {
        "list": "revisions",
        "model": model,
        "deleted": show_deleted,
        "order": [field, down],
        "filter": filter_text,
    }
    last = names.read_page_token(query, page_token, int, int)
    statement = (
        select(Revision)
        .where(Revision.model == model, *filters.revision_conditions(filter_text))
        .order_by(
            column.desc() if down else column,
            Revision.number.desc() if down else Revision.number,
        )
        .limit(limit + 1)
    )
    if not show_deleted:
        statement = statement.where(Revision.delete_time.is_(None))
    if last is not None:
        key = tuple_(column, Revision.number)
        statement = statement.where(key < tuple(last) if down else key > tuple(last))
    found = list(session.scalars(statement))
    token = ""
    if len(found) > limit:
        end = found[limit - 1]
        value = end.number if field == "revision" else end.create_time
        token = names.make_page_token(query, [value, end.number])
    return found[:limit], token


def add_revision(
    session: Session,
    model: str,
    bundle: bundle_rows.NewBundle,
    *,
    notes: str,
    labels: dict[str, str],
    actor: str,
    origin: bytes = b"",
) -> tuple[Revision, bool]:
    """Make a bundle the next revision of a model, or return the one that has it.

    A model that does not exist is created, one that is deleted comes back.

    Returns:
        The revision, and whether the model already had the bundle.
    """
    now = now_us()
    owner = session.get(Model, model)
    if owner is None:
        owner = Model(
            name=model,
            create_time=now,
            update_time=now,
            latest_revision=0,
            etag=record(session, actor, "MODEL_CREATED", model_name(model), "created", model=model),
        )
        session.add(owner)
    elif owner.delete_time is not None:
        owner.delete_time = None
        owner.etag = record(
            session, actor, "MODEL_UNDELETED", model_name(model), "pushed to again", model=model
        )
    existing = session.scalars(
        select(Revision)
        .where(Revision.model == model, Revision.bundle_sha256 == bundle.sha256)
        .order_by(Revision.number.desc())
    ).first()
    if existing is not None:
        if existing.delete_time is not None:
            existing.delete_time = None
            name = revision_name(model, existing.number)
            existing.etag = record(
                session, actor, "REVISION_UNDELETED", name, "pushed again", model=model
            )
        return existing, True
    bundle_rows.add(session, bundle, actor)
    owner.latest_revision += 1
    owner.update_time = now
    name = revision_name(model, owner.latest_revision)
    sequence = record(
        session,
        actor,
        "REVISION_UPLOADED",
        name,
        f"bundle {bundle.sha256}, {bundle.size_bytes} bytes, "
        f"{bundle_rows.signed_by(bundle.signed)}",
        model=model,
    )
    owner.etag = sequence
    row = Revision(
        model=model,
        number=owner.latest_revision,
        bundle_sha256=bundle.sha256,
        state=pb.Revision.STATE_CHECKED,
        error=b"",
        notes=names.check_text(notes, "notes"),
        labels=names.check_labels(labels),
        creator=actor,
        create_time=now,
        removed_version=0,
        origin=origin or None,
        etag=sequence,
    )
    session.add(row)
    session.flush()
    return row, False


def update_revision(
    session: Session,
    model: str,
    number: int,
    *,
    notes: str | None,
    labels: dict[str, str] | None,
    etag: str,
    actor: str,
) -> Revision:
    """Change what is not None.

    Raises:
        NotFound: there is no such revision.
        Conflict: the etag is another one.
    """
    row = find_revision(session, model, number)
    name = revision_name(model, number)
    check_etag(etag, row.etag, name)
    changed = []
    if notes is not None:
        row.notes = names.check_text(notes, "notes")
        changed.append("notes")
    if labels is not None:
        row.labels = names.check_labels(labels)
        changed.append("labels")
    if changed:
        detail = f"changed {' and '.join(changed)}"
        row.etag = record(session, actor, "REVISION_UPDATED", name, detail, model=model)
    return row


def delete_revision(
    session: Session, model: str, number: int, *, etag: str, actor: str
) -> Revision:
    """Mark a revision as deleted.

    Raises:
        NotFound: there is no such revision.
        Conflict: the etag is another one.
        FailedPrecondition: an alias points at it, a rollout moves one to it,
            or it is being drained.
    """
    row = find_revision(session, model, number)
    name = revision_name(model, number)
    check_etag(etag, row.etag, name)
    users = [
        alias.name
        for alias in session.scalars(select(Alias).where(Alias.model == model))
        if number in (alias.revision, alias.pending_revision)
    ]
    if users:
        raise FailedPrecondition(
            f"{name} is in use by {', '.join(users)}; point the alias elsewhere first",
            reason="REVISION_IN_USE",
            revision=name,
            aliases=",".join(users),
        )
    for rollout in running(session, model):
        if number == rollout.revision:
            used_by = rollout_name(model, rollout.number)
            raise FailedPrecondition(
                f"{used_by} is moving {rollout.alias!r} to {name}; abort it first",
                reason="REVISION_IN_USE",
                revision=name,
                rollout=used_by,
            )
    if session.get(Draining, (model, number)) is not None:
        raise FailedPrecondition(
            f"{name} still answers requests in flight; try again when it is drained",
            reason="REVISION_DRAINING",
            revision=name,
        )
    row.delete_time = now_us()
    row.etag = record(session, actor, "REVISION_DELETED", name, "deleted", model=model)
    return row


def undelete_revision(session: Session, model: str, number: int, *, actor: str) -> Revision:
    """Bring back a revision.

    Raises:
        NotFound: there is no such revision, or its time is over.
        FailedPrecondition: it is not deleted, or its model is.
    """
    owner = find_model(session, model, deleted=True)
    row = find_revision(session, model, number, deleted=True)
    name = revision_name(model, number)
    if row.delete_time is None:
        raise FailedPrecondition(f"{name} is not deleted", reason="NOT_DELETED", revision=name)
    if owner.delete_time is not None:
        raise FailedPrecondition(
            f"model {model!r} is deleted; bring it back first", reason="MODEL_DELETED", model=model
        )
    _check_not_expired(row.delete_time, name)
    row.delete_time = None
    row.etag = record(session, actor, "REVISION_UNDELETED", name, "brought back", model=model)
    return row


def aliases_of(session: Session, models: Sequence[str]) -> dict[str, list[Alias]]:
    """Return the aliases of each of the models, by name."""
    found: dict[str, list[Alias]] = {model: [] for model in models}
    statement = select(Alias).where(Alias.model.in_(models)).order_by(Alias.name)
    for alias in session.scalars(statement):
        found[alias.model].append(alias)
    return found


def purge_expired(session: Session) -> int:
    """Forget what was deleted more than 30 days ago; return how many revisions that were."""
    limit = now_us() - KEEP_DELETED_US
    old = session.scalars(select(Revision).where(Revision.delete_time < limit)).all()
    for revision in old:
        session.delete(revision)
        name = revision_name(revision.model, revision.number)
        record(
            session,
            MANAGER,
            "REVISION_PURGED",
            name,
            "30 days after its deletion",
            model=revision.model,
        )
    session.flush()
    for model in session.scalars(select(Model.name).where(Model.delete_time < limit)).all():
        session.execute(delete(Model).where(Model.name == model))
        detail = "30 days after its deletion"
        record(session, MANAGER, "MODEL_PURGED", model_name(model), detail, model=model)
    used: Any = select(Revision.bundle_sha256)
    session.execute(delete(Bundle).where(Bundle.sha256.not_in(used)))
    return len(old)
