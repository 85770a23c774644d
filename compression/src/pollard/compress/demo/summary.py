"""The figures of a demo, as a table and as JSON."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from pollard.client.load import IMAGE, TENSOR, Answered, Traffic
from pollard.runtime.reference import Reference

# Requests that were sent before a swap ended are on their way for a little longer.
AFTER_SWAP_SECONDS = 0.25


@dataclass(frozen=True)
class Swap:
    """One swap."""

    revision: int
    """Where it led."""
    started: float
    """When it was asked for, on the monotonic clock."""
    ended: float
    """When the alias was active everywhere."""


@dataclass(frozen=True)
class Run:
    """Everything that the demo found out."""

    traffic: Traffic
    swaps: Sequence[Swap]
    seconds: float
    """How long requests were sent."""
    report: dict[str, Any]
    """The compression's report.json."""
    report_page: Path
    references: dict[int, Reference]
    telling: int
    """Samples for which the revisions' answers can be told apart."""

    @property
    def passed(self) -> bool:
        """Whether every request was answered, and rightly."""
        traffic = self.traffic
        return bool(traffic.answered) and not (traffic.failed or traffic.wrong or traffic.stale)


def percentile_ms(answered: Sequence[Answered], percent: float) -> float:
    """Return a percentile of the latencies in milliseconds; 0 when there are none."""
    if not answered:
        return 0.0
    return float(np.percentile([(item.ended - item.started) * 1e3 for item in answered], percent))


def during_swaps(answered: Sequence[Answered], swaps: Sequence[Swap]) -> list[Answered]:
    """Return the requests that were on their way while a swap was."""
    return [
        item
        for item in answered
        if any(
            item.ended >= swap.started and item.started <= swap.ended + AFTER_SWAP_SECONDS
            for swap in swaps
        )
    ]


def figures(run: Run) -> dict[str, Any]:
    """Return the figures as JSON holds them."""
    traffic, summary = run.traffic, run.report["summary"]
    swapping = during_swaps(traffic.answered, run.swaps)
    images = [item for item in traffic.answered if item.kind == IMAGE]
    tensors = [item for item in traffic.answered if item.kind == TENSOR]
    parent, chosen = run.report["parent"], run.report["chosen"]
    return {
        "requests_total": traffic.total,
        "requests_failed": traffic.failed + traffic.wrong + traffic.stale,
        "requests_wrong": traffic.wrong,
        "requests_stale": traffic.stale,
        "requests_during_swap": len(swapping),
        "requests_by_revision": {
            str(revision): count
            for revision, count in sorted(
                Counter(item.revision for item in traffic.answered).items()
            )
        },
        "requests_per_second": traffic.total / run.seconds,
        "swaps": len(run.swaps),
        "swap_ms": [(swap.ended - swap.started) * 1e3 for swap in run.swaps],
        "p50_ms": percentile_ms(traffic.answered, 50),
        "p99_ms": percentile_ms(traffic.answered, 99),
        "p99_during_swap_ms": percentile_ms(swapping, 99),
        "image_p50_ms": percentile_ms(images, 50),
        "image_p99_ms": percentile_ms(images, 99),
        "tensor_p50_ms": percentile_ms(tensors, 50),
        "tensor_p99_ms": percentile_ms(tensors, 99),
        "accuracy_parent": summary["accuracy_parent"],
        "accuracy_compressed": summary["accuracy_compressed"],
        "accuracy_samples": parent["accuracy"]["samples"],
        "accuracy_parent_interval": [parent["accuracy"]["lower"], parent["accuracy"]["upper"]],
        "accuracy_compressed_interval": [chosen["accuracy"]["lower"], chosen["accuracy"]["upper"]],
        "size_parent_bytes": summary["size_parent_bytes"],
        "size_compressed_bytes": summary["size_compressed_bytes"],
        "latency_parent_ms": summary["latency_parent_ms"],
        "latency_compressed_ms": summary["latency_compressed_ms"],
        "shipped": summary["shipped"],
        "report": str(run.report_page),
    }


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write the figures to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def show(console: Console, run: Run, clients: int) -> None:
    """Print the tables."""
    found = figures(run)
    console.print()
    console.print(_compression(found))
    console.print()
    console.print(_traffic(found, run, clients))
    for problem in run.traffic.problems:
        console.print(f"  {problem}", style="red", markup=False, soft_wrap=True)
    console.print(
        f"\nEach answer was compared with what the revision that it names answers offline; the two "
        f"revisions can be told apart by {run.telling} of {len(run.references[1].scores)} images.",
        highlight=False,
    )
    console.print(f"Compression report: {run.report_page}", markup=False, soft_wrap=True)


