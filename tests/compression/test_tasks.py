"""Boxes and masks: losses that know the right answer, figures by hand, files that are served."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from pollard.compress import export, quantize
from pollard.compress.candidates import Tuning, build
from pollard.compress.data import Dataset, Part, load_data
from pollard.compress.errors import ModelUnknown, UsageInvalid
from pollard.compress.evaluate import predict_part, session_predictor, torch_predictor
from pollard.compress.groups import analyse
from pollard.compress.models import resolve
from pollard.compress.prune import prune
from pollard.compress.quantize import QuantizeConfig
from pollard.compress.spec import InputSpec
from pollard.compress.tasks import task_of
from pollard.compress.tasks.detection import cells
from pollard.compress.tasks.segmentation import palette
from pollard.compress.training import FitConfig, fit
from pollard.compress.truth import NOTHING
from pollard.compress.zoo import find
from pollard.runtime.sessions import open_session

OPTIONS = FitConfig(0)
STRIDE = 8


@pytest.fixture(scope="module")
def scenes() -> Callable[[str], Dataset]:
    """Return a function that gives drawn data for a task."""
    made: dict[str, Dataset] = {}

    def give(task) -> Dataset:
        name = {"detection": "small-fcos", "segmentation": "small-unet"}[task]
        if task not in made:
            made[task] = load_data("shapes:60", find(name).spec, task=task)
        return made[task]

    return give


def right_boxes(part: Part, moved: float = 0.0) -> np.ndarray:
    """Return answers in which every cell within an object has its box, sure of its class."""
    height, width = part.images.shape[1:3]
    middles, _ = cells(height * width // STRIDE**2, (height, width))
    answers = np.zeros((len(part), len(middles), 4 + 5), np.float32)
    answers[:, :, 2:4] = 1
    answers[:, :, 4:] = -12
    for image, objects in enumerate(part.labels):
        for x1, y1, x2, y2, number in objects[objects[:, 4] != NOTHING]:
            x, y = middles[:, 0].numpy(), middles[:, 1].numpy()
            inside = (x > x1) & (x < x2) & (y > y1) & (y < y2)
            answers[image, inside, :4] = (x1 + moved, y1, x2 + moved, y2)
            answers[image, inside, 4 + int(number)] = 12
    return answers


def right_masks(part: Part, classes: int) -> np.ndarray:
    labels = np.where(part.labels == 255, 0, part.labels)
    return np.moveaxis(20 * np.eye(classes, dtype=np.float32)[labels], 3, 1)


def test_right_boxes_are_right_and_moved_ones_are_worse(scenes) -> None:
    part, task = scenes("detection").train, task_of("detection")
    right = task.judge(right_boxes(part), part, 5)
    moved = task.judge(right_boxes(part, moved=4.0), part, 5)
    accuracy = right.accuracy(part)
    # Scaled and scaled back: overlaps are 1 but for rounding, except at the image's edges.
    assert accuracy.value > 0.97
    assert accuracy.metric == "mAP"
    assert accuracy.lower <= accuracy.value <= accuracy.upper
    assert 0.1 < moved.accuracy(part).value < accuracy.value
    drop = moved.drop_from(right)
    assert drop.points == pytest.approx(100 * (accuracy.value - moved.accuracy(part).value))
    assert 0 < drop.lower <= drop.points <= drop.upper
    assert right.drop_from(right).points == 0


def test_the_loss_of_boxes_is_least_where_they_are_right(scenes) -> None:
    part, task = scenes("detection").train, task_of("detection")
    size = part.images.shape[1:3]
    truth = torch.from_numpy(part.labels)

    def loss(answers: np.ndarray) -> float:
        both = torch.from_numpy(answers)
        return float(task.loss((both[..., :4], both[..., 4:]), truth, size, OPTIONS))

    right, moved = right_boxes(part), right_boxes(part, moved=3.0)
    confused = right.copy()
    confused[..., 4:] = np.roll(confused[..., 4:], 1, axis=2)
    # Cells within an object but far from its middle need not find it, so 0 is not reached.
    assert loss(right) < loss(moved)
    assert 2 * loss(right) < loss(confused)
    assert task.divergence(right, right) == pytest.approx(0, abs=1e-6)
    assert task.divergence(right, moved) > 0
    broken = np.full_like(right, np.nan)
    assert task.divergence(right, broken) == np.inf


def test_an_image_without_objects_teaches_that_there_are_none() -> None:
    task = task_of("detection")
    truth = torch.zeros(2, 1, 5)
    truth[..., 4] = NOTHING
    boxes = torch.rand(2, 144, 4, requires_grad=True)
    scores = torch.zeros(2, 144, 5, requires_grad=True)
    loss = task.loss((boxes, scores), truth, (96, 96), OPTIONS)
    loss.backward()
    assert torch.isfinite(loss)
    assert (scores.grad > 0).all()


def test_agreement_and_confusion_of_boxes(scenes) -> None:
    part, task = scenes("detection").train, task_of("detection")
    right = right_boxes(part)
    same, total = task.agreement(right, right, part)
    assert same == total > 0
    confusion = task.confusion(right, part, 5)
    assert confusion.shape == (6, 6)
    assert np.trace(confusion) > 0.95 * confusion.sum()
    nothing = np.full_like(right, -12)
    assert task.agreement(right, nothing, part)[0] < total
    missed = task.confusion(nothing, part, 5)
    assert missed[:, -1].sum() == missed.sum() == sum(len(t.boxes) for t in part.truths)
    assert task.confusion_labels(["a"]) == ["a", "nothing"]


def test_right_masks_are_right_and_what_is_not_known_counts_nowhere(scenes) -> None:
    part, task = scenes("segmentation").train, task_of("segmentation")
    answers = right_masks(part, 6)
    verdict = task.judge(answers, part, 6)
    # Made smaller and enlarged again: borders are off by a pixel.
    assert verdict.accuracy(part).value > 0.9
    assert verdict.accuracy(part).metric == "mIoU"
    confused = np.roll(answers, 1, axis=1)
    assert task.judge(confused, part, 6).accuracy(part).value < 0.01
    truth, size = torch.from_numpy(part.labels), part.images.shape[1:3]
    right, wrong = (
        float(task.loss(torch.from_numpy(each), truth, size, OPTIONS))
        for each in (answers, confused)
    )
    assert right < 0.01 < 1 < wrong
    # The border of the letterbox is answered otherwise, and nothing changes.
    border = np.where((part.labels == 255)[:, None], np.roll(answers, 2, axis=1), answers)
    assert float(task.loss(torch.from_numpy(border), truth, size, OPTIONS)) == pytest.approx(right)


def test_mean_overlap_by_hand() -> None:
    from pollard.compress.tasks.segmentation import judge_masks
    from pollard.compress.truth import Truth
    from pollard.runtime.transforms import Geometry

    true = np.array([[0, 0, 1, 1], [0, 0, 1, 255]], np.uint8)
    said = np.array([[0, 1, 1, 1], [0, 0, 255, 1]], np.uint8)
    part = Part(
        "p", np.zeros((1, 2, 4, 3), np.uint8), true[None], "segmentation",
        [Truth(Geometry(4, 2), mask=true)],
    )  # fmt: skip
    verdict = judge_masks([said], part, 3)
    # Class 0: 3 of 4; class 1: 2 of 4 (one called so wrongly, one not seen); class 2 is nowhere.
    np.testing.assert_allclose(verdict.by_class()[:2], [3 / 4, 2 / 4])
    assert np.isnan(verdict.by_class()[2])
    assert verdict.value() == pytest.approx((3 / 4 + 2 / 4) / 2)


def test_cells_that_are_no_grid_are_refused() -> None:
    middles, side = cells(12 * 8, (96, 64))
    assert side == 8
    assert middles[0].tolist() == [4, 4]
    assert middles[-1].tolist() == [60, 92]
    with pytest.raises(UsageInvalid, match="100 cells are no regular grid over 96x64"):
        cells(100, (96, 64))


def test_a_palette_gives_the_background_no_colour() -> None:
    colours = np.array(palette(["background", "a", "b", "c"])).reshape(-1, 3)
    assert colours[0].tolist() == [0, 0, 0]
    assert len({tuple(each) for each in colours.tolist()}) == 4


@pytest.mark.parametrize(
    ("name", "task"), [("small-fcos", "detection"), ("small-unet", "segmentation")]
)
def test_a_network_learns_loses_channels_and_becomes_8_bits(
    scenes, tmp_path: Path, name: str, task: str
) -> None:
    data, entry = scenes(task), find(name)
    torch.manual_seed(0)
    module = entry.build(len(data.classes))
    history = fit(module, data, entry.spec, FitConfig(3, 12, 4e-3))
    assert history.loss[-1] < history.loss[0]

    whole = analyse(module, entry.spec).left_whole
    assert set(whole) == ({"box_head", "class_head"} if task == "detection" else {"head"})
    cut = prune(module, entry.spec, 0.5)
    assert 0.5 <= cut.removed < 0.6

    answers = predict_part(torch_predictor(module, entry.spec), data.choose)
    verdict = task_of(data.task).judge(answers, data.choose, len(data.classes))
    tuning = Tuning(data.choose, verdict, len(data.classes), 100.0)
    config = QuantizeConfig(24, True, "min-max", equalize=False)
    plain, quantized = build("parent", module, entry.spec, tmp_path, data.train, config, tuning)
    # A network of a few steps says nothing: the file must say the same nothing.
    judged = task_of(data.task).divergence
    given = predict_part(session_predictor(open_session(quantized.path)), data.choose)
    assert given.shape == answers.shape
    assert judged(answers, given) < 0.1 * judged(answers, np.roll(answers, 1, axis=0))
    names = [output.name for output in open_session(plain.path).outputs]
    assert names == (["boxes", "scores"] if task == "detection" else ["logits"])


def test_boxes_are_put_together_in_float() -> None:
    entry = find("small-fcos")
    core = export.export_core(entry.build(5).eval(), entry.spec)
    tail = set(quantize.tail_nodes(core))
    kinds = {node.op_type for node in core.graph.node if node.name in tail}
    assert {"Exp", "Sub", "Add", "Concat"} <= kinds
    assert "Conv" not in kinds
    # The shortcut's addition is no part of it.
    added = [node.name for node in core.graph.node if node.op_type == "Add"]
    assert len(set(added) - tail) == 1


def test_what_a_model_is_for_is_seen_in_its_answers(monkeypatch, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        "from pollard.compress.zoo import find\n"
        "from torch import nn\n"
        "def detector():\n    return find('small-fcos').build(3)\n"
        "def pixels():\n    return nn.Conv2d(3, 4, 1)\n"
        "def odd():\n    return nn.Flatten(0)\n"
    )
    monkeypatch.chdir(tmp_path)
    spec = InputSpec(96, 96, 3, (0.5,) * 3, (0.25,) * 3)
    assert resolve("own:detector", spec).task == "detection"
    assert resolve("own:pixels", spec).task == "segmentation"
    assert resolve("small-cnn-28").task == "classification"
    with pytest.raises(ModelUnknown, match="for detection it must give boxes"):
        _ = resolve("own:odd", spec).task
