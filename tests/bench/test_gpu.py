"""`python -m bench.gpu` as a user runs it, on the CPU and with the smallest network."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def _run(*flags: str, seconds: float = 150) -> subprocess.CompletedProcess[str]:
    # Without the paths of the tests: the benchmark finds the sources by itself.
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, "-m", "bench.gpu", *flags],
        cwd=ROOT,
        env=kept,
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )


def test_a_section_leaves_its_figures_and_a_table(tmp_path: Path) -> None:
    done = _run("--provider", "cpu", "--only", "environment", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "gpu.json").read_text())["sections"]["environment"]
    assert found["problem"] == ""
    assert found["data"]["session"] == "runs on CPUExecutionProvider"
    assert "| machine: cores" in (tmp_path / "gpu.md").read_text()


@pytest.mark.long
def test_a_section_that_fails_is_told_and_the_next_begins(tmp_path: Path) -> None:
    # No machine has this provider, or the test runs where there is a GPU.
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("CUDA works here")
    done = _run(
        *("--provider", "cuda", "--tiny", "--only", "environment", "--only", "correctness"),
        *("--zoo", "small-cnn-28", "--out", str(tmp_path)),
    )
    assert done.returncode == 1
    sections = json.loads((tmp_path / "gpu.json").read_text())["sections"]
    assert sections["environment"]["problem"] == "ended with 1; its words are above"
    assert "CUDAExecutionProvider" in sections["environment"]["data"]["session"]
    assert sections["environment"]["data"]["machine"]["cores"] > 0  # kept from before the failure
    assert "correctness" in sections
    assert "not whole: environment, correctness" in done.stdout


@pytest.mark.long
def test_a_section_that_is_chosen_has_all_of_the_time_and_its_models(tmp_path: Path) -> None:
    done = _run(
        *("--provider", "cuda", "--tiny", "--only", "compressed", "--minutes", "20"),
        *("--out", str(tmp_path)),
    )
    assert "models: begins, for at most 8" in done.stdout  # 100 of 145 parts of 1200 s
    allowed = float(done.stdout.split("compressed: begins, for at most ")[1].split()[0])
    assert 1000 < allowed <= 1200
    sections = json.loads((tmp_path / "gpu.json").read_text())["sections"]
    assert {"parent", "other", "pruned"} == set(sections["models"]["data"]["made"])


@pytest.mark.long
def test_tensors_in_shared_memory_are_answered_as_those_in_requests(tmp_path: Path) -> None:
    done = _run("--provider", "cpu", "--only", "shared_memory", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "gpu.json").read_text())["sections"]["shared_memory"]["data"]
    assert {row["way"] for row in found["shared"]} == {"in the request", "shared, host"}
    assert all(row["failed"] == 0 and row["requests"] > 0 for row in found["shared"])


def test_without_time_nothing_is_begun(tmp_path: Path) -> None:
    done = _run("--provider", "cpu", "--minutes", "0.01", "--out", str(tmp_path))
    assert done.returncode == 1
    sections = json.loads((tmp_path / "gpu.json").read_text())["sections"]
    assert {told["problem"] for told in sections.values()} == {"not begun: the time was used up"}


def test_unknown_sections_are_named() -> None:
    done = _run("--only", "nonsense")
    assert done.returncode == 2
    assert "nonsense" in done.stderr


def test_the_wheels_are_pinned_as_everything_else() -> None:
    pins = set((ROOT / "constraints.txt").read_text().replace("_", "-").splitlines())
    done = _run("--wheels")
    named = [word for word in done.stdout.split() if "==" in word]
    assert len(named) > 10
    assert set(named) <= pins
