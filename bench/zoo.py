"""Every network of the zoo, float and compressed: size, MACs, latency, and accuracy where known.

    python -m bench.zoo [NAME …] [--cifar ZIP] [--weights FOLDER] [--prune 0.5] [--out FILE]
    python -m bench.zoo --time [NAME …] [--seconds 100]

The first makes the files and judges them, each network in a process of its own; the second times
them, which needs a quiet machine and little of its time: it begins with no further network after
that many seconds, and goes on with the rest when it is called again. Figures and files are kept in
build/bench/zoo, so that a run goes on where it was, and the table is made of all that is there
(`--fresh` does it anew, `--table` only writes it); networks that are not there keep what the
table said of them. Networks without weights have random ones: size
and latency hardly depend on them, accuracy is left out. Weights are FOLDER/NAME*.pt or
.safetensors; small-cnn-28 is trained here, three times, on three splits of its images.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bench.environment import environment, heading

KEPT = Path("build/bench/zoo")
RESULTS = Path("docs/results.md")

# Images that 8-bit ranges are measured on: data where there are some, noise elsewhere.
_CALIBRATION = 256
_NOISE = 8

# Rounds of the timing: as many as fill so many seconds, within these.
_ROUNDS = (5, 40)
_ROUND_SECONDS = 6.0

# Share of the squared weights that factorised dense layers keep.
_ENERGY = 0.5

_DIGITS_SPLITS = 3

_PREFACE = """Made by `python -m bench.zoo`; change that, not this. One image, ONNX Runtime with one
and two threads, medians of files in turns.

- *pruned*: half of the multiply-accumulates are gone, and the network was **not trained again**, so
  that it shows size and latency only.
- *low-rank*: the same with its large dense layers factorised, half of their squared weights kept,
  where a network has such; not trained again either.
- Accuracy is that of the held-out images, with its 95 % interval. Networks without it had random
  weights, on which size and latency hardly depend.
