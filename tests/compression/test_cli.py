from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import typer
from typer.testing import CliRunner, Result

from pollard.compress.cli import register
from pollard.compress.cli_common import errors, write_json
from pollard.compress.models import save_state
from pollard.compress.zoo import find
from pollard.runtime.bundle import Bundle
from pollard.runtime.keys import TrustedKeys, create_key_pair
from pollard.runtime.signing import require_signature

Invoke = Callable[..., Result]
Tree = Callable[..., Path]


@pytest.fixture
def invoke() -> Invoke:
    app = typer.Typer()
    register(app)
    runner = CliRunner()

    def call(*arguments: object) -> Result:
        return runner.invoke(app, [str(argument) for argument in arguments])

    return call


def test_the_commands_are_light_until_they_run() -> None:
    code = (
        "import sys, typer\nfrom pollard.compress.cli import register\n"
        "app = typer.Typer()\nregister(app)\n"
        "heavy = {'torch', 'onnx', 'onnxruntime', 'numpy', 'plotly', 'sklearn', 'grpc'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_train_bundle_and_eval_agree(invoke: Invoke, write_images: Tree, tmp_path: Path) -> None:
    (tmp_path / "own_net.py").write_text(
        "from torch import nn\n"
        "def net():\n"
        "    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(),\n"
        "        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(392, 3))\n"
    )
    data, weights = write_images("train", "test", per_class=16), tmp_path / "w.safetensors"
    keys = create_key_pair(tmp_path / "team")
    shape = ["--input-size", "16x16x3", "--mean", "0.4,0.5,0.6", "--std", "0.25"]
    common = ["own_net:net", "--data", data, *shape, "--threads", 2]
    sys.path.insert(0, str(tmp_path))
    try:
        done = invoke(
            "train", *common, "--out", weights, "--epochs", 6, "--json", tmp_path / "t.json"
        )
        assert done.exit_code == 0, done.output
        done = invoke(
            "bundle",
            *common,
            "--weights",
            weights,
            "--out",
            tmp_path / "b",
            "--json",
            tmp_path / "b.json",
            "--sign",
            keys.private,
        )
        assert done.exit_code == 0, done.output
        trusted = TrustedKeys({keys.fingerprint: keys.public})
        assert require_signature(Bundle.open(tmp_path / "b"), trusted)
        model = invoke("eval", *common, "--weights", weights, "--json", tmp_path / "e.json")
        packed = invoke("eval", tmp_path / "b", "--data", data, "--json", tmp_path / "p.json")
    finally:
        sys.path.remove(str(tmp_path))
    assert model.exit_code == packed.exit_code == 0, model.output + packed.output
    files = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in "tbep"}
    assert len({json.dumps(files[name]["accuracy"]) for name in "tep"}) == 1
    assert files["e"]["accuracy"] == files["b"]["parent"]["accuracy"]
    assert files["e"]["accuracy"]["value"] > 0.9
    assert "n = 24" in model.output


@pytest.mark.parametrize("command", ["compress", "bundle"])
def test_a_key_that_cannot_sign_is_told_before_any_work(
    invoke: Invoke, tmp_path: Path, command: str
) -> None:
    arguments = ["zoo:small-cnn-28", "--data", "digits", "--out", tmp_path / "b"]
    done = invoke(command, *arguments, "--sign", tmp_path / "missing.key")
    assert done.exit_code == 1
    assert "missing.key" in done.output
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compress", "zoo:small-cnn-29"], "did you mean 'small-cnn-28'"),
        (["compress", "zoo:small-cnn-28"], "train it first"),
        (["compress", "zoo:small-cnn-28", "--prune", "1.5"], "at least 0 and below 1"),
        (["compress", "zoo:small-cnn-28", "--target", "tpu"], "not one of cpu-int8, cpu-fp32"),
        (["compress", "zoo:small-cnn-28", "--budget", "speed=2"], "latency, macs, params, size"),
        (["compress", "zoo:small-cnn-28", "--budget", "macs=0.5", "--prune", "0.5"], "exclude"),
        (["compress", "zoo:small-cnn-28", "--importance", "luck"], "l1, l2, bn, taylor"),
        (["compress", "a.b:c"], "--input-size"),
        (["compress", "a.b:c", "--input-size", "12"], "not HEIGHTxWIDTHxCHANNELS"),
        (["train", "small-cnn-28"], "ends otherwise"),
    ],
)
def test_usage_errors_end_with_code_2(
    invoke: Invoke, tmp_path: Path, arguments: list[str], message: str
) -> None:
    done = invoke(*arguments, "--data", "digits", "--out", tmp_path / "out")
    assert done.exit_code == 2, done.output
    assert message in done.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["train", "--seed", 2**64, "--out", "w.safetensors"], "--seed"),
        (["train", "--threads", 100_000, "--out", "w.safetensors"], "--threads"),
        (["train", "--max-time", 0, "--out", "w.safetensors"], "max-time is 0; it is in minutes"),
        (["train", "--max-time", "nan", "--out", "w.safetensors"], "max-time is nan"),
        (
            [
                *("train", "--out", "w.safetensors", "--input-size", "28x28x1"),
                *("--mean", "nan", "--std", "1"),
            ],
            "must be finite",
        ),
        (["compress", "--dry-run", "--ray", "local"], "give --search N"),
    ],
)
def test_numbers_beyond_what_can_be_are_refused_before_any_work(
    invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], told: str
) -> None:
    monkeypatch.chdir(tmp_path)
    command, *options = arguments
    done = invoke(command, "small-cnn-28", "--data", "digits", *options)
    assert done.exit_code == 2
    assert told in done.output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("option", ["--json", "--plot"])
