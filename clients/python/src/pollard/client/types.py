"""What the clients give back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from pollard.client.errors import ServerFailure

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True)
class ScoredLabel:
    """One class with its score."""

    index: int
    """Index of the class, from 0."""
    label: str
    """Its label; empty when the bundle has none."""
    score: float
    """Its score; a probability when the bundle says softmax."""


@dataclass(frozen=True)
class Timings:
    """Where the time of one prediction went; the parts need not add up to the whole."""

    preprocess_seconds: float
    """Decoding and transforming."""
    inference_seconds: float
    """The inference server's answer, transport included."""
    postprocess_seconds: float
    """From outputs to the answer."""


@dataclass(frozen=True)
class DetectedObject:
    """One box, in pixels of the upright image; (0, 0) is its upper left corner."""

    label: ScoredLabel
    """Class and score."""
    x1: float
    """Left edge."""
    y1: float
    """Upper edge."""
    x2: float
    """Right edge."""
    y2: float
    """Lower edge."""


@dataclass(frozen=True)
class Prediction:
    """The answer for one image."""

    model: str
    """Model name."""
    revision: int
    """Revision that answered."""
    labels: tuple[ScoredLabel, ...]
    """The best labels, by falling score; empty when the model is no classifier."""
    embedding: NDArray[np.float32] | None
    """Vector, float32 of shape (D,), when the model gives one."""
    timings: Timings
    """Where the time went."""
    objects: tuple[DetectedObject, ...] | None = None
    """Boxes by falling score; None when the model is no detector."""
    mask: NDArray[np.uint8] | None = None
    """Class of each pixel of the upright image, uint8 of shape (H, W), 255 where the model saw
    nothing; None when the model does not segment. Read-only."""
    areas: tuple[ScoredLabel, ...] = ()
    """Classes of the mask with their share of the pixels seen, the largest first."""
    size: tuple[int, int] | None = None
    """Width and height of the upright image in pixels, beside boxes and masks."""


@dataclass(frozen=True)
class Explanation:
    """Which parts of an image a classification rests on."""

    model: str
    """Model name."""
    revision: int
    """Revision that answered."""
    label: ScoredLabel
    """Class that is explained, with its score."""
    values: NDArray[np.float32]
    """Saliency between 0 and 1, float32 of shape (H, W): the upright image, scaled down."""
    overlay_png: bytes
    """The map painted over the image, as a PNG file; empty when not asked for."""


@dataclass(frozen=True)
class Geometry:
    """Maps points of the tensor back to the upright image.

    A point (x, y) of the tensor lies at ((x - offset_x) / scale_x, (y - offset_y) / scale_y), or,
    when `transposed`, at ((y - offset_y) / scale_y, (x - offset_x) / scale_x).
    """

    width: int
    """Width of the upright image in pixels."""
    height: int
    """Height of the upright image in pixels."""
    scale_x: float
    """Horizontal scale."""
    scale_y: float
    """Vertical scale."""
    offset_x: float
    """Horizontal offset in pixels of the tensor."""
    offset_y: float
    """Vertical offset in pixels of the tensor."""
    transposed: bool = False
    """Whether a quarter turn has exchanged the axes."""


@dataclass(frozen=True)
class Transformed:
    """Images made into the input tensor of a revision."""

    model: str
    """Model name."""
    revision: int
    """Revision whose steps were used; name it when sending the tensor to an inference server."""
    name: str
    """Name of the input."""
    tensor: NDArray[Any]
    """The batch, images along the first dimension, by custom uint8 (N, H, W, C)."""
    geometries: tuple[Geometry, ...]
    """Where each image went."""


@dataclass(frozen=True)
class InferResult:
    """The outputs of one inference."""

    model: str
    """Model name."""
    version: int
    """Revision that ran."""
    id: str
    """Name that the caller gave to the request."""
    outputs: Mapping[str, NDArray[Any]]
    """Output tensors by name, in the order in which they were asked for. Read-only arrays."""


