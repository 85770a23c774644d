"""Where a watch of the audit log stands, and what it may go on after."""

from __future__ import annotations

from pollard.client.errors import (
    Cancelled,
    DeadlineExceeded,
    ErrorDetails,
    Internal,
    RequestFailed,
    Unavailable,
    Unknown,
)
from pollard.models.v1 import model_service_pb2

RENEW_SECONDS = 90.0
"""How long one call of a watch lasts before the next takes over: three signs of life."""

FIRST_PAUSE_SECONDS = 0.1
_LAST_PAUSE_SECONDS = 2.0


class Position:
    """Which event a watch wants next.

    Args:
        start: Sequence of the first event wanted; None for what happens from now on.

    Raises:
        ValueError: `start` is not 1 or more.
    """

    def __init__(self, start: int | None) -> None:
        if start is not None and (isinstance(start, bool) or start < 1):
            raise ValueError(f"start must be a sequence from 1 on, or None, not {start!r}")
        self.next = start or 0

    def is_new(self, response: model_service_pb2.WatchEventsResponse) -> bool:
        """Take a message in, and say whether it brings an event that was not seen before."""
        fresh = response.HasField("event") and response.event.sequence >= self.next
        self.next = max(self.next, response.sequence + 1)
        return fresh


def may_resume(failure: RequestFailed) -> bool:
    """Say whether a watch that broke in this way can go on where it stood.

    A transport that breaks shows as UNAVAILABLE, CANCELLED, INTERNAL or UNKNOWN, by where it was
    cut; what Pollard's services themselves say carries a reason.
    """
    if isinstance(failure, Unavailable | DeadlineExceeded):
        return True
    return isinstance(failure, Cancelled | Internal | Unknown) and not failure.reason


def was_ended(address: str, method: str) -> Unavailable:
    """Return what it means that a watch ended without an error, which it never does by itself."""
    return Unavailable(
        "the watch was ended by the other side",
        details=ErrorDetails(),
        address=address,
        method=method,
    )


def longer(pause: float) -> float:
    """Return the pause after this one, in seconds."""
    return min(pause * 2, _LAST_PAUSE_SECONDS)
