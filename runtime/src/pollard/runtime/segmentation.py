"""From a segmentation's output tensor to a class for each pixel of the upright image.

Scores are interpolated bilinearly between the centres of the output's cells, as frameworks do with
``align_corners=False``, and the best class is taken at the centre of each pixel. Where the four
cells around a pixel have the same best class, that class is the best of every mixture of them, so
that only the pixels along borders are computed: a photograph of many megapixels costs little.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pollard.bundle.v1 import bundle_pb2
from pollard.runtime.errors import ManifestInvalid, TensorInvalid
from pollard.runtime.postprocess import activate, output_of
from pollard.runtime.transforms import Geometry

UNSEEN = 255
"""In the place of a class: the model saw nothing of this pixel, because a crop left it out."""

MAX_CLASSES = UNSEEN

_STRIP_PIXELS = 1 << 20
"""Pixels that are computed at once; bounds the memory."""


@dataclass(frozen=True)
class Area:
    """How much of an image is of one class."""

    class_index: int
    """Index of the class, from 0."""
    label: str
    """Its label; empty when the bundle has none."""
    share: float
    """Of the pixels that the model saw, 0 to 1."""


def segment(
    outputs: Mapping[str, NDArray[np.generic]],
    manifest: bundle_pb2.Manifest,
    geometry: Geometry,
    input_size: tuple[int, int],
    *,
    mirrored: bool = False,
) -> NDArray[np.uint8]:
    """Return the class of each pixel of the upright image, uint8 [height, width].

    Args:
        outputs: Output tensors by name.
        manifest: Of the revision that gave the outputs.
        geometry: Where the image went.
        input_size: Width and height of the input tensor in pixels; the output may be coarser.
        mirrored: The outputs hold a second view, mirrored left to right; the scores of both are
            averaged, after the activation.

    Raises:
        ManifestInvalid: the manifest does not describe a segmentation.
        TensorInvalid: the output is missing, has another shape than the manifest says, holds a
            value that is not finite, a class above 254, or no scores that could be averaged.
    """
    if manifest.postprocess.WhichOneof("task") != "segmentation":
        raise ManifestInvalid("the manifest does not describe a segmentation")
    name = manifest.postprocess.segmentation.output or (
        manifest.outputs[0].name if manifest.outputs else ""
    )
    output = output_of(outputs, name)
    views = 2 if mirrored else 1
    if output.ndim not in (3, 4) or output.shape[0] != views or 0 in output.shape:
        raise TensorInvalid(
            f"output {name!r} has shape {list(output.shape)}, not [{views}, classes, height, "
            f"width] or [{views}, height, width]",
            output=name,
            shape=list(output.shape),
        )
    if output.ndim == 3:
        if mirrored:
            raise TensorInvalid(
                f"output {name!r} holds classes, not scores, so that several views cannot be "
                "averaged",
                output=name,
            )
        return _place(_classes(name, output[0]), None, geometry, input_size)
    if output.shape[1] > MAX_CLASSES:
        raise TensorInvalid(
            f"output {name!r} has {output.shape[1]} classes; at most {MAX_CLASSES} fit into a mask",
            output=name,
        )
    scores = output[0].astype(np.float32)
    if mirrored:
        both = [_softmax(scores), _softmax(output[1].astype(np.float32)[:, :, ::-1])]
        scores = np.mean(both, axis=0)
    if not np.isfinite(scores).all():
        raise TensorInvalid(f"output {name!r} holds values that are not finite", output=name)
    return _place(scores.argmax(axis=0).astype(np.uint8), scores, geometry, input_size)


def areas(mask: NDArray[np.uint8], labels: Sequence[str] = ()) -> list[Area]:
    """Return the share of each class among the pixels seen, the largest first."""
    counts = np.bincount(mask.reshape(-1), minlength=UNSEEN + 1)[:UNSEEN]
    seen = max(1, int(counts.sum()))
    order = np.argsort(-counts, kind="stable")
    return [
        Area(int(i), labels[i] if i < len(labels) else "", int(counts[i]) / seen)
        for i in order
        if counts[i]
    ]


def run_lengths(mask: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Return classes and lengths of the runs of equal pixels, in row-major order."""
    flat = mask.reshape(-1)
    starts = np.concatenate([[0], np.flatnonzero(flat[1:] != flat[:-1]) + 1])
    return flat[starts], np.diff(starts, append=flat.size)


