"""Compression with a device looks at networks there, and cuts and writes them here."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from pollard.compress import accelerator, export
from pollard.compress.anydata import ModelRecipe, compress_model
from pollard.compress.blocks import find_blocks
from pollard.compress.data import Dataset, Part, load_data
from pollard.compress.dense import decompose
from pollard.compress.evaluate import torch_predictor
from pollard.compress.evaluation import evaluate
from pollard.compress.fake_quantize import FakeQuantized, trainer
from pollard.compress.groups import analyse
from pollard.compress.pipeline import Recipe, compress
from pollard.compress.plan import make_plan
from pollard.compress.progress import Reporter
from pollard.compress.quantize import QuantizeConfig, prepare
from pollard.compress.sensitivity import measure_sensitivities
from pollard.compress.shrink import loss_gradients
from pollard.compress.spec import InputSpec
from pollard.compress.train import TrainOptions, train
from pollard.compress.training import FitConfig
from pollard.runtime.bundle import Bundle
from pollard.runtime.machine import Machine

SPEC = InputSpec(28, 28, 1, (0.5,), (0.25,))


@pytest.fixture(scope="module")
def data() -> Dataset:
    return load_data("shapes:120", InputSpec(32, 32, 3, (0.5,) * 3, (0.25,) * 3))


class Block(nn.Module):
    """A residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(x + self.body(x))


class Told(Reporter):
    """Keeps what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


def test_sensitivities_and_gradients_are_the_processor_s(
    data: Dataset, device: str, tolerance: float
) -> None:
    spec = InputSpec(32, 32, 3, (0.5,) * 3, (0.25,) * 3)
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2), nn.BatchNorm2d(16), nn.ReLU(), Block(), Block(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 48),
        nn.ReLU(), nn.Linear(48, len(data.classes)),
    ).eval()  # fmt: skip
    found = []
    for name in ("cpu", device):
        with accelerator.on(accelerator.find(name)):
            prunable = analyse(
                net, spec, importance="taylor", gradients=loss_gradients(data, spec, 16)
            )
            importance = prunable.groups[0].importance
            before = copy.deepcopy(prunable.module.state_dict())
            dense = {
                name: (decompose(name, prunable.module.get_submodule(name).weight), [16, 8])  # type: ignore[arg-type]
                for name in ("7", "9")
            }
            losses = measure_sensitivities(
                prunable, find_blocks(prunable.module, spec), data, spec, net, dense=dense,
                images=24,
            )  # fmt: skip
            after = prunable.module.state_dict()
        assert all(torch.equal(before[key], after[key]) for key in before)
        assert {tensor.device.type for tensor in after.values()} == {"cpu"}
        found.append((importance, losses))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=tolerance, atol=tolerance)
    wanted, got = found[0][1], found[1][1]
    assert len(wanted.blocks) == 2
    assert got.blocks == pytest.approx(wanted.blocks, rel=10 * tolerance, abs=tolerance)
    for mine, theirs in ((wanted.groups, got.groups), (wanted.dense, got.dense)):
        for name, sizes in mine.items():
            assert theirs[name] == pytest.approx(sizes, rel=10 * tolerance, abs=tolerance)


def test_training_in_8_bits_gives_what_the_processor_gives(device: str, tolerance: float) -> None:
    torch.manual_seed(0)
    spec = InputSpec(16, 16, 3, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, groups=8),
        nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
    ).eval()  # fmt: skip
    images = export.probe_images(spec, 64, seed=5)
    labels = torch_predictor(net, spec)(images).argmax(axis=1)
    part = Part("x/train", images, labels)
    data = Dataset("x", [str(number) for number in range(5)], part, part, part, "")
    core = export.export_core(net, torch.zeros(1, 3, 16, 16))
    quantizing = QuantizeConfig(64, reduce_range=not Machine.detect().has_vnni)
    prepared = prepare(core, spec, part, quantizing)
    quantized = prepared.build_core(prepared.collect().ranges("min-max"))
    losses, answers = [], []
    for name in ("cpu", device):
        with accelerator.on(accelerator.find(name)):
            config = FitConfig(2, 16, 1e-3, optimizer="sgd", distill_weight=0.5)
            made, told = trainer(net, data, spec, config)(prepared, prepared.core, quantized)
        losses.append(told["loss"])
        answers.append(torch_predictor(FakeQuantized(prepared, made, quantized), spec)(images))
    assert losses[1] == pytest.approx(losses[0], rel=tolerance)
    np.testing.assert_allclose(answers[1], answers[0], atol=0.05 * float(np.ptp(answers[0])))


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("parent") / "parent.safetensors"
    options = TrainOptions(epochs=4, batch_size=16)
    train("small-cnn-28", "shapes:200", out, options=options, device="cpu", spec=SPEC)
    return out


def test_a_whole_compression_says_where_it_computes_and_writes_a_bundle(
    parent: Path, device: str, tmp_path: Path
) -> None:
    told = Told()
    recipe = Recipe(
        "small-cnn-28", "shapes:200", str(parent), prune=0.5, max_drop=50, epochs=1,
        batch_size=16, calibration="min-max", qat_epochs=1, importance="taylor", spec=SPEC,
        device=device,
    )  # fmt: skip
    result = compress(recipe, tmp_path / "out", reporter=told)
    assert any(line.startswith("PyTorch computes on ") for line in told.lines), told.lines
    assert Bundle.open(tmp_path / "out").manifest.name == "small-cnn-28"
    assert {tensor.device.type for tensor in result.module.state_dict().values()} == {"cpu"}
    assert result.chosen.agreement > 0.9
    # The same on the processor is another run: sums come in another order.
    other = compress(Recipe(**{**vars(recipe), "device": "cpu"}), tmp_path / "other", reporter=told)
    assert not any(stage.reused for stage in other.stages.done if stage.name == "recover")
    again = compress(recipe, tmp_path / "again", reporter=told)
    assert all(stage.reused for stage in again.stages.done)


def test_a_plan_times_recovery_on_it(parent: Path, device: str) -> None:
    recipe = Recipe("small-cnn-28", "shapes:200", str(parent), spec=SPEC, device=device)
    assert make_plan(recipe).recovery_seconds > 0


def test_evaluation_gives_the_processor_s_figures(
    parent: Path, device: str, tolerance: float
) -> None:
    figures = [
        evaluate("small-cnn-28", "shapes:200", weights=str(parent), spec=SPEC, device=name)
        for name in ("cpu", device)
    ]
    theirs, ours = (list(_numbers(each.to_json())) for each in figures)
    assert [name for name, _ in ours] == [name for name, _ in theirs]
    # Confidences are rounded differently; which class comes first is not.
    wanted = [
        pytest.approx(value, rel=0.1 * tolerance, abs=0.01 * tolerance) for _, value in theirs
    ]
    assert [value for _, value in ours] == wanted


def _numbers(content: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """Give every number of a report with its place; what is no number stands in its name."""
    if isinstance(content, dict):
        for key, value in content.items():
            yield from _numbers(value, f"{name}.{key}")
    elif isinstance(content, list):
        for number, value in enumerate(content):
            yield from _numbers(value, f"{name}.{number}")
    elif isinstance(content, int | float) and not isinstance(content, bool):
        yield name, float(content)
    else:
        yield f"{name}={content}", 0.0


class Loader:
    """Batches as a data loader gives them, which are the processor's."""

    def __iter__(self) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        generator = torch.Generator().manual_seed(1)
        for _ in range(6):
            level = torch.rand(16, 2, 1, 1, generator=generator)
            noise = 0.1 * torch.randn(16, 2, 16, 16, generator=generator)
            yield level + noise, {"level": level.flatten(1)}


