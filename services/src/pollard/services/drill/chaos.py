"""`pollard drill chaos`: faults of all kinds, one after the other, while clients keep asking.

The order is drawn from a seed, without a kind coming again before each of the others has had its
turn. In the middle of a fault the alias is often swapped. After each, everything must be as before:
requests answered, the alias at a revision that was asked for, and nothing stored damaged.
"""

from __future__ import annotations

import asyncio
import gc
import math
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pollard.client import (
    Aborted,
    Alias,
    AsyncModelsClient,
    Cancelled,
    DeadlineExceeded,
    FailedPrecondition,
    PollardError,
    ResourceExhausted,
    RetryPolicy,
    Unavailable,
)
from pollard.client.load import Load
from pollard.runtime.reference import Reference
from pollard.services.drill.bundles import drill_bundle
from pollard.services.drill.chaos_view import show_chaos
from pollard.services.drill.errors import DrillFailed
from pollard.services.drill.faults import FAULTS, FULL_DISK, KINDS, Stage
from pollard.services.drill.figures import Record, memory_figures, spread
from pollard.services.drill.guard import run_drill_guarded
from pollard.services.drill.options import DrillOptions
from pollard.services.drill.stage import left_out, staged
from pollard.services.drill.swaps import asking, measure_capacity
from pollard.services.drill.target import Target, own_target
from pollard.services.drill.view import View

T = TypeVar("T")

_TIMEOUT_SECONDS = 30.0
"""Of each request; it is sent again as long, while something is broken."""
_PATIENCE_SECONDS = 60.0
_POLL_SECONDS = 0.05
_GRACE_SECONDS = 5.0
"""After a fault, until all have connected again: a client that met a closed port, or whose packets
were lost, tries again after a while."""
_HELD_SECONDS = (1.0, 4.0)
_QUIET_SECONDS = (0.2, 1.0)
_SPARE_SECONDS = 900.0
"""For starting, stopping, and the faults that are not over."""


@dataclass(frozen=True)
class ChaosOptions:
    """One chaos."""

    seconds: float = 600.0
    """No fault begins after that, but each kind comes at least once."""
    kinds: tuple[str, ...] = KINDS
    """What goes wrong."""
    load_percent: float = 20.0
    """Requests, in percent of what the services can answer."""
    clients: int = 4
    seed: int = 0
    model_mb: float = 5.0
    drain_seconds: float = 1.0
    json_file: Path | None = None


@dataclass
class Turn:
    """One fault, on the monotonic clock."""

    kind: str
    began: float
    what: str = ""
    """What was done, in words."""
    swap: str = ""
    """What came of the swap in the middle of it; empty without one."""
    healed: float = math.inf
    """When it was over."""
    recovered: float = math.inf
    """When the manager had answered again, and a request of each kind sent after the fault."""


@dataclass
class Chaos:
    """What has been seen so far."""

    options: ChaosOptions
    record: Record = field(default_factory=Record)
    turns: list[Turn] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    """Kinds that cannot be had on this machine, and why."""

    def excused(self, _: str, sent: float, error: PollardError) -> bool:
        """Whether a request may be sent again: something was broken at any time since `sent`."""
        return isinstance(error, Unavailable | Cancelled) and any(
            turn.healed + _GRACE_SECONDS >= sent for turn in self.turns[-3:]
        )


def run_chaos(options: ChaosOptions) -> int:
    """Run a chaos and print what was seen; return the exit code.

    Returns:
        0 when everything was done and nothing went wrong, 130 when it was interrupted, else 1.
    """
    chaos = Chaos(options)
    return run_drill_guarded(
        lambda directory: _chaos(chaos, directory),
        chaos.record,
        options.seconds + _SPARE_SECONDS,
        options.json_file,
        figures=lambda: chaos_figures(chaos),
        show=show_chaos,
    )


async def _chaos(chaos: Chaos, directory: Path) -> None:
    options, record = chaos.options, chaos.record
    chaos.left_out = left_out(options.kinds)
    kinds = [kind for kind in options.kinds if kind not in chaos.left_out]
    if not kinds:
        raise DrillFailed("; ".join(f"{kind}: {why}" for kind, why in chaos.left_out.items()))
    made = DrillOptions(
        model_mb=options.model_mb, drain_seconds=options.drain_seconds, seed=options.seed
    )
    with View(record) as view:
        for kind, why in chaos.left_out.items():
            view.say(f"Left out: {kind}. {why}")
        view.say(f"Seed {options.seed}: {', '.join(kinds)}.")
        async with (
            staged(
                directory,
                kinds,
                model_mb=options.model_mb,
                drain_seconds=options.drain_seconds,
                said=view.say,
            ) as (stage, installation),
            AsyncModelsClient(installation.models) as models,
        ):
            target = await own_target(models, made, directory)

            def load() -> Load:
                return Load(
                    model=target.model,
                    vision=installation.vision,
                    inference=installation.inference,
                    samples=target.samples,
                    references=target.references,
                    clients=options.clients,
                    kinds=target.kinds,
                    timeout=_TIMEOUT_SECONDS,
                    excused=chaos.excused,
                    retry=RetryPolicy(),
                )

            gc.collect()
            gc.freeze()
            view.say(f"Measuring what the services can answer, with {options.clients} clients…")
            record.capacity, measuring = await measure_capacity(load, target)
            if measuring.traffic.bad:
                record.traffic = measuring.traffic
                raise DrillFailed("requests failed before anything was broken")
            record.rate = record.capacity * options.load_percent / 100
            asked = load()
            asked.traffic.serving = target.revisions[0]
            record.traffic = asked.traffic
            record.began = time.monotonic()
            record.memory.append((0, stage.services.memory_bytes()))
            try:
                async with asking(asked, record.rate):
                    await _Storm(chaos, stage, models, asked, target, directory, view).run(kinds)
            finally:
                record.ended = time.monotonic()
                record.memory.append((len(chaos.turns), stage.services.memory_bytes()))
        record.problems += stage.services.deaths


