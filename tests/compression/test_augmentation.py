from __future__ import annotations

import numpy as np
import pytest
import torch

from pollard.compress import augmentation
from pollard.compress.augmentation import Augment, parse
from pollard.compress.spec import InputSpec

SPEC = InputSpec(24, 32, 3, (0.0,) * 3, (1.0,) * 3)


def _images(count: int = 6) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 24, 32, 3)).astype(np.uint8)


def _change(config: Augment, images: np.ndarray, seed: int = 0) -> np.ndarray:
    drawn = augmentation.draw(config, len(images), SPEC, np.random.default_rng(seed))
    return augmentation.apply(torch.from_numpy(images), drawn).numpy()


def test_a_list_of_kinds_is_read() -> None:
    assert parse("none") == Augment()
    assert parse("flip, rotation=20,mixup") == Augment(flip=True, rotation=20, mixup=0.2)
    assert parse("color=0.3") == Augment(colour=0.3)


def test_flipping_mirrors_some_and_leaves_the_others() -> None:
    images = _images(40)
    changed = _change(Augment(flip=True), images)
    mirrored = [np.array_equal(b, a[:, ::-1]) for a, b in zip(images, changed, strict=True)]
    same = [np.array_equal(b, a) for a, b in zip(images, changed, strict=True)]
    assert 0 < sum(mirrored) < 40
    assert sum(mirrored) + sum(same) == 40


def test_a_turned_disc_stays_a_disc() -> None:
    """Where height and width differ, turning must not shear."""
    y, x = np.mgrid[:24, :32]
    disc = (np.hypot(y - 11.5, x - 15.5) < 8)[None, ..., None] * np.full(3, 200)
    images = np.repeat(disc.astype(np.uint8), 8, axis=0)
    changed = _change(Augment(rotation=90), images)
    difference = np.abs(changed.astype(int) - images.astype(int)).mean((1, 2, 3))
    # Edges alone differ: a sheared disc differs by tens.
    assert difference.max() < 6


def test_a_crop_enlarges_and_colour_keeps_grey_grey() -> None:
    flat = np.full((5, 24, 32, 3), 120, np.uint8)
    assert (_change(Augment(crop=0.5), flat) == 120).all()
    changed = _change(Augment(colour=0.4), flat)
    assert len({int(value) for value in changed[:, 0, 0, 0]}) > 1
    assert np.ptp(changed, axis=3).max() <= 1


def test_nothing_asked_for_changes_nothing() -> None:
    images = torch.from_numpy(_images())
    drawn = augmentation.draw(Augment(), len(images), SPEC, np.random.default_rng(0))
    assert augmentation.apply(images, drawn) is images


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_mixing_takes_as_much_of_the_pixels_as_of_the_label(kind: str) -> None:
    inputs = torch.zeros(4, 3, 24, 32)
    partners = torch.ones(4, 3, 24, 32)
    config = Augment(**{kind: 1.0})
    for seed in range(5):
        drawn = augmentation.draw(config, 4, SPEC, np.random.default_rng(seed))
        assert drawn.partner is not None
        mixed = augmentation.mix(inputs, partners, drawn)
        assert float(mixed.mean()) == pytest.approx(1 - drawn.share, abs=1e-5)


def test_a_share_of_a_batch_gets_what_the_whole_batch_would_give_it() -> None:
    images = _images()
    config = Augment(shift=0.1, flip=True, rotation=10, crop=0.3, colour=0.2)
    drawn = augmentation.draw(config, 6, SPEC, np.random.default_rng(1))
    whole = augmentation.apply(torch.from_numpy(images), drawn)
    half = augmentation.apply(torch.from_numpy(images[3:]), drawn.part(slice(3, 6)))
    assert (half == whole[3:]).all()
