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

from pollard.services.up.plan import INFERENCE, MODELS, PREPROCESS

# The others need programs that may be missing, and are slow on a machine that has much to do.
KINDS = "kill,reset,delay,full-disk"


@pytest.mark.timeout(280)
def test_whatever_breaks_no_request_fails_and_all_recovers(tmp_path: Path) -> None:
    seed = random.randrange(1_000_000)
    print(f"to see it again: pollard drill chaos --for 1s --only {','.join(KINDS)} --seed {seed}")
    figures = tmp_path / "chaos.json"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pollard.client.cli", "drill", "chaos", "--for", "1s"),
            *("--only", KINDS, "--load", "10%", "--clients", "2", "--model-mb", "1"),
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
    assert {fault["kind"] for fault in found["faults"]} == set(KINDS.split(","))
    assert found["left_out"] == {}
    assert set(found["memory_mib"]) == {INFERENCE, PREPROCESS, MODELS}
    assert f"Seed {seed}" in done.stderr
    assert "Passed" in done.stdout
