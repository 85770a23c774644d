"""Serving a repository without a manager: which models are loaded, when, and by whose word.

Every change of a model is made beside what serves: all its wanted versions are loaded, then one
reference is switched, then the old versions are freed once they are idle. If one of them does not
load, nothing changes.
"""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any, Literal

import structlog

from pollard.runtime.errors import RuntimeFault
from pollard.services.common.errors import ServiceError
from pollard.services.common.lifecycle import cancel, spawn
from pollard.services.common.routing import PRODUCTION
from pollard.services.inference.catalogue import IndexEntry, LoadParameter
from pollard.services.inference.config import poll_failed
from pollard.services.inference.engine import Engine, ServedModel
from pollard.services.inference.errors import (
    ControlDisabled,
    LoadOutdated,
    PollFailed,
    RequestInvalid,
)
from pollard.services.inference.load_request import read_parameters, write_files
from pollard.services.inference.loader import Loader
from pollard.services.inference.repository import (
    Limits,
    ModelRepository,
    RepositoryEntry,
    RepositoryModel,
    Stamp,
    read_folder,
)
from pollard.services.inference.revision import LoadedRevision

_log = structlog.get_logger("pollard.inference.standalone")

ModelControl = Literal["none", "explicit", "poll"]

_SETTLE_SECONDS = 0.2
"""A model whose files change within this time is still being copied."""


