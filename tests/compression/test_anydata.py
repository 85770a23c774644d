from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from pollard.compress import export
from pollard.compress.anydata import Batches, ModelRecipe, compress_model
from pollard.compress.anydata_eight_bits import (
    Evaluate,
    MetricJudge,
    Predict,
    quantize_module,
    score,
)
from pollard.compress.channel_map import load_pruned, save_pruned
from pollard.compress.errors import (
    CompressionError,
    DataInvalid,
    ExportFailed,
    GateRefused,
    PruneFailed,
    UsageInvalid,
    WeightsInvalid,
)
from pollard.compress.progress import Reporter
from pollard.compress.prune import prune
from pollard.compress.quantize import QuantizeConfig
from pollard.compress.spec import InputSpec
from pollard.compress.zoo import find

EXAMPLE = torch.zeros(1, 2, 16, 16)


def build() -> nn.Module:
    """A regression net over two-channel fields: no images, no classes."""
    return nn.Sequential(
        nn.Conv2d(2, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(),
        nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 2),
    )  # fmt: skip


def batches(seed: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    level = torch.rand(8, 16, 2, 1, 1, generator=generator)
    noise = 0.1 * torch.randn(8, 16, 2, 16, 16, generator=generator)
    return [(one + more, one.flatten(1)) for one, more in zip(level, noise, strict=True)]


def closeness(predict: Predict) -> float:
    data = batches(2)
    return -float(np.mean([float(functional.mse_loss(predict(x), y)) for x, y in data]))


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    torch.manual_seed(0)
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(6):
        for inputs, targets in batches(1):
            optimizer.zero_grad()
            functional.mse_loss(model(inputs), targets).backward()
            optimizer.step()
    return model.eval()


@pytest.mark.long
def test_own_data_loss_and_metric_give_a_file_and_a_trainable_model(
    trained: nn.Module, tmp_path: Path
) -> None:
    recipe = ModelRecipe(max_drop=0.1, prune=0.7, epochs=15, learning_rate=4e-3, target="cpu-fp32")
    result = compress_model(
        trained, batches(1), closeness, recipe, EXAMPLE, tmp_path / "out",
        loss_fn=functional.mse_loss,
    )  # fmt: skip
    assert result.shipped == "pruned-fp32"
    assert result.parent.metric - result.chosen.metric <= 0.1
    assert all(parameter.requires_grad for parameter in result.module.parameters())
    inputs = batches(3)[0][0]
    with torch.no_grad():
        wanted = result.module.eval()(inputs)
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx")
    got = session.run(None, {session.get_inputs()[0].name: inputs.numpy()})[0]
    np.testing.assert_allclose(got, wanted.numpy(), atol=1e-4)

    again = load_pruned(build(), tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(again(inputs), wanted)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["shipped"] == "pruned-fp32"
    assert report["confirmed_on_other_data"] is False
    assert report["macs"]["pruned"] < 0.31 * report["macs"]["parent"]


@pytest.mark.long
def test_eight_bits_compete(trained: nn.Module, tmp_path: Path) -> None:
    def whatever(predict: Predict) -> float:
        return float(predict(batches(2)[0][0]).isfinite().all())

    recipe = ModelRecipe(max_drop=0.0, prune=0.7, epochs=0)
    result = compress_model(trained, batches(1), whatever, recipe, EXAMPLE, tmp_path / "out")
    assert [row.name for row in result.candidates] == [
        "parent-fp32", "parent-int8", "pruned-fp32", "pruned-int8",
    ]  # fmt: skip
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    tried = [trial["name"] for trial in report["quantization"]["pruned-int8"]["trials"]]
    assert {"min-max", "mse", "percentile-99.9"} < set(tried)


def test_ranges_are_compared_on_the_inputs_of_the_metric(
    trained: nn.Module, tmp_path: Path
) -> None:
    """One wild input among those that ranges are measured on makes min-max far too wide."""
    wild = batches(1)
    wild[0] = (wild[0][0].clone(), wild[0][1])
    wild[0][0][0, :, 0, 0] = 400.0
    found = {}
    for method in ("auto", "min-max"):
        judge = MetricJudge(float_file(trained), score(closeness, trained), closeness, 10.0)
        config = QuantizeConfig(reduce_range=True, method=method)  # type: ignore[arg-type]
        raw, told = quantize_module(trained, EXAMPLE, wild, 4, judge, config, Reporter())
        assert judge.attainable
        assert told["trials"][0]["name"] == "min-max"
        found[method] = (told["method"], judge.divergence(raw))
    assert found["auto"][0] != "min-max"
    assert found["auto"][1] < 0.5 * found["min-max"][1]


def float_file(module: nn.Module) -> bytes:
    return export.serialize(export.export_core(module, EXAMPLE))


def test_a_metric_that_asks_nothing_is_refused(trained: nn.Module) -> None:
    with pytest.raises(DataInvalid, match="does not ask"):
        MetricJudge(float_file(trained), 1.0, lambda _: 1.0, 0.1)


def test_a_gate_that_cannot_be_met_leaves_nothing(trained: nn.Module, tmp_path: Path) -> None:
    recipe = ModelRecipe(max_drop=0.0, prune=0.9, epochs=0, target="cpu-fp32")
    with pytest.raises(GateRefused, match="pruned-fp32") as caught:
        compress_model(trained, batches(1), closeness, recipe, EXAMPLE, tmp_path / "out")
    assert len(caught.value.figures["candidates"]) == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("data", "example", "error"),
    [
        ([], EXAMPLE, DataInvalid),
        (iter(batches(1)), EXAMPLE, UsageInvalid),
        (batches(1), torch.zeros(1, 3, 16, 16), DataInvalid),
        (batches(1), torch.zeros(1, 2, 16, 16, dtype=torch.int64), UsageInvalid),
    ],
)
def test_unusable_arguments_are_refused(
    data: Batches, example: Tensor, error: type[Exception], trained: nn.Module, tmp_path: Path
) -> None:
    with pytest.raises(error):
        compress_model(trained, data, closeness, ModelRecipe(1.0), example, tmp_path / "out")


@pytest.mark.parametrize("name", ["mobilenet-v2", "shared", "convnext", "grouped-transposed"])
def test_a_pruned_architecture_is_reloaded(
    name: str, architectures: dict[str, Callable[[], nn.Module]], tmp_path: Path
) -> None:
    pruned = prune(architectures[name](), InputSpec(32, 32, 3, (0.0,) * 3, (1.0,) * 3), 0.5)
    save_pruned(pruned.module, tmp_path, pruned.channels)
    again = load_pruned(architectures[name](), tmp_path)
    inputs = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(again(inputs), pruned.module(inputs))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "channels.json",
        "model.safetensors",
    ]


