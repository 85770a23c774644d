"""The servers of a fleet."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from pollard.client.types.answers import Tuning


@dataclass(frozen=True)
class ServerRevision:
    """One revision on one server."""

    model: str
    """Model name."""
    revision: int
    """Number."""
    state: str
    """PENDING, FETCHING, LOADING, READY, FAILED or DRAINING."""
    variant: str
    """Variant in use."""
    error: str
    """Why it failed; empty otherwise."""
    succeeded: int
    """Requests answered with success since the server started."""
    failed: int
    """Requests that failed for a reason of the server's."""
    tuning: Tuning | None = None
    """How an inference server runs it; None before it is READY."""


@dataclass(frozen=True)
class Server:
    """One server of the fleet."""

    server_id: str
    """Id, stable across restarts."""
    kind: str
    """INFERENCE or PREPROCESS."""
    address: str
    """gRPC target under which others reach it."""
    connected: bool
    """Whether it is in touch with the manager now."""
    last_seen_time: datetime | None
    """When it was last heard, in UTC."""
    acked_version: int
    """Version of the desired state that it last acknowledged."""
    last_refusal: str
    """Its last refusal; empty after a later acknowledgement."""
    software_version: str
    """Version of Pollard."""
    targets: tuple[str, ...]
    """Targets it can run."""
    revisions: tuple[ServerRevision, ...]
    """What it runs."""
