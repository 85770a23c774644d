"""The engine: which revisions are loaded, where requests go, and the switch between them.

What requests see is one immutable routing table behind one reference. A switch builds a new table
and replaces the reference; a request that has found its revision in the old table keeps it until
it is answered, whatever happens to the table.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from pollard.runtime.sessions import Array, TensorInfo
from pollard.services.common.counters import RequestCounters
from pollard.services.common.desired import Route
from pollard.services.common.routing import PRODUCTION, choose_revision
from pollard.services.common.shadows import ShadowRule
from pollard.services.inference.errors import (
    ModelNotReady,
    ModelUnknown,
    RequestInvalid,
    ServerStopping,
)
from pollard.services.inference.revision import LoadedRevision
from pollard.services.inference.shadowing import Shadowing, ShadowRunner
from pollard.services.inference.workers import Outputs

_MOMENT_SECONDS = 1.0


@dataclass(frozen=True)
class ServedModel:
    """One model as requests find it."""

    name: str
    revisions: Mapping[int, LoadedRevision]
    routes: Mapping[str, Route]
    """By alias; every revision in it is in `revisions`."""
    shadows: Mapping[str, ShadowRule] = field(default_factory=lambda: MappingProxyType({}))
    """By alias; every revision in it is in `revisions`."""


@dataclass(frozen=True)
class RoutingTable:
    """All models as requests find them. Never changed, only replaced."""

    models: Mapping[str, ServedModel] = field(default_factory=lambda: MappingProxyType({}))

    def with_model(self, model: ServedModel) -> RoutingTable:
        """Return a table that differs in one model; one without revisions is left out."""
        models = dict(self.models)
        if model.revisions:
            models[model.name] = model
        else:
            models.pop(model.name, None)
        return replace(self, models=MappingProxyType(models))


class Engine:
    """Runs requests on loaded revisions. Used from the event loop's thread, but for `enter`."""

    def __init__(self, *, max_request_seconds: float = 30.0) -> None:
        """Start without models.

        Args:
            max_request_seconds: Longest that a request may take, whatever its deadline.
        """
        self.table = RoutingTable()
        self.known: Mapping[str, frozenset[int]] = {}
        """Revisions that should be served, loaded or not, by model: what is known but not loaded
        is "not ready", the rest is unknown."""
        self.known_aliases: Mapping[str, frozenset[str]] = {}
        """Aliases that should lead somewhere, loaded or not, by model."""
        self.settled = True
        """Whether `known` is what the manager, or the cache, says; until then nothing is unknown,
        only not ready."""
        self._max_request_seconds = max_request_seconds
        self._counters: dict[tuple[str, int], RequestCounters] = {}
        self.switches: dict[str, int] = {}
        """How often what serves a model was changed, while there is one."""
        self._cores = len(os.sched_getaffinity(0))
        self._shadows = ShadowRunner(self._has_idle_worker)
        self._retiring: set[asyncio.Task[None]] = set()
        self._stopping = False
        self.on_lost: Callable[[], None] = lambda: None
        """Called when a revision's device is found to be gone, and after switches from then on."""
        self._any_lost = False

    def resolve(
        self, model: str, version: str = "", alias: str = "", sticky_key: str = ""
    ) -> LoadedRevision:
        """Return the revision that a request is for.

        The caller must run it before it yields to the event loop, or the revision may be freed.

        Args:
            model: Name of the model.
            version: A revision's number, or empty to follow the alias.
            alias: Alias to follow; empty means "production".
            sticky_key: Requests with the same key get the same revision of a split alias.

        Raises:
            RequestInvalid: the version is not an integer.
            ModelUnknown: there is no such model, revision or alias.
            ModelNotReady: it is known but not loaded, or its device is gone.
            ServerStopping: the server takes no new requests.
        """
        if self._stopping:
            raise ServerStopping("the server is stopping; send the request to another one")
        served = self.table.models.get(model)
        if version:
            number = parse_version(version)
            revision = served.revisions.get(number) if served else None
            if revision is None:
                if not self.settled or number in self.known.get(model, ()):
                    raise ModelNotReady(
                        f"Request for unknown model: '{model}' version {number} is not at ready "
                        "state",
                        model=model,
                        version=number,
                    )
                raise ModelUnknown(
                    f"Request for unknown model: '{model}' version {number} is not found",
                    model=model,
                    version=number,
                )
            return _running(revision)
        if served is None:
            if not self.settled or self.known.get(model):
                raise ModelNotReady(
                    f"Request for unknown model: '{model}' is not at ready state", model=model
                )
            raise ModelUnknown(f"Request for unknown model: '{model}' is not found", model=model)
        wanted = alias or PRODUCTION
        number_or_none = choose_revision(served.routes.get(wanted, ()), sticky_key)
        if number_or_none is None and wanted in self.known_aliases.get(model, ()):
            raise ModelNotReady(
                f"Request for unknown model: '{model}' is not at ready state: what alias "
                f"'{wanted}' leads to is not loaded here",
                model=model,
                alias=wanted,
            )
        if number_or_none is None:
            raise ModelUnknown(
                f"Request for unknown model: '{model}' has no alias '{wanted}'; it has "
                f"{sorted(served.routes)}. Name a version or point the alias at one",
                model=model,
                alias=wanted,
            )
        return _running(served.revisions[number_or_none])

    def enter(
        self, model: str, version: str = "", alias: str = "", sticky_key: str = ""
    ) -> LoadedRevision:
        """Return the revision that a request is for, as `resolve`, and keep it until its `finish`.

        May be called on any thread.
        """
        while True:
            revision = self.resolve(model, version, alias, sticky_key)
            # One that is being freed has left the table already.
            if revision.enter():
                return revision

    def deadline(self, seconds_left: float | None) -> float:
        """Return when a request is given up, on the clock of `time.monotonic`.

        Args:
            seconds_left: Time until the caller's deadline; None if it has none.
        """
        limit = self._max_request_seconds
        if seconds_left is not None:
            limit = min(limit, seconds_left)
        return time.monotonic() + limit

    async def infer(
        self,
        revision: LoadedRevision,
        feeds: dict[str, Array],
        outputs: Sequence[TensorInfo],
        seconds_left: float | None = None,
        *,
        wait_seconds: float = 0.0,
        priority: int = 0,
    ) -> Outputs:
        """Run one request on a revision that `resolve` returned.

        Args:
            revision: Where to run it.
            feeds: Inputs by name, checked against the revision.
            outputs: Outputs wanted.
            seconds_left: Time until the caller's deadline; None if it has none.
            wait_seconds: Longest that it may wait for a worker; 0 leaves that to the model.
            priority: 1 is the highest; 0 leaves it to the model.

        Raises:
            QueueFull: too many requests wait.
            QueueTimeout: it waited longer than it may.
            RequestExpired: the deadline passed before it was run.
            ExecutionFailed: onnxruntime failed on it.
        """
        return await revision.infer(
            feeds,
            outputs,
            self.deadline(seconds_left),
            wait_seconds=wait_seconds,
            priority=priority,
        )

    async def infer_shadow(
        self,
        revision: LoadedRevision,
        feeds: dict[str, Array],
        outputs: Sequence[TensorInfo],
    ) -> Outputs:
        """Run a copy of a request at low priority; whoever sent it compares and counts it.

        Raises:
            ShadowDropped: no worker is idle, or too many copies wait.
            ExecutionFailed: onnxruntime failed on it.
        """
        return await self._shadows.run(revision, feeds, [output.name for output in outputs])

    def _has_idle_worker(self) -> bool:
        """Tell from any thread whether fewer requests are in hand than there are cores."""
        in_hand = sum(
            revision.in_flight
            for model in self.table.models.values()
            for revision in model.revisions.values()
        )
        return in_hand < self._cores

    def switch(self, model: ServedModel) -> None:
        """Replace a model by another state of it; free what is no longer in it once it is idle.

        A model without revisions is removed.
        """
        before = self.table.models.get(model.name)
        for number, revision in model.revisions.items():
            # Counters only grow while the server runs, also where a revision comes back.
            revision.counters = self._counters.setdefault((model.name, number), revision.counters)
            revision.shadow = None
            revision.on_lost = self._lost
        for rule in model.shadows.values():
            if not rule.transform_again:
                base = model.revisions[rule.base_revision]
                base.shadow = base.shadow or Shadowing(self._shadows)
                base.shadow.add(model.revisions[rule.revision], rule.share, rule.output)
        self.table = self.table.with_model(model)
        self.switches[model.name] = self.switches.get(model.name, 0) + 1
        if not model.revisions:
            del self.switches[model.name]
        if self._any_lost:
            self.on_lost()
        if before is not None:
            kept = set(map(id, model.revisions.values()))
            for revision in before.revisions.values():
                if id(revision) not in kept:
                    self.retire(revision)

    @property
    def lost(self) -> bool:
        """Whether nothing that is loaded can run any more, because devices are gone."""
        revisions = [r for model in self.table.models.values() for r in model.revisions.values()]
        return bool(revisions) and all(revision.lost for revision in revisions)

    def _lost(self) -> None:
        self._any_lost = True
        self.on_lost()

    def retire(self, revision: LoadedRevision) -> asyncio.Task[None]:
        """Free a revision once its requests in flight are answered; return the task that waits."""
        task = asyncio.get_running_loop().create_task(revision.retire())
        self._retiring.add(task)
        task.add_done_callback(self._retiring.discard)
        return task

    def counters(self, model: str, revision: int) -> RequestCounters | None:
        """Return the counters of a revision; None if it was never loaded."""
        return self._counters.get((model, revision))

    @property
    def stopping(self) -> bool:
        """Whether new requests are refused."""
        return self._stopping

    def busy(self) -> bool:
        """Tell whether requests are in flight or were a moment ago. May be called on any thread."""
        since = time.monotonic() - _MOMENT_SECONDS
        return any(
            revision.in_flight > 0 or revision.last_request > since
            for model in self.table.models.values()
            for revision in model.revisions.values()
        )

    def stop_accepting(self) -> None:
        """Refuse new requests from now on."""
        self._stopping = True

    async def close(self) -> None:
        """Refuse new requests, finish those in flight and free everything."""
        self.stop_accepting()
        self._shadows.close()
        served = list(self.table.models.values())
        self.table = RoutingTable()
        for model in served:
            for revision in model.revisions.values():
                self.retire(revision)
        while self._retiring:
            await asyncio.gather(*self._retiring, return_exceptions=True)


def _running(revision: LoadedRevision) -> LoadedRevision:
    """Return a revision if its device is there.

    Raises:
        ModelNotReady: it is not.
    """
    if lost := revision.lost:
        raise ModelNotReady(
            f"'{revision.info.model}' version {revision.info.revision} is not at ready state: its "
            f"GPU is lost ({lost}); the server must be started again",
            model=revision.info.model,
            version=revision.info.revision,
        )
    return revision


def parse_version(version: str) -> int:
    """Return the number of a version as requests write it.

    Raises:
        RequestInvalid: it is not a positive integer.
    """
    if version.isascii() and version.isdigit() and len(version) < 19 and int(version) > 0:
        return int(version)
    raise RequestInvalid(
        f"failed to get model version from specified version string '{version}', version should be "
        "an integral value > 0; other aliases than production travel in the metadata key "
        "pollard-alias",
        version=version,
    )
