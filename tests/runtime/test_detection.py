"""Boxes: the right ones, in the right place of the image that was sent."""

import numpy as np
import pytest

from pollard.bundle.v1 import bundle_pb2
from pollard.runtime.detection import boxes_to_image, detect, suppress
from pollard.runtime.errors import ManifestInvalid, TensorInvalid
from pollard.runtime.transforms import (
    Geometry,
    Pipeline,
    center_crop,
    decode,
    flip,
    pad,
    resize,
    rotate,
)


def manifest(**detection) -> bundle_pb2.Manifest:
    settings = {"boxes_output": "boxes", "scores_output": "scores", **detection}
    result = bundle_pb2.Manifest(task=bundle_pb2.TASK_DETECTION)
    result.postprocess.detection.CopyFrom(bundle_pb2.Detection(**settings))
    return result


def outputs(boxes, scores, **others) -> dict[str, np.ndarray]:
    made = {"boxes": boxes, "scores": scores, **others}
    return {name: np.array(value, np.float32) for name, value in made.items()}


PLAIN = Geometry(100, 80)


def iou(a, b) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    both = max(width, 0) * max(height, 0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both
    return both / union if union else 0.0


def test_boxes_come_by_falling_score_with_their_labels() -> None:
    found = detect(
        outputs([[[0, 0, 10, 10], [20, 20, 40, 30]]], [[[0.1, 0.6], [0.9, 0.2]]]),
        manifest(score_threshold=0.5),
        [PLAIN],
        ["cat", "dog"],
    )
    assert [(box.class_index, box.label) for box in found] == [(0, "cat"), (1, "dog")]
    assert [box.score for box in found] == pytest.approx([0.9, 0.6])
    assert found[0][3:] == (20, 20, 40, 30)


def test_a_box_may_be_of_two_classes() -> None:
    found = detect(
        outputs([[[0, 0, 10, 10]]], [[[0.8, 0.7]]]), manifest(iou_threshold=0.5), [PLAIN]
    )
    assert [box.class_index for box in found] == [0, 1]


def test_the_requests_threshold_replaces_the_manifests() -> None:
    given = outputs([[[0, 0, 10, 10], [20, 20, 40, 30]]], [[[0.3], [0.9]]])
    assert len(detect(given, manifest(score_threshold=0.5), [PLAIN])) == 1
    assert len(detect(given, manifest(score_threshold=0.5), [PLAIN], score_threshold=0.0)) == 2


def test_sigmoid_and_softmax_make_scores() -> None:
    given = outputs([[[0, 0, 10, 10]]], [[[0.0, 2.0]]])
    sigmoid = detect(given, manifest(activation=bundle_pb2.ACTIVATION_SIGMOID), [PLAIN])
    assert sigmoid[0].score == pytest.approx(1 / (1 + np.exp(-2)))
    softmax = detect(given, manifest(activation=bundle_pb2.ACTIVATION_SOFTMAX), [PLAIN])
    assert softmax[0].score == pytest.approx(np.exp(2) / (1 + np.exp(2)))


def test_graphs_that_choose_the_boxes_themselves_fill_up_with_nothing() -> None:
    found = detect(
        outputs(
            [[[1, 2, 3, 4], [0, 0, 0, 0], [5, 5, 9, 9]]],
            [[0.9, 0.0, 0.8]],
            labels=[[3, 0, -1]],
        ),
        manifest(labels_output="labels"),
        [PLAIN],
    )
    assert [(box.class_index, box[3:]) for box in found] == [(3, (1, 2, 3, 4))]


def test_at_most_so_many_boxes_as_the_manifest_says() -> None:
    generator = np.random.default_rng(0)
    corners = generator.uniform(0, 40, (1, 300, 2))
    boxes = np.concatenate([corners, corners + 5], axis=2)
    scores = generator.uniform(0, 1, (1, 300, 1))
    assert len(detect(outputs(boxes, scores), manifest(max_detections=7), [PLAIN])) == 7
    found = detect(outputs(boxes, scores), manifest(), [PLAIN])
    assert len(found) == 100
    best = sorted(scores.reshape(-1), reverse=True)[:100]
    assert [box.score for box in found] == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_suppression_is_the_greedy_one(seed) -> None:
    generator = np.random.default_rng(seed)
    corners = generator.uniform(0, 50, (120, 2))
    boxes = np.concatenate([corners, corners + generator.uniform(0, 30, (120, 2))], axis=1)
    boxes[7, 2:] = boxes[7, :2]  # without any area
    scores, classes = generator.uniform(0, 1, 120), generator.integers(0, 3, 120)
    kept: list[int] = []
    for index in np.argsort(-scores):
        rivals = [other for other in kept if classes[other] == classes[index]]
        if all(iou(boxes[index], boxes[other]) <= 0.4 for other in rivals):
            kept.append(int(index))
    assert suppress(boxes, scores, classes, 0.4).tolist() == kept


def test_nothing_found_is_an_empty_answer() -> None:
    given = outputs(np.zeros((1, 0, 4)), np.zeros((1, 0, 3)))
    assert detect(given, manifest(iou_threshold=0.5), [PLAIN]) == []
    assert detect(outputs([[[0, 0, 1, 1]]], [[[0.1]]]), manifest(score_threshold=1), [PLAIN]) == []


STEPS = {
    "letterbox": [resize(64, 48, mode=bundle_pb2.RESIZE_MODE_LETTERBOX)],
    "short side and crop": [
        resize(0, 60, mode=bundle_pb2.RESIZE_MODE_SHORT_SIDE),
        center_crop(48, 40),
    ],
    "mirrored and turned": [resize(50, 70), flip(horizontal=True), rotate(1), flip(vertical=True)],
    "padded and turned thrice": [pad(3, 4, 5, 6), rotate(3)],
}


@pytest.mark.parametrize("name", STEPS)
def test_boxes_are_found_where_the_image_has_them(name) -> None:
    """A white rectangle is looked for in the tensor; its box must come back in the image."""
    pixels = np.zeros((120, 160, 3), np.uint8)
    pixels[40:80, 60:110] = 255
    transformed = Pipeline([decode(), *STEPS[name]]).apply_pixels(pixels)
    rows, columns = np.nonzero(transformed.array[:, :, 0] > 127)
    box = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    found = detect(outputs([[box]], [[[1.0]]]), manifest(), [transformed.geometry])
    assert found[0][3:] == pytest.approx((60, 40, 110, 80), abs=2.5)


def test_boxes_are_cut_off_at_the_edges_and_left_out_beyond() -> None:
    # A letterbox of 100 × 100 around an image of 200 × 100: 25 empty rows above and below.
    geometry = Geometry(200, 100, 0.5, 0.5, 0.0, 25.0)
    found = detect(
        outputs([[[-5, 20, 50, 50], [0, 2, 90, 24]]], [[[0.9], [0.8]]]), manifest(), [geometry]
    )
    assert [box[3:] for box in found] == [(0, 0, 100, 50)]


def test_views_are_put_together() -> None:
    mirrored = Geometry(100, 80, -1.0, 1.0, 100.0, 0.0)
    found = detect(
        outputs([[[10, 10, 30, 30]], [[71, 10, 91, 30]]], [[[0.8]], [[0.9]]]),
        manifest(),
        [PLAIN, mirrored],
    )
    assert [(box.score, box[3:]) for box in found] == [(pytest.approx(0.9), (9, 10, 29, 30))]


def test_mirrored_axes_exchange_the_edges() -> None:
    box = boxes_to_image(np.array([[1.0, 2.0, 3.0, 4.0]]), Geometry(10, 10, -1, 1, 10, 0))
    assert box.tolist() == [[7, 2, 9, 4]]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (outputs([[0, 0, 1, 1]], [[[1.0]]]), r"'boxes' has shape \[1, 4\]"),
        (outputs([[[0, 0, 1]]], [[[1.0]]]), r"'boxes' has shape \[1, 1, 3\]"),
        (outputs([[[0, 0, 1, 1]]], [[[1.0], [1.0]]]), r"'scores' has shape \[1, 2, 1\]"),
        (outputs([[[0, 0, 1, 1]]], [[1.0]]), r"'scores' has shape \[1, 1\]"),
        (outputs([[[0, 0, 1, np.nan]]], [[[1.0]]]), "not finite"),
        (outputs([[[0, 0, 1, 1]]], [[[np.inf]]]), "not finite"),
        ({"boxes": np.zeros((1, 1, 4), np.float32)}, "no output 'scores'; it gave boxes"),
    ],
)
def test_outputs_that_the_manifest_does_not_describe_are_named(given, words) -> None:
    with pytest.raises(TensorInvalid, match=words):
        detect(given, manifest(), [PLAIN])


def test_another_task_is_refused() -> None:
    with pytest.raises(ManifestInvalid, match="does not describe a detection"):
        detect({}, bundle_pb2.Manifest(), [PLAIN])
