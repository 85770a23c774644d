"""`pollard drill soak`: load for a time, with swaps, and a look at what grows.

The services are looked at every few seconds: resident memory, file descriptors and threads, child
processes included. What moves steadily is a leak; the slope is told, and judged once the services
have warmed up.
"""

from __future__ import annotations

import asyncio
import gc
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
from rich.console import Console
from rich.table import Table

from pollard.client import AsyncModelsClient
from pollard.client.load import Load
from pollard.services.common.lifecycle import cancel
from pollard.services.drill.errors import DrillFailed
from pollard.services.drill.figures import Record
from pollard.services.drill.guard import run_drill_guarded
from pollard.services.drill.options import DrillOptions
from pollard.services.drill.processes import Services, Usage, running_services
from pollard.services.drill.swaps import asking, measure_capacity, swap
from pollard.services.drill.target import Target, own_target
from pollard.services.drill.trends import theil_sen
from pollard.services.drill.view import View

TEN_MINUTES = 600.0
_MEBIBYTE = 1 << 20
_SPARE_SECONDS = 300.0
"""For starting, measuring and stopping."""
_FEWEST_JUDGED = 30
"""Samples after the warm-up; of fewer the slope says more about chance than about a leak."""
_BEAT_SECONDS = 0.2
_STOOD_STILL_SECONDS = 3.0
_MOST_MORE = 4
"""File descriptors or threads by which the last quarter's median may lie above the first's: a
connection that comes back, or a thread of a pool that was not needed before."""


@dataclass(frozen=True)
class SoakOptions:
    """One soak."""

    seconds: float = 1800.0
    """How long the load lasts."""
    load_percent: float = 30.0
    """Requests, in percent of what the services can answer."""
    clients: int = 4
    swap_seconds: float = 60.0
    """From one swap to the next; 0 swaps never."""
    sample_seconds: float = 10.0
    """From one look at the services to the next."""
    warm_seconds: float = 600.0
    """What is looked at before that is told, and not judged."""
    max_slope_percent: float = 1.0
    """Most that the memory of a service may grow in ten minutes, in percent of its median."""
    model_mb: float = 10.0
    drain_seconds: float = 1.0
    json_file: Path | None = None


@dataclass
class Sample:
    """The services at one moment."""

    seconds: float
    """Since the load began."""
    usage: dict[str, Usage]


class Heart:
    """Notices when the drill itself did not run: stopped by a signal, or with its machine.

    Requests that were on their way then say nothing of the services.
    """

    def __init__(self) -> None:
        """Beat for the first time."""
        self.gaps: list[tuple[float, float]] = []
        """From when to when it stood still, on the monotonic clock."""
        self._last = time.monotonic()

    async def beat(self) -> None:
        """Beat until cancelled."""
        while True:
            self.look()
            await asyncio.sleep(_BEAT_SECONDS)

    def look(self) -> None:
        """Note a gap if there was one."""
        now = time.monotonic()
        if now - self._last > _STOOD_STILL_SECONDS:
            self.gaps.append((self._last, now))
        self._last = now

    def excuses(self, sent: float) -> bool:
        """Whether the drill stood still at any time since `sent`."""
        self.look()
        return any(ended >= sent for _, ended in self.gaps[-3:])


@dataclass
class Soak:
    """What a soak has seen so far."""

    options: SoakOptions
    record: Record = field(default_factory=Record)
    samples: list[Sample] = field(default_factory=list)
    heart: Heart = field(default_factory=Heart)
    scrapes: int = 0
    """Times that the metrics of a service were read."""


def run_soak(options: SoakOptions) -> int:
    """Run a soak and print what was seen; return the exit code.

    Returns:
        0 when everything was done and nothing went wrong or grew, 130 when it was interrupted,
        else 1.
    """
    soak = Soak(options)
    return run_drill_guarded(
        lambda directory: _soak(soak, directory),
        soak.record,
        options.seconds + _SPARE_SECONDS,
        options.json_file,
        figures=lambda: soak_figures(soak),
        show=_show,
    )


