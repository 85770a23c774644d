"""`pollard drill swap`, in short: nothing fails while revisions are swapped, and nothing is lost
when services are killed in the middle of anything.

The long versions are commands; docs/drill.md names them.
"""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from pollard.services.up.plan import INFERENCE, MODELS, PREPROCESS

DRILL = [sys.executable, "-m", "pollard.client.cli", "drill", "swap"]

Drill = Callable[..., tuple[dict[str, Any], subprocess.CompletedProcess[str]]]


@pytest.fixture
def drill(tmp_path: Path) -> Drill:
    """Runs the drill; returns its figures and the finished process."""

    def run(*arguments: str) -> tuple[dict[str, Any], subprocess.CompletedProcess[str]]:
        figures = tmp_path / "figures.json"
        done = subprocess.run(
            [*DRILL, *arguments, "--json", str(figures)],
            capture_output=True,
            text=True,
            timeout=170,
            check=False,
        )
        return json.loads(figures.read_text()), done

    return run


@pytest.mark.long
def test_no_request_fails_or_is_answered_wrongly_while_revisions_are_swapped(drill: Drill) -> None:
    # Far from what the services can answer: other tests may take most of the machine.
    found, done = drill(
        *("--swaps", "10", "--pause", "0.6", "--drain", "0.6", "--model-mb", "1"),
        *("--clients", "4", "--load", "30%"),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert found["passed"]
    assert found["swaps"] == 10
    assert (found["failed"], found["wrong"], found["stale"]) == (0, 0, 0)
    assert found["requests"] > 500
    assert set(found["requests_by_revision"]) == {"1", "2"}
    for part in ("latency_in_swaps_ms", "latency_out_of_swaps_ms"):
        assert found[part]["count"] > 100
    assert found["rate_per_second"] == pytest.approx(0.3 * found["capacity_per_second"])
    assert set(found["memory_mib"]) == {INFERENCE, PREPROCESS, MODELS}
    assert "Passed" in done.stdout


@pytest.mark.long
@pytest.mark.timeout(200)
def test_nothing_is_lost_when_services_are_killed_in_the_middle_of_anything(drill: Drill) -> None:
    seed = random.randrange(1_000_000)
    print(f"to see it again: pollard drill swap --kill random --kills 8 --seed {seed}")
    found, done = drill(
        *("--swaps", "1", "--load", "closed", "--clients", "2", "--model-mb", "1"),
        *("--kill", "random", "--kills", "8", "--seed", str(seed)),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"seed {seed}" in done.stderr
    assert found["passed"]
    assert len(found["kills"]) == 8
    assert {kill["service"] for kill in found["kills"]} <= {INFERENCE, PREPROCESS, MODELS}


@pytest.mark.long
def test_it_ends_cleanly_when_it_is_interrupted(tmp_path: Path) -> None:
    with (tmp_path / "out.txt").open("wb") as out:
        process = subprocess.Popen(
            [*DRILL, "--swaps", "1000", "--pause", "0.1", "--model-mb", "1", "--load", "closed"],
            stdout=out,
            stderr=out,
        )
    children: dict[int, psutil.Process] = {}
    give_up = time.monotonic() + 100
    while b"Services of the drill" not in (tmp_path / "out.txt").read_bytes():
        assert process.poll() is None, (tmp_path / "out.txt").read_text()
        assert time.monotonic() < give_up
        time.sleep(0.1)
    time.sleep(2.0)
    for child in psutil.Process(process.pid).children(recursive=True):
        children[child.pid] = child
    assert len(children) >= 3
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    _, alive = psutil.wait_procs(list(children.values()), timeout=15)
    assert alive == []
    said = (tmp_path / "out.txt").read_text()
    assert "Interrupted after" in said
    assert "Traceback" not in said


@pytest.mark.long
def test_a_time_that_is_over_is_told_and_is_no_success(drill: Drill, tmp_path: Path) -> None:
    found, done = drill(
        *("--swaps", "1000", "--model-mb", "1", "--load", "closed"),
        *("--clients", "2", "--max-time", "8s"),
    )
    assert done.returncode == 1
    assert "Stopped by --max-time" in found["stopped"]
    assert not found["passed"]
    # Of a drill that failed what the services wrote is kept.
    log = tmp_path / "figures.services.log"
    assert f"The services' log is kept in {log}" in done.stderr
    assert log.is_file()
