"""What the drill can be told."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pollard.services.up.plan import INFERENCE, MODELS, PREPROCESS

UPLOAD, VERIFY, ROLLOUT, SWAP, COLLECT = "upload", "verify", "rollout", "swap", "collect"

STEPS = (UPLOAD, VERIFY, ROLLOUT, SWAP, COLLECT)
"""In the middle of which services are killed."""

SERVICES = (INFERENCE, PREPROCESS, MODELS)

AROUND_SECONDS = 0.25
"""How long before a swap begins and after it has ended a request counts as one during a swap."""


@dataclass(frozen=True)
class Installation:
    """Addresses of services that run."""

    models: str
    vision: str
    inference: str


@dataclass(frozen=True)
class DrillOptions:
    """One drill."""

    swaps: int = 20
    """How often the alias is swapped."""
    load_percent: float = 70.0
    """Requests, in percent of what the services can answer; 0 lets each client ask without
    pause."""
    clients: int = 8
    """Clients that ask."""
    pause_seconds: float = 1.5
    """From the end of a swap to the next one; longer than `drain_seconds`, so that a revision is
    freed before it is swapped to again, and really loaded."""
    kills: int = 0
    """How often a service is killed."""
    kill: str = "random"
    """Which one: a name, or "random"."""
    steps: tuple[str, ...] = STEPS
    """In the middle of which steps."""
    seed: int = 0
    """Decides what is killed and when."""
    model_mb: float = 10.0
    """Size of the drill's own model."""
    drain_seconds: float = 1.0
    """How long the drill's own services keep a revision that is no longer served: longer than any
    request takes, as wherever Pollard runs."""
    max_seconds: float = 3600.0
    """When the drill stops, finished or not."""
    installation: Installation | None = None
    """What to drill; None starts services for the drill."""
    model: str | None = None
    """A model of the installation; None registers the drill's own."""
    revisions: tuple[int, int] | None = None
    """Its revisions."""
    alias: str = "production"
    """Alias that is swapped."""
    json_file: Path | None = None
    """Where to write the figures."""
