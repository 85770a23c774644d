"""Runs that are killed or stopped, as real processes, and gone on with."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pollard.compress.errors import GateRefused
from pollard.compress.pipeline import CompressionResult, compress
from pollard.compress.recipe import Recipe
from pollard.runtime.bundle import Bundle

# Kills itself in the third epoch of recovery, with a checkpoint after every step.
_KILLED = """
import functools, math, os, signal, sys
from contextlib import contextmanager
from pathlib import Path
from pollard.compress import cut_files, pipeline
from pollard.compress.checkpoint import Checkpoint
from pollard.compress.progress import Reporter
from pollard.compress.recipe import Recipe

cut_files.Checkpoint = functools.partial(Checkpoint, every_seconds=0, share=math.inf)

class Deadly(Reporter):
    @contextmanager
    def step(self, title, total):
        self.title, self.steps = title, 22
        yield self

    def advance(self, count=1, note=""):
        self.steps -= count
        if self.title == "Recovering accuracy" and self.steps == 0:
            os.kill(os.getpid(), signal.SIGKILL)

recipe = Recipe("zoo:small-cnn-28", "digits", sys.argv[1], "cpu-fp32", prune=0.8, epochs=3,
    batch_size=64, max_train_images=512, max_drop=100.0, threads=2)
pipeline.compress(recipe, sys.argv[2], cache=Path(sys.argv[3]), reporter=Deadly())
"""


def _recipe(weights: Path, **changes: object) -> Recipe:
    fields: dict[str, object] = {
        "target": "cpu-fp32",
        "prune": 0.8,
        "epochs": 3,
        "batch_size": 64,
        "max_train_images": 512,
        "max_drop": 100.0,
        "threads": 2,
        **changes,
    }
    return Recipe("zoo:small-cnn-28", "digits", str(weights), **fields)  # type: ignore[arg-type]


def _stages(report: dict[str, list[dict[str, object]]]) -> list[tuple[object, object]]:
    return [(stage["name"], stage["reused"]) for stage in report["stages"]]


@pytest.fixture(scope="module")
def finished(
    digits_parent: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[CompressionResult, Path]:
    """A run that nothing disturbed, and where its stages are kept."""
    folder = tmp_path_factory.mktemp("finished")
    return compress(_recipe(digits_parent), folder / "out", cache=folder / "stages"), folder


@pytest.mark.long
def test_a_killed_run_goes_on_and_gives_the_same_file(
    finished: tuple[CompressionResult, Path], digits_parent: Path, tmp_path: Path
) -> None:
    whole, folder = finished
    stages, out = tmp_path / "stages", tmp_path / "out"
    shutil.copytree(folder / "stages", stages, ignore=shutil.ignore_patterns("recover-*"))
    done = subprocess.run(
        [sys.executable, "-c", _KILLED, str(digits_parent), str(out), str(stages)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not out.exists()
    assert len(list(stages.glob("recover-*.partial/scratch/recover.pt"))) == 1

    result = compress(_recipe(digits_parent), out, cache=stages)
    # What comes after recovery is found by the digest of its weights: they are the same.
    names = ["prune", "recover", "export", "export", "verify", "verify", "profile", "profile"]
    assert _stages(whole.report) == [(name, False) for name in names]
    assert _stages(result.report) == [(name, name != "recover") for name in names]
    assert not list(stages.glob("*.partial"))
    assert sorted(os.listdir(tmp_path)) == ["out", "stages"]
    one, other = (Bundle.open(p).model_path("cpu-fp32") for p in (out, folder / "out"))
    assert one.read_bytes() == other.read_bytes()
    for key in (
        "parent",
        "chosen",
        "recovery",
        "pruning",
        "profiles",
        "confusion",
        "dropped_stages",
    ):
        assert result.report[key] == whole.report[key], key


@pytest.mark.long
def test_a_refused_measurement_is_measured_anew(
    finished: tuple[CompressionResult, Path], digits_parent: Path, tmp_path: Path
) -> None:
    stages = tmp_path / "stages"
    shutil.copytree(finished[1] / "stages", stages)
    with pytest.raises(GateRefused, match="no candidate loses at most 0 points"):
        compress(_recipe(digits_parent, max_drop=0.0), tmp_path / "out", cache=stages)
    assert len(list(stages.glob("verify-*/"))) == 1
    assert len(list(stages.glob("export-*/"))) == 2


@pytest.mark.long
@pytest.mark.parametrize(
    ("number", "code", "words"), [(signal.SIGTERM, 143, "SIGTERM"), (signal.SIGINT, 130, "Ctrl-C")]
)
def test_a_stopped_command_says_so_and_leaves_nothing_half_made(
    number: int, code: int, words: str, digits_parent: Path, tmp_path: Path
) -> None:
    command = [
        sys.executable, "-m", "pollard.client.cli",
        "compress", "zoo:small-cnn-28", "--data", "digits", "--weights", str(digits_parent),
        "--out", str(tmp_path / "out"), "--cache", str(tmp_path / "cache"), "--epochs", "10000",
    ]  # fmt: skip
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        # A test run in the background may have been started with Ctrl-C ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    stages = tmp_path / "cache" / "stages"
    try:
        while not list(stages.glob("recover-*.partial")):
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        process.send_signal(number)
        _, told = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == code, told
    assert f"Stopped by {words}; finished stages are kept" in told
    assert os.listdir(tmp_path) == ["cache"]
    (record,) = stages.glob("prune-*/stage.json")
    assert json.loads(record.read_text())["inputs"]["prune"] == 0.5