@dataclass(eq=False)
class _Order:
    """One wish for what a model should be."""

    number: int
    """Grows with each."""
    entry: RepositoryEntry | None
    """What should be loaded; None for nothing."""
    outdated: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when another order has come after it."""


@dataclass
class _Model:
    """What is known of one model beside what the engine serves."""

    changing: asyncio.Lock = field(default_factory=asyncio.Lock)
    order: _Order | None = None
    """The newest one that could be read."""
    arrivals: int = 0
    """Orders so far."""
    pending: int = 0
    """Loads under way."""
    stamp: Stamp = ()
    """Of what was loaded last, or could not be."""
    entry: RepositoryEntry | None = None
    """Of what is loaded from the repository; None if nothing is, or it came with the request."""
    states: dict[str, tuple[str, str]] = field(default_factory=dict)
    """State and reason by version."""


class StandaloneCatalogue:
    """The models of one repository. Used from the event loop's thread only."""

    def __init__(
        self,
        engine: Engine,
        loader: Loader,
        repository: ModelRepository,
        *,
        control: ModelControl = "none",
        load_at_start: Iterable[str] = (),
        poll_seconds: float = 15.0,
        limits: Limits | None = None,
    ) -> None:
        """Bring models of `repository` into `engine`.

        Args:
            engine: Runs the requests.
            loader: Loads versions.
            repository: Where the models are.
            control: "none" loads everything once, "poll" follows the folder, "explicit" waits for
                requests.
            load_at_start: With explicit control, what to load first; "*" for everything.
            poll_seconds: Time between two looks at the folder.
            limits: What holds where a configuration says nothing.
        """
        self._engine = engine
        self._loader = loader
        self._repository = repository
        self._control = control
        self._load_at_start = tuple(load_at_start)
        self._poll_seconds = poll_seconds
        self._limits = limits or Limits()
        self._models: dict[str, _Model] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self.ready = False
        """Whether all that should run at the start was loaded or refused."""

    async def start(self) -> None:
        """Load what should run from the start; a model that does not load does not stop others."""
        names = self._repository.names()
        if self._control == "explicit" and "*" not in self._load_at_start:
            names = sorted(set(self._load_at_start))
        for name in names:
            await self._try(name)
        self.ready = True
        if self._control == "poll":
            spawn(self._tasks, self._poll(), "poll-repository")

    async def close(self) -> None:
        """Abandon what is being loaded."""
        await cancel(*self._tasks)
        self._loader.close()

    def index(self) -> list[IndexEntry]:
        """Return every version that is or was wanted, and the models beside."""
        entries = []
        for name in sorted({*self._models, *self._repository.names()}):
            model = self._models.get(name)
            states = model.states if model else {}
            if not states:
                entries.append(IndexEntry(name, "", "UNAVAILABLE", "not loaded"))
            for version, (state, reason) in sorted(states.items(), key=lambda s: int(s[0] or 0)):
                entries.append(IndexEntry(name, version, state, reason))
        return entries

    async def load_model(self, model: str, parameters: Mapping[str, LoadParameter]) -> None:
        """Load a model, or load it again; see `Catalogue.load_model`."""
        self._require_explicit()
        config, files = read_parameters(model, parameters)
        # Not cancelled with the request: whoever asked may have gone, the order stands.
        task = asyncio.create_task(self._load(model, config, files), name=f"load-{model}")
        self._tasks.add(task)
        task.add_done_callback(self._loaded)
        await asyncio.shield(task)

    def _loaded(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            # Looked at, also if whoever asked has gone; it was logged where it happened.
            task.exception()

    async def unload_model(self, model: str, parameters: Mapping[str, LoadParameter]) -> None:
        """Unload a model; see `Catalogue.unload_model`."""
        self._require_explicit()
        for name, value in parameters.items():
            if name != "unload_dependents":
                raise RequestInvalid(f"unrecognized parameter '{name}' in unload", parameter=name)
            if not isinstance(value, bool):
                raise RequestInvalid(f"'{name}' must be a boolean", parameter=name)
        await self._unload(model)

    def _require_explicit(self) -> None:
        if self._control != "explicit":
            reason = "polling is enabled" if self._control == "poll" else "model control is off"
            raise ControlDisabled(
                f"explicit model load / unload is not allowed if {reason}; start the server with "
                "--model-control explicit"
            )

    async def _load(
        self, name: str, config: str | None = None, files: Mapping[str, bytes] | None = None
    ) -> None:
        model = self._models.setdefault(name, _Model())
        model.arrivals += 1
        number = model.arrivals
        model.pending += 1
        try:
            with contextlib.ExitStack() as held:
                if files:
                    folder = Path(
                        held.enter_context(tempfile.TemporaryDirectory(prefix="pollard-load-"))
                    )
                    await asyncio.to_thread(write_files, folder, files)
                    entry = await asyncio.to_thread(read_folder, name, folder, config)
                else:
                    entry = await asyncio.to_thread(self._repository.read, name, config)
                order = _newest(model, _Order(number, entry))
                async with model.changing:
                    if not files:
                        model.stamp = entry.stamp
                    await self._carry_out(model, name, order)
                    model.stamp, model.entry = ((), None) if files else (entry.stamp, entry)
        except (PollFailed, LoadOutdated) as error:
            self._refused(name, model, error.message)
            raise
        except OSError as error:
            failed = poll_failed(name, f"its files cannot be read: {error}")
            self._refused(name, model, failed.message)
            raise failed from error
        except (ServiceError, RuntimeFault) as error:
            self._refused(name, model, error.message)
            raise RequestInvalid(
                f"load failed for model '{name}': {error.message}", model=name
            ) from error
        finally:
            model.pending -= 1

    async def _carry_out(self, model: _Model, name: str, order: _Order) -> None:
        """Bring a model to what an order wants, unless a newer one comes first.

        Raises:
            LoadOutdated: a newer one has come; what serves is as it was.
        """
        entry = order.entry
        if order.outdated.is_set() or entry is None:
            raise _outdated(name)
        if _same(entry, model.entry):
            return
        replacing = asyncio.create_task(self._replace(model, entry, self._reusable(model, entry)))
        overtaken = asyncio.create_task(order.outdated.wait())
        try:
            await asyncio.wait({replacing, overtaken}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            await cancel(replacing, overtaken)
        if replacing.cancelled():
            raise _outdated(name)
        replacing.result()

    async def _replace(
        self, model: _Model, entry: RepositoryEntry, kept: dict[int, LoadedRevision]
    ) -> None:
        """Load what is wanted beside what serves, then switch."""
        loaded = dict(kept)
        fresh: list[LoadedRevision] = []
        wanted = [version for version in entry.versions if version not in kept]
        try:
            for version in wanted:
                if model.states.get(str(version), ("", ""))[0] != "READY":
                    model.states[str(version)] = ("LOADING", "")
                source = RepositoryModel(entry, version, self._limits)
                loaded[version] = await self._loader.load_source(source)
                fresh.append(loaded[version])
        except BaseException:
            for revision in fresh:
                self._engine.retire(revision)
            raise
        before = self._engine.table.models.get(entry.name)
        self._engine.switch(
            ServedModel(
                entry.name,
                MappingProxyType(dict(sorted(loaded.items()))),
                MappingProxyType({PRODUCTION: ((max(loaded), 1),)}),
            )
        )
        model.states = {str(version): ("READY", "") for version in sorted(loaded)}
        self._know(entry.name, loaded)
        if before is not None:
            for version, revision in before.revisions.items():
                if version not in loaded:
                    self._drain(model, version, revision)
        _log.info("switched", model=entry.name, versions=sorted(loaded))

    def _reusable(self, model: _Model, entry: RepositoryEntry) -> dict[int, LoadedRevision]:
        """Return loaded versions whose files and configuration are what they were."""
        served = self._engine.table.models.get(entry.name)
        if served is None or model.entry is None or model.entry.config != entry.config:
            return {}

        def common(each: RepositoryEntry, version: int) -> Stamp:
            versions = {str(number) for number in each.versions}
            # Labels and warm-up data belong to every version.
            return tuple(
                file
                for file in each.stamp
                if (first := PurePosixPath(file[0]).parts[0]) == str(version)
                or not (first.isdigit() or first in versions)
            )

        return {
            version: revision
            for version, revision in served.revisions.items()
            if version in entry.versions and common(model.entry, version) == common(entry, version)
        }

    async def _unload(self, name: str) -> None:
        model = self._models.get(name)
        if model is None:
            return
        model.arrivals += 1
        order = _newest(model, _Order(model.arrivals, None))
        async with model.changing:
            if order.outdated.is_set():
                # It is to be loaded again.
                return
            served = self._engine.table.models.get(name)
            model.stamp, model.entry = (), None
            if served is None:
                return
            self._engine.switch(ServedModel(name, {}, {}))
            for version, revision in served.revisions.items():
                self._drain(model, version, revision)
            _log.info("unloaded", model=name)

    def _drain(self, model: _Model, version: int, revision: LoadedRevision) -> None:
        key = str(version)
        draining = ("UNLOADING", "")
        model.states[key] = draining

        async def wait() -> None:
            await revision.freed.wait()
            # Unless the version has come back since.
            if model.states.get(key) is draining:
                model.states[key] = ("UNAVAILABLE", "unloaded")

        spawn(self._tasks, wait(), f"drain-{revision.info.model}-{version}")

    def _refused(self, name: str, model: _Model, reason: str) -> None:
        """Note why a load failed; what serves is as it was."""
        _log.warning("refused", model=name, error=reason)
        if model.pending > 1:
            # What another load does to the model's states stands.
            return
        served = self._engine.table.models.get(name)
        ready = set(map(str, served.revisions)) if served else set()
        for version, (state, _) in list(model.states.items()):
            if state == "LOADING":
                model.states[version] = ("UNAVAILABLE", reason)
        if not model.states and name not in self._repository.names():
            # A name that somebody made up is not kept.
            self._models.pop(name, None)
            return
        if not model.states:
            model.states[""] = ("UNAVAILABLE", reason)
        for version in ready:
            model.states[version] = ("READY", "")
        self._know(name, (int(version) for version in model.states if version))

    def _know(self, name: str, versions: Iterable[int]) -> None:
        # A version that was known and is not loaded is not ready; any other is not found.
        known = self._engine.known.get(name, frozenset()) | frozenset(versions)
        self._engine.known = {**self._engine.known, name: known}

    async def _try(self, name: str) -> None:
        try:
            await self._load(name)
        except ServiceError as error:
            _log.error("a model is not served", model=name, error=error.message)

    async def _poll(self) -> None:
        while True:
            await asyncio.sleep(self._poll_seconds)
            try:
                await self._look()
            except Exception:
                _log.exception("the repository could not be polled")

    async def _look(self) -> None:
        """Bring the models to what the folder holds now."""
        names = await asyncio.to_thread(self._repository.names)
        for name in names:
            stamp = await asyncio.to_thread(self._repository.stamp, name)
            model = self._models.get(name)
            if model is not None and stamp == model.stamp:
                continue
            await asyncio.sleep(min(_SETTLE_SECONDS, self._poll_seconds))
            if stamp == await asyncio.to_thread(self._repository.stamp, name):
                await self._try(name)
                # Also where it could not be read: it is tried again once its files change.
                self._models.setdefault(name, _Model()).stamp = stamp
        for name in [name for name in self._engine.table.models if name not in names]:
            await self._unload(name)


def _newest(model: _Model, order: _Order) -> _Order:
    """Make an order the newest of its model; one that wants something else is out of date."""
    before = model.order
    if before is not None:
        if (
            before.entry is not None
            and order.entry is not None
            and _same(order.entry, before.entry)
        ):
            return before
        if before.number > order.number:
            # It took longer to read than the one that came after it.
            order.outdated.set()
            return order
        before.outdated.set()
    model.order = order
    return order


def _outdated(name: str) -> LoadOutdated:
    return LoadOutdated(
        f"load failed for model '{name}': it is out-dated, a newer order for this model has "
        "overtaken it",
        model=name,
    )


def _same(entry: RepositoryEntry, loaded: RepositoryEntry | None) -> bool:
    return (
        loaded is not None
        and entry.stamp == loaded.stamp
        and entry.config == loaded.config
        and entry.batch_size_given == loaded.batch_size_given
    )