class _Storm:
    """Fault after fault."""

    def __init__(
        self,
        chaos: Chaos,
        stage: Stage,
        models: AsyncModelsClient,
        load: Load,
        target: Target,
        directory: Path,
        view: View,
    ) -> None:
        self._chaos = chaos
        self._record = chaos.record
        self._stage = stage
        self._models = models
        self._load = load
        self._target = target
        self._directory = directory
        self._view = view
        self._random = random.Random(chaos.options.seed)
        self._asked_for = {target.revisions[0]}
        """Where the alias may be."""
        self._pushed = 0

    async def run(self, kinds: list[str]) -> None:
        """Go on until the time is over, and each kind has had its turn."""
        began = self._record.began
        turns, bag = self._chaos.turns, list[str]()
        while len(turns) < len(kinds) or time.monotonic() - began < self._chaos.options.seconds:
            if not bag:
                bag = self._random.sample(kinds, len(kinds))
            turn = Turn(bag.pop(), time.monotonic())
            turns.append(turn)
            await self._take(turn)
            self._view.say(
                f"{turn.began - began:6.1f} s  {turn.what}; recovered after "
                f"{_recovery(turn):.2f} s{f'; {turn.swap}' if turn.swap else ''}"
            )
            await asyncio.sleep(self._random.uniform(*_QUIET_SECONDS))
        damaged = (await self._patiently(self._models.verify)).damaged
        for file in damaged:
            self._problem(
                f"after it all the file {file.sha256} of the store is damaged: {file.message}"
            )

    async def _take(self, turn: Turn) -> None:
        chance = self._random
        held, swaps = chance.uniform(*_HELD_SECONDS), chance.random() < 0.5
        fault = FAULTS[turn.kind](self._stage)
        self._load.traffic.serving = 0
        swapping: asyncio.Task[str] | None = None
        try:
            turn.what = await fault.strike(chance)
            struck = time.monotonic()
            if swaps:
                swapping = asyncio.create_task(self._swap())
            if turn.kind == FULL_DISK:
                await self._push_in_vain()
            if fault.held:
                await asyncio.sleep(max(0.0, struck + held - time.monotonic()))
        finally:
            await fault.heal()
            turn.healed = time.monotonic()
        try:
            await self._recover(turn, turn.healed if fault.held else struck)
            if swapping is not None:
                turn.swap = await swapping
        finally:
            if swapping is not None:
                swapping.cancel()
                await asyncio.gather(swapping, return_exceptions=True)
        if turn.kind == FULL_DISK:
            await self._push()
        await self._settle(turn)

    async def _recover(self, turn: Turn, since: float) -> None:
        """Wait until the manager answers, and a request of each kind that was sent since."""
        answered = self._load.traffic.answered
        index, missing = 0, set(self._target.kinds)
        give_up = time.monotonic() + _PATIENCE_SECONDS
        await self._patiently(lambda: self._models.alias(self._target.model, self._target.alias))
        while missing:
            for answer in answered[index:]:
                if answer.started >= since:
                    missing.discard(answer.kind)
            index = len(answered)
            if time.monotonic() > give_up:
                self._problem(f"{turn.what}: {', '.join(missing)} is not answered any more")
                break
            if missing:
                await asyncio.sleep(_POLL_SECONDS)
        turn.recovered = time.monotonic()

    async def _settle(self, turn: Turn) -> None:
        """Wait until the alias rests, and the services answer by the revision that it names."""
        give_up = time.monotonic() + _PATIENCE_SECONDS
        alias = await self._alias()
        while alias.state not in ("ACTIVE", "FAILED"):
            if time.monotonic() > give_up:
                self._problem(f"{turn.what}: the alias is still {alias.state}")
                return
            await asyncio.sleep(_POLL_SECONDS)
            alias = await self._alias()
        if alias.revision not in self._asked_for:
            self._problem(f"{turn.what}: revision {alias.revision} is served, unasked for")
        self._asked_for = {alias.revision}
        answered = self._load.traffic.answered
        index, missing = len(answered), set(self._target.kinds)
        while missing:
            for answer in answered[index:]:
                if answer.revision == alias.revision:
                    missing.discard(answer.kind)
            index = len(answered)
            if time.monotonic() > give_up:
                self._problem(
                    f"{turn.what}: {', '.join(missing)} is not answered by revision "
                    f"{alias.revision}, which the alias names"
                )
                return
            await asyncio.sleep(_POLL_SECONDS)
        self._load.traffic.serving = alias.revision

    async def _swap(self) -> str:
        """Order a swap in the middle of it; say what came of it."""
        current = next(iter(self._asked_for))
        wanted = self._target.other(current)
        self._asked_for = {current, wanted}
        try:
            await self._patiently(
                lambda: self._models.set_alias(
                    self._target.model, self._target.alias, wanted, wait=False
                )
            )
        except (Aborted, FailedPrecondition, ResourceExhausted) as error:
            return f"a swap was refused: {error.reason or error.code.name}"
        return "swapped meanwhile"

    async def _push_in_vain(self) -> None:
        """A full disk takes no revision, and says so."""
        made = await asyncio.to_thread(self._bundle)
        try:
            await self._models.push(made.path, self._target.model)
        except ResourceExhausted:
            return
        except PollardError as error:
            self._problem(f"an upload to a full disk ended with {type(error).__name__}: {error}")
            return
        self._problem("an upload to a full disk was acknowledged")

    async def _push(self) -> None:
        """With room again it takes one."""
        made = await asyncio.to_thread(self._bundle)
        pushed = await self._patiently(
            lambda: self._models.push(made.path, self._target.model, idle_timeout=_PATIENCE_SECONDS)
        )
        number = pushed.revision.revision
        self._load.references[number] = await asyncio.to_thread(
            Reference, made, self._target.samples
        )
        await self._patiently(lambda: self._models.delete(self._target.model, revision=number))

    def _bundle(self) -> Any:
        self._pushed += 1
        options = self._chaos.options
        return drill_bundle(
            self._directory / f"more-{self._pushed}",
            options.seed + 1 + self._pushed,
            options.model_mb,
        )

    async def _alias(self) -> Alias:
        return await self._patiently(
            lambda: self._models.alias(self._target.model, self._target.alias)
        )

    async def _patiently(self, ask: Callable[[], Awaitable[T]]) -> T:
        """Ask until the manager is there."""
        give_up = time.monotonic() + _PATIENCE_SECONDS
        while True:
            try:
                return await ask()
            except (Unavailable, Cancelled, DeadlineExceeded):
                if time.monotonic() > give_up:
                    raise
            await asyncio.sleep(_POLL_SECONDS)

    def _problem(self, text: str) -> None:
        if text not in self._record.problems:
            self._record.problems.append(text)


