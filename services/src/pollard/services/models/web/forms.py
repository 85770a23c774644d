"""Forms as requests: read with limits, and turned into the messages of the contract."""

from __future__ import annotations

import math
from collections.abc import Mapping
from urllib.parse import parse_qsl

from aiohttp import web
from google.protobuf.duration_pb2 import Duration

from pollard.models.v1 import model_service_pb2 as pb
from pollard.services.common.errors import InvalidRequest
from pollard.services.models import names, rollouts
from pollard.services.models.web.asking import Visitor

MAX_FORM_BYTES = 64 * 1024
MAX_FIELDS = 64

Form = Mapping[str, str]


async def read_form(request: web.Request) -> dict[str, str]:
    """Return the fields of a form.

    Raises:
        web.HTTPException: it is no form, or too long.
    """
    if request.content_type != "application/x-www-form-urlencoded":
        raise web.HTTPUnsupportedMediaType(text="This takes forms only.")
    body = bytearray()
    async for piece in request.content.iter_chunked(16 * 1024):
        body += piece
        if len(body) > MAX_FORM_BYTES:
            raise web.HTTPRequestEntityTooLarge(MAX_FORM_BYTES, len(body))
    try:
        pairs = parse_qsl(
            body.decode(), keep_blank_values=True, max_num_fields=MAX_FIELDS, errors="strict"
        )
    except ValueError:
        raise web.HTTPBadRequest(text="The form cannot be read.") from None
    return dict(pairs)


def new_rollout(model: str, form: Form, visitor: Visitor) -> pb.CreateRolloutRequest:
    """Return the request for a rollout.

    Raises:
        InvalidRequest: a field is no number, or impossible.
    """
    alias = form.get("alias", "").strip() or "production"
    hold = Duration()
    hold.FromNanoseconds(round(_number(form, "hold", rollouts.DEFAULT_HOLD_SECONDS) * 1e9))
    gates = pb.RolloutGates(
        min_requests=_whole(form, "min_requests", rollouts.DEFAULT_MIN_REQUESTS),
        max_error_rate=_number(form, "max_error_rate", rollouts.DEFAULT_MAX_ERROR_RATE * 100) / 100,
        max_p99_ratio=_number(form, "max_p99_ratio", rollouts.DEFAULT_MAX_P99_RATIO),
    )
    if form.get("min_agreement", "").strip():
        gates.min_agreement = _number(form, "min_agreement", 0) / 100
    return pb.CreateRolloutRequest(
        parent=f"models/{model}",
        rollout=pb.Rollout(
            alias=alias,
            revision=names.check_number(form.get("revision", ""), "revision"),
            steps=_steps(form.get("steps", "")),
            hold=hold,
            gates=gates,
            shadow_percent=_number(form, "shadow_percent", 0),
        ),
        # Of two such forms the second is another wish only after the first one's rollout.
        request_id=visitor.request_id(
            "CreateRollout", model, form.get("after", ""), sorted(form.items())
        ),
    )


def set_alias(model: str, alias: str, form: Form, visitor: Visitor) -> pb.SetAliasRequest:
    """Return the request to point an alias at a revision.

    Raises:
        InvalidRequest: the revision is no number.
    """
    number = names.check_number(form.get("revision", ""), "revision")
    etag = form.get("etag", "")
    return pb.SetAliasRequest(
        name=f"models/{model}/aliases/{alias}",
        revision=number,
        etag=etag,
        request_id=visitor.request_id("SetAlias", model, alias, number, etag) if etag else "",
    )


def roll_back_alias(
    model: str, alias: str, form: Form, visitor: Visitor
) -> pb.RollbackAliasRequest:
    """Return the request to point an alias back.

    Raises:
        InvalidRequest: the form does not say what the visitor saw: pressed twice, the button would
            go back and forth.
    """
    etag = form.get("etag", "")
    if not etag:
        raise InvalidRequest("the form lacks its etag; load the page again", reason="ETAG_MISSING")
    return pb.RollbackAliasRequest(
        name=f"models/{model}/aliases/{alias}",
        etag=etag,
        request_id=visitor.request_id("RollbackAlias", model, alias, etag),
    )


def _steps(text: str) -> list[float]:
    """Return the shares that are named, with commas or blanks between them.

    Raises:
        InvalidRequest: one is no number.
    """
    parts = text.replace(",", " ").replace("%", " ").split()
    return [_read("steps", part) for part in parts]


def _number(form: Form, field: str, default: float) -> float:
    text = form.get(field, "").strip().removesuffix("%").strip()
    return _read(field, text) if text else default


def _whole(form: Form, field: str, default: int) -> int:
    number = _number(form, field, default)
    if number != int(number) or not 0 <= number < 2**53:
        raise InvalidRequest(
            f"{field} {number:g} is not a whole number", reason="FIELD_INVALID", field=field
        )
    return int(number)


def _read(field: str, text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    # Far beyond what any field takes, and still a number of the contract.
    if not math.isfinite(number) or abs(number) > 1e9:
        raise InvalidRequest(
            f"{field} {text[:80]!r} is not a number", reason="FIELD_INVALID", field=field
        )
    return number
