"""ONNX Runtime alone: batches, float32 and float16, arrays of the host or bound, options."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bench.gpu.sessions import (
    bound_runner,
    host_runner,
    make_session,
    random_feeds,
    staged_runner,
    time_callers,
    time_runs,
)
from bench.gpu.setup import Setup, Table, ratio, say

_WAYS: Mapping[str, Callable[..., Callable[[], object]]] = {
    "host": lambda session, feeds, provider: host_runner(session, feeds),
    "bound": bound_runner,
}

OPTIONS: Mapping[str, Mapping[str, str]] = {
    "heuristic, NHWC": {},
    "CUDA graph, heuristic, NHWC": {"enable_cuda_graph": "1"},
    "heuristic, NCHW": {"prefer_nhwc": "0"},
    "exhaustive, NHWC": {"cudnn_conv_algo_search": "EXHAUSTIVE"},
    "exhaustive, NCHW": {"cudnn_conv_algo_search": "EXHAUSTIVE", "prefer_nhwc": "0"},
    "CUDA graph, heuristic, NCHW": {"enable_cuda_graph": "1", "prefer_nhwc": "0"},
}
"""Options of the provider that are compared; the first are those of everything else here."""

_LEAST_SECONDS = 3.0


def run(setup: Setup) -> None:
    """Measure what matters most first, and stop when the time is used up."""
    files = {kind: setup.models / f"parent-{kind}.onnx" for kind in ("fp16", "fp32")}
    _sweep(setup, "fp16", files["fp16"])
    _sweep(setup, "fp32", files["fp32"])
    for step in (_options, _callers, _pollard):
        if setup.left < _LEAST_SECONDS:
            say("the time is used up")
            return
        try:
            step(setup, files["fp16"])
        except Exception as error:
            setup.keep(f"{step.__name__} failed", f"{type(error).__name__}: {error}")
            say(f"{step.__name__} failed: {error}")


def _sweep(setup: Setup, kind: str, file: Path) -> None:
    session = make_session(file, setup.provider)
    found: dict[str, dict[str, Any]] = {}
    for batch in setup.sizes.batches:
        feeds = random_feeds(session, batch)
        found[str(batch)] = {
            way: time_runs(make(session, feeds, setup.provider), batch, setup.sizes.seconds).told()
            for way, make in _WAYS.items()
        }
        setup.keep(kind, found)
        say(f"{kind}, batch {batch}: " + _brief(found[str(batch)]))


def _options(setup: Setup, file: Path) -> None:
    found: dict[str, dict[str, Any]] = {}
    for name, options in OPTIONS.items():
        if setup.provider != "cuda" and options:
            continue
        found[name] = {}
        for batch in setup.sizes.few:
            if setup.left < _LEAST_SECONDS:
                return
            # Kernels are chosen for each shape, and a graph holds one.
            try:
                session = make_session(file, setup.provider, options)
                feeds = random_feeds(session, batch)
                once = bound_runner(session, feeds, setup.provider)
                found[name][str(batch)] = time_runs(once, batch, setup.sizes.seconds).told()
            except Exception as error:
                found[name][str(batch)] = {"problem": f"{type(error).__name__}: {error}"[:300]}
            setup.keep("options", found)
        say(f"{name}: " + _brief(found[name]))


def _callers(setup: Setup, file: Path) -> None:
    """Several threads with arrays of the host: copies of one may hide behind runs of another."""
    batch = setup.sizes.request_batch
    found: dict[str, float] = {}
    for callers in (1, 2, 4):
        session = make_session(file, setup.provider)
        once = host_runner(session, random_feeds(session, batch))
        found[f"{callers} callers of one session"] = round(
            time_callers(once, callers, batch, 2 * setup.sizes.seconds), 1
        )
        setup.keep("callers", found)
    sessions = [make_session(file, setup.provider) for _ in range(2)]
    runners = iter([host_runner(each, random_feeds(each, batch)) for each in sessions] * 2)
    mine: dict[int, Callable[[], object]] = {}
    import threading

    def once_each() -> object:
        number = threading.get_ident()
        if number not in mine:
            mine[number] = next(runners)
        return mine[number]()

    found["2 callers, a session each"] = round(
        time_callers(once_each, 2, batch, 2 * setup.sizes.seconds), 1
    )
    session = make_session(file, setup.provider)
    staged = staged_runner(session, random_feeds(session, batch), setup.provider)
    found["1 caller, copied into one place"] = round(
        time_runs(staged, batch, setup.sizes.seconds).images_per_second, 1
    )
    setup.keep("callers", found)
    say(f"batch {batch}, images/s: {found}")


def _pollard(setup: Setup, file: Path) -> None:
    """The sessions that the service opens, with arrays of the host in and out."""
    from pollard.runtime.cuda import CudaOptions
    from pollard.runtime.sessions import open_session

    found: dict[str, dict[str, Any]] = {}
    ways = {
        "plain": (CudaOptions(), False),
        "staged": (CudaOptions(), True),
        "staged, CUDA graphs": (CudaOptions(graphs=True), True),
    }
    for name, (options, staged) in ways.items():
        if setup.provider != "cuda" and name != "plain":
            continue
        target = "cuda-fp16" if setup.provider == "cuda" else "cpu-fp32"
        session = open_session(file, target=target, cuda=options)
        if staged:
            session.batch_up_to(  # type: ignore[attr-defined] # of sessions on a GPU
                max(setup.sizes.few), (*session.inputs, *session.outputs)
            )
        found[name] = {}
        for batch in setup.sizes.few:
            feeds = random_feeds(session.raw, batch)
            found[name][str(batch)] = time_runs(
                lambda feeds=feeds, session=session: session.run(feeds),  # type: ignore[misc]
                batch,
                setup.sizes.seconds,
            ).told()
            setup.keep("pollard", found)
        say(f"the service's session, {name}: " + _brief(found[name]))
        session.close()


def _brief(found: Mapping[str, Mapping[str, Any]]) -> str:
    return ", ".join(
        f"{key} {told['p50_ms']:.2f} ms {told['images_per_second']:,.0f}/s"
        if "p50_ms" in told
        else f"{key} failed"
        for key, told in found.items()
    )


def tables(data: dict[str, Any]) -> list[Table]:
    """Return the sweep over batches, the options, and the callers."""
    rows: list[tuple[object, ...]] = []
    for batch, fp16 in data.get("fp16", {}).items():
        fp32 = data.get("fp32", {}).get(batch, {})
        rows.append(
            (
                batch,
                *(_cell(told.get(way)) for told in (fp32, fp16) for way in ("host", "bound")),
                ratio(_speed(fp16.get("bound")), _speed(fp32.get("bound"))),
            )
        )
    columns = ("batch", "fp32 host", "fp32 bound", "fp16 host", "fp16 bound", "fp16 / fp32, bound")
    made = [Table("ONNX Runtime alone: p50, p99 in ms, images/s", columns, rows)]
    batches = list(next(iter(data.get("options", {}).values()), {}))
    made.append(
        Table(
            "fp16, bound, by the provider's options (first run in ms, then as above)",
            ("options", *(f"batch {batch}" for batch in batches)),
            [
                (name, *(_cell(told.get(batch), first=True) for batch in batches))
                for name, told in data.get("options", {}).items()
            ]
            + [
                (f"Pollard's session, {name}", *(_cell(told.get(batch)) for batch in batches))
                for name, told in data.get("pollard", {}).items()
            ],
        )
    )
    made.append(
        Table(
            "fp16, arrays of the host: images/s",
            ("callers", "images/s"),
            [*data.get("callers", {}).items()],
        )
    )
    return made


def _cell(told: Mapping[str, Any] | None, first: bool = False) -> str:
    if not told:
        return "–"
    if "problem" in told:
        return str(told["problem"])[:80]
    start = f"({told['first_ms']:,.0f}) " if first else ""
    return f"{start}{told['p50_ms']:.2f}, {told['p99_ms']:.2f}, {told['images_per_second']:,.0f}/s"


def _speed(told: Mapping[str, Any] | None) -> float | None:
    return told["images_per_second"] if told else None
