"""An answer of the vision service as it is drawn, and two of them compared."""

from __future__ import annotations

import base64
import colorsys
import io
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pollard.services.models.web import words
from pollard.vision.v1 import vision_service_pb2 as pb

SAME_BOX_IOU = 0.5
"""Two boxes of one class that overlap so much show the same."""

MAX_MASK_PIXELS = 100_000_000
MAX_MASK_SIDE = 1024
"""Masks are drawn with at most so many pixels a side."""

UNSEEN = 255
"""Class of the pixels that the model did not see."""

_SEE_THROUGH = ("background", "_background_", "void", "unlabeled")

_TURN = 0.618033988749895
"""Of the colour circle, from one class to the next: neighbours differ most."""


@dataclass(frozen=True)
class Scored:
    """One class with its score or share."""

    name: str
    score: float
    color: str


@dataclass(frozen=True)
class Box:
    """One box in pixels of the image."""

    x: float
    y: float
    width: float
    height: float
    label: str
    score: float
    color: str
    index: int


@dataclass(frozen=True)
class Mask:
    """Classes by pixel, and the picture of them."""

    classes: NDArray[np.uint8]
    uri: str


@dataclass(frozen=True)
class Answer:
    """What one side answers, or why it does not."""

    choice: str
    revision: int = 0
    problem: str = ""
    kind: str = ""
    """ "classification", "detection", "segmentation" or "embedding"."""
    labels: Sequence[Scored] = ()
    boxes: Sequence[Box] = ()
    areas: Sequence[Scored] = ()
    mask: Mask | None = None
    width: int = 0
    height: int = 0
    values: NDArray[np.float32] | None = None
    timings: Sequence[tuple[str, str]] = field(default=())

    @property
    def text_size(self) -> float:
        """Height of the words beside boxes, in pixels of the image."""
        return max(self.width, self.height) / 28

    @property
    def shown_values(self) -> list[str]:
        """The first values of a vector."""
        return [] if self.values is None else [f"{value:.3f}" for value in self.values[:8]]

    @property
    def norm(self) -> float:
        """Length of a vector."""
        return 0.0 if self.values is None else float(np.linalg.norm(self.values))


def read(choice: str, response: pb.PredictResponse, palette: Sequence[int] = ()) -> Answer:
    """Return an answer as it is drawn.

    Args:
        choice: What was asked.
        response: What was answered.
        palette: Colours of the classes of a segmentation, three values each.
    """
    kind = response.WhichOneof("result") or ""
    told = response.timings
    timings = [
        (name, words.duration(span))
        for name, span in (
            ("Prepared in", told.preprocess),
            ("run in", told.inference),
            ("answered in", told.postprocess),
        )
    ]
    if kind == "classification":
        labels = [
            Scored(_name(each), each.score, color(each.index))
            for each in response.classification.labels
        ]
        return Answer(choice, response.revision, kind=kind, labels=labels, timings=timings)
    if kind == "detection":
        found = response.detection
        return Answer(
            choice,
            response.revision,
            kind=kind,
            boxes=[_box(each) for each in found.objects],
            width=found.width,
            height=found.height,
            timings=timings,
        )
    if kind == "segmentation":
        return _segmentation(choice, response, palette, timings)
    values = np.asarray(response.embedding.values, np.float32)
    return Answer(choice, response.revision, kind="embedding", values=values, timings=timings)


def compare(left: Answer, right: Answer) -> str:
    """Return in one sentence how two answers differ; empty where they cannot be compared."""
    if left.problem or right.problem or left.kind != right.kind:
        return ""
    if left.revision == right.revision:
        return f"Both are answers of revision {left.revision}."
    if left.kind == "classification" and left.labels and right.labels:
        ours, theirs = left.labels[0], right.labels[0]
        if ours.name == theirs.name:
            return (
                f"Both say {ours.name}, with {words.percent(ours.score)} and "
                f"{words.percent(theirs.score)}."
            )
        return f"They differ: {ours.name} against {theirs.name}."
    if left.kind == "detection":
        same = _same_boxes(left.boxes, right.boxes)
        if not left.boxes and not right.boxes:
            return "Neither finds anything."
        if not left.boxes or not right.boxes:
            return f"One finds {len(left.boxes) + len(right.boxes)} boxes, the other nothing."
        return f"{same} of {len(left.boxes)} and {len(right.boxes)} boxes show the same."
    if left.kind == "segmentation" and left.mask is not None and right.mask is not None:
        if left.mask.classes.shape != right.mask.classes.shape:
            return ""
        seen = (left.mask.classes != UNSEEN) & (right.mask.classes != UNSEEN)
        if not seen.any():
            return ""
        agree = float((left.mask.classes == right.mask.classes)[seen].mean())
        return f"{words.percent(agree)} of the pixels have the same class."
    if left.values is not None and right.values is not None:
        if left.values.shape != right.values.shape or not left.norm or not right.norm:
            return ""
        cosine = float(left.values @ right.values) / (left.norm * right.norm)
        return f"The cosine between the two vectors is {cosine:.4f}."
    return ""