def _compression(found: dict[str, Any]) -> Table:
    table = Table(title=f"The model ({found['shipped']} was shipped)", title_justify="left")
    table.add_column("")
    table.add_column("parent", justify="right")
    table.add_column("compressed", justify="right")
    table.add_column("change", justify="right")
    drop = (found["accuracy_compressed"] - found["accuracy_parent"]) * 100
    table.add_row(
        f"accuracy, n = {found['accuracy_samples']}",
        f"{found['accuracy_parent']:.2%}",
        f"{found['accuracy_compressed']:.2%}",
        f"{drop:+.2f} points",
    )
    table.add_row(
        "  95 % interval",
        "{:.2%} – {:.2%}".format(*found["accuracy_parent_interval"]),
        "{:.2%} – {:.2%}".format(*found["accuracy_compressed_interval"]),
        "",
    )
    table.add_row(
        "size of model.onnx",
        f"{found['size_parent_bytes'] / 1e3:.0f} kB",
        f"{found['size_compressed_bytes'] / 1e3:.0f} kB",
        f"× {found['size_compressed_bytes'] / found['size_parent_bytes']:.3f}",
    )
    table.add_row(
        "engine latency, batch 1",
        f"{found['latency_parent_ms'] * 1e3:.1f} µs",
        f"{found['latency_compressed_ms'] * 1e3:.1f} µs",
        f"× {found['latency_compressed_ms'] / found['latency_parent_ms']:.2f}",
    )
    return table


def _traffic(found: dict[str, Any], run: Run, clients: int) -> Table:
    table = Table(
        title=f"{clients} clients for {run.seconds:.0f} s, {found['swaps']} swaps",
        title_justify="left",
        show_header=False,
    )
    table.add_column("")
    table.add_column("", justify="right")
    bad = found["requests_failed"]
    by_revision = ", ".join(
        f"{count} by revision {revision}"
        for revision, count in found["requests_by_revision"].items()
    )
    table.add_row("requests", f"{found['requests_total']}")
    table.add_row("  answered", by_revision)
    table.add_row("  on their way during a swap", f"{found['requests_during_swap']}")
    table.add_row("failed or answered wrongly", f"{bad}", style="bold red" if bad else "bold green")
    table.add_row("swaps took", _durations(found["swap_ms"]))
    table.add_row("latency p50", f"{found['p50_ms']:.2f} ms")
    table.add_row("latency p99", f"{found['p99_ms']:.2f} ms")
    table.add_row("latency p99 during swaps", f"{found['p99_during_swap_ms']:.2f} ms")
    table.add_row(
        "  images (VisionService.Predict)",
        f"p50 {found['image_p50_ms']:.2f} ms, p99 {found['image_p99_ms']:.2f} ms",
    )
    table.add_row(
        "  tensors (ModelInfer)",
        f"p50 {found['tensor_p50_ms']:.2f} ms, p99 {found['tensor_p99_ms']:.2f} ms",
    )
    table.add_row("requests per second", f"{found['requests_per_second']:.0f}")
    return table


def _durations(values: Sequence[float]) -> str:
    if len(values) <= 6:
        return ", ".join(f"{value:.0f}" for value in values) + " ms"
    return f"{min(values):.0f} – {max(values):.0f} ms, median {np.median(values):.0f} ms"
