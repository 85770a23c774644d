"""Memory of the GPU and of the host over many swaps."""

from __future__ import annotations

import asyncio
import subprocess
import time
from typing import Any

import psutil

from bench.gpu.serving import COMMAND, flags, make_bundle
from bench.gpu.sessions import make_session, random_feeds
from bench.gpu.setup import Setup, Table, say
from bench.lone_server import Desired, ServedBundle, start_fleet_server
from pollard.runtime.bundle import Bundle

_ALLOWED = 1.1
"""Memory after the last swap over that after the fifth."""

_MAX_BATCH = 8
_SETTLED = 5


def run(setup: Setup) -> None:
    """Swap to and fro under one caller, and note the memory after each swap."""
    bundles = [
        make_bundle(setup, each, setup.models / f"{each}-fp16.onnx", _MAX_BATCH)
        for each in ("parent", "other")
    ]
    asyncio.run(_run(setup, bundles))


async def _run(setup: Setup, bundles: list[Bundle]) -> None:
    rows: list[dict[str, float]] = []
    feeds = random_feeds(make_session(setup.models / "parent-fp16.onnx", "cpu"), 1)
    cache = setup.work / "cache-memory"
    told = flags(setup, 1)
    idle = _gpu_megabytes()
    async with start_fleet_server(cache, bundles, *told, command=COMMAND) as (server, fleet):
        await fleet.apply(Desired({"image": ServedBundle(1, bundles[0])}))
        process = psutil.Process(server.process.pid)
        async with fleet.caller("image", feeds) as caller:
            for swap in range(1, setup.sizes.swaps + 1):
                if setup.left < 4:
                    say("the time is used up")
                    break
                started = time.perf_counter()
                await fleet.apply(Desired({"image": ServedBundle(swap + 1, bundles[swap % 2])}))
                took = time.perf_counter() - started
                await fleet.settled()
                rows.append(
                    {
                        "swap": swap,
                        "seconds": round(took, 3),
                        "host_mb": round(process.memory_info().rss / 1e6, 1),
                        "gpu_mb": _gpu_megabytes() - idle,
                    }
                )
                setup.keep("swaps", rows)
                if swap in (1, _SETTLED) or swap % 10 == 0:
                    say(f"swap {swap}: {rows[-1]}")
        setup.keep("answered", caller.answered)
        setup.keep("failed", caller.failed)
    if caller.failed:
        raise SystemExit(f"{caller.failed} requests failed")


def _gpu_megabytes() -> float:
    """Return what is used of the GPU, in MB; 0 where there is none."""
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        )
        return float(done.stdout.split()[0]) * 1.048576
    except (OSError, ValueError, IndexError, subprocess.SubprocessError):
        return 0.0


def tables(data: dict[str, Any]) -> list[Table]:
    """Return the memory at some of the swaps, and the growth."""
    swaps = data.get("swaps", [])
    shown = [row for row in swaps if row["swap"] in (1, _SETTLED) or row["swap"] % 10 == 0]
    note = f"{data.get('answered')} requests answered meanwhile, {data.get('failed')} failed."
    if len(swaps) > _SETTLED:
        fifth, last = swaps[_SETTLED - 1], swaps[-1]
        growth = [
            f"{place} {last[key] / fifth[key]:.3f} ×"
            for place, key in (("host", "host_mb"), ("GPU", "gpu_mb"))
            if fifth[key]
        ]
        note += f" After swap {last['swap']} over after swap 5: {', '.join(growth)} (allowed "
        note += f"{_ALLOWED} ×)."
    return [
        Table(
            "Memory over swaps",
            ("after swap", "host MB", "GPU MB", "the swap took, s"),
            [(row["swap"], row["host_mb"], round(row["gpu_mb"]), row["seconds"]) for row in shown],
            note,
        )
    ]
