"""Who looks at the page: by a certificate, a header, or a session that was begun with a token.

The cookie of a session is a value of its own; the token stays in this process's memory, so that it
is looked at again with every request: one that is revoked or has expired ends its sessions at once.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from collections import OrderedDict
from dataclasses import dataclass, field

from aiohttp import web

from pollard.services.common.auth import Gate
from pollard.services.common.auth.callers import OPEN, Caller, Role
from pollard.services.common.auth.errors import CredentialInvalid, RoleMissing
from pollard.services.common.auth.http import caller_of_request
from pollard.services.common.errors import Unauthenticated

MOST = 1024
"""Sessions at a time; the one that was idle for longest makes way."""

IDLE_SECONDS = 12 * 3600.0

MAX_TOKEN_CHARACTERS = 8192

_COOKIE = "pollard-session"


@dataclass
class _Session:
    token: str = field(repr=False)
    seen: float


@dataclass(frozen=True)
class Known:
    """Who is known to look."""

    caller: Caller
    authorization: str = field(default="", repr=False)
    """What the caller has shown, for other services; empty where it is a certificate."""
    in_session: bool = False


class Sessions:
    """Tells who looks.

    Args:
        gate: Knows tokens and certificates.
    """

    def __init__(self, gate: Gate) -> None:
        self._gate = gate
        self._sessions: OrderedDict[bytes, _Session] = OrderedDict()

    @property
    def enforced(self) -> bool:
        """Whether anything has to be shown at all."""
        return self._gate.enforced

    def begin(self, token: str) -> str:
        """Begin a session; return the value of its cookie.

        Raises:
            Unauthenticated: the token is nobody's, or no longer valid.
            PermissionDenied: its role may not look.
            Unavailable: it cannot be known yet.
        """
        if len(token) > MAX_TOKEN_CHARACTERS:
            raise CredentialInvalid(
                "what was shown has not the form of a token", reason="TOKEN_MALFORMED"
            )
        _check(self._gate.caller_of_token(token))
        value = secrets.token_urlsafe(32)
        self._sessions[_key(value)] = _Session(token, time.monotonic())
        while len(self._sessions) > MOST:
            self._sessions.popitem(last=False)
        return value

    def end(self, request: web.Request) -> None:
        """End the session of a request, if it has one."""
        self._sessions.pop(_key(request.cookies.get(cookie_name(request), "")), None)

    def who(self, request: web.Request) -> Known:
        """Return who sends a request.

        Raises:
            web.HTTPException: what was shown is not known here, or may not look.
            Unauthenticated: nothing was shown, or a session that has ended.
            PermissionDenied: the role of a session's token may not look any more.
            Unavailable: it cannot be known yet.
        """
        if not self._gate.enforced:
            return Known(OPEN)
        value = request.cookies.get(cookie_name(request), "")
        if value:
            session = self._sessions.get(_key(value))
            if session is not None and time.monotonic() - session.seen > IDLE_SECONDS:
                self.end(request)
                session = None
            if session is not None:
                session.seen = time.monotonic()
                self._sessions.move_to_end(_key(value))
                try:
                    caller = _check(self._gate.caller_of_token(session.token))
                except Unauthenticated:
                    self.end(request)
                    raise
                return Known(caller, f"Bearer {session.token}", in_session=True)
        try:
            caller = caller_of_request(self._gate, request)
        except web.HTTPUnauthorized as error:
            raise Unauthenticated((error.text or "").strip(), reason="TOKEN_MISSING") from None
        return Known(caller, request.headers.get("Authorization", ""))


def cookie_name(request: web.Request) -> str:
    """Return the name of the cookie: under TLS, one that no other host can set."""
    return f"__Host-{_COOKIE}" if request.secure else _COOKIE


def _check(caller: Caller) -> Caller:
    if not caller.may(Role.VIEWER):
        raise RoleMissing(
            f"{caller.name} has the role {caller.role.value}, and the page needs viewer",
            role=caller.role.value,
        )
    return caller


def _key(value: str) -> bytes:
    # By a hash, so that how long a look-up takes tells nothing about the values there are.
    return hashlib.sha256(value.encode()).digest()
