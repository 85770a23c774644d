"""The results of `bench.compression` as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bench.environment import heading

_WANTED = {
    "ptq-resnet20": "at most 0.2 points (upper bound 0.4), ≥ 2.2 ×, size ≤ 0.29",
    "ptq-resnet56": "at most 0.2 points (upper bound 0.4), ≥ 2.4 ×, size ≤ 0.29",
    "pruned-resnet20": "",
    "pruned-resnet56": "float: MACs ≤ 1/2, ≥ 1.9 ×, at most 1.0 point",
    "together-resnet56": "≥ 4 ×, ≥ 1.6 × the unpruned 8-bit file, at most 1.0 point, size ≤ 1/6",
}


def render(content: Mapping[str, Any]) -> str:
    """Return the page."""
    cells: Mapping[str, Any] = content["cells"]
    last = max(cells.values(), key=lambda cell: str(cell["environment"]["date"]))
    parts = [
        "# Compression: accuracy for time",
        heading(last["environment"]),
        "CIFAR-10 as JPEG files. Latency: onnxruntime, one thread, one image, interleaved with the "
        "parent's float file; × is how many times faster, with the 95 % interval of the median. "
        "Points lost are paired against the parent on the same images, with their 95 % interval. "
        "Every choice was made on one half of `test/`; the figures are from the other (n = 5,000), "
        "except for quantization alone, which chooses nothing (n = 10,000).",
        _loads(cells),
    ]
    for name, cell in cells.items():
        if not name.startswith("equal-"):
            parts += _cell(name, cell)
    parts += _equal({n: c for n, c in cells.items() if n.startswith("equal-")})
    if content["missing"]:
        parts.append(f"Not measured yet: {', '.join(content['missing'])}.")
    return "\n\n".join(parts) + "\n"


def _loads(cells: Mapping[str, Any]) -> str:
    timed = [cell["timed"]["load_average"][0] for cell in cells.values() if "timed" in cell]
    load = [cell["environment"]["load_average"][0] for cell in cells.values()]
    told = (
        f"The accuracies were measured while other work ran (load averages of {min(load)} to "
        f"{max(load)}), and the latencies beside them are of little worth: read the clock's × only "
        "where it agrees with that of the processor."
    )
    if timed:
        told += (
            " The column 'of the processor' is the time that the calling thread itself used, from "
            f"a later run at load averages of {min(timed)} to {max(timed)}; where there is none, "
            "no timing can be relied on."
        )
    return told


def _cell(name: str, cell: Mapping[str, Any]) -> list[str]:
    about = []
    if "budgets" in cell:
        about.append(
            f"Budget {', '.join(cell['budgets'])}; recovered for {cell['epochs']} epochs over "
            f"{cell['train_images']:,} training images, seed {cell['seed']}; MACs "
            f"÷ {cell['macs'][0] / cell['macs'][1]:.2f}; blocks removed: "
            f"{', '.join(cell['blocks']) or 'none'}."
        )
    if cell.get("reduced_range"):
        about.append(
            "This processor has no VNNI: weights have 7 bits, as its 16-bit sums would saturate."
        )
    if wanted := _WANTED.get(name):
        about.append(f"To reach: {wanted}.")
    return [f"## {name}", " ".join(about), _files(cell["files"])]


def _files(files: Sequence[Mapping[str, Any]]) -> str:
    parent = files[0]
    rows = []
    for one in files:
        drop, speed, accuracy = one["drop_points"], one["speedup"], one["accuracy"]
        first = one is parent
        rows.append(
            (
                one["name"],
                f"{accuracy['value']:.2%} ({accuracy['lower']:.2%} to {accuracy['upper']:.2%})",
                "–"
                if first
                else f"{drop['estimate']:+.2f} ({drop['lower']:+.2f} to {drop['upper']:+.2f})",
                f"{one['latency'][0]['p50_us']:.0f}",
                "–"
                if first
                else f"{speed['estimate']:.2f} × ({speed['lower']:.2f} to {speed['upper']:.2f})",
                _processor(one, first=first),
                f"{one['size_bytes'] / parent['size_bytes']:.3f}",
            )
        )
    heads = ("file", "accuracy", "points lost", "µs", "faster", "of the processor", "size")
    return _table(heads, rows)


def _processor(file: Mapping[str, Any], *, first: bool) -> str:
    if "processor_us" not in file:
        return "–"
    found = file["processor_speedup"]
    told = (
        ""
        if first
        else f", {found['estimate']:.2f} × ({found['lower']:.2f} to {found['upper']:.2f})"
    )
    return f"{file['processor_us']:.0f} µs{told}"


def _equal(cells: Mapping[str, Any]) -> list[str]:
    if not cells:
        return []
    rows = []
    for method in ("latency", "uniform", "macs"):
        runs = [c for n, c in cells.items() if f"-{method}-" in n]
        if not runs:
            continue
        files = [_pruned(run) for run in runs]
        values = [100 * file["accuracy"]["value"] for file in files]
        speeds = [f["processor_speedup"]["estimate"] for f in files if "processor_speedup" in f]
        spread = f" ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else ""
        rows.append(
            (
                {"latency": "by latency", "uniform": "uniform", "macs": "by MACs"}[method],
                f"{np.mean(values):.2f} %{spread}",
                ", ".join(f"{value:.2f}" for value in values),
                f"{np.mean([file['drop_points']['estimate'] for file in files]):.2f}",
                f"{np.mean(speeds):.2f} × ({min(speeds):.2f} to {max(speeds):.2f})"
                if speeds
                else "not timed in quiet",
                f"÷ {runs[0]['macs'][0] / runs[0]['macs'][1]:.2f}",
                ", ".join(runs[0]["blocks"]) or "none",
            )
        )
    first = next(iter(cells.values()))
    return [
        "## Three ways to one latency (ResNet-20, float)",
        f"Each is cut so that the table of latencies says half of the parent's time, and recovered "
        f"alike: {first['epochs']} epoch(s), {first['train_images']:,} training images. Mean and "
        f"standard deviation over seeds, on {first['files'][0]['accuracy']['samples']:,} held-out "
        "images. To reach: by latency is more accurate than the other two.",
        _table(
            (
                "cut",
                "accuracy",
                "by seed",
                "points lost",
                "faster (processor)",
                "MACs",
                "blocks removed",
            ),
            rows,
        ),
    ]


def _pruned(cell: Mapping[str, Any]) -> Mapping[str, Any]:
    found: Mapping[str, Any] = next(f for f in cell["files"] if f["name"] == "pruned-fp32")
    return found


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
