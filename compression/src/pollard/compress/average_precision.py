"""Mean average precision of boxes, as COCO counts it (Lin et al., 2014).

For each class and each of ten thresholds of overlap, 0.5 to 0.95, boxes are matched with objects
by falling score, each object once; the precision at 101 levels of recall is averaged over levels,
thresholds and classes. The same as pycocotools with all areas and up to 100 boxes an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

THRESHOLDS = np.linspace(0.5, 0.95, 10)
_LEVELS = np.linspace(0, 1, 101)
MAX_BOXES = 100

Boxes = NDArray[np.float64]
"""[boxes, 6]: left, upper, right and lower edge, class, score. Without the last: objects."""


@dataclass(frozen=True)
class Matches:
    """Every box that was found, by falling score, and which of them are right."""

    image: NDArray[np.int64] = field(repr=False)
    label: NDArray[np.int64] = field(repr=False)
    right: NDArray[np.bool_] = field(repr=False)
    """[thresholds, boxes]."""
    objects: NDArray[np.int64] = field(repr=False)
    """Objects of each class in each image, [images, classes]."""

    def precisions(self, weights: NDArray[np.int64] | None = None) -> NDArray[np.float64]:
        """Return the average precision [classes, thresholds]; NaN for classes without objects.

        Args:
            weights: How often each image counts; once when None.
        """
        if weights is None:
            weights = np.ones(len(self.objects), np.int64)
        classes = self.objects.shape[1]
        made = np.full((classes, len(THRESHOLDS)), np.nan)
        totals = weights @ self.objects
        counts = weights[self.image]
        for number in np.flatnonzero(totals):
            own = self.label == number
            made[number] = _areas(self.right[:, own], counts[own], int(totals[number]))
        return made


def iou(boxes: NDArray[np.float64], others: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return intersection over union of each with each, [boxes, others]."""
    low = np.maximum(boxes[:, None, :2], others[None, :, :2])
    high = np.minimum(boxes[:, None, 2:4], others[None, :, 2:4])
    both = np.prod(np.maximum(high - low, 0), axis=2)
    areas = [np.prod(np.maximum(b[:, 2:4] - b[:, :2], 0), axis=1) for b in (boxes, others)]
    either = areas[0][:, None] + areas[1][None, :] - both
    shares: NDArray[np.float64] = np.divide(both, either, out=np.zeros_like(both), where=either > 0)
    return shares


def match(found: Sequence[Boxes], objects: Sequence[Boxes], classes: int) -> Matches:
    """Match boxes with objects, image by image.

    Args:
        found: For each image, [boxes, 6].
        objects: For each image, [objects, 5].
        classes: How many there are.
    """
    images, labels, scores, rights = [], [], [], []
    counts = np.zeros((len(objects), classes), np.int64)
    for image, (boxes, true) in enumerate(zip(found, objects, strict=True)):
        np.add.at(counts[image], true[:, 4].astype(np.int64), 1)
        best = boxes[np.argsort(-boxes[:, 5], kind="stable")[:MAX_BOXES]]
        for number in np.unique(best[:, 4]):
            own = best[best[:, 4] == number]
            overlaps = iou(own, true[true[:, 4] == number])
            images.append(np.full(len(own), image))
            labels.append(np.full(len(own), int(number)))
            scores.append(own[:, 5])
            rights.append(_matched(overlaps))
    if not images:
        none = np.zeros(0, np.int64)
        return Matches(none, none, np.zeros((len(THRESHOLDS), 0), bool), counts)
    order = np.argsort(-np.concatenate(scores), kind="stable")
    return Matches(
        np.concatenate(images)[order],
        np.concatenate(labels)[order],
        np.concatenate(rights, axis=1)[:, order],
        counts,
    )


def pairs(boxes: Boxes, objects: Boxes, threshold: float = 0.5) -> list[tuple[int, int]]:
    """Return which box shows which object, whatever their classes: the largest overlaps first."""
    overlaps = iou(boxes, objects)
    made = []
    while overlaps.size and overlaps.max() >= threshold:
        row, column = (int(i) for i in np.unravel_index(int(overlaps.argmax()), overlaps.shape))
        made.append((row, column))
        overlaps[row], overlaps[:, column] = -1, -1
    return made


def _matched(overlaps: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Give each box, in order, the free object that it overlaps most; [thresholds, boxes]."""
    right = np.zeros((len(THRESHOLDS), len(overlaps)), bool)
    if not overlaps.shape[1]:
        return right
    for place, threshold in enumerate(THRESHOLDS):
        free = np.ones(overlaps.shape[1], bool)
        for box, row in enumerate(overlaps):
            # The last of equals, as COCO's own tool does it.
            candidates = np.where(free, row, -1.0)
            best = len(candidates) - 1 - int(candidates[::-1].argmax())
            if candidates[best] >= min(threshold, 1 - 1e-10):
                right[place, box] = True
                free[best] = False
    return right


def _areas(right: NDArray[np.bool_], counts: NDArray[np.int64], total: int) -> NDArray[np.float64]:
    hits = np.cumsum(right * counts, axis=1)
    said = np.cumsum(counts)
    made = np.zeros(len(right))
    if not len(said):
        return made
    precision = hits / np.maximum(said, 1e-12)
    envelope = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    for place, row in enumerate(hits):
        at = np.searchsorted(row / total, _LEVELS)
        reached = at < len(row)
        made[place] = envelope[place, at[reached]].sum() / len(_LEVELS)
    return made
