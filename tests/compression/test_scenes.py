"""Drawn scenes: exact, repeatable, and in the tensor where the geometry says."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pollard.bundle.v1 import bundle_pb2
from pollard.compress import augmentation, augmentation_truth
from pollard.compress.augmentation import Augment
from pollard.compress.data import load_data, load_part
from pollard.compress.errors import DataInvalid, UsageInvalid
from pollard.compress.shapes import NAMES, draw_scene, draw_single
from pollard.compress.sources import ShapesSource
from pollard.compress.spec import InputSpec
from pollard.compress.truth import NOTHING, Truth, boxes_in_tensor, mask_in_tensor
from pollard.runtime import transforms
from pollard.runtime.detection import boxes_to_image

SPEC = InputSpec(96, 96, 3, (0.5,) * 3, (0.25,) * 3, letterbox=True)


def test_boxes_are_those_of_the_mask_and_shapes_do_not_touch() -> None:
    seen = set()
    for seed in range(30):
        scene = draw_scene(seed)
        assert scene.pixels.shape == (*scene.mask.shape, 3)
        left = scene.mask.copy()
        for x1, y1, x2, y2, number in scene.boxes:
            inside = scene.mask[int(y1) : int(y2), int(x1) : int(x2)]
            own = inside == number + 1
            # Every edge of the box is touched, so no smaller one holds the shape.
            assert all(own.any(axis=axis)[end] for axis in (0, 1) for end in (0, -1))
            left[int(y1) : int(y2), int(x1) : int(x2)][own] = 0
            seen.add(NAMES[int(number)])
        assert not left.any()
    assert seen == set(NAMES)


def test_a_seed_is_a_scene() -> None:
    assert (draw_scene(3).pixels == draw_scene(3).pixels).all()
    assert draw_scene(3).pixels.shape != draw_scene(4).pixels.shape
    assert (draw_single("disc", 3) == draw_single("disc", 3)).all()


def test_single_shapes_are_as_many_as_asked_for() -> None:
    few = ShapesSource(50, seed=1)
    assert len(few.items) == 50
    plain = ShapesSource()
    assert (few.read(few.items[0]) != plain.read(plain.items[0])).any()


@pytest.mark.parametrize("task", ["detection", "segmentation"])
def test_data_of_boxes_and_masks_are_split_once_and_for_all(task) -> None:
    data = load_data("shapes:40:2", SPEC, task=task)
    assert [len(p) for p in (data.train, data.choose, data.held_out)] == [24, 6, 10]
    assert data.task == task
    assert "at random" in data.split
    again, classes, _ = load_part("shapes:40:2", SPEC, "held-out", task=task)
    assert (again.images == data.held_out.images).all()
    assert (again.labels == data.held_out.labels).all()
    assert classes == data.classes == (["background"] * (task == "segmentation") + list(NAMES))
    other = load_data("shapes:40:3", SPEC, task=task)
    assert other.digest != data.digest == load_data("shapes:40:2", SPEC, task=task).digest


@pytest.mark.parametrize("wrong", ["shapes:x", "shapes:1", "shapes:40:2:1", "digits", "/nowhere"])
def test_what_is_no_data_of_boxes_is_said(wrong) -> None:
    with pytest.raises(DataInvalid, match="shapes"):
        load_data(wrong, SPEC, task="detection")


STEPS = {
    "letterbox": [transforms.resize(96, 96, mode=bundle_pb2.RESIZE_MODE_LETTERBOX)],
    "turned": [transforms.rotate(1), transforms.resize(80, 64)],
    "mirrored crop": [transforms.flip(horizontal=True), transforms.center_crop(64, 64)],
}


@pytest.mark.parametrize("steps", STEPS.values(), ids=STEPS)
def test_boxes_and_masks_go_where_the_image_goes(steps) -> None:
    pipeline = transforms.Pipeline([transforms.decode(), *steps])
    scene = draw_scene(11)
    made = pipeline.apply_pixels(scene.pixels)
    height, width = made.array.shape[:2]
    truth = Truth(made.geometry, scene.boxes, scene.mask)
    boxes, mask = boxes_in_tensor(truth, width, height), mask_in_tensor(truth, width, height)
    assert len(boxes)
    # The mask of the transformed picture, by the same transformation without any mixture.
    painted = np.repeat(scene.mask[:, :, None] * 40, 3, axis=2)
    nearest = pipeline_of(steps).apply_pixels(painted).array[:, :, 0] // 40
    agree = (nearest == mask) | (mask == 255)
    assert agree.mean() > 0.97
    for x1, y1, x2, y2, number in boxes:
        inside = mask[int(y1) : int(np.ceil(y2)), int(x1) : int(np.ceil(x2))]
        assert (inside == number + 1).sum() > 0.2 * inside.size
    # And back: boxes that nothing was cut off of are where they were.
    back = boxes_to_image(boxes[:, :4].astype(np.float64), made.geometry)
    for one in back:
        assert any(np.abs(one - box[:4]).max() < 1e-3 for box in scene.boxes) or "crop" in str(
            steps
        )


def pipeline_of(steps) -> transforms.Pipeline:
    plain = []
    for step in steps:
        copy = bundle_pb2.PreprocessStep()
        copy.CopyFrom(step)
        if copy.HasField("resize"):
            copy.resize.interpolation = bundle_pb2.INTERPOLATION_NEAREST
        plain.append(copy)
    return transforms.Pipeline([transforms.decode(), *plain])


@pytest.mark.parametrize(
    "how",
    [Augment(flip=True), Augment(shift=0.2, flip=True), Augment(crop=0.5), Augment(shift=0.2)],
    ids=str,
)
def test_augmentation_moves_boxes_and_masks_with_the_pixels(how) -> None:
    boxes_of = load_data("shapes:40", SPEC, task="detection").train
    masks_of = load_data("shapes:40", SPEC, task="segmentation").train
    generator = np.random.default_rng(0)
    drawn = augmentation.draw(how, len(masks_of), SPEC, generator)
    # Pixels that say their class: what is done to them must be done to the mask.
    painted = np.repeat((masks_of.labels[..., None] % 255) * 30, 3, axis=3).astype(np.uint8)
    moved = augmentation.apply(torch.from_numpy(painted), drawn)[..., 0].numpy()
    masks = augmentation_truth.move(masks_of.labels, drawn, "segmentation", SPEC)
    known = masks != 255
    assert (np.abs(moved[known].astype(int) - masks[known] * 30) < 15).mean() > 0.97
    boxes = augmentation_truth.move(boxes_of.labels, drawn, "detection", SPEC)
    for mask, rows in zip(masks, boxes, strict=True):
        real = rows[rows[:, 4] != NOTHING]
        for x1, y1, x2, y2, number in real:
            own = np.argwhere(mask == number + 1)
            inside = (own >= (y1 - 1, x1 - 1)) & (own <= (y2 + 1, x2 + 1))
            assert inside.all(axis=1).any()
        # Whatever is left of a shape in good size has its box.
        for number in set(real[:, 4].astype(int)):
            own = np.argwhere(mask == number + 1)
            of_it = real[real[:, 4] == number]
            covered = [
                ((own >= (b[1] - 1, b[0] - 1)) & (own <= (b[3] + 1, b[2] + 1))).all(axis=1)
                for b in of_it
            ]
            assert np.any(covered, axis=0).mean() > 0.8


def test_what_boxes_cannot_follow_is_refused() -> None:
    with pytest.raises(UsageInvalid, match="mixup"):
        augmentation_truth.check(Augment(mixup=0.2), "segmentation")
    with pytest.raises(UsageInvalid, match="rotation"):
        augmentation_truth.check(Augment(rotation=10), "detection")
    augmentation_truth.check(Augment(rotation=10), "segmentation")
