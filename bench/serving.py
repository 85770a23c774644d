"""Pollard's inference server against Triton, in one run: `python -m bench.serving`.

Both serve the same ONNX files on this machine at the same time; Triton's own perf_analyzer sends
the load, to one of them at a time, interleaved. Triton runs its Python backend: its ONNX backend
is in no package, so nothing is said about it.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

import psutil
import typer

from bench.environment import environment, heading
from bench.load import Measured, measure, raw_limit
from bench.models import MODELS, BuiltModel
from bench.peers.fetch import ROOT, PeerMissing, Tools, fetch
from bench.peers.triton import start_triton
from bench.pollard_server import start_pollard
from bench.process import ServerProcess
from bench.statistics import Interval, control, ratios

TRITON = "Triton, Python backend"

_RAW_BATCHES = (1, 8, 32)


@dataclass
class Point:
    """One model at one concurrency: rounds of two measurements, by server."""

    model: str
    title: str
    concurrency: int
    batch: int = 1
    rounds: dict[str, list[list[Measured]]] = field(default_factory=dict)
    load_average: float = 0.0
    """Of the machine, before the point."""

    def ratio(self, server: str, peer: str, what: str) -> Interval:
        """Return `server` over `peer`."""
        return ratios(self._values(server, what), self._values(peer, what))

    def control(self, server: str, what: str) -> Interval:
        """Return the server over itself."""
        return control(self._values(server, what))

    def median(self, server: str, what: str) -> float:
        """Return the median over all measurements."""
        return statistics.median(value for pair in self._values(server, what) for value in pair)

    def cpu_per_inference(self, server: str) -> float:
        """Return the server's processor time per inference in microseconds."""
        return 1e6 * statistics.median(
            each.server_cpu_seconds / (each.throughput * each.wall_seconds)
            for pair in self.rounds[server]
            for each in pair
        )

    def _values(self, server: str, what: str) -> list[list[float]]:
        return [[getattr(each, what) for each in pair] for pair in self.rounds[server]]


def run_point(
    tools: Tools,
    servers: dict[str, ServerProcess],
    model: BuiltModel,
    concurrency: int,
    *,
    rounds: int,
    window_ms: int,
    batch: int = 1,
) -> Point:
    """Measure the servers in the order A B B A, so many times."""
    point = Point(model.name, model.title, concurrency, batch)
    point.load_average = psutil.getloadavg()[0]
    for _ in range(rounds):
        pairs: dict[str, list[Measured]] = {name: [] for name in servers}
        for name in (*servers, *reversed(servers)):
            pairs[name].append(
                measure(tools, servers[name], model, concurrency, window_ms=window_ms, batch=batch)
            )
        for name, pair in pairs.items():
            point.rounds.setdefault(name, []).append(pair)
    return point


