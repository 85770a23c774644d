"""Resource names, identifiers and page tokens: parsed and checked in one place."""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import re
import uuid
from collections.abc import Mapping
from typing import Any

from pollard.services.common.errors import InvalidRequest

_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,62}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_SERVER_ID = re.compile(r"[\x21-\x7e]{1,128}")

MAX_LABELS = 64
MAX_LABEL_CHARACTERS = 256
MAX_TEXT_CHARACTERS = 64 * 1024


def _shown(value: str) -> str:
    # A name can be of any length, and a message should not be.
    return repr(value if len(value) <= 80 else value[:77] + "...")


def _refuse(field: str, value: str, why: str) -> InvalidRequest:
    return InvalidRequest(
        f"{field} {_shown(value)} {why}", reason="NAME_INVALID", field=field, value=value[:200]
    )


def check_model_id(value: str, field: str = "model") -> str:
    """Return ``value`` if it may name a model.

    Raises:
        InvalidRequest: it may not.
    """
    if not _NAME.fullmatch(value):
        raise _refuse(
            field,
            value,
            "is not a name: 1 to 63 characters out of a-z, 0-9, '-', '_' and '.', "
            "beginning with a letter or digit",
        )
    return value


def check_alias_id(value: str, field: str = "alias") -> str:
    """Return ``value`` if it may name an alias: a name that is not only digits.

    Raises:
        InvalidRequest: it may not.
    """
    check_model_id(value, field)
    if value.isdigit():
        raise _refuse(field, value, "is only digits and would be taken for a revision")
    return value


def parse_model(name: str, field: str = "name") -> str:
    """Return the model of ``models/{model}``.

    Raises:
        InvalidRequest: it is not such a name.
    """
    parts = name.split("/")
    if len(parts) != 2 or parts[0] != "models":
        raise _refuse(field, name, "is not of the form models/{model}")
    return check_model_id(parts[1], field)


def parse_revision(name: str, field: str = "name") -> tuple[str, int]:
    """Return model and number of ``models/{model}/revisions/{n}``.

    Raises:
        InvalidRequest: it is not such a name.
    """
    parts = name.split("/")
    if len(parts) != 4 or parts[0] != "models" or parts[2] != "revisions":
        raise _refuse(field, name, "is not of the form models/{model}/revisions/{n}")
    return check_model_id(parts[1], field), check_number(parts[3], field)


def parse_alias(name: str, field: str = "name") -> tuple[str, str]:
    """Return model and alias of ``models/{model}/aliases/{alias}``.

    Raises:
        InvalidRequest: it is not such a name.
    """
    parts = name.split("/")
    if len(parts) != 4 or parts[0] != "models" or parts[2] != "aliases":
        raise _refuse(field, name, "is not of the form models/{model}/aliases/{alias}")
    return check_model_id(parts[1], field), check_alias_id(parts[3], field)


def parse_rollout(name: str, field: str = "name") -> tuple[str, int]:
    """Return model and number of ``models/{model}/rollouts/{id}``.

    Raises:
        InvalidRequest: it is not such a name.
    """
    parts = name.split("/")
    if len(parts) != 4 or parts[0] != "models" or parts[2] != "rollouts":
        raise _refuse(field, name, "is not of the form models/{model}/rollouts/{id}")
    if not re.fullmatch(r"[1-9][0-9]{0,14}", parts[3]):
        raise _refuse(field, name, "does not end in the number of a rollout")
    return check_model_id(parts[1], field), int(parts[3])


def parse_target(name: str, field: str = "name") -> tuple[str, int | str]:
    """Return the model and a revision number or an alias, whichever ``name`` holds.

    Raises:
        InvalidRequest: it is neither form.
    """
    if name.split("/")[2:3] == ["aliases"]:
        return parse_alias(name, field)
    return parse_revision(name, field)


def check_number(text: str, field: str) -> int:
    """Return a revision number: digits without a leading zero, at most 15 of them.

    Raises:
        InvalidRequest: it is not one.
    """
    if not re.fullmatch(r"[1-9][0-9]{0,14}", text):
        raise _refuse(field, text, "is not a revision number; they count 1, 2, 3…")
    return int(text)


def check_uuid(value: str, field: str) -> str:
    """Return ``value`` in the canonical form of a UUID.

    Raises:
        InvalidRequest: it is not a UUID.
    """
    try:
        if len(value) != 36:
            raise ValueError
        return str(uuid.UUID(value))
    except ValueError:
        raise _refuse(field, value, "is not a UUID") from None


