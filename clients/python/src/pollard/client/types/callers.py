"""Tokens, and who calls."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime


@dataclass(frozen=True)
class TokenLimits:
    """How much of each server the holder of a token may use; 0 is the server's, -1 no limit."""

    requests_per_second: float = 0.0
    """Requests a second, over a while."""
    burst: float = 0.0
    """Requests that may come at once beyond that; 0 is one second's."""
    concurrent_requests: int = 0
    """Requests in flight."""
    streams: int = 0
    """Streams that are open."""
    message_bytes: int = 0
    """Size of one message, in bytes."""
    stored_bytes: int = 0
    """Sum of the sizes of the bundles that the holder has stored, in bytes."""


@dataclass(frozen=True)
class Token:
    """What the manager keeps of a token; not the token itself."""

    token_id: str
    """Part of the token that is no secret."""
    name: str
    """Who has it, for people."""
    role: str
    """viewer, predictor, publisher, admin or server."""
    limits: TokenLimits
    """How much its holder may use."""
    create_time: datetime | None
    """When it was made, in UTC."""
    creator: str
    """Who made it."""
    expire_time: datetime | None
    """When it ends by itself, in UTC; None for never."""
    revoke_time: datetime | None
    """When it was revoked, in UTC; None for not."""


@dataclass(frozen=True)
class NewToken:
    """A token that was just made."""

    token: Token
    """What is known of it."""
    secret: str = field(repr=False)
    """The token itself; nobody can be told it again."""


@dataclass(frozen=True)
class Caller:
    """Who this client is to the manager."""

    name: str
    """For people, and in the audit log."""
    role: str
    """viewer, predictor, publisher, admin or server."""
    kind: str
    """token, jwt, certificate, or open where nobody has to show anything."""
    expire_time: datetime | None
    """When the manager will no longer know it, in UTC; None for never."""
