"""`pollard drill chaos`, in short: whatever breaks, no request fails, and all recovers.

The long version is a command; docs/drill.md names it.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pollard.services.drill.stage import left_out
from pollard.services.up.plan import INFERENCE, MODELS, PREPROCESS

EVERYWHERE = ("kill", "reset", "delay", "full-disk")
# These need root, or programs that may be missing.
ELSEWHERE = ("link", "slow-disk", "clock")


def storm(kinds: tuple[str, ...], directory: Path) -> dict[str, Any]:
    """Run it, each kind once; return its figures when nothing went wrong."""
    seed, only = random.randrange(1_000_000), ",".join(kinds)
    print(f"to see it again: pollard drill chaos --for 1s --only {only} --seed {seed}")
    figures = directory / "chaos.json"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pollard.client.cli", "drill", "chaos", "--for", "1s"),
            *("--only", only, "--load", "10%", "--clients", "2", "--model-mb", "1"),
            *("--seed", str(seed), "--json", str(figures)),
        ],
        capture_output=True,
        text=True,
        timeout=270,
        check=False,
    )
    log = directory / "chaos.services.log"
    written = log.read_text() if log.is_file() else ""
    assert done.returncode == 0, done.stdout + done.stderr + written
    assert not written
    assert f"Seed {seed}" in done.stderr
    assert "Passed" in done.stdout
    found: dict[str, Any] = json.loads(figures.read_text())
    assert found["passed"]
    assert found["requests"] > 20
    assert (found["failed"], found["wrong"], found["stale"]) == (0, 0, 0)
    assert set(found["memory_mib"]) == {INFERENCE, PREPROCESS, MODELS}
    return found


@pytest.mark.long
@pytest.mark.timeout(280)
def test_whatever_breaks_no_request_fails_and_all_recovers(tmp_path: Path) -> None:
    found = storm(EVERYWHERE, tmp_path)
    assert {fault["kind"] for fault in found["faults"]} == set(EVERYWHERE)
    assert found["left_out"] == {}


@pytest.mark.long
@pytest.mark.timeout(280)
def test_pulled_cables_slow_disks_and_wrong_clocks_are_survived(tmp_path: Path) -> None:
    missing = left_out(ELSEWHERE)
    if len(missing) == len(ELSEWHERE):
        pytest.skip("; ".join(missing.values()))
    found = storm(ELSEWHERE, tmp_path)
    assert {fault["kind"] for fault in found["faults"]} == set(ELSEWHERE) - set(missing)
    assert found["left_out"] == missing
