"""The errors of authentication and limits: leaves of the tree in `common.errors`.

::

    Unauthenticated
    ├── CredentialMissing    nothing was shown
    ├── CredentialInvalid    what was shown is none, or nobody's
    └── CredentialEnded      it was valid once: expired, or revoked
    PermissionDenied
    └── RoleMissing          the caller is known, and may not do this
    Unavailable
    └── AccessUnknown        this server has not heard yet whom it should know
    ResourceExhausted
    └── LimitReached         the caller uses as much as it may; says when to try again

No message holds what was shown.
"""

from __future__ import annotations

from pollard.services.common import errors

LIMIT_REASONS = frozenset({"RATE_LIMIT", "CONCURRENCY_LIMIT", "STREAM_LIMIT", "MESSAGE_LIMIT"})
"""Reasons of `LimitReached` that are about one caller on one server."""


class CredentialMissing(errors.Unauthenticated):
    """Nothing was shown."""

    def __init__(self, message: str, **metadata: object) -> None:
        super().__init__(message, reason="TOKEN_MISSING", **metadata)


class CredentialInvalid(errors.Unauthenticated):
    """What was shown is no token, or nobody's."""

    def __init__(self, message: str, *, reason: str = "TOKEN_INVALID", **metadata: object) -> None:
        super().__init__(message, reason=reason, **metadata)


class CredentialEnded(errors.Unauthenticated):
    """What was shown was valid once."""

    def __init__(self, message: str, *, reason: str, **metadata: object) -> None:
        super().__init__(message, reason=reason, **metadata)


class RoleMissing(errors.PermissionDenied):
    """The caller is known, and may not do this."""

    def __init__(self, message: str, **metadata: object) -> None:
        super().__init__(message, reason="ROLE_MISSING", **metadata)


class AccessUnknown(errors.Unavailable):
    """This server has not heard yet whom it should know."""

    def __init__(self, message: str, **metadata: object) -> None:
        super().__init__(message, reason="ACCESS_UNKNOWN", **metadata)


class LimitReached(errors.ResourceExhausted):
    """The caller uses as much as it may."""

    def __init__(
        self, message: str, *, reason: str, retry_seconds: float | None = None, **metadata: object
    ) -> None:
        super().__init__(message, reason=reason, **metadata)
        self.retry_seconds = retry_seconds
