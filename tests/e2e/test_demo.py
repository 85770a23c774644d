"""`pollard demo`: its figures, its exit codes, and that it cleans up."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from pollard.runtime.bundle import Bundle

BundleMaker = Callable[..., Bundle]
DEMO = [sys.executable, "-m", "pollard.client.cli", "demo"]

KEYS = {
    "requests_total",
    "requests_failed",
    "swaps",
    "p50_ms",
    "p99_ms",
    "p99_during_swap_ms",
    "accuracy_parent",
    "accuracy_compressed",
    "size_parent_bytes",
    "size_compressed_bytes",
    "latency_parent_ms",
    "latency_compressed_ms",
}


@pytest.fixture
def bundles(make_bundle: BundleMaker) -> Path:
    """A directory with the two bundles of a demo, which make it skip training and compression."""
    side = {"accuracy": {"samples": 445, "lower": 0.1, "upper": 0.2}}
    report = {
        "summary": {
            "shipped": "pruned-fp32",
            "accuracy_parent": 0.15,
            "accuracy_compressed": 0.15,
            "size_parent_bytes": 1000,
            "size_compressed_bytes": 500,
            "latency_parent_ms": 0.2,
            "latency_compressed_ms": 0.1,
        },
        "parent": side,
        "chosen": side,
    }
    files = {"report.json": json.dumps(report).encode(), "report.html": b"<html></html>"}
    for name, seed in (("parent", 1), ("compressed", 2)):
        made = make_bundle(name=name, size=28, classes=10, seed=seed, files=files)
    return made.path.parent


@pytest.mark.long
def test_nothing_fails_while_it_swaps(bundles: Path, tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    done = subprocess.run(
        [
            *DEMO,
            *("--out", str(bundles), "--reuse", "--json", str(figures)),
            *("--seconds", "3", "--swaps", "3"),
        ],
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(figures.read_text())
    assert found.keys() >= KEYS
    assert found["requests_failed"] == 0
    assert found["requests_total"] > 0
    assert found["swaps"] == 3
    assert set(found["requests_by_revision"]) == {"1", "2"}
    assert str(bundles / "compressed" / "report.html") in done.stdout.replace("\n", "")


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_leaves_no_process_when_it_is_interrupted(
    bundles: Path, tmp_path: Path, number: signal.Signals
) -> None:
    with (tmp_path / "out.txt").open("wb") as out:
        process = subprocess.Popen(
            [*DEMO, "--out", str(bundles), "--reuse", "--seconds", "600"], stdout=out, stderr=out
        )
    give_up = time.monotonic() + 100
    while b"clients begin" not in (tmp_path / "out.txt").read_bytes():
        assert process.poll() is None, (tmp_path / "out.txt").read_text()
        assert time.monotonic() < give_up
        time.sleep(0.1)
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) >= 4
    process.send_signal(number)
    assert process.wait(timeout=60) == 130
    _, alive = psutil.wait_procs(children, timeout=15)
    assert alive == []
    said = (tmp_path / "out.txt").read_text()
    assert "interrupted" in said
    assert "Traceback" not in said


@pytest.mark.skipif(
    "POLLARD_TEST_DEMO" not in os.environ, reason="takes minutes; `make demo` runs it as a whole"
)
@pytest.mark.timeout(600)
def test_the_whole_of_it(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    done = subprocess.run(
        [*DEMO, "--out", str(tmp_path / "out"), "--json", str(figures)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(figures.read_text())
    assert found["requests_failed"] == 0
    assert found["accuracy_parent"] >= 0.985
    assert found["accuracy_parent"] - found["accuracy_compressed"] <= 0.010
    assert found["size_compressed_bytes"] <= 0.15 * found["size_parent_bytes"]
    assert found["latency_compressed_ms"] <= 0.60 * found["latency_parent_ms"]
