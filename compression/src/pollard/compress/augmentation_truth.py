"""What augmentation of images does to their boxes and masks."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from pollard.compress.augmentation import Augment, Drawn, move_pixels
from pollard.compress.errors import UsageInvalid
from pollard.compress.spec import InputSpec
from pollard.compress.truth import NOTHING, TaskName
from pollard.runtime.segmentation import UNSEEN

# A box of which less is left in the picture is none.
_LEAST_SHARE = 0.25


def check(config: Augment, task: TaskName) -> None:
    """Refuse what makes a truth that cannot be told.

    Raises:
        UsageInvalid: images are blended, or turned where boxes would have to be turned, too.
    """
    if task == "classification":
        return
    if config.mixes:
        raise UsageInvalid(f"augmentation mixup and cutmix blend classes; {task} has none to blend")
    if task == "detection" and config.rotation:
        raise UsageInvalid(
            "augmentation rotation has no boxes: what encloses a turned box encloses too much"
        )


def move(labels: NDArray[Any], drawn: Drawn, task: TaskName, spec: InputSpec) -> NDArray[Any]:
    """Return the truth of images after :func:`pollard.compress.augmentation.apply`.

    Args:
        labels: As :class:`pollard.compress.data.Part` has them.
        drawn: Chance for these images.
        task: What they are.
        spec: Size of the images.
    """
    if task == "detection":
        return _boxes(labels, drawn, spec)
    if task == "segmentation":
        return _masks(labels, drawn, spec)
    return labels


def _boxes(labels: NDArray[np.float32], drawn: Drawn, spec: InputSpec) -> NDArray[np.float32]:
    boxes = labels.copy()
    real = boxes[:, :, 4] != NOTHING
    x, y = boxes[:, :, [0, 2]], boxes[:, :, [1, 3]]
    if drawn.rows is not None and drawn.columns is not None:
        y -= (drawn.rows - drawn.reach[0])[:, None, None].astype(np.float32)
        x -= (drawn.columns - drawn.reach[1])[:, None, None].astype(np.float32)
    if drawn.mirrored is not None:
        x[drawn.mirrored] = spec.width - x[drawn.mirrored][:, :, ::-1]
    if drawn.matrices is not None:
        for edges, side, axis in ((x, spec.width, 0), (y, spec.height, 1)):
            scale, offset = drawn.matrices[:, axis, axis], drawn.matrices[:, axis, 2]
            at = (edges * (2 / side) - 1 - offset[:, None, None]) / scale[:, None, None]
            edges[:] = (at + 1) * (side / 2)
    whole = np.ptp(x, axis=2) * np.ptp(y, axis=2)
    x, y = np.clip(x, 0, spec.width), np.clip(y, 0, spec.height)
    left = np.ptp(x, axis=2) * np.ptp(y, axis=2)
    kept = real & (left > 0) & (left >= _LEAST_SHARE * whole)
    made = np.concatenate(
        [x[:, :, :1], y[:, :, :1], x[:, :, 1:], y[:, :, 1:], boxes[:, :, 4:]], axis=2
    )
    made[~kept] = (0, 0, 0, 0, NOTHING)
    return made.astype(np.float32)


def _masks(labels: NDArray[np.uint8], drawn: Drawn, spec: InputSpec) -> NDArray[np.uint8]:
    del spec
    masks = move_pixels(torch.from_numpy(labels)[..., None], drawn, fill=UNSEEN)[..., 0]
    if drawn.matrices is None:
        plain: NDArray[np.uint8] = masks.numpy()
        return plain
    # Outside of the image the sampler gives 0.
    values = masks[:, None].float() - UNSEEN
    grid = functional.affine_grid(
        torch.from_numpy(drawn.matrices), list(values.shape), align_corners=False
    )
    moved = functional.grid_sample(values, grid, mode="nearest", align_corners=False)
    made: NDArray[np.uint8] = (moved[:, 0] + UNSEEN).round().to(torch.uint8).numpy()
    return made
