"""What is true of an image beyond one class: boxes, or a class for each pixel.

Both are known of the image as it was; where they lie in the tensor that a model sees is what the
preprocessing's geometry says, so that training and serving agree on it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from pollard.runtime.segmentation import UNSEEN
from pollard.runtime.transforms import Geometry

TaskName = Literal["classification", "detection", "segmentation"]
TASKS: tuple[TaskName, ...] = get_args(TaskName)

NOTHING = -1.0
"""Class of a row of boxes that is none: images have different numbers of them."""

# A box of which less is left by a crop says little.
_LEAST_SHARE = 0.25


@dataclass(frozen=True)
class Truth:
    """What is true of one image, in pixels of the upright image."""

    geometry: Geometry
    """Where it went."""
    boxes: NDArray[np.float64] | None = None
    """[objects, 5]: left, upper, right and lower edge, and the class."""
    mask: NDArray[np.uint8] | None = None
    """[height, width], the class of each pixel; 255 where it is not known."""


def boxes_in_tensor(truth: Truth, width: int, height: int) -> NDArray[np.float32]:
    """Return the boxes [objects, 5] where the tensor shows them, cut off at its edges."""
    assert truth.boxes is not None  # noqa: S101 - the caller's task says so
    geometry, boxes = truth.geometry, truth.boxes
    x, y = boxes[:, [0, 2]], boxes[:, [1, 3]]
    if geometry.transposed:
        x, y = y, x
    x = np.sort(x * geometry.scale_x + geometry.offset_x, axis=1)
    y = np.sort(y * geometry.scale_y + geometry.offset_y, axis=1)
    whole = np.ptp(x, axis=1) * np.ptp(y, axis=1)
    x, y = np.clip(x, 0, width), np.clip(y, 0, height)
    left = np.ptp(x, axis=1) * np.ptp(y, axis=1)
    made = np.stack([x[:, 0], y[:, 0], x[:, 1], y[:, 1], boxes[:, 4]], axis=1)
    kept: NDArray[np.float32] = made[(left > 0) & (left >= _LEAST_SHARE * whole)].astype(np.float32)
    return kept


def mask_in_tensor(truth: Truth, width: int, height: int) -> NDArray[np.uint8]:
    """Return the classes [height, width] of the tensor's pixels; 255 where it shows no image."""
    assert truth.mask is not None  # noqa: S101 - the caller's task says so
    geometry, mask = truth.geometry, truth.mask
    along = (np.arange(width) + 0.5 - geometry.offset_x) / geometry.scale_x
    down = (np.arange(height) + 0.5 - geometry.offset_y) / geometry.scale_y
    rows, columns = (along, down) if geometry.transposed else (down, along)
    seen_rows = (rows >= 0) & (rows < geometry.height)
    seen_columns = (columns >= 0) & (columns < geometry.width)
    # To the mask's own cells: it may be coarser than the image.
    rows = np.floor(rows * (mask.shape[0] / geometry.height)).astype(np.int64)
    columns = np.floor(columns * (mask.shape[1] / geometry.width)).astype(np.int64)
    rows, columns = np.clip(rows, 0, mask.shape[0] - 1), np.clip(columns, 0, mask.shape[1] - 1)
    made: NDArray[np.uint8] = mask[rows[:, None], columns]
    made[~seen_rows[:, None] | ~seen_columns] = UNSEEN
    return made.T if geometry.transposed else made


def padded(rows: list[NDArray[np.float32]]) -> NDArray[np.float32]:
    """Return boxes of several images as one array [images, most objects, 5]."""
    most = max((len(each) for each in rows), default=0)
    made = np.zeros((len(rows), max(1, most), 5), np.float32)
    made[:, :, 4] = NOTHING
    for place, each in enumerate(rows):
        made[place, : len(each)] = each
    return made
