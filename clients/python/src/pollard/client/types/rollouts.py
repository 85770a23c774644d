"""Rollouts and what they have seen."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from pollard.client.errors import ServerFailure


@dataclass(frozen=True)
class RevisionEvidence:
    """What a step of a rollout has seen of one revision's requests."""

    requests: int
    """Requests that inference servers answered or failed; without those that clients failed."""
    failed: int
    """Those that failed."""
    p50_ms: float
    """Median latency in the engine, in milliseconds; 0 if unknown."""
    p99_ms: float
    """99th percentile of it; 0 if unknown."""
    images: int
    """Images that preprocess servers answered, or for which their part failed."""
    images_failed: int
    """Those for which it failed."""


@dataclass(frozen=True)
class ShadowEvidence:
    """What a step of a rollout has seen of copies of the base revision's requests."""

    compared: int
    """Copies that were run and compared."""
    items: int
    """Items in them: entries of the requests' batches."""
    agreed: int
    """Items with the same first answer."""
    dropped: int
    """Copies that were not run because no worker was idle."""
    failed: int
    """Copies that the revision failed."""
    distance_p50: float
    """Median of the relative distance of the scores."""
    distance_p99: float
    """99th percentile of it."""


@dataclass(frozen=True)
class GateEvidence:
    """How one gate of a rollout stands."""

    gate: str
    """Its name."""
    state: str
    """WAITING, HOLDS or FAILED."""
    words: str
    """One sentence with the numbers."""


@dataclass(frozen=True)
class RolloutEvidence:
    """What was seen since a step of a rollout began."""

    step: int
    """Index of the step; -1 is the step of shadows alone."""
    held_seconds: float
    """How long it has lasted."""
    revision: RevisionEvidence
    """Requests to the new revision."""
    base: RevisionEvidence
    """Requests to the base revision meanwhile."""
    shadow: ShadowEvidence | None
    """Copies; None without shadows."""
    gates: tuple[GateEvidence, ...]
    """How each gate stands."""
    waiting_for: tuple[str, ...]
    """What the next step waits for, one sentence each."""


@dataclass(frozen=True)
class Rollout:
    """The way of an alias to a revision in steps, with gates."""

    model: str
    """Model name."""
    number: int
    """Number, counting 1, 2, 3… in each model."""
    alias: str
    """Alias that moves."""
    revision: int
    """Revision that it moves to."""
    base_revision: int
    """Revision that it moves from."""
    steps: tuple[float, ...]
    """Shares of the steps in percent; the last is 100."""
    step: int
    """Index of the current step; -1 while only shadows go to the revision."""
    hold_seconds: float
    """How long each step lasts at least."""
    min_requests: int
    """Requests to the revision that each step must have seen."""
    max_error_rate: float
    """Largest rate of failed requests, 0 to 1."""
    max_p99_ratio: float
    """Largest ratio of the 99th percentiles of the latency to the base revision's."""
    shadow_percent: float
    """Share of the base revision's requests that are also run as shadows."""
    min_agreement: float
    """Smallest share of the shadows' items that agree, 0 to 1; 0 judges none."""
    state: str
    """SHADOW, CANARY, PAUSED, PROMOTED or ROLLED_BACK."""
    error: str
    """Which gate failed, with numbers, or which server refused; empty otherwise."""
    create_time: datetime | None
    """When it began, in UTC."""
    end_time: datetime | None
    """When it ended, in UTC; None while it goes on."""
    etag: str
    """Changes with every change."""
    evidence: RolloutEvidence | None = None
    """What the present step, or the last one, has seen; None before the first, and in lists."""
    failures: tuple[ServerFailure, ...] = ()
    """Inference servers that refuse the revision and are excused by the quorum."""
