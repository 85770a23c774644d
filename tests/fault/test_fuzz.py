"""A short run of every fuzz target; `python -m bench.fuzz` makes long ones."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
TARGETS = ["images", "manifest", "archive", "upload", "graph", "config", "framing"]


def test_nothing_that_is_read_does_more_than_fail() -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "bench.fuzz", "all", "--plain"),
            *("--runs", "500", "--seconds", "20"),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    told = [line.partition(": nothing found in ")[0] for line in done.stdout.splitlines()]
    assert told == TARGETS
    assert " 0 inputs" not in done.stdout