- 8-bit ranges are min-max of some images; `pollard compress` chooses more, and trains again.
- small-cnn-28 is trained by the benchmark itself, with the defaults of `pollard train`. The weights
  of the CIFAR ResNets are given, and have seen all training images, which are re-encoded as JPEG.
  mobilenet-v2-cifar and vgg16-bn-cifar were trained here, for 4 epochs and for two thirds of one
  (`bench/results` tells how); published figures come of hundreds. All are judged on one
  class-balanced half of the test images: the one that `pollard compress` reports its figures of,
  because it chooses by the other half."""


def make(name: str, cifar: Path | None, weights: Path | None, ratio: float) -> dict[str, Any]:
    """Make the files of one network, and return their figures but for the latency."""
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
    from pollard.compress.zoo import find
    from pollard.runtime.machine import Machine
    from pollard.runtime.sessions import open_session

    started = time.monotonic()
    entry = find(name)
    spec = entry.spec
    file = _weights_of(name, weights)
    work = KEPT / name
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    splits: list[dict[str, Any]] = []
    if name == "small-cnn-28":
        file = work / "digits.safetensors"
        splits = _digits(file)
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
            "path": str(made.path),
            "target": made.target,
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
        "splits": splits,
        "files": rows,
        "seconds": time.monotonic() - started,
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        # As it was after the work, whose own load is at most the number of cores.
        "environment": environment(),
    }


def _digits(out: Path) -> list[dict[str, Any]]:
    """Train small-cnn-28 on three splits; the weights of the usual one are left in ``out``."""
    from pollard.compress import data
    from pollard.compress.train import train

    found, usual = [], data.SPLIT_SEED
    for seed in range(_DIGITS_SPLITS):
        started = time.monotonic()
        data.SPLIT_SEED = usual + seed
        try:
            path = out if seed == 0 else out.with_name(f"digits-{seed}.safetensors")
            right = train("small-cnn-28", "digits", path, seed=seed).accuracy.to_json()
        finally:
            data.SPLIT_SEED = usual
        found.append({"accuracy": right, "seconds": time.monotonic() - started})
    return found


def take_times(one: dict[str, Any]) -> None:
    """Time the files of one network, with one thread and with two, into its figures."""
    import numpy as np

    from pollard.compress.export import probe_images
    from pollard.compress.zoo import find
    from pollard.runtime.measure import interleaved
    from pollard.runtime.sessions import open_session

    image = probe_images(find(one["name"]).spec, 1, seed=2)
    one["timed"] = environment()
    for threads in (1, 2):
        sessions = [
            open_session(Path(row["path"]), target=row["target"], intra_op_threads=threads)
            for row in one["files"]
        ]
        calls = [
            functools.partial(session.run, {session.inputs[0].name: image}) for session in sessions
        ]
        started = time.perf_counter()
        for call in calls:
            call()
        once = time.perf_counter() - started
        least, most = _ROUNDS
        rounds = max(least, min(most, int(_ROUND_SECONDS / once)))
        times = interleaved(calls, rounds=rounds, warmup=1)
        for row, taken in zip(one["files"], times, strict=True):
            row[f"latency_us_{threads}"] = float(np.median(taken))
        del sessions, calls


def _weights_of(name: str, folder: Path | None) -> Path | None:
    if folder is None:
        return None
    found = [
        path
        for path in sorted(folder.glob(f"{name}*"))
        if path.suffix in (".safetensors", ".pt", ".pth")
    ]
    return found[0] if found else None


def render(found: list[dict[str, Any]], before: str, order: list[str]) -> str:
    """Return the table as Markdown.

    Args:
        found: Figures of the networks that were made.
        before: The table as it was; what it says of other networks is kept.
        order: Names of all networks.
    """
    sections, machines, environments = _read(before)
    sections |= {one["name"]: "\n".join(_section(one)) for one in found}
    machines |= {one["name"]: _machine(one) for one in found}
    environments.append(heading(found[-1]["environment"]).partition(" Load average")[0])
    lines = ["# Results of the zoo", "", _PREFACE, ""]
    lines += [sections[name] for name in order if name in sections]
    lines += ["## Machine", ""]
    lines += [machines[name] for name in order if name in machines]
    for environment_line in dict.fromkeys(environments):
        lines += ["", environment_line]
    return "\n".join([*lines, ""])


def _read(table: str) -> tuple[dict[str, str], dict[str, str], list[str]]:
    """Return the sections and the lines on the machine by network, and the environments."""
    parts = re.split(r"^## (\S+)\n", table, flags=re.MULTILINE)
    sections = {
        name: f"## {name}\n{text}" for name, text in zip(parts[1::2], parts[2::2], strict=True)
    }
    told = [line for line in sections.pop("Machine", "").splitlines()[1:] if line]
    machines = {line[2:].partition(":")[0]: line for line in told if line.startswith("- ")}
    sections = {name: text.rstrip("\n") + "\n" for name, text in sections.items()}
    return sections, machines, [line for line in told if not line.startswith("- ")]


def _machine(one: dict[str, Any]) -> str:
    peak, said = one["peak_memory_bytes"] / 2**30, one["environment"]
    timed = one.get("timed")
    told = "not timed"
    if timed:
        told = f"timed {timed['date']}, load average before it {timed['load_average'][0]}"
    return (
        f"- {one['name']}: made in {one['seconds']:.0f} s (load average at the end "
        f"{said['load_average'][0]}), peak memory {peak:.1f} GiB; {told}"
    )


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
            f"{row[key] / 1000:.3f} ms ({first[key] / row[key]:.2f} ×)" if key in row else "–"
            for key in ("latency_us_1", "latency_us_2")
        ]
        lines.append(
            f"| {row['file']} | {row['size_bytes'] / 1e6:.2f} MB | {row['parameters']:,} | "
            f"{row['macs']:,} | {times[0]} | {times[1]} | {told} |"
        )
    if one.get("splits"):
        shares = [each["accuracy"]["value"] for each in one["splits"]]
        lines += [
            "",
            f"Trained on {len(shares)} stratified splits: "
            + ", ".join(
                f"{each['accuracy']['value']:.2%} in {each['seconds']:.0f} s"
                for each in one["splits"]
            )
            + f"; mean {sum(shares) / len(shares):.2%}, n {one['splits'][0]['accuracy']['samples']}"
            " each.",
        ]
    if one["not_pruned"]:
        lines += ["", f"Not pruned: {one['not_pruned']}"]
    return [*lines, ""]


def _keep(one: dict[str, Any]) -> None:
    KEPT.mkdir(parents=True, exist_ok=True)
    (KEPT / f"{one['name']}.json").write_text(json.dumps(one, indent=2) + "\n")


def _time_all(names: list[str], seconds: float, fresh: bool) -> None:
    """Time what has been made and is not timed yet, as long as there is time."""
    end = time.monotonic() + seconds
    for name in names:
        path = KEPT / f"{name}.json"
        if time.monotonic() > end or not path.exists():
            continue
        one = json.loads(path.read_text())
        if fresh or "timed" not in one:
            print(name, flush=True)
            take_times(one)
            _keep(one)


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
    parser.add_argument("--time", action="store_true", help="time what has been made")
    parser.add_argument("--seconds", type=float, default=100.0)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    names = [find(name.removeprefix("zoo:")).name for name in given.names] or list(ENTRIES)
    if given.one:
        figures = make(names[0], given.cifar, given.weights, given.prune)
        _keep(figures)
        return
    failed = []
    if given.time:
        _time_all(names, given.seconds, given.fresh)
    for name in [] if given.table or given.time else names:
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
        before = given.out.read_text(encoding="utf-8") if given.out.exists() else ""
        given.out.write_text(render(found, before, list(ENTRIES)), encoding="utf-8")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
