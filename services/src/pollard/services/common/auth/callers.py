"""Who calls: a name, a role, and how it is known."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field, fields, replace
from enum import StrEnum
from typing import Literal


class Role(StrEnum):
    """What a caller may do. Each of the first four may do what those before it may."""

    VIEWER = "viewer"
    """Sees models, revisions, rollouts, the fleet and the audit log."""
    PREDICTOR = "predictor"
    """Sends images and tensors."""
    PUBLISHER = "publisher"
    """Pushes bundles, moves aliases, runs rollouts."""
    ADMIN = "admin"
    """Does everything, tokens included."""
    SERVER = "server"
    """What services are to each other; not above or below the others."""

    def includes(self, other: Role) -> bool:
        """Whether who has this role may do what `other` may."""
        if Role.SERVER in (self, other):
            return self is other
        return _ORDER.index(self) >= _ORDER.index(other)


_ORDER = (Role.VIEWER, Role.PREDICTOR, Role.PUBLISHER, Role.ADMIN)

Kind = Literal["open", "token", "jwt", "certificate"]
"""How a caller is known; "open" where nobody has to show anything."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How much of one server a caller may use; 0 is no limit."""

    requests_per_second: float = 0.0
    burst: float = 0.0
    """Requests that may come at once; 0 is one second's."""
    concurrent_requests: int = 0
    streams: int = 0
    message_bytes: int = 0
    stored_bytes: int = 0

    def over(self, default: Limits) -> Limits:
        """Return these limits as a token has them: 0 is the default's, less is none."""
        merged = {}
        for item in fields(self):
            own = getattr(self, item.name)
            merged[item.name] = max(0, own) if own else getattr(default, item.name)
        return Limits(**merged)


UNLIMITED = Limits()


@dataclass(frozen=True, slots=True)
class Caller:
    """Who makes a call."""

    name: str
    """For people, logs and the audit log; empty where nobody has to show anything."""
    role: Role
    kind: Kind
    key: str = ""
    """Tells callers apart: "token:ID", "jwt:SUBJECT", "certificate:NAME". Limits go by it."""
    expires: float | None = None
    """When it is no longer known, in seconds since the epoch; None for never."""
    limits: Limits = field(default=UNLIMITED, compare=False)
    server: str = ""
    """Key of the service that made the call for this caller; empty where it did so itself."""

    def may(self, role: Role) -> bool:
        """Whether the caller has `role` or one that includes it."""
        return self.role.includes(role)

    def through(self, server: Caller) -> Caller:
        """Return this caller, on whose behalf `server` calls."""
        return replace(self, server=server.key)

    @property
    def actor(self) -> str:
        """The caller as the audit log names it: unmistakable, and without a secret."""
        return f"{self.name} ({self.key.replace(':', ' ', 1)})" if self.key else ""


OPEN = Caller("", Role.ADMIN, "open")
"""Everybody, where nobody has to show anything."""

_current: ContextVar[Caller] = ContextVar("pollard_caller", default=OPEN)


def current_caller() -> Caller:
    """Return who makes the call that is being answered; `OPEN` outside of calls."""
    return _current.get()


def set_caller(caller: Caller) -> None:
    """Say who makes the call that this task answers."""
    _current.set(caller)


@contextlib.contextmanager
def calling(caller: Caller) -> Iterator[None]:
    """Run a block as the answer to `caller`."""
    token = _current.set(caller)
    try:
        yield
    finally:
        _current.reset(token)
