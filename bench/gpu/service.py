"""The service over gRPC against ONNX Runtime alone: large requests, single images, replicas."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.gpu.callers import Load, measure, write_request
from bench.gpu.serving import flags, make_bundle, servers
from bench.gpu.sessions import host_runner, make_session, random_feeds, time_callers, time_runs
from bench.gpu.setup import Setup, Table, ratio, say

_JOINED = {"cuda": 64, "cpu": 4}
"""Largest batch that single images are joined to."""

_LARGE_IN_FLIGHT = 4

_WANTED_SHARE = 0.9
_WANTED_SINGLES = 8000


def run(setup: Setup) -> None:
    """Measure raw ONNX Runtime, then one front end and the other, then more replicas."""
    sizes = setup.sizes
    joined = _JOINED[setup.provider]
    files = {
        "uint8": setup.models / "parent-fp16.onnx",
        "float32": setup.models / "parent-float-fp16.onnx",
    }
    setup.keep("request_batch", sizes.request_batch)
    setup.keep("raw", _raw(setup, files["uint8"]))
    say(f"ONNX Runtime alone, images/s at batch {sizes.request_batch}: {setup.data['raw']}")
    bundles = {
        kind: make_bundle(setup, kind, file, max(joined, sizes.request_batch))
        for kind, file in files.items()
    }
    requests = {
        (kind, batch): write_request(
            setup.work / f"{kind}-{batch}.request",
            kind,
            random_feeds(make_session(file, "cpu"), batch),
        )
        for kind, file in files.items()
        for batch in (1, sizes.request_batch)
    }
    told = flags(setup, joined)
    most = max(sizes.replicas)
    named = {f"core-{number}": [*told, "--frontend", "core"] for number in range(most)}
    named["grpcio-0"] = [*told, "--frontend", "grpcio"]
    if setup.provider == "cuda":
        named["no graphs-0"] = [*told, "--frontend", "core", "--no-cuda-graphs"]
    cuda = setup.provider == "cuda"
    with servers(setup, bundles, named) as running:
        say(f"{len(running)} servers are ready")
        plan = [
            ("core", 1, "uint8", sizes.request_batch),
            *(("core", replicas, "uint8", 1) for replicas in sizes.replicas),
            ("grpcio", 1, "uint8", sizes.request_batch),
            ("grpcio", 1, "uint8", 1),
            *(
                ("core", replicas, "uint8", sizes.request_batch)
                for replicas in sizes.replicas
                if replicas > 1
            ),
            ("core", 1, "float32", sizes.request_batch),
            ("core", 1, "float32", 1),
            *(("no graphs", 1, "uint8", batch) for batch in (sizes.request_batch, 1) if cuda),
        ]
        found: list[dict[str, Any]] = []
        for front, replicas, kind, batch in plan:
            if setup.left < sizes.load_seconds + 3:
                say("the time is used up")
                return
            used = [running[f"{front}-{number}"] for number in range(replicas)]
            load = Load(
                tuple(server.address for server in used),
                requests[kind, batch],
                processes=sizes.callers if batch == 1 else max(2, min(replicas * 2, sizes.callers)),
                in_flight=sizes.in_flight if batch == 1 else _LARGE_IN_FLIGHT,
                rows=batch,
            )
            row: dict[str, Any] = {
                "front": front, "replicas": replicas, "input": kind, "batch": batch,
                "in_flight": load.processes * load.in_flight,
            }  # fmt: skip
            try:
                row |= measure(load, setup.work / "seen", sizes.load_seconds, servers=used)
            except Exception as error:
                row["problem"] = f"{type(error).__name__}: {error}"[:500]
            found.append(row)
            setup.keep("service", found)
            say(", ".join(f"{key} {value}" for key, value in row.items()))


def _raw(setup: Setup, file: Path) -> dict[str, float]:
    batch, seconds = setup.sizes.request_batch, 2 * setup.sizes.seconds
    session = make_session(file, setup.provider)
    once = host_runner(session, random_feeds(session, batch))
    one = time_runs(once, batch, seconds).images_per_second
    several = {count: time_callers(once, count, batch, seconds) for count in (2, 4)}
    return {
        "one caller": round(one, 1),
        **{f"{count} callers": round(value, 1) for count, value in several.items()},
    }


def tables(data: dict[str, Any]) -> list[Table]:
    """Return the measurements, against ONNX Runtime alone at the batch of a large request."""
    raw = data.get("raw", {})
    rows: list[tuple[object, ...]] = []
    for row in data.get("service", ()):
        what = (row["front"], row["replicas"], row["input"], row["batch"], row["in_flight"])
        if "problem" in row:
            rows.append((*what, row["problem"][:80], *[""] * 5))
            continue
        speed = row["images_per_second"]
        large = row["batch"] == data["request_batch"]
        rows.append(
            (
                *what,
                f"{speed:,.0f}",
                f"{row['p50_ms']:.1f}, {row['p99_ms']:.1f}",
                row["failed"],
                f"{row['server_cores']:.1f}, {row['caller_cores']:.1f}",
                ratio(speed, raw.get("one caller")) if large else "",
                ratio(speed, max(raw.values(), default=None)) if large else "",
            )
        )
    columns = (
        *("front end", "replicas", "input", "batch", "in flight", "images/s", "p50, p99 in ms"),
        *("failed", "cores: servers, callers", "/ raw, one caller", "/ raw, best"),
    )
    alone = ", ".join(f"{name} {speed:,.0f}" for name, speed in raw.items())
    return [
        Table(
            "The service over gRPC, float16",
            columns,
            rows,
            "Where nothing else is said with CUDA graphs, which are the default. "
            f"ONNX Runtime alone with arrays of the host, batch {data.get('request_batch')}, "
            f"images/s: {alone}. Wanted: {_WANTED_SHARE} × raw with large requests; "
            f"{_WANTED_SINGLES:,} images/s with single uint8 images on 16 cores.",
        )
    ]
