"""How many inference servers are enough for a revision to get requests, where some refuse it.

Without a quorum every expected server has to have it. Preprocess servers only need its manifest;
all of them always have to.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping
from dataclasses import dataclass

from google.rpc import code_pb2, status_pb2

from pollard.models.v1 import model_service_pb2 as pb
from pollard.services.common.errors import DeadlineExceeded, InvalidRequest
from pollard.services.common.retries import given_up, is_promised
from pollard.services.common.status import to_proto
from pollard.services.models.fleet_view import Loading

MAX_SERVERS = 100_000

Stored = dict[str, float]
"""A quorum as a row keeps it; empty for all servers."""


@dataclass(frozen=True)
class Quorum:
    """At least so many inference servers; checked when it is made."""

    servers: int = 0
    """That many; 0 means that `share` counts."""
    share: float = 0.0
    """Above 0, up to 1, rounded up to whole servers."""

    def __post_init__(self) -> None:
        """Refuse what makes no sense.

        Raises:
            InvalidRequest: neither or both are given, or out of range.
        """
        if self.share == 0 and 1 <= self.servers <= MAX_SERVERS:
            return
        if self.servers == 0 and 0 < self.share <= 1:
            return
        value = f"a share of {self.share:g}" if self.share else f"{self.servers} servers"
        raise InvalidRequest(
            f"a quorum of {value} is none; it is 1 server or more, or a share of the servers above "
            "0, up to 1",
            reason="QUORUM_INVALID",
            servers=self.servers,
            share=self.share,
        )

    @classmethod
    def decode(cls, message: pb.Quorum) -> Quorum:
        """Return the quorum of a request.

        Raises:
            InvalidRequest: it makes no sense.
        """
        return cls(message.servers, message.share)

    @classmethod
    def of(cls, stored: Stored | None) -> Quorum | None:
        """Return the quorum of a row; None for all servers."""
        if not stored:
            return None
        return cls(int(stored.get("servers", 0)), float(stored.get("share", 0)))

    def stored(self) -> Stored:
        """Return it as a row keeps it."""
        return {"servers": self.servers} if self.servers else {"share": self.share}

    def encode(self) -> pb.Quorum:
        """Return it as messages carry it."""
        return pb.Quorum(servers=self.servers) if self.servers else pb.Quorum(share=self.share)

    def needed(self, count: int) -> int:
        """Return how many of `count` inference servers are enough."""
        if self.servers:
            return self.servers
        # 2/3 of 3 is 2, whatever a float makes of it.
        return max(1, math.ceil(self.share * count - 1e-6))

    def __str__(self) -> str:
        """Return it for people."""
        return str(self.servers) if self.servers else f"{100 * self.share:.4g} %"


class Verdict(enum.Enum):
    """What follows from what the servers say of a revision."""

    WAIT = enum.auto()
    """Some have not said anything yet, and it may still come about."""
    GO = enum.auto()
    """Requests may go to it; servers that refuse it are left out."""
    REFUSED = enum.auto()
    """It cannot come about."""


def judge(
    loading: Loading, quorum: Quorum | None, late: status_pb2.Status | None = None
) -> tuple[Verdict, Mapping[str, status_pb2.Status]]:
    """Return what follows, and the servers that do not have the revision with their reasons.

    Args:
        loading: What the servers say.
        quorum: How many are enough; None for all.
        late: The time is over: what is said of those that are not ready yet.
    """
    refusals = dict(loading.refusals)
    waiting = loading.waiting
    if late is not None:
        refusals.update(dict.fromkeys(waiting, late))
        waiting = ()
    if refusals:
        can = loading.inference - refusals.keys()
        excused = quorum is not None and refusals.keys() <= loading.inference
        if quorum is None or not excused or len(can) < quorum.needed(len(loading.inference)):
            return Verdict.REFUSED, refusals
    return (Verdict.WAIT if waiting else Verdict.GO), refusals


def refused(
    revision: int,
    loading: Loading,
    quorum: Quorum | None,
    refusals: Mapping[str, status_pb2.Status],
) -> status_pb2.Status:
    """Return why a revision gets no requests, naming the servers that refuse it."""
    first = next(iter(refusals))
    why = given_up(refusals[first]).message
    message = f"revision {revision} was refused by {', '.join(refusals)}: {why}"
    others = [server_id for server_id in refusals if server_id not in loading.inference]
    if quorum is not None and others:
        message += f"; {', '.join(others)}: no quorum excuses a preprocess server"
    elif quorum is not None:
        count = len(loading.inference)
        message += (
            f"; {count - len(refusals)} of {count} inference servers can run it, and the quorum of "
            f"{quorum} asks for {quorum.needed(count)}"
        )
    if any(is_promised(status) for status in refusals.values()):
        # The servers would have tried again by themselves, and are no longer asked to.
        message += "; that may pass: try again"
    return status_pb2.Status(code=code_pb2.FAILED_PRECONDITION, message=message)


def too_late(revision: int, loading: Loading, timeout_seconds: float) -> status_pb2.Status:
    """Return why a revision gets no requests: some servers were not ready in time."""
    return to_proto(
        DeadlineExceeded(
            f"revision {revision} was not ready on {', '.join(loading.waiting)} within "
            f"{timeout_seconds:g} s",
            reason="LOAD_TIMEOUT",
            revision=revision,
            servers=",".join(loading.waiting),
            timeout_seconds=f"{timeout_seconds:g}",
        )
    )