def test_files_that_cannot_be_written_are_told_before_any_work(
    invoke: Invoke, digits_parent: Path, tmp_path: Path, option: str
) -> None:
    (tmp_path / "file").write_text("kept")
    for path, told in (
        (tmp_path, "is a directory; give the name of a file"),
        (tmp_path / "file" / "within.html", "is no directory to write in"),
    ):
        arguments = ("--weights", digits_parent, "--data", "digits", option, path)
        done = invoke("eval", "small-cnn-28", *arguments)
        assert done.exit_code == 2
        assert told in done.output
        assert "Accuracy" not in done.output
    assert (tmp_path / "file").read_text() == "kept"


def test_a_full_disk_is_told_with_what_there_is_of_the_work(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(typer.Exit) as ended, errors(None, lambda: "stages are kept"):
        Path("/dev/full").write_text("x")  # every write to it fails as on a full disk
    assert ended.value.exit_code == 1
    assert capsys.readouterr().err == "Error: no space is left on the disk; stages are kept.\n"


def test_memory_that_does_not_suffice_is_told_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as ended, errors(None):
        np.empty((2**40, 2**10))
    assert ended.value.exit_code == 1
    assert capsys.readouterr().err.startswith("Error: the memory does not suffice: Unable to")


def test_figures_for_machines_are_strict_json(tmp_path: Path) -> None:
    write_json(tmp_path / "f.json", {"loss": [1.0, math.nan], "within": {"most": -math.inf}})
    text = (tmp_path / "f.json").read_text()
    assert json.loads(text) == {"loss": [1.0, None], "within": {"most": None}}
    assert "NaN" not in text


def test_bad_data_and_weights_end_with_code_1(invoke: Invoke, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = invoke("train", "small-cnn-28", "--data", tmp_path / "no", "--out", f"{out}.safetensors")
    assert done.exit_code == 1
    assert "there is no data at" in done.output
    done = invoke(
        "bundle", "small-cnn-28", "--data", "digits", "--weights", tmp_path / "no.pt", "--out", out
    )
    assert done.exit_code == 1
    assert "there is no weights file" in done.output
    assert not out.exists()


def test_a_refusal_ends_with_code_3_and_the_numbers(
    invoke: Invoke, digits_parent: Path, tmp_path: Path
) -> None:
    done = invoke(
        "compress", "zoo:small-cnn-28", "--data", "digits", "--weights", digits_parent,
        "--target", "cpu-fp32", "--prune", 0.95, "--epochs", 0, "--max-drop", 0.1,
        "--out", tmp_path / "out", "--json", tmp_path / "figures.json",
    )  # fmt: skip
    assert done.exit_code == 3, done.output
    assert "pruned-fp32 lost" in done.output
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["candidates"][1]["drop_points"]["estimate"] > 0.1
    assert not (tmp_path / "out").exists()


def test_weights_are_not_overwritten_unasked(invoke: Invoke, digits_parent: Path) -> None:
    before = digits_parent.read_bytes()
    done = invoke("train", "small-cnn-28", "--data", "digits", "--out", digits_parent)
    assert done.exit_code == 2
    assert digits_parent.read_bytes() == before


@pytest.mark.long
def test_a_dry_run_says_whether_a_budget_can_be_met_and_writes_nothing(
    invoke: Invoke, digits_parent: Path, tmp_path: Path
) -> None:
    common = ["compress", "zoo:small-cnn-28", "--data", "digits", "--weights", digits_parent]
    plan = [*common, "--target", "cpu-fp32", "--dry-run"]
    done = invoke(*plan, "--budget", "macs=0.3", "--budget", "size=0.5")
    assert done.exit_code == 0, done.output
    assert "by the table of latencies macs=0.3, size=0.5 can be met" in done.output
    assert "conv2: 64 →" in done.output
    assert "Faster than the parent (lower bound 1.03): can be met" in done.output
    done = invoke(*plan, "--target", "cpu-int8", "--budget", "size=60kB")
    assert "Not shipped: parent-int8 takes size 2" in done.output
    done = invoke(*plan, "--budget", "params=0.0001")
    assert done.exit_code == 1
    assert "cannot be met by narrowing, removing blocks and factorising; the least" in done.output
    done = invoke(*plan, "--budget", "latency=10s")
    assert "nothing needs to be cut for latency=10s" in done.output
    done = invoke(*plan, "--search", 4)
    assert "Search: 4 trials, about" in done.output
    assert "by the table of latencies latency=0.5000 can be met" in done.output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("plan", [(), ("--dry-run",)])
def test_fewer_training_images_than_classes_are_refused_by_a_dry_run_too(
    invoke: Invoke, digits_parent: Path, tmp_path: Path, plan: tuple[str, ...]
) -> None:
    done = invoke(
        "compress", "small-cnn-28", "--data", "digits", "--weights", digits_parent,
        "--out", tmp_path / "b", "--train-images", 5, *plan,
    )  # fmt: skip
    assert done.exit_code == 1, done.output
    assert "5 training images are too few for 10 classes" in done.output
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_splits_scenes_as_the_run_does(invoke: Invoke, tmp_path: Path) -> None:
    # Of the five shapes masks know a sixth class, the background.
    save_state(find("small-unet").build(6), tmp_path / "w.safetensors")
    done = invoke(
        "compress", "small-unet", "--data", "shapes:40", "--weights", tmp_path / "w.safetensors",
        "--out", tmp_path / "b", "--target", "cpu-fp32", "--epochs", 1, "--dry-run",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "6 classes; images: 24 train, 6 choose, 10 held-out" in done.output


def test_the_zoo_is_listed_with_what_its_models_cost(invoke: Invoke, tmp_path: Path) -> None:
    done = invoke("zoo", "--json", tmp_path / "zoo.json")
    assert done.exit_code == 0, done.output
    assert "zoo:resnet50" in done.output
    assert max(map(len, done.output.splitlines())) <= 80
    assert "…" not in done.output
    models = {row["name"]: row for row in json.loads((tmp_path / "zoo.json").read_text())["models"]}
    assert models["vgg16"]["parameters"] == 138_357_544
    assert models["vgg16"]["macs"] == 15_470_264_320
    assert models["inception-v3"]["input"]["height"] == 299
    assert models["small-cnn-28"]["classes"] == 10


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds 0 label"),
        ("one\n\ntwo\n", "line 2 of"),
        ("only\n", "holds 1 label"),
        (None, "cannot be read"),
    ],
)
def test_labels_that_are_none_are_refused(
    invoke: Invoke, digits_parent: Path, tmp_path: Path, content: str | None, message: str
) -> None:
    if content is not None:
        (tmp_path / "labels.txt").write_text(content)
    done = invoke(
        "bundle", "small-cnn-28", "--weights", digits_parent, "--out", tmp_path / "b",
        "--labels", tmp_path / "labels.txt",
    )  # fmt: skip
    assert done.exit_code == 2, done.output
    assert message in done.output
    assert not (tmp_path / "b").exists()


def test_labels_must_be_as_many_as_the_logits(
    invoke: Invoke, digits_parent: Path, tmp_path: Path
) -> None:
    (tmp_path / "labels.txt").write_text("a\nb\nc\n")
    common = ["bundle", "small-cnn-28", "--weights", digits_parent, "--out", tmp_path / "b"]
    done = invoke(*common, "--labels", tmp_path / "labels.txt")
    assert done.exit_code == 1
    assert "fc2.bias ([10] in the file, [3] in the model)" in done.output
    done = invoke(*common, "--labels", tmp_path / "labels.txt", "--data", "digits")
    assert done.exit_code == 2
    assert "either --data, or --labels" in done.output