@dataclass(frozen=True)
class TensorInfo:
    """Name, type and shape of one tensor."""

    name: str
    """Name of the tensor."""
    datatype: str
    """Element type as the Open Inference Protocol names it, such as "UINT8"."""
    shape: tuple[int, ...]
    """Size of each dimension; -1 stands for a size that the request chooses."""


@dataclass(frozen=True)
class ModelMetadata:
    """What a model takes and gives."""

    name: str
    """Model name."""
    versions: tuple[int, ...]
    """Revisions that the server can run now, ascending."""
    platform: str
    """Kind of file and engine."""
    inputs: tuple[TensorInfo, ...]
    """Inputs in the order of the graph."""
    outputs: tuple[TensorInfo, ...]
    """Outputs in the order of the graph."""


@dataclass(frozen=True)
class ServerMetadata:
    """What an inference server is."""

    name: str
    """Product name."""
    version: str
    """Version of the software."""
    extensions: tuple[str, ...]
    """Optional parts of the protocol that the server implements."""


@dataclass(frozen=True)
class RepositoryEntry:
    """One model version that an inference server knows of."""

    name: str
    """Model name."""
    version: str
    """The version; empty when the model has none loaded."""
    state: str
    """State, such as "READY" or "UNAVAILABLE"."""
    reason: str
    """Why it is in that state; empty when all is well."""


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
class TuningPoint:
    """One way to run a revision, and how fast that was on its server."""

    threads: int
    """Threads of a run."""
    callers: int
    """Runs at a time."""
    batch_size: int
    """Rows of a run."""
    rows_per_second: float
    """Rows in a second, by all callers together."""
    latency_us: float
    """Mean time of a run, in microseconds."""


@dataclass(frozen=True)
class Tuning:
    """How a server runs a revision, and what it measured to choose that."""

    workers: int
    """Runs at a time."""
    threads: int
    """Threads of one run."""
    joined_batch: int
    """Most rows that waiting requests are joined to; 1 joins none."""
    set_by_hand: tuple[str, ...]
    """Which of these three were set by hand."""
    aim: str
    """What was looked for, "latency" or "throughput"; empty if nothing was measured."""
    measured_time: datetime | None
    """When it was measured, in UTC; None if it was not."""
    processor: str
    """Processor that it was measured on."""
    cores: int
    """Cores that could be used there."""
    onnxruntime: str
    """Version of onnxruntime that it was measured with."""
    points: tuple[TuningPoint, ...]
    """What was measured."""


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


@dataclass(frozen=True)
class TokenLimits:
    """How much of each server the holder of a token may use; 0 is the server's, -1 no limit."""

    requests_per_second: float = 0.0
    """Requests a second, over a while."""
    burst: float = 0.0
    """Requests that may come at once beyond that; 0 is one second's."""
    concurrent_requests: int = 0
    """Requests in flight."""
    streams: int = 0
    """Streams that are open."""
    message_bytes: int = 0
    """Size of one message, in bytes."""
    stored_bytes: int = 0
    """Sum of the sizes of the bundles that the holder has stored, in bytes."""


@dataclass(frozen=True)
class Token:
    """What the manager keeps of a token; not the token itself."""

    token_id: str
    """Part of the token that is no secret."""
    name: str
    """Who has it, for people."""
    role: str
    """viewer, predictor, publisher, admin or server."""
    limits: TokenLimits
    """How much its holder may use."""
    create_time: datetime | None
    """When it was made, in UTC."""
    creator: str
    """Who made it."""
    expire_time: datetime | None
    """When it ends by itself, in UTC; None for never."""
    revoke_time: datetime | None
    """When it was revoked, in UTC; None for not."""


@dataclass(frozen=True)
class NewToken:
    """A token that was just made."""

    token: Token
    """What is known of it."""
    secret: str = field(repr=False)
    """The token itself; nobody can be told it again."""


@dataclass(frozen=True)
class Caller:
    """Who this client is to the manager."""

    name: str
    """For people, and in the audit log."""
    role: str
    """viewer, predictor, publisher, admin or server."""
    kind: str
    """token, jwt, certificate, or open where nobody has to show anything."""
    expire_time: datetime | None
    """When the manager will no longer know it, in UTC; None for never."""
