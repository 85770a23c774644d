"""Average precision: as COCO's own tool counts it, and by hand where that is easy."""

from __future__ import annotations

import contextlib
import io

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from pollard.compress.average_precision import THRESHOLDS, match, pairs

CLASSES = 3


def scenes(seed: int, images: int = 30):
    """Return boxes found and objects: most near each other, some of another class, some alone."""
    generator = np.random.default_rng(seed)
    found, objects = [], []
    for _ in range(images):
        count = int(generator.integers(0, 6))
        corner = generator.uniform(0, 80, (count, 2))
        size = generator.uniform(5, 40, (count, 2))
        label = generator.integers(0, CLASSES, (count, 1))
        objects.append(np.hstack([corner, corner + size, label]).astype(np.float64))
        near = np.repeat(objects[-1], int(generator.integers(1, 4)), axis=0)
        boxes = near[:, :4] + generator.normal(0, 4, near[:, :4].shape)
        boxes[:, 2:] = np.maximum(boxes[:, 2:], boxes[:, :2] + 1)
        wrong = generator.random(len(near)) < 0.2
        labels = np.where(wrong, generator.integers(0, CLASSES, len(near)), near[:, 4])
        # Few different scores, so that some are equal.
        scores = generator.integers(1, 20, len(near)) / 20
        found.append(np.column_stack([boxes, labels, scores]))
    return found, objects


def by_coco(found, objects) -> np.ndarray:
    """Return the average precision [classes, thresholds] of pycocotools."""

    def rows(boxes):
        return [float(boxes[0]), float(boxes[1]), float(boxes[2] - boxes[0]),
                float(boxes[3] - boxes[1])]  # fmt: skip

    truth = {
        "info": {},
        "images": [{"id": i} for i in range(len(objects))],
        "categories": [{"id": c} for c in range(CLASSES)],
        "annotations": [
            {"image_id": i, "category_id": int(o[4]), "bbox": rows(o), "iscrowd": 0,
             "area": float((o[2] - o[0]) * (o[3] - o[1]))}
            for i, each in enumerate(objects)
            for o in each
        ],
    }  # fmt: skip
    for number, annotation in enumerate(truth["annotations"], 1):
        annotation["id"] = number
    told = [
        {"image_id": i, "category_id": int(b[4]), "bbox": rows(b), "score": float(b[5])}
        for i, each in enumerate(found)
        for b in each
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = truth
        coco.createIndex()
        run = COCOeval(coco, coco.loadRes(told), "bbox")
        run.evaluate()
        run.accumulate()
    return run.eval["precision"][:, :, :, 0, -1].mean(axis=1).T


@pytest.mark.parametrize("seed", range(3))
def test_it_is_what_cocos_own_tool_says(seed: int) -> None:
    found, objects = scenes(seed)
    np.testing.assert_allclose(
        match(found, objects, CLASSES).precisions(), by_coco(found, objects), atol=1e-12
    )


def test_by_hand() -> None:
    objects = [np.array([[0, 0, 10, 10, 0], [20, 20, 30, 30, 0]], float), np.zeros((0, 5))]
    # Right, a duplicate of it, and one in an image where there is nothing.
    found = [
        np.array([[0, 0, 10, 10, 0, 0.9], [0, 0, 10, 8, 0, 0.5]], float),
        np.array([[0, 0, 5, 5, 0, 0.7]], float),
    ]
    precision = match(found, objects, 1).precisions()
    # One of two objects, always first: the precision is 1 up to a recall of 0.5.
    np.testing.assert_allclose(precision, np.full((1, len(THRESHOLDS)), 51 / 101))
    # Counted twice, the image with the false box changes nothing before it.
    np.testing.assert_allclose(match(found, objects, 1).precisions(np.array([1, 2])), precision)


def test_images_that_count_twice_are_images_that_are_there_twice() -> None:
    found, objects = scenes(7, images=8)
    weights = np.array([2, 0, 1, 3, 1, 0, 0, 1])
    copies = np.repeat(np.arange(8), weights)
    weighted = match(found, objects, CLASSES).precisions(weights)
    copied = match([found[i] for i in copies], [objects[i] for i in copies], CLASSES).precisions()
    # Equal scores of copies lie side by side in one and apart in the other.
    np.testing.assert_allclose(weighted, copied, atol=0.02)


def test_classes_without_objects_say_nothing_and_nothing_found_is_zero() -> None:
    objects = [np.array([[0, 0, 10, 10, 1]], float)]
    precision = match([np.zeros((0, 6))], objects, 2).precisions()
    assert np.isnan(precision[0]).all()
    assert (precision[1] == 0).all()


def test_boxes_and_objects_are_paired_whatever_their_classes() -> None:
    boxes = np.array([[0, 0, 10, 10, 0, 1], [0, 0, 10, 9, 1, 1], [50, 50, 60, 60, 0, 1]], float)
    objects = np.array([[0, 0, 10, 9, 0], [80, 80, 90, 90, 0]], float)
    assert pairs(boxes, objects) == [(1, 0)]
