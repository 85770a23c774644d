"""Every network of the zoo on the device: float32 with and without TF32, float16."""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from bench.gpu.sessions import Array, make_session
from bench.gpu.setup import Setup, Table, say

LIMITS = {"fp32": 1e-3, "fp32, TF32": 5e-2, "fp16": 5e-2}
"""Largest difference from PyTorch's float32 logits that passes, relative to their range."""

_OWN_LOSS = 2.0
"""Where float16 costs a network more by itself, emulated on the CPU, a GPU may differ by so many
times that: another order of summation is as good as this one."""


def run(setup: Setup) -> None:
    """Compare one network after the other; a failure of one is noted, and the next begins."""
    found: dict[str, Any] = {}
    files = sorted((setup.models / "zoo").glob("*-fp32.onnx"))
    if setup.only_zoo:
        files = [file for file in files if file.name.removesuffix("-fp32.onnx") in setup.only_zoo]
    if not files:
        raise RuntimeError(f"no networks in {setup.models}; run --only models first")
    for file in files:
        name = file.name.removesuffix("-fp32.onnx")
        try:
            found[name] = _compare(setup, name)
        except Exception as error:
            found[name] = {"problem": f"{type(error).__name__}: {error}"}
        say(f"{name}: {found[name]}")
        setup.keep("networks", found)
    bad = [name for name, told in found.items() if "problem" in told or not told["passed"]]
    if bad:
        raise SystemExit(f"not correct: {', '.join(bad)}")


def _compare(setup: Setup, name: str) -> dict[str, Any]:
    folder = setup.models / "zoo"
    with np.load(folder / f"{name}.npz") as kept:
        images, logits, rounded = kept["images"], kept["logits"], kept["rounded"]
    told: dict[str, Any] = {}
    cpu = _answers(folder / f"{name}-fp32.onnx", "cpu", {}, images)
    told["cpu"] = _difference(cpu, logits)
    told["fp16 on the CPU"] = _difference(rounded, logits)
    for kind, options in (
        ("fp32", {"use_tf32": "0"}),
        ("fp32, TF32", {"use_tf32": "1"}),
        ("fp16", {}),
    ):
        file = folder / f"{name}-{kind[:4]}.onnx"
        started = time.perf_counter()
        got = _answers(file, setup.provider, options, images)
        told[kind] = _difference(got, logits)
        told[f"{kind} top-1"] = float(np.mean(got.argmax(1) == logits.argmax(1)))
        told[f"{kind} seconds"] = round(time.perf_counter() - started, 2)
    told["nodes"] = _places(folder / f"{name}-fp16.onnx", setup, images)
    # Written so that NaN fails.
    limits = {**LIMITS, "fp16": max(LIMITS["fp16"], _OWN_LOSS * told["fp16 on the CPU"])}
    told["passed"] = all(told[kind] <= limit for kind, limit in limits.items())
    return told


def _answers(file: Path, provider: str, options: dict[str, str], images: Array) -> Array:
    session = make_session(file, provider, options)
    answers: Array = session.run(None, {session.get_inputs()[0].name: images})[0]
    return answers


def _difference(got: Array, want: Array) -> float:
    return float(np.abs(got.astype(np.float64) - want).max() / (np.ptp(want) or 1.0))


def _places(file: Path, setup: Setup, images: Array) -> dict[str, int]:
    """Return how many nodes ran where; those on the CPU cost a copy to it and back."""
    session = make_session(file, setup.provider, profile=setup.work / f"profile-{file.stem}")
    session.run(None, {session.get_inputs()[0].name: images})
    profile = Path(session.end_profiling())
    events = json.loads(profile.read_text())
    profile.unlink()
    counts = Counter(
        event["args"]["provider"].removesuffix("ExecutionProvider")
        for event in events
        if event.get("cat") == "Node" and event.get("args", {}).get("provider")
    )
    return dict(counts)


def tables(data: dict[str, Any]) -> list[Table]:
    """Return the differences, with the limits."""
    rows: list[tuple[object, ...]] = []
    for name, told in data.get("networks", {}).items():
        if "problem" in told:
            rows.append((name, told["problem"], *[""] * (len(LIMITS) + 4)))
            continue
        rows.append(
            (
                name,
                f"{told['cpu']:.1e}",
                *(f"{told[kind]:.1e}" for kind in LIMITS),
                f"{told['fp16 on the CPU']:.1e}",
                f"{told['fp16 top-1']:.0%}",
                ", ".join(f"{count} {place}" for place, count in told["nodes"].items()),
                "yes" if told["passed"] else "NO",
            )
        )
    limits = [f"{kind} (≤ {limit:g})" for kind, limit in LIMITS.items()]
    return [
        Table(
            "Largest difference from PyTorch, relative to the logits' range",
            (
                *("network", "CPU fp32", *limits, "fp16 emulated on the CPU"),
                *("fp16 top-1 agrees", "nodes run", "passed"),
            ),
            rows,
            f"Where float16 costs a network more by itself, {_OWN_LOSS:g} × its loss in emulation "
            "is allowed: these networks are untrained.",
        )
    ]
