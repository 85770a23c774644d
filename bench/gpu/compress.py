"""`pollard train` and `pollard compress` from one end to the other, there and on the processor."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

from bench.gpu.serving import COMMAND
from bench.gpu.setup import Setup, Table, ratio, say

_MODEL = "resnet20-cifar"
_IMAGES = {"full": 4000, "tiny": 100}
_EPOCHS = {"full": 6, "tiny": 1}
_TARGETS = {"cuda": "cuda-fp16", "cpu": "cpu-fp32"}
_ANY_DROP = "100"
"""Few epochs teach little: what is measured is that everything runs, and how long it takes."""


def run(setup: Setup) -> None:
    """Train a parent and compress it, on the device and on the processor."""
    size = "tiny" if setup.tiny else "full"
    data, epochs = f"shapes:{_IMAGES[size]}", str(_EPOCHS[size])
    found: dict[str, dict[str, Any]] = {}
    for device in dict.fromkeys((setup.provider, "cpu")):
        folder = setup.work / f"compress-{device}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        told = found.setdefault(device, {})
        common = ["--data", data, "--epochs", epochs, "--device", device]
        weights = folder / "parent.safetensors"
        told["train_seconds"] = _pollard(
            setup, folder, ["train", _MODEL, *common, "--out", str(weights)]
        )
        setup.keep("devices", found)
        report = folder / "report.json"
        told["compress_seconds"] = _pollard(
            setup, folder,
            [
                "compress", _MODEL, *common, "--weights", str(weights), "--max-drop", _ANY_DROP,
                "--target", _TARGETS[setup.provider], "--cache", str(folder / "cache"),
                "--out", str(folder / "bundle"), "--json", str(report),
            ],
        )  # fmt: skip
        content = json.loads(report.read_text())
        told["stages"] = [[stage["name"], stage["seconds"]] for stage in content["stages"]]
        told["judged_on"] = content["device"]
        told["summary"] = content["summary"]
        setup.keep("devices", found)
        say(f"{device}: {told}")
    judged = found[setup.provider]["judged_on"]
    if setup.provider == "cuda" and not judged["timed"]:
        raise SystemExit(f"nothing was judged on the GPU: {judged['why_not']}")


def _pollard(setup: Setup, folder: Path, arguments: list[str]) -> float:
    """Run a command and return its seconds; what it says goes to a file beside its results."""
    started = time.perf_counter()
    with (folder / "log").open("ab") as log:
        done = subprocess.run(
            [*COMMAND, *arguments],
            stdout=log,
            stderr=subprocess.STDOUT,
            timeout=max(1.0, setup.left),
            check=False,
            env={**os.environ, "POLLARD_CACHE": str(folder / "cache")},
        )
    if done.returncode:
        end = (folder / "log").read_text(errors="replace")[-2000:]
        raise SystemExit(f"{arguments[0]} ended with {done.returncode}: {end}")
    return round(time.perf_counter() - started, 1)


def tables(data: dict[str, Any]) -> list[Table]:
    """Return what both commands took on either device."""
    devices = data.get("devices", {})
    theirs = devices.get("cpu", {})
    rows: list[tuple[object, ...]] = []
    for device, told in devices.items():
        stages: dict[str, float] = {}
        for name, seconds in told.get("stages", ()):
            stages[name] = stages.get(name, 0.0) + seconds
        summary = told.get("summary", {})
        rows.append(
            (
                device,
                told.get("train_seconds", ""),
                told.get("compress_seconds", ""),
                ratio(theirs.get("train_seconds"), told.get("train_seconds")),
                ", ".join(f"{name} {seconds:.1f}" for name, seconds in stages.items()),
                summary.get("shipped", ""),
                f"{summary['speedup']:.2f} ×" if summary.get("speedup") else "not timed",
            )
        )
    columns = (
        *("--device", "train, s", "compress, s", "train against the processor", "stages, s"),
        *("shipped", "against the parent"),
    )
    return [
        Table(
            f"{_MODEL} from training to bundle",
            columns,
            rows,
            "Seconds of whole commands, PyTorch's start included.",
        )
    ]
