"""The drill, part by part."""

from __future__ import annotations

import contextlib
import gc
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pollard.client import AsyncModelsClient, PollardError, Unavailable
from pollard.client.load import TENSOR, Load
from pollard.services.common.routing import PRODUCTION
from pollard.services.drill.errors import DrillFailed
from pollard.services.drill.figures import Record, figures
from pollard.services.drill.guard import run_drill_guarded
from pollard.services.drill.kills import KillDrill
from pollard.services.drill.options import DrillOptions, Installation
from pollard.services.drill.processes import Services, running_services
from pollard.services.drill.swaps import asking, measure_capacity, swap, swap_under_load
from pollard.services.drill.target import Target, given_target, own_target
from pollard.services.drill.view import View, show
from pollard.services.up.plan import INFERENCE, PREPROCESS

_YOUNG_OBJECTS = 50_000
# Longer than a killed service takes to come back.
_KILL_TIMEOUT_SECONDS = 30.0


def run_drill(options: DrillOptions) -> int:
    """Run a drill and print what was seen; return the exit code.

    Returns:
        0 when everything was done and nothing went wrong, 130 when it was interrupted, else 1.
    """
    record = Record()

    def so_far() -> str:
        return (
            f" after {len(record.swaps)} of {options.swaps} swaps and {len(record.kills)} of "
            f"{options.kills} kills"
        )

    return run_drill_guarded(
        lambda directory: _drill(options, record, directory),
        record,
        options.max_seconds,
        options.json_file,
        figures=lambda: figures(record),
        show=show,
        so_far=so_far,
    )


async def _drill(options: DrillOptions, record: Record, directory: Path) -> None:
    with View(record) as view:
        async with (
            _services(options, directory, view) as (installation, services),
            AsyncModelsClient(installation.models) as models,
            _target(options, models, directory) as target,
        ):
            drill = _Drill(options, record, view, directory, installation, services, models, target)
            await drill.run()
        if services is not None:
            record.problems += services.deaths


@contextlib.asynccontextmanager
async def _services(
    options: DrillOptions, directory: Path, view: View
) -> AsyncIterator[tuple[Installation, Services | None]]:
    if options.installation is not None:
        yield options.installation, None
        return
    async with running_services(
        directory, drain_seconds=options.drain_seconds, said=view.say
    ) as services:
        yield services.installation, services


@contextlib.asynccontextmanager
async def _target(
    options: DrillOptions, models: AsyncModelsClient, directory: Path
) -> AsyncIterator[Target]:
    """Make or fetch the revisions; put everything back as it was at the end."""
    if options.model is not None:
        target = await given_target(models, options, directory)
        try:
            yield target
        finally:
            await models.set_alias(
                target.model, target.alias, target.before, allow_signature_change=True
            )
        return
    if options.installation is None:
        yield await own_target(models, options, directory)
        return
    name = f"drill-{uuid.uuid4().hex[:8]}"
    try:
        yield await own_target(models, options, directory, name)
    finally:
        await models.delete(name, force=True)


@dataclass(frozen=True)
class _Drill:
    """One drill, once everything is there."""

    options: DrillOptions
    record: Record
    view: View
    directory: Path
    installation: Installation
    services: Services | None
    """None for an installation that is not the drill's own."""
    models: AsyncModelsClient
    target: Target

    async def run(self) -> None:
        """Measure, swap, and kill."""
        options, record, target = self.options, self.record, self.target
        if target.before and target.before != target.revisions[0]:
            await swap(self.models, self._load(), target, target.revisions[0])
        # A collection over everything that was imported would stop the clients in the middle.
        gc.collect()
        gc.freeze()
        gc.set_threshold(_YOUNG_OBJECTS, 20, 100)
        if options.load_percent:
            await self._measure()
        load = self._load()
        load.traffic.serving = target.revisions[0]
        record.traffic = load.traffic
        record.began = time.monotonic()
        try:
            async with asking(load, record.rate):
                await swap_under_load(
                    self.models,
                    load,
                    target,
                    options,
                    record,
                    advanced=self.view.part("Swap", options.swaps),
                    memory=self.services.memory_bytes if self.services is not None else dict,
                )
        finally:
            record.ended = time.monotonic()
        if self.services is not None and options.kills:
            await self._kill(self.services)

    async def _measure(self) -> None:
        record, clients = self.record, self.options.clients
        self.view.say(f"Measuring what the services can answer, with {clients} clients…")
        record.capacity, load = await measure_capacity(self._load, self.target)
        record.rate = record.capacity * self.options.load_percent / 100
        if load.traffic.bad:
            record.traffic = load.traffic
            raise DrillFailed("requests failed before anything was swapped")
        self.view.say(
            f"{record.capacity:.0f} requests a second; from now on {record.rate:.0f} are sent."
        )

    async def _kill(self, services: Services) -> None:
        def excused(kind: str, sent: float, error: PollardError) -> bool:
            """Whose connection was to a killed process sees UNAVAILABLE, and nothing else."""
            if not isinstance(error, Unavailable):
                return False
            if kind == TENSOR:
                return services.was_down((INFERENCE,), sent)
            return services.was_down((PREPROCESS,), sent) or services.was_down_long(INFERENCE)

        options, record = self.options, self.record
        load = self._load(timeout=_KILL_TIMEOUT_SECONDS, excused=excused)
        # One account for the whole drill.
        load.traffic = record.traffic
        record.traffic.serving = 0
        drill = KillDrill(self.models, services, load, self.target, options, record, self.directory)
        self.view.say(f"Killing {options.kill} {options.kills} times, seed {options.seed}.")
        async with asking(load, 0.0):
            await drill.run(self.view.part("Kill", options.kills))

    def _load(self, **more: Any) -> Load:
        target = self.target
        return Load(
            model=target.model,
            vision=self.installation.vision,
            inference=self.installation.inference,
            samples=target.samples,
            references=target.references,
            clients=self.options.clients,
            kinds=target.kinds,
            alias=None if target.alias == PRODUCTION else target.alias,
            **more,
        )


def with_seed(options: DrillOptions, seed: int | None) -> DrillOptions:
    """Return the options with this seed, or with one drawn now."""
    return replace(options, seed=time.time_ns() % 1_000_000 if seed is None else seed)