def _classes(name: str, output: NDArray[np.generic]) -> NDArray[np.uint8]:
    if not np.isfinite(output).all() or output.min() < 0 or output.max() >= UNSEEN:
        raise TensorInvalid(
            f"output {name!r} holds other values than classes of 0 to {UNSEEN - 1}", output=name
        )
    return output.astype(np.uint8)


def _softmax(scores: NDArray[np.float32]) -> NDArray[np.float32]:
    rows = scores.reshape(len(scores), -1).T.astype(np.float64)
    if not np.isfinite(rows).all():
        raise TensorInvalid("the model's scores hold values that are not finite")
    mixed = activate(rows, bundle_pb2.ACTIVATION_SOFTMAX)
    return mixed.T.reshape(scores.shape).astype(np.float32)


@dataclass(frozen=True)
class Axis:
    """Where the pixels of one axis of the image lie among the cells of the output."""

    low: NDArray[np.int64]
    """The cell before."""
    high: NDArray[np.int64]
    """The cell after."""
    weight: NDArray[np.float32]
    """Of the cell after."""
    nearest: NDArray[np.int64]
    """The cell that the pixel's centre lies in."""
    seen: NDArray[np.bool_]
    """Whether the pixel lies in the tensor at all."""


def axis_of(pixels: int, scale: float, offset: float, size: int, cells: int) -> Axis:
    """Return where the pixels of one axis lie.

    Args:
        pixels: Of the image.
        scale: From the image to the tensor; negative when mirrored.
        offset: In pixels of the tensor.
        size: Of the tensor, in pixels.
        cells: Of the output, which covers the tensor.
    """
    at = (np.arange(pixels) + 0.5) * scale + offset
    place = at * (cells / size)
    seen = (at > 0) & (at < size)
    centre = np.clip(place - 0.5, 0, cells - 1)
    low = np.floor(centre).astype(np.int64)
    return Axis(
        low,
        np.minimum(low + 1, cells - 1),
        (centre - low).astype(np.float32),
        np.clip(np.floor(place), 0, cells - 1).astype(np.int64),
        seen,
    )


def _place(
    best: NDArray[np.uint8],
    scores: NDArray[np.float32] | None,
    geometry: Geometry,
    input_size: tuple[int, int],
) -> NDArray[np.uint8]:
    """Return the mask at the image's size; without scores by the nearest cell."""
    if geometry.transposed:
        # The tensor's x runs along the image's y.
        best = best.T
        scores = None if scores is None else scores.transpose(0, 2, 1)
        input_size = input_size[::-1]
        along = (geometry.scale_y, geometry.offset_y)
        down = (geometry.scale_x, geometry.offset_x)
    else:
        along = (geometry.scale_x, geometry.offset_x)
        down = (geometry.scale_y, geometry.offset_y)
    columns = axis_of(geometry.width, *along, input_size[0], best.shape[1])
    rows = axis_of(geometry.height, *down, input_size[1], best.shape[0])
    mask = np.empty((geometry.height, geometry.width), np.uint8)
    step = max(1, _STRIP_PIXELS // geometry.width)
    for top in range(0, geometry.height, step):
        part = slice(top, top + step)
        strip = mask[part]
        if scores is None:
            strip[:] = best[rows.nearest[part, None], columns.nearest]
        else:
            _interpolate(strip, best, scores, rows, columns, part)
        strip[~rows.seen[part]] = UNSEEN
    mask[:, ~columns.seen] = UNSEEN
    return mask


def _interpolate(
    strip: NDArray[np.uint8],
    best: NDArray[np.uint8],
    scores: NDArray[np.float32],
    rows: Axis,
    columns: Axis,
    part: slice,
) -> None:
    low, high = rows.low[part], rows.high[part]
    upper_left = best[low[:, None], columns.low]
    border = upper_left != best[low[:, None], columns.high]
    border |= upper_left != best[high[:, None], columns.low]
    border |= upper_left != best[high[:, None], columns.high]
    strip[:] = upper_left
    y, x = np.nonzero(border)
    if not len(y):
        return
    down, across = rows.weight[part][y], columns.weight[x]
    top_row, bottom_row = low[y], high[y]
    left, right = columns.low[x], columns.high[x]
    winner = np.zeros(len(y), np.uint8)
    winning = np.full(len(y), -np.inf, np.float32)
    for number, plane in enumerate(scores):
        over = plane[top_row, left] * (1 - across) + plane[top_row, right] * across
        under = plane[bottom_row, left] * (1 - across) + plane[bottom_row, right] * across
        value = over * (1 - down) + under * down
        better = value > winning
        winner[better] = number
        winning = np.where(better, value, winning)
    strip[y, x] = winner