async def _soak(soak: Soak, directory: Path) -> None:
    options, record = soak.options, soak.record
    made = DrillOptions(model_mb=options.model_mb, drain_seconds=options.drain_seconds)
    with View(record) as view:
        async with (
            running_services(
                directory, drain_seconds=options.drain_seconds, said=view.say
            ) as services,
            AsyncModelsClient(services.installation.models) as models,
        ):
            target = await own_target(models, made, directory)

            def load() -> Load:
                return Load(
                    model=target.model,
                    vision=services.installation.vision,
                    inference=services.installation.inference,
                    samples=target.samples,
                    references=target.references,
                    clients=options.clients,
                    kinds=target.kinds,
                    excused=lambda _, sent, __: soak.heart.excuses(sent),
                    again_seconds=math.inf,
                )

            gc.collect()
            gc.freeze()
            view.say(f"Measuring what the services can answer, with {options.clients} clients…")
            record.capacity, measuring = await measure_capacity(load, target)
            if measuring.traffic.bad:
                record.traffic = measuring.traffic
                raise DrillFailed("requests failed before the soak began")
            record.rate = record.capacity * options.load_percent / 100
            view.say(f"{record.rate:.0f} requests a second for {options.seconds:.0f} s.")
            await _under_load(soak, services, models, target, load, view)
        record.problems += services.deaths


async def _under_load(
    soak: Soak,
    services: Services,
    models: AsyncModelsClient,
    target: Target,
    make: Callable[[], Load],
    view: View,
) -> None:
    options, record = soak.options, soak.record
    load = make()
    load.traffic.serving = target.revisions[0]
    record.traffic = load.traffic
    record.began = time.monotonic()
    try:
        async with asking(load, record.rate):
            beating = asyncio.create_task(soak.heart.beat())
            try:
                async with asyncio.TaskGroup() as group:
                    group.create_task(_look(soak, services, view))
                    if options.swap_seconds:
                        group.create_task(_swap(soak, models, load, target))
            finally:
                await cancel(beating)
    except ExceptionGroup as several:
        raise several.exceptions[0] from several
    finally:
        record.ended = time.monotonic()


async def _look(soak: Soak, services: Services, view: View) -> None:
    options, record = soak.options, soak.record
    count = max(2, int(options.seconds / options.sample_seconds))
    advanced = view.part("Sample", count)
    async with aiohttp.ClientSession() as session:
        for number in range(1, count + 1):
            due = record.began + number * options.sample_seconds
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            usage = services.usage()
            soak.samples.append(Sample(time.monotonic() - record.began, usage))
            # Prometheus would read them too, and what they keep is looked at with the rest.
            for url in services.http_urls:
                async with session.get(f"{url}/metrics") as answer:
                    await answer.read()
                    if answer.status != 200:
                        record.problems.append(f"{url}/metrics answered {answer.status}")
                soak.scrapes += 1
            advanced()


async def _swap(soak: Soak, models: AsyncModelsClient, load: Load, target: Target) -> None:
    options, record = soak.options, soak.record
    current = target.revisions[0]
    for number in range(1, int(options.seconds / options.swap_seconds)):
        due = record.began + number * options.swap_seconds
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        current = target.other(current)
        record.swaps.append(await swap(models, load, target, current))


