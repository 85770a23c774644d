"""Saliency maps: high where the answer comes from, in the place of the image."""

import numpy as np
import pytest

from pollard.bundle.v1 import bundle_pb2
from pollard.runtime.saliency import (
    Saliency,
    cover,
    fitted,
    map_to_image,
    overlay,
    random_masks,
)
from pollard.runtime.transforms import (
    Geometry,
    Pipeline,
    center_crop,
    decode,
    flip,
    resize,
    rotate,
)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize("size", [(1, 1), (5, 9), (32, 32), (224, 160)])
def test_masks_cover_half_on_the_whole(size) -> None:
    masks = random_masks(300, *size, rng())
    assert masks.shape == (300, *size)
    assert masks.min() >= 0
    assert masks.max() <= 1
    # Every place is shown about as often as covered.
    assert masks.mean(axis=0) == pytest.approx(np.full(size, 0.5), abs=0.15)


def test_the_same_seed_gives_the_same_masks() -> None:
    assert (random_masks(3, 16, 16, rng(4)) == random_masks(3, 16, 16, rng(4))).all()
    assert (random_masks(3, 16, 16, rng(4)) != random_masks(3, 16, 16, rng(5))).any()


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
@pytest.mark.parametrize("channels_first", [False, True])
def test_what_is_covered_takes_the_mean_colour(dtype, channels_first) -> None:
    image = rng(1).integers(0, 256, (6, 8, 3)).astype(dtype)
    masks = np.zeros((2, 6, 8), np.float32)
    masks[1, :, :4] = 1
    tensor = image.transpose(2, 0, 1) if channels_first else image
    copies = cover(tensor, masks, channels_first=channels_first)
    assert copies.dtype == dtype
    if channels_first:
        copies = copies.transpose(0, 2, 3, 1)
    mean = image.astype(np.float64).mean(axis=(0, 1))
    assert copies[0] == pytest.approx(np.broadcast_to(mean, (6, 8, 3)), abs=0.51)
    assert (copies[1, :, :4] == image[:, :4]).all()
    assert copies[1, :, 4:] == pytest.approx(np.broadcast_to(mean, (6, 4, 3)), abs=0.51)


def explained(score, size=(40, 60), count=400) -> np.ndarray:
    saliency = Saliency(*size)
    for begin in range(0, count, 50):
        masks = random_masks(50, *size, rng(begin))
        saliency.add(masks, np.array([score(mask) for mask in masks]))
    return saliency.values()


def test_the_map_is_high_where_the_score_comes_from() -> None:
    values = explained(lambda mask: float(mask[5:15, 40:52].mean()))
    assert values.min() == 0
    assert values.max() == 1
    row, column = np.unravel_index(values.argmax(), values.shape)
    assert 3 <= row <= 17
    assert 38 <= column <= 54
    assert values[5:15, 40:52].mean() > 0.75
    assert values[25:, :30].mean() < 0.4


def test_a_constant_score_explains_nothing() -> None:
    assert not explained(lambda mask: 0.7, count=100).any()
    assert not Saliency(4, 4).values().any()


STEPS = {
    "plain": [resize(48, 32)],
    "letterbox": [resize(64, 64, mode=bundle_pb2.RESIZE_MODE_LETTERBOX)],
    "turned and mirrored": [resize(50, 70), flip(horizontal=True), rotate(1)],
}


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("longest_side", [80, 1000])
@pytest.mark.parametrize("smooth", [False, True])
def test_the_map_lies_over_the_upright_image(name, longest_side, smooth) -> None:
    pixels = np.zeros((120, 160, 3), np.uint8)
    pixels[30:60, 100:150] = 255
    transformed = Pipeline([decode(), *STEPS[name]]).apply_pixels(pixels)
    values = (transformed.array[:, :, 0] / np.float32(255)).astype(np.float32)
    placed = map_to_image(values, transformed.geometry, longest_side, smooth=smooth)
    assert placed.shape == ((60, 80) if longest_side == 80 else (120, 160))
    step = 160 // placed.shape[1]
    expected = pixels[::step, ::step, 0] / 255
    assert np.abs(placed - expected).mean() < 0.03


def test_what_a_crop_left_out_is_zero() -> None:
    pixels = np.zeros((40, 100, 3), np.uint8)
    transformed = Pipeline([decode(), center_crop(40, 40)]).apply_pixels(pixels)
    placed = map_to_image(np.ones((40, 40), np.float32), transformed.geometry, 200)
    assert (placed[:, 30:70] == 1).all()
    assert not np.delete(placed, np.s_[30:70], axis=1).any()


def test_a_map_for_a_picture_has_no_steps_where_its_own_values_have() -> None:
    values = np.array([[0, 1], [0, 1]], np.float32)
    whole = Geometry(100, 100, 0.02, 0.02)
    assert set(map_to_image(values, whole, 100).ravel()) == {0.0, 1.0}
    row = map_to_image(values, whole, 100, smooth=True)[50]
    assert np.diff(row).max() <= 0.021
    assert (row[0], row[-1]) == (0, 1)


def test_the_longest_side_is_kept_to() -> None:
    assert fitted(Geometry(4000, 10), 200) == (200, 1)
    assert fitted(Geometry(100, 50), 200) == (100, 50)


def test_the_overlay_tells_high_from_low() -> None:
    image = np.full((2, 2, 3), 128, np.uint8)
    painted = overlay(image, np.array([[0, 1], [0.5, 2]], np.float32)).astype(int)
    assert painted[0, 1, 0] > painted[0, 0, 0] + 100
    assert (painted[0, 1] == painted[1, 1]).all()