def test_rewritten_shortcuts_are_reloaded(tmp_path: Path) -> None:
    entry = find("resnet20-cifar")
    pruned = prune(entry.build(10).eval(), entry.spec, 0.5)
    assert pruned.rewritten
    save_pruned(pruned.module, tmp_path)
    inputs = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(load_pruned(entry.build(10), tmp_path)(inputs), pruned.module(inputs))


def test_damaged_or_foreign_files_are_refused(tmp_path: Path) -> None:
    entry = find("small-cnn-28")
    save_pruned(prune(entry.build(10), entry.spec, 0.5).module, tmp_path)
    with pytest.raises(WeightsInvalid, match="the model has none"):
        load_pruned(nn.Sequential(nn.Linear(3, 3)), tmp_path)
    path = tmp_path / "channels.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "schema_version": 3}))
    with pytest.raises(WeightsInvalid, match="install a newer one"):
        load_pruned(entry.build(10), tmp_path)
    path.write_text(json.dumps({**content, "layers": {"conv1": {"type": "Conv2d"}}}))
    with pytest.raises(WeightsInvalid, match="not complete"):
        load_pruned(entry.build(10), tmp_path)
    path.write_text(json.dumps(content))
    (tmp_path / "model.safetensors").write_bytes(b"other")
    with pytest.raises(WeightsInvalid, match="not the file"):
        load_pruned(entry.build(10), tmp_path)


