"""Pruned float16 against its parent in float32 and in float16, in turns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bench.gpu.sessions import bound_runner, make_session, random_feeds, time_runs
from bench.gpu.setup import Setup, Table, say
from bench.statistics import ratios

_FILES = ("parent-fp32", "parent-fp16", "pruned-fp16")
_LAYOUTS: Mapping[str, Mapping[str, str]] = {
    "NHWC, CUDA graph": {"enable_cuda_graph": "1"},
    "NHWC": {},
    "NCHW": {"prefer_nhwc": "0"},
}
"""Small batches are limited by how soon kernels are started, unless a graph starts them."""


def run(setup: Setup) -> None:
    """Measure the three in turns, forwards and backwards, at some batches and in both layouts."""
    found: dict[str, dict[str, dict[str, list[list[float]]]]] = {}
    for layout, options in _LAYOUTS.items():
        if setup.provider != "cuda" and layout != "NHWC":
            continue
        found[layout] = {}
        for batch in (*setup.sizes.few, setup.sizes.batches[-1]):
            if setup.left < 3:
                return
            runners = {}
            for name in _FILES:
                session = make_session(setup.models / f"{name}.onnx", setup.provider, options)
                runners[name] = bound_runner(session, random_feeds(session, batch), setup.provider)
            rounds: dict[str, list[list[float]]] = {name: [] for name in _FILES}
            for _ in range(setup.sizes.rounds):
                for name in _FILES:
                    rounds[name].append([])
                for name in (*_FILES, *reversed(_FILES)):
                    speed = time_runs(runners[name], batch, setup.sizes.seconds / 2)
                    rounds[name][-1].append(round(speed.images_per_second, 1))
            found[layout][str(batch)] = rounds
            setup.keep("layouts", found)
            say(f"{layout}, batch {batch}: {rounds}")


def tables(data: dict[str, Any]) -> list[Table]:
    """Return images per second and the ratios with their intervals."""
    rows: list[tuple[object, ...]] = []
    for layout, batches in data.get("layouts", {}).items():
        for batch, rounds in batches.items():
            means = [_mean(rounds[name]) for name in _FILES]
            rows.append(
                (
                    layout,
                    batch,
                    *(f"{mean:,.0f}" for mean in means),
                    f"{ratios(rounds['pruned-fp16'], rounds['parent-fp32'])} ×",
                    f"{ratios(rounds['pruned-fp16'], rounds['parent-fp16'])} ×",
                )
            )
    columns = ("layout", "batch", *_FILES, "pruned / fp32 parent", "pruned / fp16 parent")
    return [
        Table(
            "Compressed against its parent, images/s",
            columns,
            rows,
            "Wanted: 2 × the float32 parent, 1.3 × the float16 parent. The weights are random: "
            "what pruning costs in accuracy is not measured here.",
        )
    ]


def _mean(rounds: list[list[float]]) -> float:
    values = [value for each in rounds for value in each]
    return sum(values) / len(values)
