"""Roles, limits and tables of tokens as the contracts carry them."""

from __future__ import annotations

from dataclasses import fields

from google.protobuf.timestamp_pb2 import Timestamp

from pollard.models.v1 import fleet_service_pb2 as fleet_pb
from pollard.models.v1 import token_service_pb2 as pb
from pollard.services.common.auth.callers import Limits, Role
from pollard.services.common.auth.tokens import KnownToken, TokenTable


def role_to_proto(role: Role) -> pb.Role.ValueType:
    """Return a role as the contracts have it."""
    return pb.Role.Value(f"ROLE_{role.name}")


def role_of(value: pb.Role.ValueType) -> Role | None:
    """Return the role that a message holds; None for one that this version does not know."""
    name = pb.Role.Name(value) if value in pb.Role.values() else ""
    return Role.__members__.get(name.removeprefix("ROLE_"))


def limits_to_proto(limits: Limits) -> pb.Limits:
    """Return limits as the contracts have them."""
    return pb.Limits(**{item.name: getattr(limits, item.name) for item in fields(limits)})


def limits_of(message: pb.Limits) -> Limits:
    """Return the limits that a message holds."""
    return Limits(**{item.name: getattr(message, item.name) for item in fields(Limits)})


def seconds_of(message: Timestamp) -> float:
    """Return a time in seconds since the epoch."""
    return message.ToNanoseconds() / 1e9


def table_of(access: fleet_pb.AccessList) -> TokenTable:
    """Return the tokens that the manager has told of; what nobody here understands is left out."""
    known = []
    for token in access.tokens:
        role = role_of(token.role)
        if role is None or len(token.sha256) != 32:
            continue
        known.append(
            KnownToken(
                token.token_id,
                token.display_name,
                token.sha256,
                role,
                seconds_of(token.expire_time) if token.HasField("expire_time") else None,
                token.revoked,
                limits_of(token.limits) if token.HasField("limits") else None,
            )
        )
    return TokenTable.of(known)
