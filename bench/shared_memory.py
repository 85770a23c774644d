"""Tensors in shared memory against raw contents: `python -m bench.shared_memory`."""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from bench.environment import environment, heading
from bench.load import Measured, measure
from bench.models import resnet50
from bench.peers.fetch import ROOT, PeerMissing, fetch
from bench.pollard_server import start_pollard
from bench.statistics import control, ratios

_WAYS = {"raw contents": "none", "shared memory": "system"}


def main(
    rounds: Annotated[int, typer.Option(help="Rounds of A B B A.")] = 7,
    batch: Annotated[int, typer.Option(help="Rows of a request.")] = 8,
    concurrency: Annotated[int, typer.Option(help="Callers at a time.")] = 2,
    window_ms: Annotated[int, typer.Option(help="Each measurement has three windows.")] = 800,
    frontend: Annotated[str, typer.Option(help="Front end of Pollard.")] = "grpcio",
    out: Annotated[Path, typer.Option(help="Folder for the result.")] = ROOT / "bench/results",
) -> None:
    """Send ResNet-50's float32 images both ways and print and keep the ratio."""
    try:
        tools = fetch()
    except PeerMissing as error:
        raise SystemExit(f"the benchmark cannot run here: {error}") from None
    before = environment()
    model = resnet50()
    found: dict[str, list[list[Measured]]] = {way: [] for way in _WAYS}
    with start_pollard([model], "--shared-memory", "--frontend", frontend) as server:
        for _ in range(rounds):
            pairs: dict[str, list[Measured]] = {way: [] for way in _WAYS}
            for way in (*_WAYS, *reversed(_WAYS)):
                pairs[way].append(
                    measure(
                        tools,
                        server,
                        model,
                        concurrency,
                        window_ms=window_ms,
                        batch=batch,
                        shared_memory=_WAYS[way],
                    )
                )
            for way, pair in pairs.items():
                found[way].append(pair)
    rates = {
        way: [[each.throughput for each in pair] for pair in pairs] for way, pairs in found.items()
    }
    raw, shared = rates["raw contents"], rates["shared memory"]
    medians = {
        way: statistics.median([rate for pair in pairs for rate in pair])
        for way, pairs in rates.items()
    }
    text = "\n".join(
        [
            "# Tensors in shared memory",
            "",
            heading(before),
            "",
            f"{model.title}, float32 input of 602 KB an image, batch {batch}, {concurrency} "
            f"callers, front end {frontend}, {rounds} rounds: raw contents "
            f"{medians['raw contents']:.1f} images/s, shared memory "
            f"{medians['shared memory']:.1f}; ratio {ratios(shared, raw)}, the same way twice "
            f"{control(raw)}.",
            "",
        ]
    )
    print(text)
    file = out / f"shared-memory-{time.strftime('%Y-%m-%d')}"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.with_suffix(".md").write_text(text)
    content = {
        "environment": before,
        "rounds": {way: [[asdict(m) for m in pair] for pair in p] for way, p in found.items()},
    }
    file.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
