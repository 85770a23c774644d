"""The compression pipeline's judgement on the GPU: golden outputs from a CPU, times, the choice."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from bench.gpu.models import PRUNED_ROUNDING, PRUNED_SHARE, build
from bench.gpu.setup import Setup, Table, say

_IMAGES = 64
_ROUNDS = 12
_ANY_DROP = 100.0
"""The networks are untrained: what they answer is worth nothing, only what it takes."""


def run(setup: Setup) -> None:
    """Compare golden outputs made without a GPU with it, then let the gate choose."""
    from pollard.compress.devices import find_device
    from pollard.runtime.machine import Machine

    device = find_device("cuda-fp16", Machine.detect())
    setup.keep("device", dataclasses.asdict(device))
    say(f"judged on {device.name}" + (f", for {device.why_not}" if device.why_not else ""))
    goldens: dict[str, Any] = {}
    for file in sorted((setup.models / "zoo").glob("*-fp16.onnx")):
        name = file.name.removesuffix("-fp16.onnx")
        goldens[name] = _golden(file, name, setup)
        setup.keep("goldens", goldens)
    say(f"golden outputs: {goldens}")
    _judge(setup, device)
    if setup.provider == "cuda" and not device.timed:
        raise SystemExit(f"nothing was judged on the GPU: {device.why_not}")
    bad = [name for name, told in goldens.items() if told["problem"]]
    if bad:
        raise SystemExit(f"golden outputs differ: {', '.join(bad)}")


def _golden(file: Path, name: str, setup: Setup) -> dict[str, Any]:
    """Make golden outputs as where there is no GPU, and compare as a server does."""
    import io

    from pollard.compress.golden import make_golden
    from pollard.compress.zoo import ENTRIES
    from pollard.runtime.bundle import Golden
    from pollard.runtime.errors import RuntimeFault
    from pollard.runtime.sessions import compare_golden, open_session

    raw = file.read_bytes()
    spec = ENTRIES[name].spec
    packed, tolerance = make_golden(open_session(raw), raw, spec, "cuda-fp16")
    with np.load(io.BytesIO(packed)) as kept:
        arrays = {key: kept[key] for key in kept.files}
    golden = Golden({"image": arrays["input/image"]}, {"logits": arrays["output/logits"]})
    session = open_session(raw, target="cuda-fp16" if setup.provider == "cuda" else "cpu-fp32")
    got = session.run(golden.inputs)["logits"]
    span = float(np.ptp(golden.outputs["logits"])) or 1.0
    problem = ""
    try:
        compare_golden(session, golden, tolerance)
    except RuntimeFault as error:
        problem = error.message
    session.close()
    return {
        "difference": round(float(np.abs(got - golden.outputs["logits"]).max()) / span, 6),
        "allowed": round(tolerance.absolute / span, 6),
        "problem": problem,
    }


def _judge(setup: Setup, device: Any) -> None:
    from pollard.compress import verify
    from pollard.compress.candidates import Candidate
    from pollard.compress.data import Dataset, Part
    from pollard.compress.errors import GateRefused
    from pollard.compress.export import probe_images
    from pollard.compress.macs import count_parameters, total_macs
    from pollard.compress.prune import prune

    parent, spec = build(setup.sizes.image_model, 0)
    pruned = prune(parent, spec, PRUNED_SHARE, rounding=PRUNED_ROUNDING).module
    candidates = [
        Candidate(
            name,
            target,
            setup.models / f"{name}.onnx",
            module,
            spec,
            total_macs(module, spec),
            count_parameters(module),
        )
        for name, target, module in (
            ("parent-fp32", "cpu-fp32", parent),
            ("parent-fp16", "cuda-fp16", parent),
            ("pruned-fp16", "cuda-fp16", pruned),
        )
    ]
    classes = [str(number) for number in range(1000)]
    part = Part("synthetic", probe_images(spec, _IMAGES), np.zeros(_IMAGES, np.int64))
    data = Dataset("synthetic", classes, part, part, part, "")
    measured = verify.measure(candidates, part, data, device, rounds=_ROUNDS)
    setup.keep("candidates", [one.to_json() for one in measured])
    try:
        setup.keep("chosen", verify.select(measured, _ANY_DROP).candidate.name)
    except GateRefused as error:
        setup.keep("chosen", f"refused: {error}")
    say(f"the gate: {setup.data['chosen']}")


def tables(data: dict[str, Any]) -> list[Table]:
    """Return the golden differences, and what the gate measured."""
    made = [
        Table(
            "Golden outputs made on a CPU, on the device; relative to the logits' range",
            ("network", "difference", "allowed", "problem"),
            [
                (name, f"{told['difference']:.2e}", f"{told['allowed']:.2e}", told["problem"])
                for name, told in data.get("goldens", {}).items()
            ],
        )
    ]
    rows: list[tuple[object, ...]] = []
    for told in data.get("candidates", ()):
        times = {each["batch_size"]: each["p50_us"] for each in told["latency"]}
        speed = told["speedup"]
        rows.append(
            (
                told["name"],
                f"{told['macs']:,}",
                ", ".join(f"{batch}: {value / 1e3:.2f} ms" for batch, value in times.items()),
                f"{speed['estimate']:.2f} × ({speed['lower']:.2f})" if speed else "not timed",
                f"{told['agreement_with_torch']:.0%}",
            )
        )
    made.append(
        Table(
            f"The gate on {data['device']['name']}",
            ("file", "MACs", "p50 by batch", "against the parent", "same answer as PyTorch"),
            rows,
            f"Chosen: {data.get('chosen')}. {data['device']['why_not']}",
        )
    )
    return made
