"""The audit log, and the answers to requests that may come twice.

Both are written in the transaction of the change that they belong to.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import TypeVar

from google.protobuf.message import Message
from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from pollard.services.common.errors import Conflict, InvalidRequest
from pollard.services.common.telemetry.traces import note
from pollard.services.models import names
from pollard.services.models.schema import Answered, Event
from pollard.services.models.store import now_us

M = TypeVar("M", bound=Message)

DAY_US = 24 * 3600 * 1_000_000

MANAGER = "manager"
"""Actor of what happens by itself."""


def record(
    session: Session, actor: str, action: str, resource: str, detail: str, *, model: str = ""
) -> int:
    """Add one event and return its sequence, which also serves as the etag of the change."""
    event = Event(
        time=now_us(), actor=actor, action=action, model=model, resource=resource, detail=detail
    )
    session.add(event)
    session.flush()
    note(action, resource)
    return event.sequence


def list_events(
    session: Session, *, page_size: int, page_token: str, model: str
) -> tuple[list[Event], str]:
    """Return a page of events, newest first, and the token of the next page.

    Raises:
        InvalidRequest: the page size or the token is not valid.
    """
    limit = names.page_limit(page_size)
    query = {"list": "events", "model": model}
    last = names.read_page_token(query, page_token, int)
    statement = select(Event).order_by(Event.sequence.desc()).limit(limit + 1)
    if model:
        statement = statement.where(Event.model == model)
    if last is not None:
        statement = statement.where(Event.sequence < last[0])
    found = list(session.scalars(statement))
    token = names.make_page_token(query, [found[limit - 1].sequence]) if len(found) > limit else ""
    return found[:limit], token


def etag(sequence: int) -> str:
    """Return the etag of a resource that the event ``sequence`` changed last."""
    return f"{sequence:x}"


def check_etag(given: str, sequence: int, resource: str) -> None:
    """Compare the etag of a request with the resource's.

    Raises:
        Conflict: it is set and another one.
    """
    if given and given != etag(sequence):
        raise Conflict(
            f"{resource} was changed in between: its etag is {etag(sequence)!r}, the request has "
            f"{given!r}. Read it again and decide anew",
            reason="ETAG_MISMATCH",
            resource=resource,
            current=etag(sequence),
            given=given,
        )


def once(
    session: Session,
    method: str,
    request: Message,
    request_id: str,
    answer: Callable[[], M],
    kind: type[M],
) -> M:
    """Carry out a request, or give the answer that it got the first time.

    Args:
        session: Transaction in which ``answer`` works.
        method: Name of the method.
        request: The whole request.
        request_id: Its UUID; empty when it may be carried out every time.
        answer: Does the work and returns the response.
        kind: Type of the response.

    Raises:
        InvalidRequest: the id is not a UUID or came with another request.
    """
    if not request_id:
        return answer()
    request_id = names.check_uuid(request_id, "request_id")
    raw = request.SerializeToString(deterministic=True)
    fingerprint = hashlib.sha256(method.encode() + b"\0" + raw).hexdigest()
    session.execute(delete(Answered).where(Answered.create_time < now_us() - DAY_US))
    earlier = session.get(Answered, request_id)
    if earlier is not None:
        if earlier.fingerprint != fingerprint:
            raise InvalidRequest(
                f"request_id {request_id} was used for another request; choose a new one",
                reason="REQUEST_ID_REUSED",
                request_id=request_id,
            )
        return kind.FromString(earlier.response)
    response = answer()
    session.add(
        Answered(
            request_id=request_id,
            method=method,
            fingerprint=fingerprint,
            response=response.SerializeToString(),
            create_time=now_us(),
        )
    )
    return response