def color(index: int) -> str:
    """Return the colour of a class, the same on every page."""
    return "#{:02x}{:02x}{:02x}".format(*_rgb(index))


def _rgb(index: int) -> tuple[int, int, int]:
    red, green, blue = colorsys.hls_to_rgb((0.37 + index * _TURN) % 1.0, 0.47, 0.62)
    return round(red * 255), round(green * 255), round(blue * 255)


def _name(label: pb.ScoredLabel) -> str:
    return label.label or f"class {label.index}"


def _box(found: pb.DetectedObject) -> Box:
    return Box(
        x=found.x1,
        y=found.y1,
        width=max(0.0, found.x2 - found.x1),
        height=max(0.0, found.y2 - found.y1),
        label=_name(found.label),
        score=found.label.score,
        color=color(found.label.index),
        index=found.label.index,
    )


def _same_boxes(left: Sequence[Box], right: Sequence[Box]) -> int:
    """Return how many boxes have a partner on the other side, each at most one."""
    free = list(right)
    same = 0
    for box in left:
        partners = [other for other in free if other.index == box.index]
        best = max(partners, key=lambda other: _iou(box, other), default=None)
        if best is not None and _iou(box, best) >= SAME_BOX_IOU:
            free.remove(best)
            same += 1
    return same


def _iou(one: Box, other: Box) -> float:
    width = min(one.x + one.width, other.x + other.width) - max(one.x, other.x)
    height = min(one.y + one.height, other.y + other.height) - max(one.y, other.y)
    shared = max(0.0, width) * max(0.0, height)
    whole = one.width * one.height + other.width * other.height - shared
    return shared / whole if whole > 0 else 0.0


def _segmentation(
    choice: str,
    response: pb.PredictResponse,
    palette: Sequence[int],
    timings: Sequence[tuple[str, str]],
) -> Answer:
    found = response.segmentation
    colors = _colors(palette)
    areas = [
        Scored(
            _name(each), each.score, "#{:02x}{:02x}{:02x}".format(*colors[3 * (each.index % 256) :])
        )
        for each in found.areas
    ]
    clear = {each.index for each in found.areas if each.label.lower() in _SEE_THROUGH}
    return Answer(
        choice,
        response.revision,
        kind="segmentation",
        areas=areas,
        mask=_mask(found, colors, clear),
        width=found.width,
        height=found.height,
        timings=timings,
    )


def _colors(palette: Sequence[int]) -> list[int]:
    """Return three values for each of 256 classes, those of the bundle first."""
    colors = [min(255, value) for value in palette[: 3 * 256]]
    colors = colors[: len(colors) // 3 * 3]
    for index in range(len(colors) // 3, 256):
        colors.extend(_rgb(index))
    return colors


def _mask(found: pb.Segmentation, colors: list[int], clear: set[int]) -> Mask | None:
    """Return the mask of run lengths, and its picture; None where they do not fit the size."""
    lengths = np.asarray(found.run_lengths.lengths, np.int64)
    classes = np.asarray(found.run_lengths.classes, np.int64)
    pixels = found.width * found.height
    if len(lengths) != len(classes) or lengths.sum() != pixels or not 0 < pixels <= MAX_MASK_PIXELS:
        return None
    flat = np.repeat((classes % 256).astype(np.uint8), lengths)
    whole = flat.reshape(found.height, found.width)
    stride = -(-max(whole.shape) // MAX_MASK_SIDE)
    picture = Image.fromarray(np.ascontiguousarray(whole[::stride, ::stride]), "P")
    picture.putpalette(colors)
    alpha = bytes(0 if index in clear or index == UNSEEN else 150 for index in range(256))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", transparency=alpha)
    uri = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    return Mask(whole, uri)
