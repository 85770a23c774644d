"""What the manager knows of its servers at one moment, and what follows from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from google.rpc import status_pb2

from pollard.models.v1 import fleet_service_pb2 as fleet_pb

Key = tuple[str, int]
"""Model and revision number."""


class Kept(Protocol):
    """What the registry keeps of a revision, as far as it says whether a report is of it."""

    @property
    def bundle_sha256(self) -> str:
        """Its bundle."""

    @property
    def removed_version(self) -> int:
        """Of the last desired state that told servers to free it."""


@dataclass(frozen=True)
class RevisionReport:
    """What a server said of one revision."""

    state: fleet_pb.RevisionState.ValueType
    error: status_pb2.Status | None = None
    counters: fleet_pb.Counters | None = field(default=None, compare=False)
    """Its requests since the server started; None when it does not count them."""
    bundle_sha256: str = ""
    """The bundle that this is said of; empty when the server does not tell."""

    def is_of(self, bundle_sha256: str) -> bool:
        """Tell whether it is said of a bundle, as far as is known.

        A registry that is restored from a backup gives numbers again that servers know already.
        """
        return self.bundle_sha256 in ("", bundle_sha256)


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

    def mentions(self, key: Key, kept: Kept) -> bool:
        """Tell whether it says anything of a revision, be it old news."""
        report = self.revisions.get(key)
        return report is not None and report.is_of(kept.bundle_sha256)

    def report_of(self, key: Key, kept: Kept) -> RevisionReport | None:
        """Return what it says of a revision, unless that may be old news or is of another bundle.

        A report carries no version. One that came before the server answered
        the state that removed the revision may tell of an earlier load.
        """
        if self.answered_before_report < kept.removed_version or not self.mentions(key, kept):
            return None
        return self.revisions[key]


@dataclass(frozen=True)
class FleetView:
    """The expected servers at one moment."""

    servers: Sequence[ServerView] = ()
    fallback_endpoints: Sequence[tuple[str, str]] = ()
    """Inference servers no longer expected: still better than none at all."""


def is_ready(server: ServerView, key: Key, pending_version: int, kept: Kept) -> bool:
    """Tell whether a server has loaded a revision."""
    if not server.connected:
        return False
    if server.acked >= pending_version:
        return True
    report = server.report_of(key, kept)
    return report is not None and report.state == fleet_pb.REVISION_STATE_READY


def refusal_of(
    server: ServerView, key: Key, pending_version: int, kept: Kept
) -> status_pb2.Status | None:
    """Return why a server refuses a revision; None when it does not."""
    report = server.report_of(key, kept)
    if report is not None:
        if report.state == fleet_pb.REVISION_STATE_FAILED and server.acked < pending_version:
            return report.error or server.nack or status_pb2.Status(message="no reason given")
        return None  # a refusal of that version is about something else, or not its last word
    if server.nacked >= pending_version > server.acked and not server.mentions(key, kept):
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


def loading_of(view: FleetView, key: Key, version: int, kept: Kept) -> Loading:
    """Return how far the servers are with a revision.

    Args:
        view: The expected servers.
        key: The revision.
        version: First desired state that holds it.
        kept: What the registry keeps of it.
    """
    refusals: dict[str, status_pb2.Status] = {}
    waiting: list[str] = []
    for server in view.servers:
        refusal = refusal_of(server, key, version, kept)
        if refusal is not None:
            refusals[server.server_id] = refusal
        elif not is_ready(server, key, version, kept):
            waiting.append(server.server_id)
    inference = frozenset(
        server.server_id for server in view.servers if server.kind == fleet_pb.SERVER_KIND_INFERENCE
    )
    return Loading(refusals, waiting, inference)
