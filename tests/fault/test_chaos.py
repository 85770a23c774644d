"""`pollard drill chaos`, in short: whatever breaks, no request fails, and all recovers.

The long version is a command; docs/drill.md names it.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from pollard.services.drill.faults import KINDS
from pollard.services.up.plan import INFERENCE, MODELS, PREPROCESS


@pytest.mark.timeout(280)
def test_whatever_breaks_no_request_fails_and_all_recovers(tmp_path: Path) -> None:
    seed = random.randrange(1_000_000)
    print(f"to see it again: pollard drill chaos --for 1s --seed {seed}")
    figures = tmp_path / "chaos.json"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pollard.client.cli", "drill", "chaos", "--for", "1s"),
            *("--load", "10%", "--clients", "2", "--model-mb", "1"),
            *("--seed", str(seed), "--json", str(figures)),
        ],
        capture_output=True,
        text=True,
        timeout=270,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(figures.read_text())
    assert found["passed"]
    assert found["requests"] > 20
    assert (found["failed"], found["wrong"], found["stale"]) == (0, 0, 0)
    # What this machine lacks is said, and the rest was done.
    done_kinds = {fault["kind"] for fault in found["faults"]}
    assert done_kinds | set(found["left_out"]) == set(KINDS)
    assert {"kill", "reset", "delay", "full-disk"} <= done_kinds
    assert all(why for why in found["left_out"].values())
    assert set(found["memory_mib"]) == {INFERENCE, PREPROCESS, MODELS}
    assert f"Seed {seed}" in done.stderr
    assert "Passed" in done.stdout