def _loss(outputs: Tensor, targets: dict[str, Tensor]) -> Tensor:
    return functional.mse_loss(outputs, targets["level"])


@pytest.mark.parametrize("budget", [(), ("macs=0.6",)])
def test_an_own_module_is_compressed_where_its_owner_has_put_it(
    budget: tuple[str, ...], device: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(32, 2),
    ).eval()  # fmt: skip
    place = accelerator.find(device)
    model.to(place)
    asked: set[str] = set()

    def metric(predict: object) -> float:
        assert callable(predict)
        total = 0.0
        for inputs, targets in Loader():
            # As a caller does whose model is on a GPU.
            answers = predict(inputs.to(place))
            asked.add(answers.device.type)
            total -= float(functional.mse_loss(answers, targets["level"].to(place)))
        return total

    recipe = ModelRecipe(
        max_drop=100.0, prune=0.5, budget=budget, epochs=1, importance="taylor", prune_steps=1,
        calibration_batches=2,
    )  # fmt: skip
    example = torch.zeros(1, 2, 16, 16).to(place)
    result = compress_model(
        model, Loader(), metric, recipe, example, tmp_path / "out", loss_fn=_loss
    )
    assert (tmp_path / "out" / "model.onnx").is_file()
    assert asked == {place.type}
    assert {parameter.device.type for parameter in result.module.parameters()} == {"cpu"}
    assert {parameter.device.type for parameter in model.parameters()} == {place.type}
