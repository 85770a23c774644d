from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from torch import Tensor, nn
from typer.testing import CliRunner

from pollard.compress.cli import register
from pollard.compress.data import Dataset, Part
from pollard.compress.macs import count_parameters, total_macs
from pollard.compress.profile import Profile, profile_module
from pollard.compress.profile_page import render_profile
from pollard.compress.profile_sensitivity import PartSensitivities, measure
from pollard.compress.progress import Reporter
from pollard.compress.spec import InputSpec
from pollard.compress.zoo import find


@pytest.fixture(scope="module")
def found() -> Profile:
    entry = find("resnet20-cifar")
    return profile_module(entry.build(10), entry.spec, name="net")


def test_every_layer_is_there_with_its_costs(found: Profile) -> None:
    entry = find("resnet20-cifar")
    module = entry.build(10)
    for target in found.targets:
        layers = [row for row in target.operations if row.macs]
        assert sum(row.macs for row in layers) == total_macs(module, entry.spec)
        norms = sum(count_parameters(m) for m in module.modules() if isinstance(m, nn.BatchNorm2d))
        assert sum(row.parameters for row in layers) == count_parameters(module) - norms
        assert all(row.latency_us and row.latency_us > 0 for row in target.operations)
        assert target.unmeasured == []
    float_bytes, int8_bytes = (sum(r.weight_bytes for r in t.operations) for t in found.targets)
    assert float_bytes == 4 * int8_bytes


def test_the_table_adds_up_to_the_whole_file(found: Profile) -> None:
    # 10 % on a machine that does nothing else; tests share theirs.
    for target in found.targets:
        assert target.summed_us == pytest.approx(target.measured_us, rel=0.6)
        overheads = target.summed_us - sum(row.latency_us or 0 for row in target.operations)
        assert 0 < overheads < 0.2 * target.summed_us
        assert target.agrees == (abs(target.summed_us / target.measured_us - 1) <= 0.1)


def test_shortcuts_are_pads_in_float_and_convolutions_in_8_bits(found: Profile) -> None:
    kinds = [
        {row.name: row.kind for row in target.operations if "shortcut" in row.name}
        for target in found.targets
    ]
    assert kinds[0]["layer2.0.shortcut/pad"] == "Pad"
    assert kinds[1]["layer2.0.shortcut"].startswith("Conv 1×1 /2")


def test_the_page_loads_nothing_from_anywhere(found: Profile) -> None:
    page = render_profile(found.to_json())
    assert "<script src" not in page
    assert "layer3.2.conv2" in page


def test_the_command_prints_and_writes(tmp_path: Path) -> None:
    app = typer.Typer()
    register(app)
    figures, plots = tmp_path / "figures.json", tmp_path / "plots.html"
    arguments = ["profile", "zoo:small-cnn-28", "--target", "cpu-int8", "--batch", "2"]
    done = CliRunner().invoke(app, [*arguments, "--json", str(figures), "--plot", str(plots)])
    assert done.exit_code == 0, done.output
    assert "fc1" in done.output
    assert "the table sums to" in done.output
    content = json.loads(figures.read_text())
    assert [target["target"] for target in content["targets"]] == ["cpu-int8"]
    assert content["batch"] == 2
    assert plots.read_text().startswith("<!doctype html>")
    done = CliRunner().invoke(app, ["profile", "zoo:small-cnn-28", "--target", "cuda-fp16"])
    assert done.exit_code == 2
    assert "cannot be profiled" in done.output


@pytest.fixture(scope="module")
def parts() -> PartSensitivities:
    """Of a network whose second convolution hangs on one channel, and block on nothing."""
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Sequential(Idle(16), Idle(16)),
        nn.AvgPool2d(8), nn.Flatten(), nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(),
        nn.Linear(64, 3),
    ).eval()  # fmt: skip
    with torch.no_grad():
        for parameter in module.get_submodule("2.0").parameters():
            parameter.zero_()
    generator = np.random.default_rng(0)

    def part(name: str) -> Part:
        images = generator.integers(0, 255, (32, 8, 8, 3)).astype(np.uint8)
        return Part(name, images, np.arange(32) % 3)

    data = Dataset("t", ["0", "1", "2"], part("a"), part("b"), part("c"), digest="")
    before = {key: value.clone() for key, value in module.state_dict().items()}
    spec = InputSpec(8, 8, 3, (0.5,) * 3, (0.25,) * 3)
    found = measure(module, data, spec, 16, True, Reporter())
    assert all(torch.equal(before[key], value) for key, value in module.state_dict().items())
    return found


class Idle(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + x


def test_every_part_has_a_sensitivity_and_what_does_nothing_has_none(
    parts: PartSensitivities,
) -> None:
    losses = {(part.kind, part.name): part.loss for part in parts.parts}
    assert losses["block", "2.0"] == pytest.approx(0, abs=1e-6)
    assert losses["block", "2.1"] > 1e-5
    assert {name for kind, name in losses if kind == "8 bits"} == {
        "0", "2.0.layer", "2.1.layer", "5", "7", "9",
    }  # fmt: skip
    assert {name for kind, name in losses if kind == "dense"} == {"7"}
    assert {name for kind, name in losses if kind == "channels"} >= {"5", "7"}
    eight = [losses[key] for key in losses if key[0] == "8 bits"]
    halved = [losses[key] for key in losses if key[0] == "channels"]
    assert 0 < max(eight) < max(halved)
    assert parts.images == 16
    assert parts.not_pruned == ""


def test_the_sensitivities_are_on_the_page(found: Profile, parts: PartSensitivities) -> None:
    page = render_profile({**found.to_json(), "sensitivity": parts.to_json()})
    assert "How much each part matters" in page
    assert "a residual block left out" in page
    assert "<script src" not in page


def test_the_command_keeps_what_it_measured(digits_parent: Path, tmp_path: Path) -> None:
    app = typer.Typer()
    register(app)
    figures = tmp_path / "figures.json"
    arguments = ["profile", "zoo:small-cnn-28", "--data", "digits", "--target", "cpu-fp32"]
    refused = CliRunner().invoke(app, arguments)
    assert refused.exit_code == 2
    assert "give the trained weights" in " ".join(refused.output.split())
    arguments += ["--weights", str(digits_parent), "--sensitivity-images", "64"]
    first = CliRunner().invoke(app, [*arguments, "--json", str(figures)])
    assert first.exit_code == 0, first.output
    assert "a layer in 8 bits" in first.output
    content = json.loads(figures.read_text())["sensitivity"]
    assert {part["kind"] for part in content["parts"]} >= {"channels", "8 bits"}
    again = CliRunner().invoke(app, [*arguments, "--json", str(figures)])
    assert again.exit_code == 0, again.output
    assert "Sensitivity to 8 bits" not in again.output
    assert json.loads(figures.read_text())["sensitivity"] == content
