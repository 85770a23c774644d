"""Boxes with a class each.

Losses and assignment are those of FCOS (Tian et al., 2019) with the quality focal loss of Li et
al. (2020), which trains the score of a class to be the overlap of the box.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from pollard.bundle.v1 import bundle_pb2
from pollard.compress.average_precision import Boxes, Matches, match, pairs
from pollard.compress.data import Part
from pollard.compress.errors import ModelUnknown, UsageInvalid
from pollard.compress.tasks.base import LossOptions, Mixed, Outputs, Resampled
from pollard.compress.truth import TaskName
from pollard.runtime.detection import detect
from pollard.runtime.transforms import Geometry

BOXES, SCORES = "boxes", "scores"

JUDGED_SCORE = 0.05
"""Boxes below are not looked at where a detector is judged: average precision wants the doubtful
ones too, and almost nothing is left below."""

_SHOWN_SCORE = 0.4
_SUPPRESSED_IOU = 0.6
_SURE = 0.3
"""Score from which a teacher's box is learnt."""

# Cells that answer for an object lie at most so many cells from its middle.
_RADIUS = 1.5
_BOX_WEIGHT = 2.0


@dataclass(frozen=True)
class Precision(Resampled):
    """Which boxes are right."""

    matches: Matches
    metric: str = "mAP"

    @property
    def images(self) -> int:
        return len(self.matches.objects)

    def value(self, weights: NDArray[np.int64] | None = None) -> float:
        found = self.matches.precisions(weights)
        known = found[~np.isnan(found[:, 0])]
        return float(known.mean()) if len(known) else 0.0


class Detection:
    """Answers are boxes [batch, cells, 4] in pixels of the input, and logits
    [batch, cells, classes]; the cells are those of a regular grid, row by row."""

    name: TaskName = "detection"
    metric = "mAP"
    metric_key = "mAP50-95"

    def check(self, outputs: object, batch: int) -> int:
        if (
            not isinstance(outputs, tuple | list)
            or len(outputs) != 2
            or not all(isinstance(each, Tensor) and each.ndim == 3 for each in outputs)
            or outputs[0].shape[0] != batch
            or outputs[0].shape[2] != 4
            or outputs[0].shape[:2] != outputs[1].shape[:2]
        ):
            raise ModelUnknown(
                "must give boxes [batch, cells, 4] and logits [batch, cells, classes]"
            )
        return int(outputs[1].shape[2])

    def loss(
        self, outputs: Outputs, truth: Tensor, size: tuple[int, int], options: LossOptions,
        mixed: Mixed = None,
    ) -> Tensor:  # fmt: skip
        del options, mixed  # refused before
        boxes, scores = outputs
        middles, stride = cells(boxes.shape[1], size)
        owner = _owners(truth, middles.to(truth.device), stride)
        # Once: how many there are a GPU is waited for.
        image, cell = (owner >= 0).nonzero(as_tuple=True)
        count = max(1, len(image))
        wanted = truth[image, owner[image, cell]]
        plain, generalized = _overlaps(boxes[image, cell], wanted[:, :4])
        quality = torch.zeros_like(scores)
        quality[image, cell, wanted[:, 4].long()] = plain.detach().clamp(0, 1)
        found = _focal(scores, quality).sum() / count
        placed = (1 - generalized).sum() / count
        return found + _BOX_WEIGHT * placed

    def distillation(self, outputs: Outputs, wanted: Outputs, options: LossOptions) -> Tensor:
        del options
        boxes, scores = outputs
        teacher = wanted[1].sigmoid()
        image, cell = (teacher.amax(2) > _SURE).nonzero(as_tuple=True)
        count = max(1, len(image))
        found = _focal(scores, teacher).sum() / count
        placed = (1 - _overlaps(boxes[image, cell], wanted[0][image, cell])[1]).sum() / count
        return found + _BOX_WEIGHT * placed

    def judge(self, answers: NDArray[np.float32], part: Part, classes: int) -> Precision:
        return judge_boxes(self._found(answers, part), part, classes)

    def _found(
        self, answers: NDArray[np.float32], part: Part, threshold: float = JUDGED_SCORE
    ) -> list[Boxes]:
        manifest = bundle_pb2.Manifest()
        self.describe(manifest, ())
        return [
            boxes_of(
                {BOXES: one[None, :, :4], SCORES: one[None, :, 4:]}, manifest, truth.geometry,
                threshold,
            )
            for one, truth in zip(answers, part.truths, strict=True)
        ]  # fmt: skip

    def agreement(
        self, answers: NDArray[np.float32], others: NDArray[np.float32], part: Part
    ) -> tuple[float, float]:
        same = total = 0.0
        both = (self._found(each, part, _SHOWN_SCORE) for each in (answers, others))
        for own, other in zip(*both, strict=True):
            agree = [pair for pair in pairs(own, other) if own[pair[0], 4] == other[pair[1], 4]]
            # An image in which both see nothing is an answer, too.
            same += len(agree) or float(not len(own) and not len(other))
            total += max(len(own), len(other), 1)
        return same, total

    def divergence(self, wanted: NDArray[np.float32], given: NDArray[np.float32]) -> float:
        if not np.isfinite(given).all():
            return math.inf
        want, have = (torch.from_numpy(each).double() for each in (wanted, given))
        p = want[..., 4:].sigmoid()
        entropy = functional.binary_cross_entropy_with_logits(want[..., 4:], p, reduction="none")
        cross = functional.binary_cross_entropy_with_logits(have[..., 4:], p, reduction="none")
        moved = (1 - _overlaps(have[..., :4], want[..., :4])[1]) * p.amax(2)
        return float((cross - entropy).sum((1, 2)).mean() + moved.sum(1).mean())

    def confusion(
        self, answers: NDArray[np.float32], part: Part, classes: int
    ) -> NDArray[np.int64]:
        return confuse_boxes(self._found(answers, part, _SHOWN_SCORE), part, classes)

    def confusion_labels(self, classes: list[str]) -> list[str]:
        return [*classes, "nothing"]

    def describe(self, manifest: bundle_pb2.Manifest, classes: Sequence[str]) -> None:
        manifest.task = bundle_pb2.TASK_DETECTION
        for name, last in ((BOXES, 4), (SCORES, len(classes))):
            manifest.outputs.add(
                name=name, data_type=bundle_pb2.DATA_TYPE_FP32, shape=[-1, -1, last]
            )
        manifest.postprocess.detection.CopyFrom(
            bundle_pb2.Detection(
                boxes_output=BOXES,
                scores_output=SCORES,
                activation=bundle_pb2.ACTIVATION_SIGMOID,
                score_threshold=_SHOWN_SCORE,
                iou_threshold=_SUPPRESSED_IOU,
            )
        )


