"""What the manager knows of its servers at one moment, and what follows from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from google.rpc import status_pb2

from pollard.models.v1 import fleet_service_pb2 as fleet_pb

Key = tuple[str, int]
"""Model and revision number."""


@dataclass(frozen=True)
class RevisionReport:
    """What a server said of one revision."""

    state: fleet_pb.RevisionState.ValueType
    error: status_pb2.Status | None = None
    counters: fleet_pb.Counters | None = field(default=None, compare=False)
    """Its requests since the server started; None when it does not count them."""


@dataclass(frozen=True)
class ServerView:
    """An expected server: connected, or gone for less than its lease."""

    server_id: str
    kind: fleet_pb.ServerKind.ValueType
    address: str
    connected: bool
    serving: bool
    """Has answered some desired state."""
    applied_version: int = 0
    """What it said to run when it connected."""
    acked: int = 0
    """Highest version acknowledged on this stream; 0 when not connected."""
    nacked: int = 0
    """Highest version refused on this stream."""
    nack: status_pb2.Status | None = None
    answered_before_report: int = 0
    """Highest version it had answered when its last report came."""
    revisions: Mapping[Key, RevisionReport] = field(default_factory=dict)

    def report_of(self, key: Key, removed_version: int) -> RevisionReport | None:
        """Return what it says of a revision, unless that may be old news.

        A report carries no version. One that came before the server answered
        the state that removed the revision may tell of an earlier load.
        """
        if self.answered_before_report < removed_version:
            return None
        return self.revisions.get(key)


@dataclass(frozen=True)
class FleetView:
    """The expected servers at one moment."""

    servers: Sequence[ServerView] = ()
    fallback_endpoints: Sequence[tuple[str, str]] = ()
    """Inference servers no longer expected: still better than none at all."""


def is_ready(server: ServerView, key: Key, pending_version: int, removed_version: int) -> bool:
    """Tell whether a server has loaded a revision."""
    if not server.connected:
        return False
    if server.acked >= pending_version:
        return True
    report = server.report_of(key, removed_version)
    return report is not None and report.state == fleet_pb.REVISION_STATE_READY


def refusal_of(
    server: ServerView, key: Key, pending_version: int, removed_version: int
) -> status_pb2.Status | None:
    """Return why a server refuses a revision; None when it does not."""
    report = server.report_of(key, removed_version)
    if report is not None:
        if report.state == fleet_pb.REVISION_STATE_FAILED and server.acked < pending_version:
            return report.error or server.nack or status_pb2.Status(message="no reason given")
        return None  # a refusal of that version is about something else, or not its last word
    if server.nacked >= pending_version > server.acked and key not in server.revisions:
        return server.nack
    return None


@dataclass(frozen=True)
class Loading:
    """How far the servers are with a revision that should be loaded everywhere."""

    refusals: Mapping[str, status_pb2.Status]
    """Why, by server; empty when none refuses."""
    waiting: Sequence[str]
    """Servers that have not said that it is ready."""
    inference: frozenset[str] = frozenset()
    """The inference servers among all that are expected."""


def loading_of(view: FleetView, key: Key, version: int, removed_version: int) -> Loading:
    """Return how far the servers are with a revision.

    Args:
        view: The expected servers.
        key: The revision.
        version: First desired state that holds it.
        removed_version: Last desired state that told servers to free it.
    """
    refusals: dict[str, status_pb2.Status] = {}
    waiting: list[str] = []
    for server in view.servers:
        refusal = refusal_of(server, key, version, removed_version)
        if refusal is not None:
            refusals[server.server_id] = refusal
        elif not is_ready(server, key, version, removed_version):
            waiting.append(server.server_id)
    inference = frozenset(
        server.server_id for server in view.servers if server.kind == fleet_pb.SERVER_KIND_INFERENCE
    )
    return Loading(refusals, waiting, inference)
