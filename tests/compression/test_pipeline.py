from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from pollard.compress import bundling
from pollard.compress.errors import ExportFailed, GateRefused, OutputExists, UsageInvalid
from pollard.compress.models import load_model, save_state
from pollard.compress.pipeline import CompressionResult, bundle_parent, compress
from pollard.compress.recipe import Recipe
from pollard.compress.zoo import find
from pollard.runtime.bundle import Bundle
from pollard.runtime.sessions import check_golden, check_signature, open_session

SPEC = find("small-cnn-28").spec


def recipe(weights: Path, **changes: object) -> Recipe:
    fields: dict[str, object] = {
        "model": "zoo:small-cnn-28",
        "data": "digits",
        "weights": str(weights),
        "prune": 0.8,
        "max_drop": 10.0,
        "epochs": 3,
        "threads": 2,
        **changes,
    }
    return Recipe(**fields)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def compressed(
    digits_parent: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[CompressionResult, Path]:
    out = tmp_path_factory.mktemp("compressed") / "bundle"
    return compress(recipe(digits_parent), out), out


def test_the_bundle_is_whole_and_served_as_it_was_verified(
    compressed: tuple[CompressionResult, Path],
) -> None:
    result, out = compressed
    bundle = Bundle.open(out)
    assert bundle.digest == result.bundle.digest == result.report["digest"]
    assert result.report["warnings"] == []
    (variant,) = bundle.manifest.variants
    session = open_session(bundle.model_path(variant), target=variant.target)
    check_signature(session, bundle.manifest)
    check_golden(session, bundle, variant)
    assert bundle.labels == [str(i) for i in range(10)]
    assert sorted(os.listdir(out.parent)) == ["bundle"]


def test_the_manifest_says_what_was_measured_and_how_it_came_to_be(
    compressed: tuple[CompressionResult, Path], digits_parent: Path
) -> None:
    result, out = compressed
    manifest = Bundle.open(out).manifest
    (variant,) = manifest.variants
    for figures, measured in (
        (manifest.parent, result.parent),
        (variant.measurement, result.chosen),
    ):
        assert figures.accuracy.samples == 445
        assert figures.accuracy.dataset == "digits/held-out"
        assert figures.accuracy.lower < figures.accuracy.value < figures.accuracy.upper
        assert figures.macs == measured.candidate.macs
        assert figures.size_bytes > 0
        assert [latency.batch_size for latency in figures.latencies] == [1, 8]
        assert all(0 < latency.p50_us <= latency.p99_us for latency in figures.latencies)
    assert variant.measurement.macs < 0.21 * manifest.parent.macs
    agreement = variant.measurement.agreement
    assert (agreement.name, agreement.samples, agreement.dataset) == (
        "agreement",
        445,
        "digits/held-out",
    )
    # Two that agree less than this could not both be right as often as they are.
    assert agreement.value >= variant.measurement.accuracy.value + result.parent.accuracy.value - 1
    assert agreement.value < 1 or result.chosen.accuracy.value == result.parent.accuracy.value
    assert not manifest.parent.HasField("agreement")
    assert variant.requirements.opset == 20
    assert 2**20 <= variant.requirements.memory_bytes <= 2**28
    assert variant.requirements.memory_bytes % 2**20 == 0
    provenance = manifest.provenance
    assert provenance.source == "zoo:small-cnn-28"
    told = json.loads(provenance.recipe_json)
    assert told["prune"] == 0.8
    assert [key for key, value in told.items() if value is None] == [
        "factorize",
        "max_time",
        "max_train_images",
    ]
    assert str(digits_parent.parent) not in provenance.recipe_json
    assert len(provenance.parent_digest) == len(provenance.data_digest) == 64
    assert provenance.tool_versions["torch"].startswith("2.")


def test_what_ships_is_smaller_and_keeps_its_accuracy(
    compressed: tuple[CompressionResult, Path],
) -> None:
    result, _ = compressed
    summary = result.report["summary"]
    assert summary["size_compressed_bytes"] <= 0.15 * summary["size_parent_bytes"]
    assert summary["speedup_lower"] >= 1.03
    assert result.chosen.drop.points <= 10
    assert {m.candidate.name for m in result.candidates} == {
        "parent-fp32",
        "parent-int8",
        "pruned-fp32",
        "pruned-int8",
    }


def test_the_shipped_module_can_be_trained_on(compressed: tuple[CompressionResult, Path]) -> None:
    result, _ = compressed
    assert all(parameter.requires_grad for parameter in result.module.parameters())


def test_nothing_in_the_bundle_names_a_directory_of_this_machine(
    compressed: tuple[CompressionResult, Path],
) -> None:
    _, out = compressed
    here = [str(Path.cwd()).encode(), str(out.parent).encode(), b"site-packages"]
    for path in out.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert not [trace for trace in here if trace in content], path


def test_the_report_loads_nothing_from_anywhere(compressed: tuple[CompressionResult, Path]) -> None:
    result, out = compressed
    page = (out / "report.html").read_text()
    assert "<script src" not in page
    assert "<link" not in page.partition("</style>")[0]
    report = json.loads((out / "report.json").read_text())
    assert report["summary"] == result.report["summary"]
    assert np.array(report["confusion"]["chosen"]).sum() == 445


@pytest.mark.long
def test_the_same_recipe_gives_the_same_file(digits_parent: Path, tmp_path: Path) -> None:
    same = recipe(digits_parent, target="cpu-fp32", epochs=1, max_train_images=256, max_drop=100.0)
    models = []
    for name in ("one", "other"):
        compress(same, tmp_path / name, cache=tmp_path / f"{name}-stages")
        bundle = Bundle.open(tmp_path / name)
        models.append(bundle.model_path("cpu-fp32").read_bytes())
    assert models[0] == models[1]
    onnx.checker.check_model(onnx.load_from_string(models[0]))


@pytest.mark.long
def test_a_budget_is_met_by_the_file_that_is_shipped(digits_parent: Path, tmp_path: Path) -> None:
    small = recipe(
        digits_parent, target="cpu-fp32", budget=("size=0.2", "macs=0.4"), epochs=2, prune_steps=1
    )
    result = compress(small, tmp_path / "out")
    summary, pruning = result.report["summary"], result.report["pruning"]
    assert summary["size_compressed_bytes"] <= 0.2 * summary["size_parent_bytes"]
    assert summary["macs_compressed"] <= 0.4 * summary["macs_parent"]
    assert pruning["search"]["budgets"] == ["size=0.2", "macs=0.4"]
    assert "What was cut, and why" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.long
def test_a_budget_holds_for_every_file_and_not_only_for_the_target_that_was_cut_for(
    digits_parent: Path, tmp_path: Path
) -> None:
    # 8 bits meet it with little cut away; in float the same network takes three times as much.
    small = recipe(digits_parent, budget=("size=60kB",), epochs=2, prune_steps=1, qat_epochs=0)
    result = compress(small, tmp_path / "out")
    assert result.report["summary"]["size_compressed_bytes"] <= 60_000
    page = (tmp_path / "out" / "report.html").read_text()
    assert "kept for choosing and takes no more than size=60kB is shipped" in page
    assert "Beyond the budget: pruned-fp32 takes size" in page


@pytest.mark.long
def test_a_parent_that_takes_more_than_the_budget_is_no_way_out(
    digits_parent: Path, tmp_path: Path
) -> None:
    hopeless = recipe(
        digits_parent, budget=("size=30kB",), epochs=0, prune_steps=1, max_drop=0.5, qat_epochs=0
    )
    with pytest.raises(GateRefused, match=r"within the budget.*parent-int8 takes size 2\d\d"):
        compress(hopeless, tmp_path / "out")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("way", [{"prune": 0.5}, {"budget": ("macs=0.5",)}])
def test_what_cannot_be_exported_is_refused_before_recovery(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: dict[str, object]
) -> None:
    (tmp_path / "branching.py").write_text(
        "from pollard.compress.zoo import find\n"
        "from torch import nn\n"
        "class Branching(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.net = find('small-cnn-28').build(10)\n"
        "    def forward(self, x):\n"
        "        x = self.net(x)\n"
        "        return x * 2 if x.mean() > 0 else x\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "branching", raising=False)
    weights = tmp_path / "w.safetensors"
    save_state(load_model("branching:Branching", spec=SPEC).module, weights)
    stages = tmp_path / "stages"
    asked = recipe(weights, model="branching:Branching", spec=SPEC, qat_epochs=0, **way)
    with pytest.raises(ExportFailed, match=r"branching\.py, line 9"):
        compress(asked, tmp_path / "out", cache=stages)
    assert not list(stages.glob("recover-*"))


def test_a_gate_that_cannot_be_met_leaves_nothing(digits_parent: Path, tmp_path: Path) -> None:
    hopeless = recipe(digits_parent, target="cpu-fp32", prune=0.95, epochs=0, max_drop=0.5)
    with pytest.raises(GateRefused, match="pruned-fp32 lost") as caught:
        compress(hopeless, tmp_path / "out")
    assert os.listdir(tmp_path) == []
    assert [c["name"] for c in caught.value.figures["candidates"]] == ["parent-fp32", "pruned-fp32"]


def test_a_parent_is_packed_without_a_gate(digits_parent: Path, tmp_path: Path) -> None:
    result = bundle_parent(recipe(digits_parent), tmp_path / "parent")
    bundle = Bundle.open(tmp_path / "parent")
    assert [variant.target for variant in bundle.manifest.variants] == ["cpu-fp32"]
    assert not bundle.manifest.HasField("parent")
    assert result.measured.accuracy.value > 0.9


def test_an_untrained_zoo_model_is_refused_with_advice() -> None:
    with pytest.raises(UsageInvalid, match="pollard train zoo:small-cnn-28"):
        compress(Recipe("small-cnn-28", "digits", ""), "unused")


@pytest.mark.parametrize(
    ("field", "value"),
    [("prune", 1.0), ("target", "cuda"), ("max_drop", -1.0), ("distill_weight", 2.0), ("seed", -1)],
)
def test_values_out_of_range_are_refused(field: str, value: object) -> None:
    with pytest.raises(UsageInvalid):
        recipe(Path("w"), **{field: value})


def test_an_output_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    for force in (False, True):
        with pytest.raises(OutputExists), bundling.staging(tmp_path, force=force):
            pytest.fail("not reached")
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
    with pytest.raises(OutputExists, match="is a file"):
        bundling.check_output(tmp_path / "thesis.txt", force=True)


def test_a_bundle_is_replaced_whole_or_not_at_all(
    compressed: tuple[CompressionResult, Path], tmp_path: Path
) -> None:
    target = tmp_path / "bundle"
    shutil.copytree(compressed[1], target)

    def fail_midway() -> None:
        with bundling.staging(target, force=True) as stage:
            (stage / bundling.BUNDLE).mkdir()
            raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        fail_midway()
    Bundle.open(target)
    with bundling.staging(target, force=True) as stage:
        (stage / bundling.BUNDLE).mkdir()
        (stage / bundling.BUNDLE / "new").write_text("new")
    assert os.listdir(target) == ["new"]
    assert os.listdir(tmp_path) == ["bundle"]


def test_a_killed_run_leaves_no_bundle_and_the_next_one_clears_up(tmp_path: Path) -> None:
    script = (
        "import sys, time\nfrom pathlib import Path\nfrom pollard.compress import bundling\n"
        "with bundling.staging(Path(sys.argv[1])) as stage:\n"
        "    (stage / 'bundle').mkdir()\n"
        "    (stage / 'bundle' / 'half').write_text('x')\n"
        "    print('ready', flush=True)\n    time.sleep(600)\n"
    )
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(out)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not out.exists()
    assert len(os.listdir(tmp_path)) == 1
    with bundling.staging(out) as stage:
        (stage / bundling.BUNDLE).mkdir()
    assert os.listdir(tmp_path) == ["out"]
