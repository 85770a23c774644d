"""Training by the command: options, transfer, kills, and several processes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import typer
from typer.testing import CliRunner, Result

from pollard.compress import kept_weights, packing
from pollard.compress.cli import register
from pollard.compress.zoo import find

Tree = Callable[..., Path]
POLLARD = ["-m", "pollard.client.cli", "train", "small-cnn-28", "--data", "digits"]
QUICK = ["--train-images", "200", "--batch-size", "50", "--threads", "1"]


def invoke(*arguments: object) -> Result:
    app = typer.Typer()
    register(app)
    return CliRunner().invoke(app, ["train", *(str(argument) for argument in arguments)])


def figures(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def test_every_option_reaches_the_training_and_its_curves_are_written(tmp_path: Path) -> None:
    done = invoke(
        "small-cnn-28", "--data", "shapes", "--out", tmp_path / "w.safetensors",
        "--input-size", "28x28x1", *QUICK, "--epochs", 2, "--optimizer", "sgd",
        "--momentum", 0.8, "--no-nesterov", "--learning-rate", 0.02, "--schedule", "step",
        "--loss", "mse", "--label-smoothing", 0.1, "--bf16", "--ema", 0.9,
        "--augment", "flip,shift=0.1,rotation=10,crop=0.2,colour=0.2,mixup=0.2,cutmix=1",
        "--curves", tmp_path / "made" / "c.html", "--tensorboard", tmp_path / "board",
        "--json", tmp_path / "t.json",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    history = figures(tmp_path / "t.json")["history"]
    assert len(history["loss"]) == 2
    # Brier's score of five classes that are guessed is 0.8.
    assert 0.2 < history["loss"][-1] < 1
    assert "accuracy on the choosing images" in (tmp_path / "made" / "c.html").read_text()
    assert [path.stat().st_size > 500 for path in (tmp_path / "board").iterdir()] == [True]
    assert "learning rate" in done.output
    assert list(tmp_path.glob("*.checkpoint.pt")) == []


def test_a_limit_of_time_takes_fewer_steps_and_still_writes_weights(tmp_path: Path) -> None:
    done = invoke(
        "small-cnn-28", "--data", "digits", "--out", tmp_path / "w.safetensors", *QUICK,
        "--epochs", 500, "--max-time", 1e-9, "--json", tmp_path / "t.json",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    history = figures(tmp_path / "t.json")["history"]
    assert history["stopped"] == "1 of 2,500 steps fitted into the time that was given"
    assert (tmp_path / "w.safetensors").is_file()


@pytest.mark.long
def test_training_ends_early_where_nothing_gets_better(tmp_path: Path) -> None:
    # A rate at which nothing moves: no epoch is better than the one before it.
    done = invoke(
        "small-cnn-28", "--data", "digits", "--out", tmp_path / "w.safetensors", *QUICK,
        "--epochs", 30, "--patience", 2, "--schedule", "constant", "--learning-rate", 1,
        "--optimizer", "sgd", "--json", tmp_path / "t.json",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    history = figures(tmp_path / "t.json")["history"]
    assert "no epoch of the last 2 was better" in history["stopped"]
    assert len(history["loss"]) < 30


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--optimizer", "lion"], "not one of adamw, adam, sgd"),
        (["--schedule", "linear"], "one-cycle, cosine, step, constant"),
        (["--loss", "hinge"], "cross-entropy, mse"),
        (["--augment", "flop"], "'flop' is unknown"),
        (["--augment", "rotation=x"], "'x' is not a number"),
        (["--augment", "crop=1.5"], "it lies from 0 to 1"),
        (["--label-smoothing", "1"], "from 0 to below 1"),
        (["--learning-rate", "-1"], "must be positive"),
        (["--freeze", "backbone"], "give --from FILE"),
        (["--unfreeze-every", "2"], "needs --freeze backbone"),
        (["--validation", "0.1"], "of them 15 % are for validation as it is"),
    ],
)
def test_impossible_options_are_refused(tmp_path: Path, arguments: list[str], message: str) -> None:
    out = tmp_path / "w.safetensors"
    done = invoke("small-cnn-28", "--data", "digits", "--out", out, *arguments)
    assert done.exit_code == 2, done.output
    assert message in done.output
    assert not out.exists()


def test_the_data_must_have_the_classes_that_are_asked_for(tmp_path: Path) -> None:
    out = tmp_path / "w.safetensors"
    done = invoke("small-cnn-28", "--data", "digits", "--out", out, "--classes", 7)
    assert done.exit_code == 1
    assert "the data have 10 classes, not 7" in done.output


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, *map(str, arguments)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.mark.long
def test_a_killed_run_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    recipe = [*QUICK, "--epochs", 12, "--ema", "0.9", "--augment", "shift,mixup"]
    digits = ["small-cnn-28", "--data", "digits"]
    whole, broken = tmp_path / "whole.safetensors", tmp_path / "broken.safetensors"
    assert invoke(*digits, *recipe, "--out", whole).exit_code == 0

    process = subprocess.Popen(
        [sys.executable, *POLLARD, *map(str, recipe), "--out", str(broken),
         "--checkpoint-seconds", "0"],
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    checkpoint = tmp_path / "broken.checkpoint.pt"
    while not checkpoint.exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not broken.exists()

    done = invoke(*digits, *recipe, "--out", broken)
    assert done.exit_code == 2
    assert "--resume goes on with it" in done.output
    done = invoke(*digits, *QUICK, "--epochs", 3, "--out", broken, "--resume")
    assert done.exit_code == 2
    assert "epochs was 12 and is 3" in done.output
    assert "ema was 0.9 and is 0.0" in done.output
    assert checkpoint.exists()

    done = invoke(*digits, *recipe, "--out", broken, "--resume")
    assert done.exit_code == 0, done.output
    assert not checkpoint.exists()
    assert broken.read_bytes() == whole.read_bytes()


@pytest.mark.long
def test_a_stopped_run_names_its_checkpoint_and_how_to_go_on(tmp_path: Path) -> None:
    out, checkpoint = tmp_path / "w.safetensors", tmp_path / "w.checkpoint.pt"
    process = subprocess.Popen(
        [sys.executable, *POLLARD, *QUICK, "--epochs", "10000", "--out", str(out),
         "--checkpoint-seconds", "0"],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while not checkpoint.exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.terminate()
    _, told = process.communicate()
    assert process.returncode == 143
    assert told == (
        f"Stopped by SIGTERM; {checkpoint} is kept, and the same command with --resume goes on "
        "from there.\n"
    )
    assert checkpoint.exists()


@pytest.mark.long
def test_a_killed_run_does_not_go_on_with_other_code_of_the_model(tmp_path: Path) -> None:
    code = (
        "from torch import nn\n"
        "def make():\n"
        "    head = nn.Linear(5408, 10)\n"
        "    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), head)\n"
    )
    (tmp_path / "own.py").write_text(code)
    out, checkpoint = tmp_path / "w.safetensors", tmp_path / "w.checkpoint.pt"

    def command(size: int) -> list[str]:
        return [
            sys.executable, *POLLARD[:3], "own:make", "--data", "digits", *QUICK, "--epochs",
            "10000", "--out", str(out), "--checkpoint-seconds", "0", "--input-size",
            f"{size}x28x1",
        ]  # fmt: skip

    def refused(size: int = 28) -> str:
        done = subprocess.run(
            [*command(size), "--resume"], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode in (1, 2)
        assert "Traceback" not in done.stderr
        return done.stderr

    process = subprocess.Popen(command(28), cwd=tmp_path, stdout=subprocess.DEVNULL)
    while not checkpoint.exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()

    (tmp_path / "own.py").write_text(code.replace("ReLU", "SiLU"))
    assert "another recipe: model_layers was" in refused()
    (tmp_path / "own.py").write_text(code.replace("1, 8, 3", "1, 8, (5, 3)"))
    assert "input.height was 28 and is 30" in refused(30)
    (tmp_path / "own.py").write_text(code)
    checkpoint.write_bytes(checkpoint.read_bytes()[:-1])
    assert "is damaged; give --force instead of --resume to begin anew" in refused()
    assert not out.exists()


@pytest.mark.long
def test_two_processes_learn_what_one_learns(tmp_path: Path) -> None:
    recipe = [*QUICK, "--epochs", "2", "--augment", "shift,cutmix", "--label-smoothing", "0.1"]
    results = {}
    for name, start in (
        ("one", []),
        ("two", ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]),
    ):
        out, told = tmp_path / f"{name}.safetensors", tmp_path / f"{name}.json"
        done = run(*start, *POLLARD, *recipe, "--out", out, "--json", told)
        assert done.stdout.count("Accuracy") == 1
        results[name] = figures(told)["history"]
    assert results["two"]["loss"] == pytest.approx(results["one"]["loss"], rel=1e-3)
    one, two = (safetensors.torch.load_file(tmp_path / f"{n}.safetensors") for n in results)
    for key in one:
        torch.testing.assert_close(two[key], one[key], rtol=0.02, atol=2e-3)


def test_a_frozen_backbone_stays_as_it_was_until_its_turn(
    digits_parent: Path, write_images: Tree, tmp_path: Path
) -> None:
    out, common = tmp_path / "w.safetensors", ["--threads", "1", "--batch-size", "8"]
    data = write_images(per_class=12, size=28)
    begun = ["--from", digits_parent, "--freeze", "backbone", "--classes", 3, *common]
    done = invoke("small-cnn-28", "--data", data, "--out", out, "--epochs", 2, *begun)
    assert done.exit_code == 0, done.output
    assert "the head is new" in done.output
    before = safetensors.torch.load_file(digits_parent)
    after = safetensors.torch.load_file(out)
    assert after["fc2.weight"].shape == (3, 64)
    frozen = [key for key in before if not key.startswith("fc2")]
    assert all(torch.equal(before[key], after[key]) for key in frozen)

    # One block more an epoch: fc1 in the second, conv2 in the third.
    done = invoke(
        "small-cnn-28", "--data", data, "--out", out, "--force", "--epochs", 3, *begun,
        "--unfreeze-every", 1, "--ema", 0.99,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    after = safetensors.torch.load_file(out)
    assert torch.equal(before["conv1.weight"], after["conv1.weight"])
    assert not torch.equal(before["fc1.weight"], after["fc1.weight"])


def test_weights_of_another_network_are_named_and_nothing_is_trained(tmp_path: Path) -> None:
    state = find("small-cnn-28").build(4).state_dict()
    state["conv2.weight"] = torch.zeros(64, 16, 3, 3)
    del state["fc1.bias"]
    torch.save(state, tmp_path / "w.pth")
    out = tmp_path / "out.safetensors"
    done = invoke("small-cnn-28", "--data", "digits", "--out", out, "--from", tmp_path / "w.pth")
    assert done.exit_code == 1
    assert "missing: fc1.bias" in done.output
    assert "conv2.weight ([64, 16, 3, 3] in the file" in done.output
    assert "fc2" not in done.output
    assert not out.exists()


def test_a_bundle_that_keeps_its_weights_is_begun_from(
    digits_parent: Path, write_images: Tree, tmp_path: Path
) -> None:
    labels = tmp_path / "labels.txt"
    labels.write_text("".join(f"{digit}\n" for digit in range(10)))
    packing.pack(
        "small-cnn-28", labels, tmp_path / "kept", weights=str(digits_parent), threads=1,
        keep_weights=True,
    )  # fmt: skip
    data, out = write_images(per_class=12, size=28), tmp_path / "w.safetensors"
    begun = ["--data", data, "--out", out, *QUICK[2:], "--epochs", 1]
    frozen = ["--freeze", "backbone", "--classes", 3]
    done = invoke("small-cnn-28", *begun, "--from", tmp_path / "kept", *frozen)
    assert done.exit_code == 0, done.output
    assert "the head is new" in done.output
    before, after = (safetensors.torch.load_file(path) for path in (digits_parent, out))
    assert torch.equal(before["conv1.weight"], after["conv1.weight"])
    assert after["fc2.weight"].shape == (3, 64)

    # Another network's bundle, and one whose weights are not those that its manifest tells.
    other = invoke("resnet20-cifar", *begun, "--force", "--from", tmp_path / "kept")
    assert other.exit_code == 1
    assert "does not fit the model; nothing was loaded" in other.output
    (tmp_path / "kept" / kept_weights.FILE).write_bytes(b"other")
    damaged = invoke("small-cnn-28", *begun, "--force", "--from", tmp_path / "kept")
    assert damaged.exit_code == 1
    assert kept_weights.FILE in damaged.output
    assert torch.equal(safetensors.torch.load_file(out)["fc2.weight"], after["fc2.weight"])


@pytest.mark.parametrize("content", [[], ["manifest.json"]])
def test_directories_without_weights_are_told_from_each_other(
    tmp_path: Path, make_bundle: Callable[..., Any], content: list[str]
) -> None:
    start = make_bundle().path if content else tmp_path
    out = tmp_path / "w.safetensors"
    done = invoke("small-cnn-28", "--data", "digits", "--out", out, "--from", start)
    assert done.exit_code == (2 if content else 1)
    assert ("--keep-weights" if content else "holds no manifest.json") in done.output
    assert not out.exists()
