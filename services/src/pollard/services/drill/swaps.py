"""Swaps under load."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Mapping

from pollard.client import AsyncModelsClient
from pollard.client.load import Load
from pollard.services.drill.figures import Record, Swap
from pollard.services.drill.options import DrillOptions
from pollard.services.drill.target import Target

_CAPACITY_SECONDS = 4.0
_SETTLE_SECONDS = 1.0
# What asking costs the manager falls on the latency within swaps: no more often than is needed.
_POLL_SECONDS = 0.05
_SWAP_TIMEOUT_SECONDS = 300.0
# Memory is compared from here on: the first swaps fill caches.
_WARM_SWAPS = 5

MakeLoad = Callable[[], Load]


async def measure_capacity(make: MakeLoad, target: Target) -> tuple[float, Load]:
    """Let every client ask without pause; return the requests a second, and the load."""
    load = make()
    load.traffic.serving = target.revisions[0]
    asking = asyncio.create_task(load.run())
    try:
        await asyncio.sleep(_SETTLE_SECONDS)
        before, began = load.traffic.total, time.monotonic()
        await asyncio.sleep(_CAPACITY_SECONDS)
        rate = (load.traffic.total - before) / (time.monotonic() - began)
    finally:
        load.finish()
        await asking
    return rate, load


@contextlib.asynccontextmanager
async def asking(load: Load, rate: float) -> AsyncIterator[None]:
    """Keep the clients asking; so many requests a second, or without pause if 0."""
    clients = asyncio.create_task(load.run_at(rate) if rate else load.run())
    try:
        yield
    finally:
        load.finish()
        await clients


async def swap(models: AsyncModelsClient, load: Load, target: Target, revision: int) -> Swap:
    """Swap once and wait until every server has the new routes.

    Raises:
        PollardError: the swap was refused or did not end in time.
    """
    load.traffic.serving = 0
    started = time.monotonic()
    alias = await models.set_alias(
        target.model,
        target.alias,
        revision,
        allow_signature_change=target.signature_changes,
        wait=False,
    )
    while alias.state in ("LOADING", "SWITCHING"):
        if time.monotonic() - started > _SWAP_TIMEOUT_SECONDS:
            break
        await asyncio.sleep(_POLL_SECONDS)
        alias = await models.alias(target.model, target.alias)
    ended = time.monotonic()
    await models.wait_alias(target.model, target.alias, revision, wait_timeout=0.001)
    load.traffic.serving = revision
    return Swap(revision, started, ended)


async def swap_under_load(
    models: AsyncModelsClient,
    load: Load,
    target: Target,
    options: DrillOptions,
    record: Record,
    *,
    advanced: Callable[[], None],
    memory: Callable[[], Mapping[str, int]],
) -> None:
    """Swap there and back, with pauses, as often as asked for; everything goes into `record`.

    Args:
        models: The manager.
        load: Asks meanwhile.
        target: What to swap.
        options: How often, and how long to pause.
        record: What is seen.
        advanced: Called after each swap.
        memory: Gives the memory of each service.
    """
    current = target.revisions[0]
    warm = min(_WARM_SWAPS, options.swaps // 2)
    if warm == 0:
        record.memory.append((0, memory()))
    await asyncio.sleep(_SETTLE_SECONDS)
    for number in range(1, options.swaps + 1):
        current = target.other(current)
        record.swaps.append(await swap(models, load, target, current))
        await asyncio.sleep(options.pause_seconds)
        if number == warm or number == options.swaps or (number > warm and number % 20 == 0):
            record.memory.append((number, memory()))
        advanced()