def boxes_of(
    outputs: dict[str, NDArray[np.generic]],
    manifest: bundle_pb2.Manifest,
    geometry: Geometry,
    threshold: float,
) -> Boxes:
    """Return the boxes of one image as a server would find them."""
    found = detect(outputs, manifest, [geometry], score_threshold=threshold)
    rows = [(b.x1, b.y1, b.x2, b.y2, b.class_index, b.score) for b in found]
    return np.array(rows, np.float64).reshape(-1, 6)


def judge_boxes(found: Sequence[Boxes], part: Part, classes: int) -> Precision:
    """Return how right boxes in pixels of the images are."""
    return Precision(match(found, _objects(part), classes))


def confuse_boxes(found: Sequence[Boxes], part: Part, classes: int) -> NDArray[np.int64]:
    """Return how often an object of class i was found as class j; the last is nothing."""
    matrix = np.zeros((classes + 1, classes + 1), np.int64)
    for boxes, objects in zip(found, _objects(part), strict=True):
        left, missed = set(range(len(boxes))), set(range(len(objects)))
        for box, thing in pairs(boxes, objects):
            matrix[int(objects[thing, 4]), int(boxes[box, 4])] += 1
            left.discard(box)
            missed.discard(thing)
        for box in left:
            matrix[classes, int(boxes[box, 4])] += 1
        for thing in missed:
            matrix[int(objects[thing, 4]), classes] += 1
    return matrix


def _objects(part: Part) -> list[Boxes]:
    return [truth.boxes for truth in part.truths if truth.boxes is not None]


def cells(count: int, size: tuple[int, int]) -> tuple[Tensor, float]:
    """Return the middles [cells, 2] of a regular grid of cells in pixels, and a cell's side.

    Raises:
        UsageInvalid: so many cells are no grid of squares over an image of this size.
    """
    height, width = size
    stride = math.sqrt(height * width / count)
    rows, columns = round(height / stride), round(width / stride)
    if rows * columns != count:
        raise UsageInvalid(
            f"{count} cells are no regular grid over {height}x{width} pixels, so that it cannot be "
            "told which cell has to find which object"
        )
    y, x = torch.meshgrid(torch.arange(rows) + 0.5, torch.arange(columns) + 0.5, indexing="ij")
    return torch.stack([x * (width / columns), y * (height / rows)], -1).reshape(-1, 2), stride


def _owners(truth: Tensor, middles: Tensor, stride: float) -> Tensor:
    """Return which object each cell answers for, [batch, cells]; −1 for none.

    Cells near an object's middle and within it answer for it, for the smallest where it is
    several.
    """
    boxes = truth[..., :4]
    x, y = middles[:, 0], middles[:, 1]
    edges = torch.stack(
        [x - boxes[..., 0:1], y - boxes[..., 1:2], boxes[..., 2:3] - x, boxes[..., 3:4] - y], -1
    )
    centre = (boxes[..., :2] + boxes[..., 2:]) / 2
    near = torch.maximum((x - centre[..., 0:1]).abs(), (y - centre[..., 1:2]).abs())
    answers = (edges.amin(-1) > 0) & (near < _RADIUS * stride) & (truth[..., 4:] >= 0)
    area = (boxes[..., 2:] - boxes[..., :2]).prod(-1)[..., None].expand_as(near)
    smallest, owner = torch.where(answers, area, math.inf).min(1)
    return torch.where(smallest.isinf(), -1, owner)


def _focal(scores: Tensor, quality: Tensor) -> Tensor:
    """Return the quality focal loss of each score."""
    entropy = functional.binary_cross_entropy_with_logits(scores, quality, reduction="none")
    return entropy * (scores.sigmoid().detach() - quality).square()


def _overlaps(boxes: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Return intersection over union, plain and generalized (Rezatofighi et al., 2019)."""
    low, high = (
        torch.maximum(boxes[..., :2], others[..., :2]),
        torch.minimum(boxes[..., 2:], others[..., 2:]),
    )
    both = (high - low).clamp(min=0).prod(-1)
    area = sum((each[..., 2:] - each[..., :2]).prod(-1) for each in (boxes, others))
    either = (area - both).clamp(min=1e-6)
    around = (
        (
            torch.maximum(boxes[..., 2:], others[..., 2:])
            - torch.minimum(boxes[..., :2], others[..., :2])
        )
        .prod(-1)
        .clamp(min=1e-6)
    )
    plain = both / either
    return plain, plain - (around - either) / around
