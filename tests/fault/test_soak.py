"""`pollard drill soak`, in short: it looks at the services, and finds what grows.

The long version is a command; docs/drill.md names it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pollard.services.drill.processes import Usage
from pollard.services.drill.soak import Sample, Soak, SoakOptions, soak_figures
from pollard.services.up.plan import INFERENCE, MODELS, PREPROCESS

COMMAND = [sys.executable, "-m", "pollard.client.cli", "drill", "soak"]


@pytest.mark.long
def test_it_asks_swaps_looks_and_passes(tmp_path: Path) -> None:
    figures = tmp_path / "soak.json"
    done = subprocess.run(
        [
            *COMMAND,
            *("--for", "8s", "--sample-every", "1s", "--swap-every", "3s", "--load", "20%"),
            *("--clients", "2", "--model-mb", "1", "--json", str(figures)),
        ],
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(figures.read_text())
    assert found["passed"]
    assert found["requests"] > 20
    assert (found["failed"], found["wrong"], found["stale"]) == (0, 0, 0)
    assert (found["swaps"], found["scrapes"]) == (1, 24)
    assert set(found["services"]) == {INFERENCE, PREPROCESS, MODELS}
    assert len(found["samples"]) == 8
    for name in found["services"]:
        memory, files, threads = found["samples"][0][name]
        assert memory > 10 << 20
        assert files > 5
        assert threads > 1
    assert "Passed" in done.stdout


def growing(bytes_a_second: float = 0.0, files_a_second: float = 0.0) -> Soak:
    soak = Soak(SoakOptions(seconds=1800.0))
    soak.record.traffic.answered.add("image", 0.0, 0.1, 1)
    for number in range(1, 181):
        seconds = number * 10.0
        usage = Usage(
            int((200 << 20) + bytes_a_second * seconds), int(30 + files_a_second * seconds), 12
        )
        soak.samples.append(Sample(seconds, {INFERENCE: usage}))
    return soak


def test_what_is_level_passes_and_what_grows_is_named() -> None:
    assert soak_figures(growing())["passed"]
    leaking = soak_figures(growing(bytes_a_second=8000.0))
    assert not leaking["passed"]
    assert "memory of inference grows by 2." in leaking["problems"][0]
    open_files = soak_figures(growing(files_a_second=0.02))
    assert "inference has 18 files more" in open_files["problems"][0]