def soak_figures(soak: Soak) -> dict[str, Any]:
    """Return what was seen as one structure, for tables and JSON."""
    options, record = soak.options, soak.record
    warm = min(options.warm_seconds, options.seconds / 3)
    services = {}
    problems = list(record.problems)
    for name in sorted({name for sample in soak.samples for name in sample.usage}):
        seen = [(s.seconds, s.usage[name]) for s in soak.samples if name in s.usage]
        judged = [(seconds, usage) for seconds, usage in seen if seconds >= warm]
        services[name] = found = _service(seen, judged)
        if found is None or len(judged) < _FEWEST_JUDGED:
            continue
        slope = found["memory_percent_per_10_min"]
        if slope > options.max_slope_percent:
            problems.append(
                f"the memory of {name} grows by {slope:.2f} % in 10 minutes; at most "
                f"{options.max_slope_percent:g} % are allowed"
            )
        for what in ("files", "threads"):
            more = found[what]["last"] - found[what]["first"]
            if more > _MOST_MORE:
                problems.append(
                    f"{name} has {more:.0f} {what} more at the end than when it was warm"
                )
    latency = (record.traffic.answered.ended - record.traffic.answered.started) * 1e3
    spread = [float(value) for value in np.percentile(latency, (50, 99))] if len(latency) else None
    done = not (record.traffic.bad or problems or record.stopped)
    return {
        "passed": done and len(record.traffic.answered) > 0,
        "stopped": record.stopped,
        "problems": [*problems, *record.traffic.problems],
        "seconds": record.ended - record.began,
        "warm_seconds": warm,
        "requests": record.traffic.total,
        "rate_per_second": record.rate,
        "failed": record.traffic.failed,
        "wrong": record.traffic.wrong,
        "stale": record.traffic.stale,
        "late": record.traffic.late,
        "swaps": len(record.swaps),
        "scrapes": soak.scrapes,
        "stood_still_seconds": sum(ended - began for began, ended in soak.heart.gaps),
        "sent_again": record.traffic.retried,
        "latency_ms": spread and {"p50": spread[0], "p99": spread[1]},
        "services": services,
        "samples": [
            {
                "seconds": round(sample.seconds, 1),
                **{
                    name: [usage.memory_bytes, usage.files, usage.threads]
                    for name, usage in sample.usage.items()
                },
            }
            for sample in soak.samples
        ],
    }


def _service(
    seen: list[tuple[float, Usage]], judged: list[tuple[float, Usage]]
) -> dict[str, Any] | None:
    if len(judged) < 2:
        return None
    times = [seconds for seconds, _ in judged]
    memory = theil_sen(times, [usage.memory_bytes for _, usage in judged])
    slope, low, high = memory.percent_per(TEN_MINUTES)
    quarter = max(1, len(judged) // 4)

    def ends(take: Callable[[Usage], int]) -> dict[str, float]:
        values = [take(usage) for _, usage in judged]
        return {
            "first": float(np.median(values[:quarter])),
            "last": float(np.median(values[-quarter:])),
            "most": float(max(take(usage) for _, usage in seen)),
        }

    return {
        "memory_mib": memory.middle / _MEBIBYTE,
        "memory_percent_per_10_min": slope,
        "memory_interval": [low, high],
        "files": ends(lambda usage: usage.files),
        "threads": ends(lambda usage: usage.threads),
    }


def _show(found: dict[str, Any]) -> None:
    console = Console(file=sys.stdout, highlight=False)
    table = Table(title="Soak", title_justify="left", show_header=False)
    table.add_column("")
    table.add_column("", justify="right")
    table.add_row("requests", f"{found['requests']} in {found['seconds']:.0f} s")
    bad = found["failed"] + found["wrong"] + found["stale"]
    table.add_row("failed or answered wrongly", str(bad), style="bold red" if bad else "bold green")
    table.add_row("swaps", str(found["swaps"]))
    if found["stood_still_seconds"]:
        table.add_row("the drill itself stood still", f"{found['stood_still_seconds']:.0f} s")
    if found["latency_ms"]:
        latency = found["latency_ms"]
        table.add_row("latency", f"p50 {latency['p50']:.1f}, p99 {latency['p99']:.1f} ms")
    for name, service in found["services"].items():
        if service is None:
            continue
        low, high = service["memory_interval"]
        table.add_row(f"{name}: memory, median", f"{service['memory_mib']:.1f} MiB")
        table.add_row(
            "  slope in 10 minutes",
            f"{service['memory_percent_per_10_min']:+.2f} % ({low:+.2f} to {high:+.2f})",
        )
        for what in ("files", "threads"):
            ends = service[what]
            table.add_row(f"  {what}", f"{ends['first']:.0f} → {ends['last']:.0f}")
    console.print(table)
    for problem in found["problems"]:
        console.print(f"  {problem}", style="red", markup=False, soft_wrap=True)
    if found["stopped"]:
        console.print(found["stopped"], style="yellow", markup=False, soft_wrap=True)
    console.print(
        "Passed: nothing failed, and nothing grew."
        if found["passed"]
        else "[bold red]Not passed.[/bold red]"
    )
