"""Discs, squares, triangles, crosses and rings, drawn with chance: data where there are none.

Single shapes are there to be told apart; scenes of several to be found, with a box for each and
a class for each pixel. Both are known exactly, because they are what was drawn.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

NAMES = ("cross", "disc", "ring", "square", "triangle")

SINGLE_SIDE = 32

# Pixels of a scene's sides, and of the radius of what is in it.
_SIDES = (96, 144)
_RADII = (11.0, 24.0)
_MOST = 5

_TRIES = 12
"""Places that are tried for a shape before it is left out."""

_GAP = 2
"""Pixels between two shapes, at least."""

_CONTRAST = 90.0
_NOISE = 10.0
"""Standard deviation."""


@dataclass(frozen=True)
class Scene:
    """Several shapes that do not touch each other."""

    pixels: NDArray[np.uint8]
    """[height, width, 3]."""
    boxes: NDArray[np.float64]
    """[shapes, 5]: left, upper, right and lower edge in pixels, and the index in `NAMES`."""
    mask: NDArray[np.uint8]
    """[height, width]: 0 for the ground, else 1 + the index in `NAMES`."""


def inside(
    name: str, x: NDArray[np.float64], y: NDArray[np.float64], radius: float, angle: float
) -> NDArray[np.bool_]:
    """Return which points, given from the middle of a shape, lie inside of it."""
    u, v = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    distance = np.hypot(x, y)
    found: NDArray[np.bool_]
    if name == "disc":
        found = distance < radius
    elif name == "ring":
        found = (distance < radius) & (distance > 0.55 * radius)
    elif name == "square":
        found = np.maximum(abs(u), abs(v)) < 0.8 * radius
    elif name == "cross":
        arms = np.minimum(abs(u), abs(v)) < 0.25 * radius
        found = arms & (np.maximum(abs(u), abs(v)) < radius)
    else:
        found = (v > -0.5 * radius) & (v < radius - 1.732 * abs(u))
    return found


def draw_single(name: str, seed: int) -> NDArray[np.uint8]:
    """Return one shape in the middle of a picture, uint8 [32, 32, 3]."""
    generator = np.random.default_rng(seed)
    size = SINGLE_SIDE
    middle = generator.uniform(12, 20, 2)
    radius = generator.uniform(6, 11)
    angle = generator.uniform(0, 2 * np.pi)
    y, x = np.mgrid[:size, :size] + 0.5
    within = inside(name, x - middle[1], y - middle[0], radius, angle)
    ground, ink = generator.uniform(0, 255, (2, 3))
    # Far enough from each other to be seen.
    ink = np.where(abs(ink - ground).max() < 90, (ground + 128) % 256, ink)
    picture = np.where(within[..., None], ink, ground) + generator.normal(0, 12, (size, size, 3))
    pixels: NDArray[np.uint8] = np.clip(picture, 0, 255).astype(np.uint8)
    return pixels


def draw_scene(seed: int) -> Scene:
    """Return a scene of one to five shapes on uneven ground; the same for the same seed."""
    generator = np.random.default_rng([seed, len(NAMES)])
    height, width = (int(side) for side in generator.integers(_SIDES[0], _SIDES[1] + 1, 2))
    corners = generator.uniform(0, 255, (2, 3))
    # The ground changes little enough for a colour to be found that differs from all of it.
    ends = corners[0], corners[0] + 0.3 * (corners[1] - corners[0])
    slope = generator.uniform(-1, 1, 2)
    along = np.add.outer(np.linspace(0, slope[0], height), np.linspace(0, slope[1], width))
    along = (along - along.min()) / max(float(np.ptp(along)), 1e-9)
    change = (ends[1] - ends[0]).astype(np.float32)
    picture = along.astype(np.float32)[..., None] * change
    picture += ends[0].astype(np.float32)
    mask = np.zeros((height, width), np.uint8)
    boxes = []
    for _ in range(int(generator.integers(1, _MOST + 1))):
        number = int(generator.integers(len(NAMES)))
        ink = _ink(ends, generator)
        place = _place(NAMES[number], mask, generator)
        if place is None:
            continue
        rows, columns = place
        picture[rows, columns] = ink
        mask[rows, columns] = number + 1
        boxes.append((columns.min(), rows.min(), columns.max() + 1, rows.max() + 1, number))
    picture += np.float32(_NOISE) * generator.standard_normal(picture.shape, np.float32)
    return Scene(
        np.clip(picture, 0, 255, out=picture).astype(np.uint8),
        np.array(boxes, np.float64).reshape(-1, 5),
        mask,
    )


def _ink(
    ends: tuple[NDArray[np.float64], NDArray[np.float64]], generator: np.random.Generator
) -> NDArray[np.float64]:
    while True:
        ink = generator.uniform(0, 255, 3)
        if min(abs(ink - end).max() for end in ends) > _CONTRAST:
            return ink


def _place(
    name: str, mask: NDArray[np.uint8], generator: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.int64]] | None:
    """Return rows and columns of a shape where there is room for one; None where there is none."""
    height, width = mask.shape
    for _ in range(_TRIES):
        radius = float(generator.uniform(*_RADII))
        angle = float(generator.uniform(0, 2 * np.pi))
        # At least half of it lies within the picture: what is left can be told apart.
        middle_x = float(generator.uniform(0.5 * radius, width - 0.5 * radius))
        middle_y = float(generator.uniform(0.5 * radius, height - 0.5 * radius))
        # A triangle's corners are at most as far away as its radius, a square's farther.
        reach = 1.15 * radius + _GAP
        left, right = max(0, int(middle_x - reach)), min(width, int(middle_x + reach) + 1)
        top, bottom = max(0, int(middle_y - reach)), min(height, int(middle_y + reach) + 1)
        if mask[top:bottom, left:right].any():
            continue
        y, x = np.mgrid[top:bottom, left:right] + 0.5
        rows, columns = np.nonzero(inside(name, x - middle_x, y - middle_y, radius, angle))
        if len(rows):
            return rows + top, columns + left
    return None
