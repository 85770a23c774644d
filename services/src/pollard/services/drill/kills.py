"""Services are killed in the middle of things, and everything is checked.

After each kill the state must be the old or the new one, nothing that was acknowledged may be lost,
and the services must answer as before.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

from pollard.client import (
    Alias,
    AliasSwitchFailed,
    AsyncModelsClient,
    DeadlineExceeded,
    FailedPrecondition,
    NotFound,
    Unavailable,
)
from pollard.client.load import Load
from pollard.runtime.reference import Reference
from pollard.services.drill.bundles import drill_bundle
from pollard.services.drill.figures import Record
from pollard.services.drill.options import (
    COLLECT,
    ROLLOUT,
    SERVICES,
    SWAP,
    UPLOAD,
    VERIFY,
    DrillOptions,
)
from pollard.services.drill.processes import Services
from pollard.services.drill.target import Target
from pollard.services.up.plan import MODELS

T = TypeVar("T")

_PATIENCE_SECONDS = 60.0
_POLL_SECONDS = 0.05
_KEPT_REVISIONS = 5
_ANSWERS_AFTER = 10
"""Answers of each kind that are waited for after each kill."""

# Longer than it takes, so that some kills come just after a step has ended.
_REACH = 1.2


class KillDrill:
    """Kills, one after the other."""

    def __init__(
        self,
        models: AsyncModelsClient,
        services: Services,
        load: Load,
        target: Target,
        options: DrillOptions,
        record: Record,
        directory: Path,
    ) -> None:
        """Prepare; nothing is killed yet.

        Args:
            models: The manager.
            services: What can be killed.
            load: Asks meanwhile.
            target: The drill's own model.
            options: What to kill, how often, and the seed.
            record: What is seen.
            directory: Where new revisions are made.
        """
        self._models = models
        self._services = services
        self._load = load
        self._target = target
        self._options = options
        self._record = record
        self._directory = directory
        self._random = random.Random(options.seed)
        self._stored: dict[int, str] = {}
        self._deleted: set[int] = set()
        self._made = 0
        self._usual: dict[str, float] = {}
        self._steps: dict[str, Callable[[], Awaitable[None]]] = {
            UPLOAD: self._upload,
            VERIFY: self._verify,
            ROLLOUT: self._roll_out,
            SWAP: self._swap,
            COLLECT: self._collect,
        }

    async def run(self, advanced: Callable[[], None]) -> None:
        """Kill as often as asked for.

        Raises:
            DrillFailed: a service did not come back.
            PollardError: the manager refused what it must not refuse.
        """
        for item in await self._models.revisions(self._target.model):
            self._stored[item.revision] = item.bundle_sha256
        for step in self._options.steps:
            began = time.monotonic()
            await self._steps[step]()
            self._usual[step] = time.monotonic() - began
        await self._check("the first round, without kills")
        for number in range(self._options.kills):
            await self._kill_in(number)
            advanced()
        damaged = (await self._patiently(self._models.verify)).damaged
        for file in damaged:
            self._problem(
                f"after all kills the file {file.sha256} of the store is damaged: {file.message}"
            )

    async def _kill_in(self, number: int) -> None:
        step = self._random.choice(self._options.steps)
        kill = self._options.kill
        service = self._random.choice(SERVICES) if kill == "random" else kill
        delay = self._random.uniform(0, _REACH * self._usual[step])
        began = time.monotonic()
        working = asyncio.ensure_future(self._steps[step]())
        try:
            await asyncio.sleep(delay)
            self._services.kill(service)
            if self._random.random() < 0.2:
                # Again while it starts: that is when the manager cleans up.
                await asyncio.sleep(self._random.uniform(0.3, 1.5))
                self._services.kill(service)
            await working
        finally:
            working.cancel()
            await asyncio.gather(working, return_exceptions=True)
        await self._services.all_healthy()
        where = f"kill {number + 1}: {service}, {delay * 1e3:.0f} ms into {step}"
        serving = await self._check(where)
        self._record.kills.append(
            {
                "step": step,
                "service": service,
                "delay_ms": delay * 1e3,
                "seconds": time.monotonic() - began,
                "serving": serving,
            }
        )

    # The steps. Each goes on until it has ended, or has been refused as it may be.

    async def _upload(self) -> None:
        self._made += 1
        made = await asyncio.to_thread(
            drill_bundle,
            self._directory / f"more-{self._made}",
            self._options.seed + 1 + self._made,
            self._options.model_mb,
        )
        right = await asyncio.to_thread(Reference, made, self._target.samples)
        pushed = await self._patiently(
            lambda: self._models.push(made.path, self._target.model, idle_timeout=_PATIENCE_SECONDS)
        )
        number = pushed.revision.revision
        self._stored[number] = made.digest
        self._load.references[number] = right

    async def _verify(self) -> None:
        verified = await self._patiently(self._models.verify)
        for file in verified.damaged:
            self._problem(f"the file {file.sha256} of the store is damaged: {file.message}")

    async def _swap(self) -> None:
        current = (await self._alias()).revision
        wanted = self._random.choice([n for n in self._stored if n != current])
        self._load.traffic.serving = 0
        await self._patiently(
            lambda: self._models.set_alias(
                self._target.model, self._target.alias, wanted, wait=False
            )
        )
        # It was acknowledged, so it ends: there, or back with a reason.
        with contextlib.suppress(AliasSwitchFailed):
            await self._patiently(
                lambda: self._models.wait_alias(
                    self._target.model, self._target.alias, wanted, wait_timeout=_PATIENCE_SECONDS
                )
            )

    async def _roll_out(self) -> None:
        current = (await self._alias()).revision
        wanted = self._random.choice([n for n in self._stored if n != current])
        self._load.traffic.serving = 0
        with contextlib.suppress(FailedPrecondition):
            # Refused where it was begun, its answer was lost, and it was sent again.
            await self._patiently(
                lambda: self._models.start_rollout(
                    self._target.model,
                    wanted,
                    alias=self._target.alias,
                    steps=(50, 100),
                    hold=0.2,
                    min_requests=20,
                )
            )
        give_up = time.monotonic() + 2 * _PATIENCE_SECONDS
        while time.monotonic() < give_up:
            now = (await self._patiently(lambda: self._models.rollouts(self._target.model)))[0]
            if now.end_time is not None:
                return
            await asyncio.sleep(_POLL_SECONDS)
        self._problem(f"rollout {now.number} was still {now.state} after a long time")
        await self._models.abort_rollout(self._target.model, now.number)

    async def _collect(self) -> None:
        """Delete the oldest revision that nobody needs; the manager cleans up when it starts."""
        alias = await self._alias()
        needed = {alias.revision, alias.pending_revision, alias.previous_revision}
        spare = sorted(set(self._stored) - needed)
        if len(self._stored) <= _KEPT_REVISIONS or not spare:
            await self._upload()
            return
        doomed = spare[0]
        # Whether it is there afterwards is open until the manager has said that it is not.
        digest = self._stored.pop(doomed)
        give_up = time.monotonic() + _PATIENCE_SECONDS
        while True:
            try:
                await self._patiently(
                    lambda: self._models.delete(self._target.model, revision=doomed)
                )
            except NotFound:
                break  # an answer was lost, and it was sent again
            except FailedPrecondition:  # it is being drained
                if time.monotonic() > give_up:
                    self._stored[doomed] = digest
                    raise
                await asyncio.sleep(_POLL_SECONDS)
            else:
                break
        self._deleted.add(doomed)

    # What must hold whatever was killed.

    async def _check(self, where: str) -> int:
        """Check everything; return the revision that is served."""
        alias = await self._settled(where)
        found = {
            item.revision: item.bundle_sha256
            for item in await self._patiently(lambda: self._models.revisions(self._target.model))
        }
        for number, digest in self._stored.items():
            if found.get(number) != digest:
                self._problem(f"{where}: revision {number} was acknowledged and is lost")
        for number in self._deleted & set(found):
            self._problem(f"{where}: revision {number} was deleted and is there")
        await self._until_answered(where, alias.revision)
        return alias.revision

    async def _settled(self, where: str) -> Alias:
        give_up = time.monotonic() + _PATIENCE_SECONDS
        while True:
            alias = await self._alias()
            if alias.state in ("ACTIVE", "FAILED"):
                break
            if time.monotonic() > give_up:
                self._problem(f"{where}: the alias is still {alias.state}")
                break
            await asyncio.sleep(_POLL_SECONDS)
        if alias.revision not in self._stored:
            self._problem(f"{where}: revision {alias.revision} is served, which nobody asked for")
        return alias

    async def _until_answered(self, where: str, revision: int) -> None:
        """Wait until the services answer again, by the revision that the alias names."""
        traffic = self._load.traffic
        traffic.serving = revision
        since, seen = len(traffic.answered), dict.fromkeys(self._target.kinds, 0)
        give_up = time.monotonic() + _PATIENCE_SECONDS
        while min(seen.values()) < _ANSWERS_AFTER:
            if time.monotonic() > give_up:
                self._problem(f"{where}: requests are not answered any more: {seen}")
                return
            await asyncio.sleep(_POLL_SECONDS)
            for answer in traffic.answered[since:]:
                seen[answer.kind] += 1
            since = len(traffic.answered)

    async def _alias(self) -> Alias:
        return await self._patiently(
            lambda: self._models.alias(self._target.model, self._target.alias)
        )

    async def _patiently(self, ask: Callable[[], Awaitable[T]]) -> T:
        """Ask until the manager is there: with it dead, nothing can be managed, and that is all."""
        give_up = time.monotonic() + _PATIENCE_SECONDS
        while True:
            try:
                return await ask()
            except (Unavailable, DeadlineExceeded):
                if time.monotonic() > give_up or not self._services.was_down((MODELS,), 0.0):
                    raise
            await asyncio.sleep(_POLL_SECONDS)

    def _problem(self, text: str) -> None:
        if text not in self._record.problems:
            self._record.problems.append(text)
