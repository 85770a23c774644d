"""What the vision and inference services answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

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