def _recovery(turn: Turn) -> float:
    """Return the seconds until it had recovered: of what lasts from its end on."""
    return turn.recovered - (turn.healed if FAULTS[turn.kind].held else turn.began)


def chaos_figures(chaos: Chaos) -> dict[str, Any]:
    """Return what was seen as one structure, for tables and JSON."""
    options, record, traffic = chaos.options, chaos.record, chaos.record.traffic
    latency = (traffic.answered.ended - traffic.answered.started) * 1e3
    by_kind: dict[str, list[Turn]] = {}
    for turn in chaos.turns:
        if turn.recovered < math.inf:
            by_kind.setdefault(turn.kind, []).append(turn)
    return {
        "passed": record.passed and bool(chaos.turns),
        "stopped": record.stopped,
        "seed": options.seed,
        "problems": [*record.problems, *traffic.problems],
        "seconds": record.ended - record.began,
        "requests": traffic.total,
        "rate_per_second": record.rate,
        "capacity_per_second": record.capacity,
        "failed": traffic.failed,
        "wrong": traffic.wrong,
        "stale": traffic.stale,
        "sent_again": traffic.retried,
        "late": traffic.late,
        "latency_ms": spread(latency),
        "left_out": chaos.left_out,
        "recovery_seconds": {
            kind: {
                "count": len(turns),
                "median": sorted(map(_recovery, turns))[len(turns) // 2],
                "longest": max(map(_recovery, turns)),
            }
            for kind, turns in by_kind.items()
        },
        "faults": [
            {
                "at_seconds": round(turn.began - record.began, 2),
                "kind": turn.kind,
                "what": turn.what,
                "lasted_seconds": round(turn.healed - turn.began, 2),
                "recovery_seconds": round(_recovery(turn), 3),
                "swap": turn.swap,
            }
            for turn in chaos.turns
            if turn.recovered < math.inf
        ],
        "memory_mib": memory_figures(record),
    }


def with_seed(seed: int | None) -> int:
    """Return this seed, or one drawn now."""
    return time.time_ns() % 1_000_000 if seed is None else seed
