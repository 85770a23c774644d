"""Models, revisions and aliases, and what is done with them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from types import MappingProxyType

from pollard.client.errors import ServerFailure


@dataclass(frozen=True)
class Alias:
    """An alias and the state of its switch."""

    model: str
    """Model name."""
    name: str
    """Alias, such as "production"."""
    revision: int
    """Revision that requests go to; 0 while the first switch is not done."""
    pending_revision: int
    """Revision that it is moving to; 0 for none."""
    previous_revision: int
    """Revision that it pointed at before; 0 for none."""
    state: str
    """ACTIVE, LOADING, SWITCHING or FAILED."""
    error: str
    """Why the last switch failed; empty otherwise."""
    failures: tuple[ServerFailure, ...]
    """Servers that refused, with their reasons."""
    update_time: datetime | None
    """When it last changed, in UTC."""
    etag: str
    """Changes with every change."""


@dataclass(frozen=True)
class Model:
    """A name under which revisions are kept."""

    name: str
    """Model name."""
    description: str
    """Free text."""
    labels: Mapping[str, str]
    """Labels."""
    latest_revision: int
    """Number of the newest revision; 0 when there is none."""
    aliases: tuple[Alias, ...]
    """Its aliases."""
    create_time: datetime | None
    """When it was created, in UTC."""
    update_time: datetime | None
    """When it last changed, in UTC."""
    etag: str
    """Changes with every change."""
    delete_time: datetime | None = None
    """When it was deleted, in UTC; None when it is not."""


@dataclass(frozen=True)
class Accuracy:
    """Quality on held-out data, with its confidence interval."""

    name: str
    """Name of the metric, such as "top1"."""
    value: float
    """Estimate, between 0 and 1."""
    lower: float
    """Lower end of the interval."""
    upper: float
    """Upper end of the interval."""
    samples: int
    """Number of samples."""
    dataset: str
    """Which data."""


@dataclass(frozen=True)
class Variant:
    """The model built for one target."""

    name: str
    """Unique within the bundle."""
    target: str
    """Target, such as "cpu-int8"."""
    size_bytes: int
    """Size of the ONNX file in bytes."""
    accuracy: Accuracy | None
    """Quality, when it was measured."""
    latency_p50_us: float | None
    """Median at batch 1 in microseconds, engine only, when it was measured."""


@dataclass(frozen=True)
class Revision:
    """One immutable bundle of a model."""

    model: str
    """Model name."""
    revision: int
    """Number, counting 1, 2, 3…."""
    bundle_sha256: str
    """SHA-256 of manifest.json, lower-case hexadecimal."""
    size_bytes: int
    """Sum of the sizes of its files."""
    state: str
    """UPLOADED, CHECKED, READY or FAILED."""
    error: str
    """Why it failed; empty otherwise."""
    notes: str
    """Free text."""
    labels: Mapping[str, str]
    """Labels."""
    aliases: tuple[str, ...]
    """Aliases that point at it."""
    variants: tuple[Variant, ...]
    """Variants; only filled by `revision()` and `push()`."""
    create_time: datetime | None
    """When it was stored, in UTC."""
    etag: str
    """Changes with every change."""
    creator: str = ""
    """Who stored it."""
    signature: BundleSignature | None = None
    """Who vouches for its bundle; None when it is not signed."""
    origin: Origin | None = None
    """The revision of another installation that it is a copy of; None when it is none."""
    delete_time: datetime | None = None
    """When it was deleted, in UTC; None when it is not."""


@dataclass(frozen=True)
class BundleSignature:
    """Who vouches for a bundle's content."""

    state: str
    """TRUSTED, or UNKNOWN_KEY when the manager does not know the key."""
    key_sha256: str
    """Fingerprint of the key, as `pollard keys show` prints it."""
    create_time: datetime | None
    """When the signature was stored, in UTC."""
    creator: str
    """Who stored it."""


@dataclass(frozen=True)
class Origin:
    """The revision that another one is a copy of, as it was when it was copied."""

    installation: str
    """Installation, such as the address of its manager."""
    model: str
    """Model name there."""
    revision: int
    """Number there."""
    creator: str = ""
    """Who stored it there."""
    create_time: datetime | None = None
    """When it was stored there, in UTC."""
    notes: str = ""
    """Its notes there."""
    labels: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    """Its labels there."""
    aliases: tuple[str, ...] = ()
    """Aliases that pointed at it there."""
    origin: Origin | None = None
    """Where that one came from in turn."""


@dataclass(frozen=True)
class Pushed:
    """What came of an upload."""

    revision: Revision
    """The stored revision."""
    existed: bool
    """Whether the model already had this bundle."""
    alias: Alias | None
    """The alias after its switch; None when none was asked for, or the wait was not wanted."""
    warnings: tuple[str, ...] = ()
    """What the manager accepted and thinks little of, such as that the bundle is not signed."""


@dataclass(frozen=True)
class Copied:
    """What came of a copy to another installation."""

    source: Revision
    """The revision that was copied."""
    revision: Revision
    """The revision there."""
    existed: bool
    """Whether the model there already had the bundle."""
    warnings: tuple[str, ...] = ()
    """What the manager there accepted and thinks little of."""


@dataclass(frozen=True)
class Progress:
    """How far an upload or a download is."""

    done_bytes: int
    """Bytes sent or received, those of earlier attempts included."""
    total_bytes: int
    """Bytes in all."""


@dataclass(frozen=True)
class DamagedFile:
    """A file in the store that is not what its digest says."""

    sha256: str
    """What its SHA-256 should be."""
    message: str
    """What is wrong, for people."""
    uses: tuple[str, ...]
    """Where it belongs, as "models/{model}/revisions/{n}/{path}"."""


@dataclass(frozen=True)
class Verified:
    """What a verification of the store found."""

    checked_files: int
    """Files that were read."""
    checked_bytes: int
    """Their size."""
    damaged: tuple[DamagedFile, ...]
    """Those that are not what their digests say."""


@dataclass(frozen=True)
class Event:
    """One change in the registry."""

    sequence: int
    """Counts up by one; never used again."""
    time: datetime | None
    """When, in UTC."""
    actor: str
    """Who."""
    action: str
    """What, in upper snake case."""
    resource: str
    """Resource that changed."""
    detail: str
    """One sentence for people."""
