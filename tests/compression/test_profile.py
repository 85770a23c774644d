from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from torch import nn
from typer.testing import CliRunner

from pollard.compress.cli import register
from pollard.compress.macs import count_parameters, total_macs
from pollard.compress.profile import Profile, profile_module
from pollard.compress.profile_page import render_profile
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