def check_sha256(value: str, field: str) -> str:
    """Return ``value`` if it is a SHA-256 in lower-case hexadecimal.

    Raises:
        InvalidRequest: it is not.
    """
    if not _SHA256.fullmatch(value):
        raise _refuse(field, value, "is not a SHA-256 of 64 lower-case hexadecimal digits")
    return value


def check_server_id(value: str) -> str:
    """Return ``value`` if it may name a server of the fleet.

    Raises:
        InvalidRequest: it may not.
    """
    if not _SERVER_ID.fullmatch(value):
        raise _refuse(
            "hello.server_id", value, "is not 1 to 128 printable ASCII characters without spaces"
        )
    return value


def check_labels(labels: Mapping[str, str]) -> dict[str, str]:
    """Return ``labels`` if there are not too many and none is too long.

    Raises:
        InvalidRequest: there are.
    """
    if len(labels) > MAX_LABELS:
        raise InvalidRequest(
            f"{len(labels)} labels are more than {MAX_LABELS}",
            reason="LABELS_INVALID",
            count=len(labels),
            limit=MAX_LABELS,
        )
    for key, value in labels.items():
        if not key or len(key) > MAX_LABEL_CHARACTERS or len(value) > MAX_LABEL_CHARACTERS:
            raise InvalidRequest(
                f"label {_shown(key)}: keys have 1 to {MAX_LABEL_CHARACTERS} characters and "
                f"values at most {MAX_LABEL_CHARACTERS}",
                reason="LABELS_INVALID",
                label=key[:200],
            )
        if "\0" in key or "\0" in value:
            raise InvalidRequest(
                f"label {_shown(key)} holds a NUL character, which not every database can keep",
                reason="LABELS_INVALID",
                label=key[:200],
            )
    return dict(labels)


def check_text(value: str, field: str) -> str:
    """Return a free text if it is not too long and can be kept.

    Raises:
        InvalidRequest: it is too long, or holds a NUL character.
    """
    if len(value) > MAX_TEXT_CHARACTERS:
        raise InvalidRequest(
            f"{field} has {len(value)} characters; at most {MAX_TEXT_CHARACTERS} are kept",
            reason="TEXT_TOO_LONG",
            field=field,
            length=len(value),
        )
    if "\0" in value:
        raise InvalidRequest(
            f"{field} holds a NUL character, which not every database can keep",
            reason="TEXT_INVALID",
            field=field,
        )
    return value


def page_limit(page_size: int, default: int = 50) -> int:
    """Return how many items a page holds: ``default`` for 0, and at most 1000.

    Raises:
        InvalidRequest: the size is negative.
    """
    if page_size < 0:
        raise InvalidRequest(
            f"page_size {page_size} is negative", reason="PAGE_SIZE_INVALID", page_size=page_size
        )
    return min(page_size or default, 1000)


def make_page_token(query: Mapping[str, Any], last: list[Any]) -> str:
    """Return a token for the page after the item whose sort key is ``last``."""
    raw = json.dumps([_query_digest(query), last], separators=(",", ":"))
    return base64.urlsafe_b64encode(raw.encode()).decode()


def read_page_token(query: Mapping[str, Any], token: str, *keys: type) -> list[Any] | None:
    """Return the sort key that a token holds; None for the first page.

    Args:
        query: The other fields of the request, which must be those that the
            token was made for.
        token: As it came.
        keys: Types of the values in the sort key, str or int. Whoever makes a token up must not
            get others as far as the database.

    Raises:
        InvalidRequest: the token is not one of ours, or of another query.
    """
    if not token:
        return None
    try:
        digest, last = json.loads(base64.urlsafe_b64decode(token.encode("ascii")))
        if not isinstance(last, list) or len(last) != len(keys):
            raise ValueError
        if not all(_is_key(value, kind) for value, kind in zip(last, keys, strict=True)):
            raise ValueError
    except (ValueError, TypeError, UnicodeError, binascii.Error):
        raise InvalidRequest(
            "page_token is not one that this service gave; begin without one",
            reason="PAGE_TOKEN_INVALID",
        ) from None
    if digest != _query_digest(query):
        raise InvalidRequest(
            "page_token belongs to another query; keep the other fields as they were",
            reason="PAGE_TOKEN_INVALID",
        )
    return last


def _is_key(value: object, kind: type) -> bool:
    """Tell whether a value may go to the database: a name, or an integer of 64 bits."""
    if isinstance(value, str):
        return kind is str and value.isascii() and value.isprintable()
    return kind is int and type(value) is int and -(2**63) <= value < 2**63


def _query_digest(query: Mapping[str, Any]) -> str:
    raw = json.dumps(query, sort_keys=True, default=str)
    return hashlib.sha256(raw.encode()).hexdigest()[:16]
