"""Every network of the zoo, float and compressed: size, MACs, latency, and accuracy where known.

    python -m bench.zoo [NAME …] [--cifar ZIP] [--weights FOLDER] [--prune 0.5] [--out FILE]

Each network runs in a process of its own; its figures are kept in build/bench/zoo, so that a run
goes on where it was, and the table is made of all that is there (`--fresh` measures anew, `--table`
only writes it). Networks without weights have random ones: size and latency hardly depend on them,
accuracy is left out. Weights are FOLDER/NAME*.pt or .safetensors; small-cnn-28 is trained here.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.environment import environment, heading

KEPT = Path("build/bench/zoo")
RESULTS = Path("docs/results.md")

# Images that 8-bit ranges are measured on: data where there are some, noise elsewhere.
_CALIBRATION = 256
_NOISE = 8

_ROUNDS = 20

# Share of the squared weights that factorised dense layers keep.
_ENERGY = 0.5

_PREFACE = """Made by `python -m bench.zoo`; change that, not this. One image, ONNX Runtime with one
and two threads, medians of files in turns.

- *pruned*: half of the multiply-accumulates are gone, and the network was **not trained again**, so
  that it shows size and latency only.
- *low-rank*: the same with its large dense layers factorised, half of their squared weights kept,
  where a network has such; not trained again either.
- Accuracy is that of the held-out images, with its 95 % interval. Networks without it had random
  weights, on which size and latency hardly depend.
