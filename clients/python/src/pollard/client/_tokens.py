"""Tokens of the contracts into the types of `types.py`, and back."""

from __future__ import annotations

import secrets
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from google.protobuf import duration_pb2, timestamp_pb2

from pollard.client._names import checked_model
from pollard.client.types import Caller, NewToken, Token, TokenLimits
from pollard.models.v1 import token_service_pb2 as pb

ROLES = ("viewer", "predictor", "publisher", "admin", "server")
"""Roles that a token can have."""

_LIMITS = tuple(asdict(TokenLimits()))


_ALPHABET = "abcdefghijklmnopqrstuvwxyz234567"


def generate_secret() -> str:
    """Return a token that nobody knows yet: `plrd_`, an id, and 256 random bits."""
    parts = ("".join(secrets.choice(_ALPHABET) for _ in range(length)) for length in (10, 52))
    return "plrd_" + "_".join(parts)


def checked_role(role: str) -> str:
    """Return a role, or raise ValueError where it is none."""
    if role not in ROLES:
        raise ValueError(f"role {role!r} is none; there are {', '.join(ROLES)}")
    return role


def create_request(
    name: str, role: str, ttl_seconds: float | None, limits: TokenLimits | None
) -> pb.CreateTokenRequest:
    """Return the request for a token.

    Raises:
        ValueError: an argument is out of its range.
    """
    request = pb.CreateTokenRequest(
        token=pb.Token(
            display_name=checked_model(name),
            role=pb.Role.Value(f"ROLE_{checked_role(role).upper()}"),
            limits=pb.Limits(**asdict(limits or TokenLimits())),
        )
    )
    if ttl_seconds is not None:
        if not 1 <= ttl_seconds <= 3_000_000_000:
            raise ValueError(f"ttl_seconds must be at least 1, not {ttl_seconds}")
        ttl = duration_pb2.Duration()
        ttl.FromNanoseconds(int(ttl_seconds * 1e9))
        request.ttl.CopyFrom(ttl)
    return request


def token(message: pb.Token) -> Token:
    """Return what is known of a token."""
    return Token(
        token_id=message.name.partition("/")[2],
        name=message.display_name,
        role=_role(message.role),
        limits=TokenLimits(**{name: getattr(message.limits, name) for name in _LIMITS}),
        create_time=_time(message, "create_time"),
        creator=message.creator,
        expire_time=_time(message, "expire_time"),
        revoke_time=_time(message, "revoke_time"),
    )


def new_token(message: pb.CreateTokenResponse) -> NewToken:
    """Return a token that was just made."""
    return NewToken(token(message.token), message.secret)


def caller(message: pb.GetCallerResponse) -> Caller:
    """Return who this client is."""
    return Caller(
        message.display_name, _role(message.role), message.kind, _time(message, "expire_time")
    )


def _role(value: pb.Role.ValueType) -> str:
    if value not in pb.Role.values():
        return f"role {value}"
    return pb.Role.Name(value).removeprefix("ROLE_").lower()


def _time(message: Any, field: str) -> datetime | None:
    if not message.HasField(field):
        return None
    value: timestamp_pb2.Timestamp = getattr(message, field)
    return value.ToDatetime(tzinfo=UTC)
