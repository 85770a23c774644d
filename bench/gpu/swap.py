"""Swaps under load: no failure, no wrong answer, and p99 during swaps against p99 between them."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import numpy as np

from bench.gpu.callers import Generators, Load, write_request
from bench.gpu.serving import COMMAND, answers, flags, make_bundle
from bench.gpu.sessions import make_session, random_feeds
from bench.gpu.setup import Setup, Table, say
from bench.lone_server import Desired, Fleet, ServedBundle, start_fleet_server
from pollard.runtime.bundle import Bundle

_ALLOWED = 1.3
"""p99 while swapping over the steady p99."""

_MAX_BATCH = {"cuda": 32, "cpu": 4}
_IN_FLIGHT = 4


def run(setup: Setup) -> None:
    """Swap to and fro between two revisions while generators check every answer."""
    bundles = [
        make_bundle(setup, each, setup.models / f"{each}-fp16.onnx", _MAX_BATCH[setup.provider])
        for each in ("parent", "other")
    ]
    asyncio.run(_run(setup, bundles))


async def _run(setup: Setup, bundles: list[Bundle]) -> None:
    sizes = setup.sizes
    sessions = [
        make_session(setup.models / f"{each}-fp16.onnx", "cpu") for each in ("parent", "other")
    ]
    feeds = random_feeds(sessions[0], 1)
    # Revisions count 1, 2, 3…: those of odd number are the parent.
    expected = {
        name: next(iter(answers(session, feeds).values()))
        for name, session in zip(("odd", "even"), sessions, strict=True)
    }
    file = setup.work / "answers.npz"
    np.savez(file, odd=expected["odd"], even=expected["even"])
    request = write_request(setup.work / "swap.request", "image", feeds)
    told = [*flags(setup, _MAX_BATCH[setup.provider]), "--frontend", "core"]
    cache = setup.work / "cache-swap"
    async with start_fleet_server(cache, bundles, *told, command=COMMAND) as (_, fleet):
        swaps = _Swaps(fleet, bundles)
        for _ in range(2):  # both bundles get into the cache
            await swaps.swap()
        load = Load(
            (fleet.address,), request, max(1, sizes.callers // 2), _IN_FLIGHT, 1, answers=file
        )
        generators = await asyncio.to_thread(Generators, load, setup.work / "seen")
        await asyncio.sleep(1)
        parts: list[tuple[str, float, float, int]] = []
        for kind in ("steady", "swapping", "swapping", "steady"):
            if setup.left < sizes.swap_seconds + 5 and parts:
                break
            before, started = swaps.count, time.monotonic()
            until = started + sizes.swap_seconds
            if kind == "swapping":
                while time.monotonic() < until:
                    await swaps.swap()
                    await fleet.settled()
            else:
                await asyncio.sleep(sizes.swap_seconds)
            parts.append((kind, started, time.monotonic(), swaps.count - before))
            say(f"{kind}: {parts[-1][3]} swaps")
        seen = await asyncio.to_thread(generators.stop)
        setup.keep(
            "parts",
            [
                {"kind": kind, "swaps": count, **seen.between(start, end)}
                for kind, start, end, count in parts
            ],
        )
        setup.keep("swap_seconds", [round(each, 3) for each in swaps.seconds])
        setup.keep("requests", int(seen.took.size))
        setup.keep("failed", seen.failed)
        setup.keep("wrong", seen.wrong)
        setup.keep("errors", seen.errors)
    if seen.failed or seen.wrong:
        raise SystemExit(f"{seen.failed} requests failed, {seen.wrong} were answered wrongly")


class _Swaps:
    """Orders the other bundle as the next revision."""

    def __init__(self, fleet: Fleet, bundles: list[Bundle]) -> None:
        self._fleet = fleet
        self._bundles = bundles
        self.count = 0
        self.seconds: list[float] = []

    async def swap(self) -> None:
        served = ServedBundle(self.count + 1, self._bundles[self.count % 2])
        started = time.perf_counter()
        await self._fleet.apply(Desired({"image": served}))
        self.seconds.append(time.perf_counter() - started)
        self.count += 1


def tables(data: dict[str, Any]) -> list[Table]:
    """Return latencies steady and swapping, and what failed."""
    parts = data.get("parts", [])
    rows: list[tuple[object, ...]] = [
        (
            part["kind"],
            part["swaps"],
            part["requests"],
            f"{part['images_per_second']:,.0f}",
            f"{part['p50_ms']:.2f}",
            f"{part['p99_ms']:.2f}",
        )
        for part in parts
    ]
    means = {
        kind: np.mean([part["p99_ms"] for part in parts if part["kind"] == kind])
        for kind in ("steady", "swapping")
        if any(part["kind"] == kind for part in parts)
    }
    note = (
        f"{data.get('requests', 0):,} requests, {data.get('failed')} failed, {data.get('wrong')} "
        f"answered by another revision than named (compared with both revisions' answers on the "
        f"CPU). A swap took {_span(data.get('swap_seconds', []))}."
    )
    if len(means) == 2:
        note += (
            f" p99 while swapping over steady: {means['swapping'] / means['steady']:.2f} × "
            f"(wanted: {_ALLOWED} ×)."
        )
    if data.get("errors"):
        note += f" Errors: {data['errors']}."
    return [
        Table(
            "Swaps without pause under load",
            ("part", "swaps", "requests", "images/s", "p50 ms", "p99 ms"),
            rows,
            note,
        )
    ]


def _span(seconds: list[float]) -> str:
    if not seconds:
        return "–"
    return f"{min(seconds):.2f} to {max(seconds):.2f} s, median {np.median(seconds):.2f} s"
