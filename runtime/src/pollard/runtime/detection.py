"""From a detector's output tensors to boxes in the upright image, as the manifest says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pollard.bundle.v1 import bundle_pb2
from pollard.runtime.errors import ManifestInvalid, TensorInvalid
from pollard.runtime.postprocess import activate, output_of
from pollard.runtime.transforms import Geometry

DEFAULT_MAX_DETECTIONS = 100

MAX_CANDIDATES = 3000
"""Boxes that non-maximum suppression looks at, the best by score: it compares each with each."""

_MERGE_IOU = 0.5
"""For several views of one image, whose boxes no graph has compared."""


class DetectedBox(NamedTuple):
    """One box, in pixels of the upright image; (0, 0) is its upper left corner."""

    class_index: int
    """Index of the class, from 0."""
    label: str
    """Its label; empty when the bundle has none."""
    score: float
    """Its score."""
    x1: float
    """Left edge."""
    y1: float
    """Upper edge."""
    x2: float
    """Right edge."""
    y2: float
    """Lower edge."""


def detect(
    outputs: Mapping[str, NDArray[np.generic]],
    manifest: bundle_pb2.Manifest,
    geometries: Sequence[Geometry],
    labels: Sequence[str] = (),
    score_threshold: float | None = None,
) -> list[DetectedBox]:
    """Return the boxes of one image by falling score, cut off at the image's edges.

    The boxes of several views are put together before the weaker one of two that show the same
    is left out. Boxes that lie outside of the image, in the border of a letterbox for instance,
    are left out.

    Args:
        outputs: Output tensors by name; the first dimension counts the views of the image.
        manifest: Of the revision that gave the outputs.
        geometries: Where the image went, for each view.
        labels: Labels in the order of the classes, or none.
        score_threshold: Boxes below are left out; None means what the manifest says.

    Raises:
        ManifestInvalid: the manifest does not describe a detection.
        TensorInvalid: an output is missing, has another shape than the manifest says, or holds a
            value that is not finite.
    """
    if manifest.postprocess.WhichOneof("task") != "detection":
        raise ManifestInvalid("the manifest does not describe a detection")
    task = manifest.postprocess.detection
    threshold = task.score_threshold if score_threshold is None else score_threshold
    boxes, scores, classes = _candidates(outputs, task, len(geometries), threshold)
    placed = np.concatenate(
        [boxes_to_image(boxes[view], geometry) for view, geometry in enumerate(geometries)]
    )
    view_of, score_all, class_all = _flat(scores, classes)
    order = np.argsort(-score_all, kind="stable")[:MAX_CANDIDATES]
    placed, score_all, class_all = placed[view_of[order]], score_all[order], class_all[order]
    iou = task.iou_threshold or (_MERGE_IOU if len(geometries) > 1 else 0.0)
    kept = np.arange(len(order)) if not iou else suppress(placed, score_all, class_all, iou)
    found = []
    width, height = geometries[0].width, geometries[0].height
    most = task.max_detections or DEFAULT_MAX_DETECTIONS
    cut = np.clip(placed, 0, [width, height, width, height])
    for index in kept:
        x1, y1, x2, y2 = (float(value) for value in cut[index])
        if x2 <= x1 or y2 <= y1:
            continue
        number = int(class_all[index])
        label = labels[number] if number < len(labels) else ""
        found.append(DetectedBox(number, label, float(score_all[index]), x1, y1, x2, y2))
        if len(found) == most:
            break
    return found


def boxes_to_image(boxes: NDArray[np.float64], geometry: Geometry) -> NDArray[np.float64]:
    """Return boxes [n, 4] of the tensor (x1, y1, x2, y2) as boxes of the upright image."""
    corners = np.stack([boxes[:, [0, 2]], boxes[:, [1, 3]]])
    along = (corners[0] - geometry.offset_x) / geometry.scale_x
    down = (corners[1] - geometry.offset_y) / geometry.scale_y
    x, y = (down, along) if geometry.transposed else (along, down)
    # A mirrored axis exchanges the edges.
    return np.stack([x.min(axis=1), y.min(axis=1), x.max(axis=1), y.max(axis=1)], axis=1)


def suppress(
    boxes: NDArray[np.float64],
    scores: NDArray[np.float64],
    classes: NDArray[np.int64],
    iou_threshold: float,
) -> NDArray[np.int64]:
    """Greedy non-maximum suppression within each class.

    The best box is kept, all boxes of its class that overlap it by more than `iou_threshold`
    (intersection over union) are left out, and so on with the rest.

    Args:
        boxes: float [n, 4], x1, y1, x2, y2.
        scores: float [n].
        classes: int [n].
        iou_threshold: 0 to 1.

    Returns:
        Indices of the boxes that are kept, by falling score.
    """
    order = np.argsort(-scores, kind="stable")
    boxes, classes = boxes[order], classes[order]
    areas = np.prod(np.maximum(boxes[:, 2:] - boxes[:, :2], 0), axis=1)
    alive = np.ones(len(boxes), bool)
    kept = []
    for index in range(len(boxes)):
        if not alive[index]:
            continue
        kept.append(index)
        rivals = np.flatnonzero(alive[index + 1 :] & (classes[index + 1 :] == classes[index]))
        rivals += index + 1
        if not len(rivals):
            continue
        low = np.maximum(boxes[index, :2], boxes[rivals, :2])
        high = np.minimum(boxes[index, 2:], boxes[rivals, 2:])
        both = np.prod(np.maximum(high - low, 0), axis=1)
        # Without the division: boxes without any area overlap nothing.
        over = both > iou_threshold * (areas[index] + areas[rivals] - both)
        alive[rivals[over]] = False
    return order[np.array(kept, np.int64)]


def _candidates(
    outputs: Mapping[str, NDArray[np.generic]],
    task: bundle_pb2.Detection,
    views: int,
    threshold: float,
) -> tuple[NDArray[np.float64], list[NDArray[np.float64]], list[NDArray[np.int64]]]:
    """Return the boxes [views, n, 4]; per view the scores, and the (box, class) they belong to.

    A box may stand for several classes, when the scores hold all of them.
    """
    boxes = output_of(outputs, task.boxes_output)
    if boxes.ndim != 3 or boxes.shape[0] != views or boxes.shape[2] != 4:
        raise _misshaped(task.boxes_output, boxes, f"[{views}, boxes, 4]")
    count = boxes.shape[1]
    raw = output_of(outputs, task.scores_output)
    if task.labels_output:
        if raw.shape != (views, count):
            raise _misshaped(task.scores_output, raw, f"[{views}, {count}]")
        numbers = output_of(outputs, task.labels_output)
        if numbers.shape != (views, count):
            raise _misshaped(task.labels_output, numbers, f"[{views}, {count}]")
        if not np.isfinite(numbers).all():
            raise TensorInvalid(f"output {task.labels_output!r} holds values that are not finite")
        if task.activation == bundle_pb2.ACTIVATION_SOFTMAX:
            raise ManifestInvalid("softmax needs the scores of all classes")
    elif raw.ndim != 3 or raw.shape[:2] != (views, count) or not raw.shape[2]:
        raise _misshaped(task.scores_output, raw, f"[{views}, {count}, classes]")
    scores, owners = [], []
    for view in range(views):
        flat = raw[view].reshape(count, raw.shape[2] if raw.ndim == 3 else 1).astype(np.float64)
        if not np.isfinite(flat).all() or not np.isfinite(boxes[view]).all():
            raise TensorInvalid("the model's boxes or scores hold values that are not finite")
        active = activate(flat, task.activation) if count else flat
        where, column = np.nonzero(active >= threshold)
        scores.append(active[where, column])
        if task.labels_output:
            column = numbers[view].astype(np.int64)[where]
            # Graphs fill up with -1 what they have no box for.
            real = column >= 0
            where, column, scores[-1] = where[real], column[real], scores[-1][real]
        owners.append(np.stack([where + view * count, column], axis=1))
    return boxes.astype(np.float64), scores, owners


def _flat(
    scores: list[NDArray[np.float64]], owners: list[NDArray[np.int64]]
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.int64]]:
    pairs = np.concatenate(owners)
    return pairs[:, 0], np.concatenate(scores), pairs[:, 1]


def _misshaped(name: str, output: NDArray[np.generic], wanted: str) -> TensorInvalid:
    return TensorInvalid(
        f"output {name!r} has shape {list(output.shape)}, not {wanted}",
        output=name,
        shape=list(output.shape),
    )
