"""Tokens: what they look like, and which are known.

A token is ``plrd_ID_SECRET``. The id is no secret: it names the token in lists and logs. The secret
has 256 random bits, so that its plain SHA-256 is as good as a slow hash would be: there is nothing
to guess.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from pollard.services.common.auth.callers import Limits, Role

PREFIX = "plrd_"
"""What tokens begin with, for those who look for secrets in the wrong places."""

_ALPHABET = "abcdefghijklmnopqrstuvwxyz234567"
_ID_LENGTH, _SECRET_LENGTH = 10, 52
_FORM = re.compile(rf"{PREFIX}([a-z2-7]{{{_ID_LENGTH}}})_[a-z2-7]{{{_SECRET_LENGTH}}}")


def make_token() -> str:
    """Return a new token."""
    return f"{PREFIX}{_random(_ID_LENGTH)}_{_random(_SECRET_LENGTH)}"


def id_of(token: str) -> str:
    """Return the id in a token; empty if it has not the form of one."""
    found = _FORM.fullmatch(token)
    return found[1] if found else ""


def digest_of(token: str | bytes) -> bytes:
    """Return what is kept of a token."""
    return hashlib.sha256(token.encode() if isinstance(token, str) else token).digest()


def _random(length: int) -> str:
    return "".join(secrets.choice(_ALPHABET) for _ in range(length))


@dataclass(frozen=True, slots=True)
class KnownToken:
    """What a server knows of a token."""

    token_id: str
    name: str
    digest: bytes
    role: Role
    expires: float | None = None
    """In seconds since the epoch; None for never."""
    revoked: bool = False
    limits: Limits | None = None
    """0 in them is the server's, less is none; None takes the server's for all."""


@dataclass(frozen=True, slots=True)
class TokenTable:
    """All tokens that a server knows; replaced as a whole."""

    by_digest: Mapping[bytes, KnownToken]
    by_id: Mapping[str, KnownToken]

    @classmethod
    def of(cls, tokens: Iterable[KnownToken]) -> TokenTable:
        """Return the table of these tokens."""
        known = list(tokens)
        return cls(
            MappingProxyType({token.digest: token for token in known}),
            MappingProxyType({token.token_id: token for token in known}),
        )


EMPTY = TokenTable.of(())