@pytest.mark.long
def test_a_budget_is_met_with_own_batches(trained: nn.Module, tmp_path: Path) -> None:
    before = {key: value.clone() for key, value in trained.state_dict().items()}
    recipe = ModelRecipe(
        max_drop=0.2, budget=("size=0.5", "macs=0.4"), prune_steps=2, epochs=8,
        learning_rate=4e-3, target="cpu-fp32", importance="taylor",
    )  # fmt: skip
    result = compress_model(
        trained, batches(1), closeness, recipe, EXAMPLE, tmp_path / "out",
        loss_fn=functional.mse_loss,
    )  # fmt: skip
    assert result.chosen.size_bytes <= 0.5 * result.parent.size_bytes
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["macs"]["pruned"] <= 0.4 * report["macs"]["parent"]
    assert [step["step"] for step in report["search"]["steps"]] == [1, 2]
    for key, value in before.items():
        assert torch.equal(trained.state_dict()[key], value)
    inputs = batches(3)[0][0]
    with torch.no_grad():
        again, kept = load_pruned(build(), tmp_path / "out"), result.module.eval()
        assert torch.equal(again(inputs), kept(inputs))


@pytest.mark.long
def test_no_file_with_own_batches_takes_more_than_the_budget(
    trained: nn.Module, tmp_path: Path
) -> None:
    recipe = ModelRecipe(
        max_drop=1e-4, budget=("size=60kB",), prune_steps=1, epochs=0, calibration="min-max",
        float_layers=False,
    )  # fmt: skip
    with pytest.raises(GateRefused, match=r"within the budget.*parent-int8 takes size"):
        compress_model(
            trained, batches(1), closeness, recipe, EXAMPLE, tmp_path / "out",
            loss_fn=functional.mse_loss,
        )  # fmt: skip


class Twice(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.net(x), self.net(x)


def not_finite() -> nn.Module:
    net = build().eval()
    with torch.no_grad():
        next(net.parameters())[0] = torch.nan
    return net


@pytest.mark.parametrize(
    ("model", "data", "metric", "message"),
    [
        (Twice(build()), batches(1), closeness, "gives a tuple; it must give one tensor"),
        (not_finite(), batches(1), closeness, "values that are not finite; look at its weights"),
        (build(), [(x.numpy(), y) for x, y in batches(1)], closeness, "inputs as a tensor"),
        (build(), [x for x, _ in batches(1)], closeness, "must give pairs"),
        (build(), batches(1), lambda predict: None, "gave None; it must give a finite number"),
    ],
)
def test_what_own_models_data_and_metrics_must_give_is_told(
    model: nn.Module, data: Batches, metric: Evaluate, message: str, tmp_path: Path
) -> None:
    with pytest.raises(CompressionError, match=message):
        compress_model(
            model.eval(), data, metric, ModelRecipe(max_drop=1.0, epochs=0), EXAMPLE,
            tmp_path / "out", loss_fn=functional.mse_loss,
        )  # fmt: skip
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_exported_is_refused_before_training(tmp_path: Path) -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = build()

        def forward(self, x: Tensor) -> Tensor:
            outputs: Tensor = self.net(x)
            return outputs * 2 if outputs.mean() > 0 else outputs

    def never(*_: object) -> Tensor:
        raise AssertionError("nothing is to be trained")

    with pytest.raises(ExportFailed, match=r"torch\.where"):
        compress_model(
            Branching().eval(), batches(1), closeness, ModelRecipe(max_drop=1.0), EXAMPLE,
            tmp_path / "out", loss_fn=never,
        )  # fmt: skip
    assert list(tmp_path.iterdir()) == []


def test_a_budget_out_of_reach_is_refused_before_training(
    trained: nn.Module, tmp_path: Path
) -> None:
    def never(predict: Predict) -> float:
        raise AssertionError("nothing is to be judged")

    recipe = ModelRecipe(max_drop=1.0, budget=("params=0.0001",), target="cpu-fp32")
    with pytest.raises(PruneFailed, match="cannot be met"):
        compress_model(
            trained, batches(1), never, recipe, EXAMPLE, tmp_path / "out",
            loss_fn=functional.mse_loss,
        )  # fmt: skip
    with pytest.raises(UsageInvalid, match="latency, macs, params, size"):
        ModelRecipe(max_drop=1.0, budget=("speed=2",))
    assert list(tmp_path.iterdir()) == []
