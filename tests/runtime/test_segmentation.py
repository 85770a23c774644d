"""Masks: at the size of the image that was sent, and as exact as plain interpolation."""

import numpy as np
import pytest
import torch

from pollard.bundle.v1 import bundle_pb2
from pollard.runtime.errors import ManifestInvalid, TensorInvalid
from pollard.runtime.segmentation import UNSEEN, areas, run_lengths, segment
from pollard.runtime.transforms import (
    Geometry,
    Pipeline,
    center_crop,
    decode,
    flip,
    resize,
    rotate,
)


def manifest(output: str = "mask") -> bundle_pb2.Manifest:
    result = bundle_pb2.Manifest(task=bundle_pb2.TASK_SEGMENTATION)
    result.postprocess.segmentation.output = output
    return result


def blobs(classes: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    """Scores with areas, not noise: that is where borders are few."""
    noise = torch.randn(1, classes, 4, 5, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(noise, (height, width), mode="bicubic").numpy()


@pytest.mark.parametrize("size", [(90, 130), (33, 47), (11, 9)])
def test_scores_are_interpolated_as_frameworks_do(size) -> None:
    scores = blobs(5, 24, 32)
    geometry = Geometry(size[1], size[0], 64 / size[1], 48 / size[0])
    mask = segment({"mask": scores}, manifest(), geometry, (64, 48))
    whole = torch.nn.functional.interpolate(
        torch.from_numpy(scores), size, mode="bilinear", align_corners=False
    )
    expected = whole.argmax(dim=1)[0].numpy()
    best_two = whole.topk(2, dim=1).values[0]
    clear = (best_two[0] - best_two[1]).numpy() > 1e-5
    assert mask.shape == size
    assert (mask == expected)[clear].all()
    assert clear.mean() > 0.99


def test_noise_is_interpolated_too() -> None:
    scores = np.random.default_rng(1).normal(size=(1, 3, 8, 8)).astype(np.float32)
    mask = segment({"mask": scores}, manifest(), Geometry(40, 40, 0.2, 0.2), (8, 8))
    whole = torch.nn.functional.interpolate(torch.from_numpy(scores), (40, 40), mode="bilinear")
    assert (mask == whole.argmax(dim=1)[0].numpy()).mean() > 0.995


STEPS = {
    "letterbox": [resize(64, 48, mode=bundle_pb2.RESIZE_MODE_LETTERBOX)],
    "mirrored and turned": [resize(50, 70), flip(horizontal=True), rotate(1)],
    "turned thrice": [resize(40, 64), rotate(3), flip(vertical=True)],
}


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("as_classes", [False, True])
def test_the_mask_lies_over_the_image(name, as_classes) -> None:
    """Colours stand for classes: the mask must show them where the image has them."""
    pixels = np.zeros((120, 160, 3), np.uint8)
    pixels[:, :, 0] = 255
    pixels[30:70, 20:90] = (0, 255, 0)
    pixels[60:110, 100:150] = (0, 0, 255)
    expected = pixels.argmax(axis=2)
    transformed = Pipeline([decode(), *STEPS[name]]).apply_pixels(pixels)
    array = transformed.array
    scores = array.transpose(2, 0, 1)[None].astype(np.float32)
    output = scores.argmax(axis=1).astype(np.int64) if as_classes else scores
    size = (array.shape[1], array.shape[0])
    mask = segment({"mask": output}, manifest(), transformed.geometry, size)
    assert mask.shape == (120, 160)
    assert UNSEEN not in mask
    assert (mask == expected).mean() > 0.96


def test_what_a_crop_left_out_is_not_guessed() -> None:
    pixels = np.zeros((40, 100, 3), np.uint8)
    transformed = Pipeline([decode(), center_crop(40, 40)]).apply_pixels(pixels)
    mask = segment(
        {"mask": np.ones((1, 40, 40), np.int64)}, manifest(), transformed.geometry, (40, 40)
    )
    assert (mask[:, 30:70] == 1).all()
    assert (np.delete(mask, np.s_[30:70], axis=1) == UNSEEN).all()
    assert [(area.class_index, area.share) for area in areas(mask)] == [(1, 1.0)]


def test_a_mirrored_view_is_averaged() -> None:
    scores = blobs(3, 16, 16)
    both = np.concatenate([scores, scores[:, :, :, ::-1]])
    geometry = Geometry(16, 16)
    once = segment({"mask": scores}, manifest(), geometry, (16, 16))
    assert (segment({"mask": both}, manifest(), geometry, (16, 16), mirrored=True) == once).all()
    sure = np.zeros((2, 2, 4, 4), np.float32)
    sure[0, 0], sure[1, 1] = 1.0, 9.0
    averaged = segment({"mask": sure}, manifest(), Geometry(4, 4), (4, 4), mirrored=True)
    assert (averaged == 1).all()


def test_areas_are_shares_with_labels() -> None:
    mask = np.array([[0, 2, 2], [2, UNSEEN, UNSEEN]], np.uint8)
    found = areas(mask, ["sky", "sea", "sand"])
    assert [(area.class_index, area.label, area.share) for area in found] == [
        (2, "sand", 0.75),
        (0, "sky", 0.25),
    ]


@pytest.mark.parametrize("mask", [[[1]], [[0, 0], [0, 3]], [[1, 2], [1, 1]], [[UNSEEN] * 3] * 2])
def test_run_lengths_give_the_mask_back(mask) -> None:
    array = np.array(mask, np.uint8)
    classes, lengths = run_lengths(array)
    assert np.repeat(classes, lengths).reshape(array.shape).tolist() == mask
    assert (classes[1:] != classes[:-1]).all()


@pytest.mark.parametrize(
    ("output", "words"),
    [
        (np.zeros((1, 4)), r"shape \[1, 4\]"),
        (np.zeros((2, 3, 4, 4)), r"shape \[2, 3, 4, 4\]"),
        (np.zeros((1, 0, 4, 4)), r"shape \[1, 0, 4, 4\]"),
        (np.full((1, 2, 4, 4), np.nan), "not finite"),
        (np.zeros((1, 256, 2, 2)), "256 classes"),
        (np.full((1, 4, 4), 255), "0 to 254"),
        (np.full((1, 4, 4), -1), "0 to 254"),
    ],
)
def test_outputs_that_the_manifest_does_not_describe_are_named(output, words) -> None:
    with pytest.raises(TensorInvalid, match=words):
        segment({"mask": output}, manifest(), Geometry(8, 8), (4, 4))


def test_classes_cannot_be_averaged() -> None:
    with pytest.raises(TensorInvalid, match="cannot be averaged"):
        segment(
            {"mask": np.zeros((2, 4, 4), np.int64)},
            manifest(),
            Geometry(8, 8),
            (4, 4),
            mirrored=True,
        )


def test_another_task_is_refused() -> None:
    with pytest.raises(ManifestInvalid, match="does not describe a segmentation"):
        segment({}, bundle_pb2.Manifest(), Geometry(8, 8), (4, 4))