def table(
    points: Sequence[Point], peer: str, names: Sequence[str], limits: Mapping[str, float]
) -> list[str]:
    """Return the points as a Markdown table, each server against `peer` and the raw limit."""
    lines = [
        "| model | c | server | inferences/s | p50 µs | p99 µs | CPU µs each | memory MiB "
        f"| / raw limit | throughput / {peer} | p50 / | p99 / | the same server twice |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for point in points:
        for name in (peer, *names):
            if name not in point.rounds:
                continue
            cells = [
                point.title if point.batch == 1 else f"{point.title}, batch {point.batch}",
                str(point.concurrency),
                name,
                f"{point.median(name, 'throughput'):,.0f}",
                f"{point.median(name, 'p50_us'):,.0f}",
                f"{point.median(name, 'p99_us'):,.0f}",
                f"{point.cpu_per_inference(name):,.0f}",
                f"{point.median(name, 'memory_bytes') / 2**20:,.0f}",
                f"{point.median(name, 'throughput') / limits[point.model]:.2f}",
            ]
            for what in ("throughput", "p50_us", "p99_us"):
                cells.append("" if name == peer else str(point.ratio(name, peer, what)))
            cells.append(str(point.control(name, "throughput")))
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def report(
    heads: Sequence[str],
    points: Sequence[Point],
    quick: Sequence[Point],
    models: Sequence[BuiltModel],
    limits: Mapping[str, float],
) -> str:
    """Return the results as a page of Markdown."""
    text = ["# Serving: Pollard against Triton, Python backend", "", *heads, ""]
    if points:
        text += [*table(points, TRITON, _ours(points[0]), limits), ""]
    text += [
        "ONNX Runtime alone, as many callers as cores, best of batches "
        f"{', '.join(map(str, _RAW_BATCHES))}: "
        + "; ".join(f"{model.title} {limits[model.name]:,.0f}/s" for model in models)
        + ".",
        "",
    ]
    if quick:
        text += ["## One caller, tuned for latency", ""]
        text += [*table(quick, TRITON, _ours(quick[0]), limits), ""]
    return "\n".join(text)


def _ours(point: Point) -> list[str]:
    return [name for name in point.rounds if name != TRITON]


def main(
    models: Annotated[str, typer.Option(help="Which, separated by commas.")] = ",".join(MODELS),
    concurrencies: Annotated[str, typer.Option(help="Callers at a time.")] = "1,4,8,16,32",
    rounds: Annotated[int, typer.Option(help="Rounds of A B B A.")] = 7,
    window_ms: Annotated[int, typer.Option(help="Each measurement has three windows.")] = 400,
    latency: Annotated[bool, typer.Option(help="Also --optimize latency at one caller.")] = True,
    frontend: Annotated[
        str, typer.Option(help="Also these front ends of Pollard, separated by commas.")
    ] = "",
    minutes: Annotated[
        float, typer.Option(help="Begin no further point after so long; 0 for no limit.")
    ] = 0.0,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = ROOT / "bench/results",
    name: Annotated[str, typer.Option(help="Name of the files in it.")] = "",
    note: Annotated[str, typer.Option(help="What else the machine did meanwhile.")] = "",
) -> None:
    """Measure Pollard against Triton and print and keep the tables."""
    try:
        tools = fetch()
    except PeerMissing as error:
        raise SystemExit(f"the benchmark cannot run here: {error}") from None
    before = environment()
    until = time.monotonic() + 60 * minutes if minutes else float("inf")
    built = [MODELS[model]() for model in models.split(",")]
    limits = {
        model.name: max(
            raw_limit(model, callers=psutil.cpu_count() or 1, batch=batch, seconds=1.5)
            for batch in _RAW_BATCHES
        )
        for model in built
    }
    points: list[Point] = []
    quick: list[Point] = []
    heads = [
        heading(before),
        f"{rounds} rounds of A B B A, three windows of {window_ms} ms each; medians, and 95 % "
        "intervals of the ratios. The generator runs on the same machine.",
        *([note] if note else []),
    ]
    file = out / (name or f"serving-{time.strftime('%Y-%m-%d')}")

    def keep() -> str:
        """Write what there is so far, so that a run that fails late has not been for nothing."""
        written = report(heads, points, quick, built, limits)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.with_suffix(".md").write_text(written)
        content = {
            "command": ["python", "-m", "bench.serving", *sys.argv[1:]],
            "environment": before,
            "note": note,
            "raw_limits": limits,
            "points": [asdict(point) for point in (*points, *quick)],
        }
        file.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")
        return written

    with contextlib.ExitStack() as stack:
        servers = {
            TRITON: stack.enter_context(start_triton(tools, built)),
            "Pollard": stack.enter_context(start_pollard(built)),
        }
        for front in filter(None, frontend.split(",")):
            label = f"Pollard, {front}"
            servers[label] = stack.enter_context(
                start_pollard(built, "--frontend", front, name=label)
            )
        ours = [server for server in servers if server != TRITON]
        for model in built:
            for concurrency in map(int, concurrencies.split(",")):
                if time.monotonic() > until:
                    print(f"{model.title}, {concurrency} callers: left out, the time is over")
                    continue
                point = run_point(
                    tools, servers, model, concurrency, rounds=rounds, window_ms=window_ms
                )
                points.append(point)
                print("\n".join(table([point], TRITON, ours, limits)[2:]), flush=True)
                keep()
        if latency:
            label = "Pollard, --optimize latency"
            with start_pollard(built, "--optimize", "latency", name=label) as fast:
                pair = {TRITON: servers[TRITON], label: fast}
                for model in built:
                    quick.append(
                        run_point(tools, pair, model, 1, rounds=rounds, window_ms=window_ms)
                    )
                    print("\n".join(table([quick[-1]], TRITON, [label], limits)[2:]), flush=True)
                    keep()
    print(keep())


if __name__ == "__main__":
    typer.run(main)