- 8-bit ranges are min-max of some images; `pollard compress` chooses more, and trains again.
- small-cnn-28 is trained by the benchmark itself. The CIFAR networks' weights are given; their
  images are re-encoded as JPEG."""


def measure(name: str, cifar: Path | None, weights: Path | None, ratio: float) -> dict[str, Any]:
    """Return the figures of one network."""
    import numpy as np
    import torch

    from pollard.compress.candidates import build
    from pollard.compress.data import Dataset, Part, load_data
    from pollard.compress.dense import DensePlan, factorize_by_energy
    from pollard.compress.errors import CompressionError
    from pollard.compress.evaluate import (
        accuracy,
        predict_part,
        right_answers,
        session_predictor,
        torch_predictor,
    )
    from pollard.compress.export import probe_images
    from pollard.compress.models import load_model
    from pollard.compress.prune import prune
    from pollard.compress.quantize import QuantizeConfig
    from pollard.compress.train import TrainOptions, train
    from pollard.compress.zoo import find
    from pollard.runtime.machine import Machine
    from pollard.runtime.measure import interleaved
    from pollard.runtime.sessions import open_session

    started = time.monotonic()
    entry = find(name)
    spec = entry.spec
    file = _weights_of(name, weights)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        if name == "small-cnn-28":
            file = work / "digits.safetensors"
            train(name, "digits", file, options=TrainOptions())
        data: Dataset | None = None
        if file is not None and name == "small-cnn-28":
            data = load_data("digits", spec)
        elif file is not None and cifar is not None and spec.height == 32:
            data = load_data(cifar, spec)
        torch.manual_seed(0)
        module = load_model(entry.name, file if data else None, classes=entry.classes).module
        if data is None:
            images = probe_images(spec, _NOISE, seed=1)
            part = Part("noise", images, np.zeros(len(images), np.int64))
        else:
            part = Part("train", data.train.images[:_CALIBRATION], data.train.labels[:_CALIBRATION])
        config = QuantizeConfig(len(part), reduce_range=not Machine.detect().has_vnni)
        files = build("parent", module, spec, work, part, config)
        left_out, ranks = "", list[DensePlan]()
        try:
            cut = prune(module, spec, ratio)
            files += build("pruned", cut.module, spec, work, part, config)
            # Random weights have no low rank; trained ones keep more of themselves.
            ranks = factorize_by_energy(cut.module, spec, _ENERGY)
            if any(plan.rank for plan in ranks):
                files += build("low-rank", cut.module, spec, work, part, config)
        except CompressionError as error:
            left_out = str(error)
        rows: list[dict[str, Any]] = []
        for made in files:
            row: dict[str, Any] = {
                "file": made.name,
                "size_bytes": made.size_bytes,
                "macs": made.macs,
                "parameters": made.parameters,
                "accuracy": None,
            }
            if made.name.startswith("low-rank"):
                row["ranks"] = {plan.name: plan.rank for plan in ranks if plan.rank}
            # What was cut and not trained again answers nothing; it is there for its latency.
            if data is not None and made.name.startswith("parent"):
                logits = predict_part(session_predictor(open_session(made.path)), data.held_out)
                right = right_answers(logits, data.held_out)
                row["accuracy"] = accuracy(right, data.held_out).to_json()
            rows.append(row)
        image = probe_images(spec, 1, seed=2)
        for threads in (1, 2):
            sessions = [
                open_session(made.path, target=made.target, intra_op_threads=threads)
                for made in files
            ]
            calls = [
                lambda s=session: s.run({s.inputs[0].name: image})  # type: ignore[misc]
                for session in sessions
            ]
            times = interleaved(calls, rounds=_ROUNDS, warmup=2)
            for row, taken in zip(rows, times, strict=True):
                row[f"latency_us_{threads}"] = float(np.median(taken))
            del sessions, calls
        parent_accuracy = None
        if data is not None:
            logits = predict_part(torch_predictor(module, spec), data.held_out)
            right = right_answers(logits, data.held_out)
            parent_accuracy = accuracy(right, data.held_out).to_json()
    return {
        "name": name,
        "input": f"{spec.height}×{spec.width}×{spec.channels}",
        "classes": entry.classes,
        "pruned_share": ratio,
        "not_pruned": left_out,
        "torch_accuracy": parent_accuracy,
        "files": rows,
        "seconds": time.monotonic() - started,
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        # As it was after the work, whose own load is at most the number of cores.
        "environment": environment(),
    }


def _weights_of(name: str, folder: Path | None) -> Path | None:
    if folder is None:
        return None
    found = [
        path
        for path in sorted(folder.glob(f"{name}*"))
        if path.suffix in (".safetensors", ".pt", ".pth")
    ]
    return found[0] if found else None


def render(found: list[dict[str, Any]]) -> str:
    """Return the table as Markdown."""
    lines = ["# Results of the zoo", "", _PREFACE, ""]
    for one in found:
        lines += _section(one)
    lines += ["## Machine", ""]
    for one in found:
        peak, said = one["peak_memory_bytes"] / 2**30, one["environment"]
        busy = said["load_average"][0] > 1.5 * said["cores"]
        lines.append(
            f"- {one['name']}: {one['seconds']:.0f} s, peak memory {peak:.1f} GiB, load average at "
            f"the end {said['load_average'][0]}"
            + ("; **the machine was busy with other work, so its times tell little**" * busy)
        )
    lines += ["", heading(found[-1]["environment"]).partition(" Load average")[0], ""]
    return "\n".join(lines)


def _section(one: dict[str, Any]) -> list[str]:
    lines = [
        f"## {one['name']}",
        "",
        f"{one['input']}, {one['classes']} classes",
        "",
        "| file | size | parameters | MACs | 1 thread | 2 threads | accuracy |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    first = one["files"][0]
    for row in one["files"]:
        share = row["accuracy"]
        told = "–"
        if share:
            interval = f"{share['lower']:.2%}–{share['upper']:.2%}"
            told = f"{share['value']:.2%} ({interval}, n {share['samples']})"
        times = [
            f"{row[key] / 1000:.3f} ms ({first[key] / row[key]:.2f} ×)"
            for key in ("latency_us_1", "latency_us_2")
        ]
        lines.append(
            f"| {row['file']} | {row['size_bytes'] / 1e6:.2f} MB | {row['parameters']:,} | "
            f"{row['macs']:,} | {times[0]} | {times[1]} | {told} |"
        )
    if one["not_pruned"]:
        lines += ["", f"Not pruned: {one['not_pruned']}"]
    return [*lines, ""]


def main() -> None:
    """Run what is asked for, each in a process, and write the table."""
    from pollard.compress.zoo import ENTRIES, find

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--cifar", type=Path, help="CIFAR-10 as train/CLASS/* and test/CLASS/*")
    parser.add_argument("--weights", type=Path, help="folder with NAME*.pt or NAME*.safetensors")
    parser.add_argument("--prune", type=float, default=0.5)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--fresh", action="store_true")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    names = [find(name.removeprefix("zoo:")).name for name in given.names] or list(ENTRIES)
    if given.one:
        figures = measure(names[0], given.cifar, given.weights, given.prune)
        KEPT.mkdir(parents=True, exist_ok=True)
        (KEPT / f"{names[0]}.json").write_text(json.dumps(figures, indent=2) + "\n")
        return
    failed = []
    for name in [] if given.table else names:
        if (KEPT / f"{name}.json").exists() and not given.fresh:
            continue
        print(name, flush=True)
        options = [
            *(("--cifar", str(given.cifar)) if given.cifar else ()),
            *(("--weights", str(given.weights)) if given.weights else ()),
        ]
        done = subprocess.run(
            [sys.executable, "-m", "bench.zoo", name, "--one", *options, "--prune",
             str(given.prune)],
            check=False,
        )  # fmt: skip
        if done.returncode:
            failed.append(name)
    found = [
        json.loads((KEPT / f"{name}.json").read_text())
        for name in ENTRIES
        if (KEPT / f"{name}.json").exists()
    ]
    if found:
        given.out.write_text(render(found), encoding="utf-8")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
