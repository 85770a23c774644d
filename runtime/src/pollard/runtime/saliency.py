"""Saliency by RISE (Petsiuk, Das and Saenko, 2018): which parts of an image an answer rests on.

Many copies of the image are asked about, each with other parts covered; a part is important when
the score is high where it is to be seen. No gradients are needed, so any model that gives scores
will do. Two things differ from the paper: what is covered takes the image's mean colour (the zeros
of the paper are grey only behind a normalisation), and the mean score is subtracted before summing,
which changes nothing but a constant and makes the sum less noisy.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pollard.runtime.segmentation import Axis, axis_of
from pollard.runtime.transforms import Geometry

GRID = 7
"""Cells across a mask, as in the paper."""

KEPT = 0.5
"""Share of the cells that are to be seen."""


def random_masks(
    count: int, height: int, width: int, generator: np.random.Generator
) -> NDArray[np.float32]:
    """Return masks of smooth blots, float32 [count, height, width] between 0 (covered) and 1.

    A random grid is scaled up bilinearly and shifted by a random part of a cell.
    """
    cell_height, cell_width = -(-height // GRID), -(-width // GRID)
    masks = np.empty((count, height, width), np.float32)
    for index in range(count):
        grid = (generator.random((GRID + 1, GRID + 1)) < KEPT).astype(np.float32)
        large = Image.fromarray(grid).resize(
            ((GRID + 1) * cell_width, (GRID + 1) * cell_height), Image.Resampling.BILINEAR
        )
        top = int(generator.integers(0, cell_height))
        left = int(generator.integers(0, cell_width))
        masks[index] = np.asarray(large)[top : top + height, left : left + width]
    return masks


def cover(
    tensor: NDArray[np.generic], masks: NDArray[np.float32], *, channels_first: bool
) -> NDArray[np.generic]:
    """Return copies of one image with parts covered by its mean colour.

    Args:
        tensor: [height, width, channels], or [channels, height, width].
        masks: float32 [n, height, width].
        channels_first: Which of the two.

    Returns:
        [n, …] of the tensor's dtype.
    """
    shown = masks[:, None] if channels_first else masks[..., None]
    image = tensor.astype(np.float32)
    mean = image.mean(axis=(1, 2) if channels_first else (0, 1), keepdims=True)
    covered = mean + (image - mean) * shown
    if np.issubdtype(tensor.dtype, np.integer):
        covered = np.rint(covered)
    return np.asarray(covered, tensor.dtype)


class Saliency:
    """Sums up what the masks have shown."""

    def __init__(self, height: int, width: int) -> None:
        """Begin with nothing, for tensors of that size in pixels."""
        self._weighted = np.zeros((height, width), np.float64)
        self._shown = np.zeros((height, width), np.float64)
        self._scores = 0.0
        self._count = 0

    def add(self, masks: NDArray[np.float32], scores: NDArray[np.float64]) -> None:
        """Take masks, float32 [n, height, width], and the scores that they gave, [n]."""
        self._weighted += np.tensordot(scores, masks, axes=1)
        self._shown += masks.sum(axis=0, dtype=np.float64)
        self._scores += float(scores.sum())
        self._count += len(masks)

    def values(self) -> NDArray[np.float32]:
        """Return the map, float32 [height, width] scaled to 0 to 1; zeros where all is alike."""
        mean = self._scores / max(1, self._count)
        raw = self._weighted - mean * self._shown
        low, high = float(raw.min()), float(raw.max())
        # What rounding makes of scores that are all the same is no saliency.
        if high - low <= 1e-9 * max(1.0, abs(mean) * self._count):
            return np.zeros(raw.shape, np.float32)
        return ((raw - low) / (high - low)).astype(np.float32)


def map_to_image(
    values: NDArray[np.float32], geometry: Geometry, longest_side: int, *, smooth: bool = False
) -> NDArray[np.float32]:
    """Return a map of the tensor as a map of the upright image, scaled down.

    Args:
        values: float32 [height, width] of the tensor.
        geometry: Where the image went.
        longest_side: Of the result, in pixels; a smaller image keeps its size.
        smooth: Mix the values of neighbours (bilinear), for pictures: the cells of a small tensor
            would be seen as blocks. Otherwise each value is one of the map's.

    Returns:
        float32 [height, width]; 0 where a crop left the image out.
    """
    width, height = fitted(geometry, longest_side)
    across = (geometry.scale_x, geometry.offset_x)
    down = (geometry.scale_y, geometry.offset_y)
    if geometry.transposed:
        # The tensor's x runs along the image's y.
        values, across, down = values.T, down, across
    tall, wide = values.shape
    columns = axis_of(width, across[0] * geometry.width / width, across[1], wide, wide)
    rows = axis_of(height, down[0] * geometry.height / height, down[1], tall, tall)
    if smooth:
        placed = np.ascontiguousarray(_mixed(_mixed(values, rows).T, columns).T)
    else:
        placed = values[rows.nearest[:, None], columns.nearest]
    placed[~rows.seen] = 0
    placed[:, ~columns.seen] = 0
    return placed


def _mixed(values: NDArray[np.float32], axis: Axis) -> NDArray[np.float32]:
    """Return the rows that lie where an axis says."""
    weight = axis.weight[:, None]
    mixed: NDArray[np.float32] = values[axis.low] * (1 - weight) + values[axis.high] * weight
    return mixed


def fitted(geometry: Geometry, longest_side: int) -> tuple[int, int]:
    """Return width and height of the upright image, scaled down to a longest side."""
    scale = min(1.0, longest_side / max(geometry.width, geometry.height))
    return max(1, round(geometry.width * scale)), max(1, round(geometry.height * scale))


_HEAT = np.array([[0, 0, 80], [90, 0, 160], [220, 40, 90], [255, 150, 0], [255, 255, 120]])


def overlay(image: NDArray[np.uint8], values: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Return the image with the map painted over it, from dark blue (0) to yellow (1).

    Args:
        image: uint8 [height, width, 3].
        values: float32 [height, width] between 0 and 1.
    """
    place = np.clip(values, 0, 1).reshape(-1)
    stops = np.linspace(0, 1, len(_HEAT))
    color = np.stack([np.interp(place, stops, _HEAT[:, channel]) for channel in range(3)], axis=1)
    mixed = 0.45 * image.reshape(-1, 3) + 0.55 * color
    return np.rint(mixed).astype(np.uint8).reshape(image.shape)
