"""Memory over many swaps between two revisions of a large model: `python -m bench.swap_memory`."""

from __future__ import annotations

import asyncio
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import psutil
import typer

from bench.environment import environment, heading
from bench.lone_server import Desired, ServedBundle, large_bundle, start_fleet_server
from bench.peers.fetch import ROOT

_ALLOWED = 1.1
"""Memory after all swaps over that after the fifth."""


async def _run(swaps: int, megabytes: int, folder: Path) -> list[dict[str, float]]:
    bundles = [large_bundle(folder / f"large-{seed}", seed, megabytes) for seed in (0, 1)]
    rows: list[dict[str, float]] = []
    async with start_fleet_server(folder / "cache", bundles) as (server, fleet):
        await fleet.apply(Desired({"large": ServedBundle(1, bundles[0])}))
        process = psutil.Process(server.process.pid)
        async with fleet.caller("large", {"x": np.zeros((1, 64), np.float32)}) as caller:
            for swap in range(1, swaps + 1):
                served = ServedBundle(swap + 1, bundles[swap % 2])
                started = time.perf_counter()
                await fleet.apply(Desired({"large": served}))
                took = time.perf_counter() - started
                await fleet.settled()
                rows.append(
                    {"swap": swap, "seconds": took, "rss_mb": process.memory_info().rss / 1e6}
                )
                if swap in (1, 5) or swap % 20 == 0:
                    print(f"swap {swap}: {rows[-1]['rss_mb']:.0f} MB, {took:.2f} s", flush=True)
        print(f"{caller.answered} requests answered, {caller.failed} failed")
        rows[-1] |= {"answered": caller.answered, "failed": caller.failed}
    return rows


def main(
    swaps: Annotated[int, typer.Option(help="How many.")] = 200,
    megabytes: Annotated[int, typer.Option(help="Size of the model.")] = 100,
    out: Annotated[Path, typer.Option(help="Folder for the result.")] = ROOT / "bench/results",
) -> None:
    """Swap to and fro under light load; exit with 1 if memory grows or a request fails."""
    before = environment()
    with tempfile.TemporaryDirectory(prefix="pollard-swaps-") as folder:
        rows = asyncio.run(_run(swaps, megabytes, Path(folder)))
    fifth, last = rows[4]["rss_mb"], rows[-1]["rss_mb"]
    highest = max(row["rss_mb"] for row in rows)
    text = "\n".join(
        [
            "# Memory over swaps",
            "",
            heading(before),
            "",
            f"{swaps} swaps between two revisions of a model of {megabytes} MB, under one caller: "
            f"resident memory {fifth:.0f} MB after the fifth, {last:.0f} MB after the last "
            f"({last / fifth:.2f} ×, allowed {_ALLOWED} ×), {highest:.0f} MB at most between two "
            f"swaps. {rows[-1]['answered']:,.0f} requests answered, {rows[-1]['failed']:.0f} "
            "failed.",
            "",
        ]
    )
    print(text)
    file = out / f"swap-memory-{time.strftime('%Y-%m-%d')}"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.with_suffix(".md").write_text(text)
    content = {"environment": before, "variables": _variables(), "swaps": rows}
    file.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")
    if last > _ALLOWED * fifth or rows[-1]["failed"]:
        raise SystemExit(1)


def _variables() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith("MALLOC_")}


if __name__ == "__main__":
    typer.run(main)
