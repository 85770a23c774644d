"""Latency of one model's requests while another, large one loads and swaps: `python -m
bench.load_spike`."""

from __future__ import annotations

import asyncio
import json
import tempfile
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from bench.environment import environment, heading
from bench.lone_server import Desired, Latencies, ServedBundle, large_bundle, start_fleet_server
from bench.models import small_cnn
from bench.peers.fetch import ROOT
from bench.pollard_server import make_bundle
from bench.statistics import Interval, interval

_ALLOWED = 1.4
"""p99 while the other model swaps over the steady p99."""


def _p99(seen: Latencies, start: float, end: float) -> float:
    return float(np.percentile([took for at, took in seen.seconds if start <= at < end], 99))


async def _run(
    rounds: int, seconds: float, megabytes: int, folder: Path
) -> tuple[list[dict[str, float]], int, int]:
    small = make_bundle(small_cnn())
    large = [large_bundle(folder / f"large-{seed}", seed, megabytes) for seed in (0, 1)]
    rows: list[dict[str, float]] = []
    swaps = 0

    def desired() -> Desired:
        served = ServedBundle(swaps + 1, large[swaps % 2])
        return Desired({"small": ServedBundle(1, small), "large": served})

    image = {"normalized": np.zeros((1, 1, 28, 28), np.float32)}
    async with start_fleet_server(folder / "cache", [small, *large]) as (_, fleet):
        for swaps in (0, 1, 2):  # noqa: B007 - read by desired(); both bundles get into the cache
            await fleet.apply(desired())
        async with (
            fleet.caller("small", image, pause_seconds=0.001) as seen,
            fleet.caller("large", {"x": np.zeros((1, 64), np.float32)}, pause_seconds=0.05) as big,
        ):
            for number in range(rounds):
                row = {"round": float(number)}
                # Steady, swapping, swapping, steady: what drifts over the round cancels out.
                for kind in ("steady", "swapping", "swapping", "steady"):
                    started = time.perf_counter()
                    until = started + seconds
                    if kind == "swapping":
                        while time.perf_counter() < until:
                            swaps += 1
                            await fleet.apply(desired())
                    else:
                        await asyncio.sleep(seconds)
                    ended = time.perf_counter()
                    row[kind] = row.get(kind, 0.0) + _p99(seen, started, ended) / 2
                    await fleet.settled()
                rows.append(row)
                print(
                    f"steady p99 {row['steady'] * 1e3:.2f} ms, swapping {row['swapping'] * 1e3:.2f}"
                    f" ms ({row['swapping'] / row['steady']:.2f} ×), {swaps} swaps",
                    flush=True,
                )
    print(f"{seen.answered + big.answered} requests answered")
    return rows, seen.failed + big.failed, swaps


def main(
    rounds: Annotated[int, typer.Option(help="Rounds of steady, swapping, swapping, steady.")] = 7,
    seconds: Annotated[float, typer.Option(help="Of each part of a round.")] = 4.0,
    megabytes: Annotated[int, typer.Option(help="Size of the model that swaps.")] = 100,
    out: Annotated[Path, typer.Option(help="Folder for the result.")] = ROOT / "bench/results",
) -> None:
    """Compare p99 while another model swaps with the steady p99; exit with 1 if it is too much."""
    before = environment()
    with tempfile.TemporaryDirectory(prefix="pollard-spike-") as folder:
        rows, failed, swaps = asyncio.run(_run(rounds, seconds, megabytes, Path(folder)))
    ratio: Interval = interval([row["swapping"] / row["steady"] for row in rows])
    steady = interval([row["steady"] * 1e3 for row in rows])
    text = "\n".join(
        [
            "# Latency while another model swaps",
            "",
            heading(before),
            "",
            f"One caller of the 28×28 CNN while a model of {megabytes} MB is swapped {swaps} times "
            f"without pause, {rounds} rounds: steady p99 {steady} ms; p99 while it swaps "
            f"{ratio} × that (allowed {_ALLOWED} ×). {failed} requests of either model failed.",
            "",
        ]
    )
    print(text)
    file = out / f"load-spike-{time.strftime('%Y-%m-%d')}"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.with_suffix(".md").write_text(text)
    content = {"environment": before, "rounds": rows, "failed": failed, "swaps": swaps}
    file.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")
    if ratio.median > _ALLOWED or failed:
        raise SystemExit(1)


if __name__ == "__main__":
    typer.run(main)
