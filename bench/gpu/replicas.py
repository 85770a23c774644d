"""One, two and four servers of a model that costs nearly nothing: the limit of the front end."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from bench.gpu.callers import Load, measure, write_request
from bench.gpu.serving import flags, make_bundle, servers
from bench.gpu.sessions import Array, make_session, random_feeds, time_runs
from bench.gpu.setup import Setup, Table, ratio, say

_PIXELS = 28 * 28
_IN_FLIGHT = 32


def run(setup: Setup) -> None:
    """Measure the model alone, then so many servers, each with a channel from each generator."""
    setup = dataclasses.replace(setup, provider="cpu", data=setup.data)
    file = setup.work / "cheap.onnx"
    onnx.save(_cheap(), file)
    session = make_session(file, "cpu")
    feeds = random_feeds(session, 1)
    alone = time_runs(lambda: session.run(None, feeds), 1, setup.sizes.seconds)
    setup.keep("model", alone.told())
    setup.keep("cores", len(os.sched_getaffinity(0)))
    bundle = make_bundle(setup, "cheap", file, 32)
    request = write_request(setup.work / "cheap.request", "cheap", feeds)
    found: list[dict[str, Any]] = []
    for front in ("core", "grpcio"):
        for replicas in setup.sizes.replicas:
            if setup.left < setup.sizes.load_seconds + 8:
                say("the time is used up")
                return
            shared = setup.work / f"marks-{front}-{replicas}"
            told = [*flags(setup, 1), "--frontend", front, "--replicas", str(replicas)]
            told += ["--replicas-dir", str(shared)]
            named = {f"cheap-{front}-{number}": told for number in range(replicas)}
            with servers(setup, {"cheap": bundle}, named) as running:
                used = list(running.values())
                load = Load(
                    tuple(server.address for server in used),
                    request,
                    setup.sizes.callers,
                    _IN_FLIGHT,
                    1,
                )
                row: dict[str, Any] = {"front": front, "replicas": replicas}
                row |= measure(load, setup.work / "seen", setup.sizes.load_seconds, servers=used)
            found.append(row)
            setup.keep("replicas", found)
            say(", ".join(f"{key} {value}" for key, value in row.items()))


def _cheap() -> onnx.ModelProto:
    weights: Array = np.random.default_rng(0).standard_normal((_PIXELS, 10), np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["image"], ["float"], to=TensorProto.FLOAT),
            helper.make_node("MatMul", ["float", "weights"], ["scores"]),
        ],
        "cheap",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["batch", _PIXELS])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["batch", 10])],
        [numpy_helper.from_array(weights, "weights")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def tables(data: dict[str, Any]) -> list[Table]:
    """Return requests per second, and how they grow."""
    rows = data.get("replicas", [])
    first = {row["front"]: row["images_per_second"] for row in rows if row["replicas"] == 1}
    return [
        Table(
            "Servers of a cheap model, on the CPU",
            ("front end", "servers", "requests/s", "p50, p99 in ms", "failed", "/ one server"),
            [
                (
                    row["front"],
                    row["replicas"],
                    f"{row['images_per_second']:,.0f}",
                    f"{row['p50_ms']:.1f}, {row['p99_ms']:.1f}",
                    row["failed"],
                    ratio(row["images_per_second"], first.get(row["front"])),
                )
                for row in rows
            ],
            f"The model alone takes {1e3 * data['model']['p50_ms']:.1f} µs. {data['cores']} cores, "
            "which the load generators share: where they are few, more servers gain nothing.",
        )
    ]
