"""Bringing the engine to what the manager wants: load beside, switch, free.

Each model is brought over by itself and atomically. What cannot be loaded leaves that model's
routes where they were; every other model goes on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from types import MappingProxyType

import structlog
from google.protobuf import duration_pb2

from pollard.models.v1 import fleet_service_pb2 as fleet_pb
from pollard.runtime.errors import BundleError, SignatureInvalid, SignatureUntrusted
from pollard.services.common.bundle_source import BundleSource, cache_fault
from pollard.services.common.desired import Route, follow_routes, follow_shadows, tell_model
from pollard.services.common.fleet_agent import Applied, Failure, RevisionKey
from pollard.services.common.lifecycle import cancel
from pollard.services.common.status import to_proto
from pollard.services.inference.catalogue import IndexEntry, LoadParameter
from pollard.services.inference.engine import Engine, ServedModel
from pollard.services.inference.errors import ControlDisabled, DeviceFailed
from pollard.services.inference.loader import Loader
from pollard.services.inference.revision import LoadedRevision

_log = structlog.get_logger("pollard.inference.sync")

LINGER_SECONDS = 15.0
"""How long a revision is kept that an alias has left in the same order that takes it away.

A manager does that only where it cannot know that requests may still be sent to it, as after a
restore from a backup: preprocess servers may be told some seconds later than this one.
"""

_Key = tuple[str, int, str]
"""Model, revision and digest: what makes a load the same load."""


_INDEX_STATES = {
    fleet_pb.REVISION_STATE_PENDING: "LOADING",
    fleet_pb.REVISION_STATE_FETCHING: "LOADING",
    fleet_pb.REVISION_STATE_LOADING: "LOADING",
    fleet_pb.REVISION_STATE_READY: "READY",
    fleet_pb.REVISION_STATE_FAILED: "UNAVAILABLE",
    fleet_pb.REVISION_STATE_DRAINING: "UNLOADING",
}
"""The protocol's name of each state."""


class InferenceMember:
    """The inference server as a member of the fleet."""

    def __init__(
        self, engine: Engine, loader: Loader, on_change: Callable[[], None] = lambda: None
    ) -> None:
        """Bring `engine` to each desired state with `loader`.

        Args:
            engine: Runs the requests.
            loader: Loads revisions.
            on_change: Called when the state of a revision has changed.
        """
        self._engine = engine
        # Until a first state is here, from the manager or the cache, nothing is known.
        engine.settled = False
        self._loader = loader
        self.on_change = on_change
        loader.on_measured = lambda: self.on_change()
        self.ready = False
        """Whether a first state has been applied as far as it can be."""
        self._statuses: dict[tuple[str, int], fleet_pb.RevisionStatus] = {}
        # Loads outlive the order that began them, so that a newer order that still wants a
        # revision does not begin its load again.
        self._loads: dict[_Key, asyncio.Task[LoadedRevision]] = {}
        self._draining: set[asyncio.Task[None]] = set()
        self._lingering: dict[tuple[str, int], LoadedRevision] = {}
        """Served for those who name them, and not wanted. One that is wanted again is loaded
        anew: the cache may have let its bundle go."""

    def statuses(self) -> list[fleet_pb.RevisionStatus]:
        """Return the state and the counters of every revision that is wanted or still there."""
        result = []
        for (model, number), status in sorted(self._statuses.items()):
            copy = fleet_pb.RevisionStatus()
            copy.CopyFrom(status)
            result.append(copy)
            served = self._engine.table.models.get(model)
            loaded = served.revisions.get(number) if served is not None else None
            if loaded is not None and loaded.info.digest != status.bundle_sha256:
                continue  # Requests are still answered by another bundle that had the number.
            counters = self._engine.counters(model, number)
            if counters is not None:
                copy.counters.CopyFrom(counters.to_proto())
            if loaded is not None:
                copy.waiting, copy.in_flight = loaded.waiting, loaded.in_flight
                if copy.HasField("tuning"):
                    copy.tuning.CopyFrom(_tuning(loaded))
        return result

    def index(self) -> list[IndexEntry]:
        """Return the state of every revision that is wanted or still there."""
        return [
            IndexEntry(
                status.model,
                str(status.revision),
                _INDEX_STATES.get(status.state, "UNAVAILABLE"),
                status.error.message,
            )
            for _, status in sorted(self._statuses.items())
        ]

    async def load_model(self, model: str, parameters: Mapping[str, LoadParameter]) -> None:
        """Refuse: the manager says what is loaded."""
        raise self._control_disabled(model)

    async def unload_model(self, model: str, parameters: Mapping[str, LoadParameter]) -> None:
        """Refuse: the manager says what is loaded."""
        raise self._control_disabled(model)

    def _control_disabled(self, model: str) -> ControlDisabled:
        return ControlDisabled(
            "explicit model load / unload is not allowed: the manager says what this server runs. "
            "Use ModelService, or a server with --repository and --model-control explicit",
            model=model,
        )

    async def apply(
        self,
        state: fleet_pb.DesiredState,
        bundles: BundleSource,
        hopeless: Mapping[RevisionKey, BaseException] = MappingProxyType({}),
    ) -> Applied:
        """Bring the engine to `state` as far as possible; see `FleetMember.apply`."""
        wanted = {model.model: model for model in state.models}
        keys = {
            (model.model, revision.revision, revision.bundle_sha256)
            for model in state.models
            for revision in model.revisions
        }
        await self._abandon(key for key in list(self._loads) if key not in keys)
        for model in self._engine.table.models:
            # A model that is no longer listed is one without revisions.
            wanted.setdefault(model, fleet_pb.DesiredModel(model=model))
        self._forget_unwanted(wanted)
        outcomes = await asyncio.gather(
            *(self._apply_model(model, bundles, hopeless) for model in wanted.values())
        )
        self.ready = True
        return Applied(
            running=fleet_pb.DesiredState(models=self._running()),
            failures=tuple(failure for failures in outcomes for failure in failures),
        )

    async def close(self) -> None:
        """Abandon every load."""
        await self._abandon(list(self._loads))
        await cancel(*self._draining)
        self._loader.close()

    async def _apply_model(
        self,
        desired: fleet_pb.DesiredModel,
        bundles: BundleSource,
        hopeless: Mapping[RevisionKey, BaseException],
    ) -> list[Failure]:
        model = desired.model
        served = self._engine.table.models.get(model) or ServedModel(model, {}, {})
        available: dict[int, LoadedRevision] = {}
        loading: dict[int, asyncio.Task[LoadedRevision]] = {}
        failures: list[Failure] = []
        for revision in desired.revisions:
            loaded = served.revisions.get(revision.revision)
            if self._lingering.get((model, revision.revision)) is loaded:
                loaded = None
            if loaded is not None and loaded.info.digest == revision.bundle_sha256:
                available[revision.revision] = loaded
            elif (why := hopeless.get((model, revision.revision))) is not None:
                failures.append(Failure(model, revision.revision, why))
            else:
                loading[revision.revision] = self._load_task(model, revision, bundles)
        for number, task in loading.items():
            try:
                # Shielded: if a newer order overtakes this one, it decides about the load.
                available[number] = await asyncio.shield(task)
            except asyncio.CancelledError:
                raise
            except Exception as error:
                failures.append(Failure(model, number, error))
        # From here on nothing waits, so no newer order can come in between.
        for key in [key for key, task in self._loads.items() if task in loading.values()]:
            del self._loads[key]
        self._switch(desired, served, available)
        return failures

    def _switch(
        self,
        desired: fleet_pb.DesiredModel,
        served: ServedModel,
        running: Mapping[int, LoadedRevision],
    ) -> None:
        routes, available = follow_routes(desired, running, served.routes, served.revisions)
        lingered = self._lingering_of(served.name)
        self._linger(served, routes, available)
        lingering = self._lingering_of(served.name)
        switched = ServedModel(
            served.name,
            MappingProxyType(dict(sorted({**lingering, **available}.items()))),
            MappingProxyType(routes),
            MappingProxyType(follow_shadows(desired, routes, available)),
        )
        if switched != served:
            self._engine.switch(switched)
            _log.info(
                "switched",
                model=served.name,
                revisions=list(switched.revisions),
                routes={alias: list(targets) for alias, targets in routes.items()},
            )
        for number, revision in served.revisions.items():
            if revision not in (available.get(number), lingered.get(number)):
                self._drain(revision)
        for revision in available.values():
            self._set_ready(revision)

    def _lingering_of(self, model: str) -> dict[int, LoadedRevision]:
        return {number: kept for (name, number), kept in self._lingering.items() if name == model}

    def _linger(
        self,
        served: ServedModel,
        routes: Mapping[str, Route],
        available: Mapping[int, LoadedRevision],
    ) -> None:
        """Keep for a while what aliases have just left and nobody wants any more."""
        for number in available:
            self._lingering.pop((served.name, number), None)
        for alias in routes:
            for number, _ in served.routes.get(alias, ()):
                key, revision = (served.name, number), served.revisions.get(number)
                if revision is None or number in available or key in self._lingering:
                    continue
                self._lingering[key] = revision
                task = asyncio.create_task(self._let_go(key, revision), name=f"let-go-{number}")
                self._draining.add(task)
                task.add_done_callback(self._draining.discard)

    async def _let_go(self, key: tuple[str, int], revision: LoadedRevision) -> None:
        await asyncio.sleep(LINGER_SECONDS)
        if self._lingering.get(key) is not revision:
            return  # It has been wanted again meanwhile.
        del self._lingering[key]
        served = self._engine.table.models.get(key[0])
        if served is not None and served.revisions.get(key[1]) is revision:
            left = {number: kept for number, kept in served.revisions.items() if number != key[1]}
            self._engine.switch(replace(served, revisions=MappingProxyType(left)))

    def _load_task(
        self, model: str, desired: fleet_pb.DesiredRevision, bundles: BundleSource
    ) -> asyncio.Task[LoadedRevision]:
        key = (model, desired.revision, desired.bundle_sha256)
        task = self._loads.get(key)
        if task is None:
            task = asyncio.create_task(
                self._load(model, desired, bundles), name=f"load-{model}-{desired.revision}"
            )
            self._loads[key] = task
        return task

    async def _load(
        self, model: str, desired: fleet_pb.DesiredRevision, bundles: BundleSource
    ) -> LoadedRevision:
        number, digest = desired.revision, desired.bundle_sha256
        self._set(model, number, digest, fleet_pb.REVISION_STATE_PENDING)
        try:
            try:
                return await self._fetch_and_load(model, desired, bundles)
            except (SignatureInvalid, SignatureUntrusted):
                # It may have been signed since it was fetched; its files are as they should be.
                if not await bundles.refresh_signature(digest):
                    raise
                return await self._fetch_and_load(model, desired, bundles)
            except BundleError as error:
                # The copy in the cache has been damaged since it was checked on arrival.
                _log.warning(
                    "a cached bundle is damaged; fetching it again",
                    model=model,
                    revision=number,
                    digest=digest,
                    error=error.message,
                )
                await bundles.discard(digest)
                return await self._fetch_and_load(model, desired, bundles)
        except asyncio.CancelledError:
            self._statuses.pop((model, number), None)
            raise
        except Exception as error:
            _log.warning("refused", model=model, revision=number, error=str(error))
            status = self._set(model, number, digest, fleet_pb.REVISION_STATE_FAILED)
            status.error.CopyFrom(to_proto(error))
            raise

    async def _fetch_and_load(
        self, model: str, desired: fleet_pb.DesiredRevision, bundles: BundleSource
    ) -> LoadedRevision:
        number, digest = desired.revision, desired.bundle_sha256
        self._set(model, number, digest, fleet_pb.REVISION_STATE_FETCHING)
        path = await bundles.fetch(digest)
        self._set(model, number, digest, fleet_pb.REVISION_STATE_LOADING)
        try:
            return await self._loader.load(model, number, digest, desired.size_bytes, path)
        except OSError as error:
            raise cache_fault(error, digest) from error

    async def _abandon(self, keys: Iterable[_Key]) -> None:
        for key in keys:
            task = self._loads.pop(key)
            await cancel(task)
            if not task.cancelled() and task.exception() is None:
                # It was ready, and nobody wants it any more; it never got a request.
                self._drain(task.result())
                self._engine.retire(task.result())

    def _drain(self, revision: LoadedRevision) -> None:
        """Show a revision as draining until it is freed; the engine frees it."""
        info = revision.info
        key = (info.model, info.revision)
        if self._has_failed_another(key, info.digest):
            return
        status = self._set(*key, info.digest, fleet_pb.REVISION_STATE_DRAINING)
        status.variant = info.variant

        async def forget() -> None:
            await revision.freed.wait()
            # Unless the number has come back since.
            if self._statuses.get(key) is status:
                del self._statuses[key]
                self.on_change()

        task = asyncio.create_task(forget())
        self._draining.add(task)
        task.add_done_callback(self._draining.discard)

    def devices_changed(self) -> None:
        """Report the revisions whose device is gone as failed."""
        for model in self._engine.table.models.values():
            for revision in model.revisions.values():
                if revision.lost:
                    self._set_lost(revision)

    def _set_lost(self, revision: LoadedRevision) -> None:
        info = revision.info
        current = self._statuses.get((info.model, info.revision))
        if current is None or current.state != fleet_pb.REVISION_STATE_FAILED:
            status = self._set(
                info.model, info.revision, info.digest, fleet_pb.REVISION_STATE_FAILED
            )
            status.variant = info.variant
            lost = DeviceFailed(f"its GPU is lost: {revision.lost}", reason="DEVICE_LOST")
            status.error.CopyFrom(to_proto(lost))

    def _set_ready(self, revision: LoadedRevision) -> None:
        info = revision.info
        if revision.lost:
            self._set_lost(revision)
            return
        key = (info.model, info.revision)
        if self._has_failed_another(key, info.digest):
            # An alias keeps it, and what the manager means by the number does not run here.
            return
        current = self._statuses.get(key)
        if (
            current is not None
            and current.state == fleet_pb.REVISION_STATE_READY
            and current.bundle_sha256 == info.digest
        ):
            return
        status = self._set(*key, info.digest, fleet_pb.REVISION_STATE_READY)
        status.variant = info.variant
        status.load_duration.CopyFrom(_duration(info.load_seconds))
        status.tuning.CopyFrom(_tuning(revision))

    def _has_failed_another(self, key: tuple[str, int], digest: str) -> bool:
        """Tell whether another bundle is wanted under the number of this one and failed."""
        status = self._statuses.get(key)
        return (
            status is not None
            and status.state == fleet_pb.REVISION_STATE_FAILED
            and status.bundle_sha256 != digest
        )

    def _set(
        self, model: str, number: int, digest: str, state: fleet_pb.RevisionState.ValueType
    ) -> fleet_pb.RevisionStatus:
        status = fleet_pb.RevisionStatus(
            model=model, revision=number, state=state, bundle_sha256=digest
        )
        self._statuses[model, number] = status
        self.on_change()
        return status

    def _forget_unwanted(self, wanted: dict[str, fleet_pb.DesiredModel]) -> None:
        """Forget failures that nobody wants any more, and tell the engine what is known."""
        known = {
            name: frozenset(revision.revision for revision in model.revisions)
            for name, model in wanted.items()
        }
        self._engine.known = known
        self._engine.known_aliases = {
            name: frozenset(route.alias for route in model.routes) for name, model in wanted.items()
        }
        self._engine.settled = True
        keys = {
            (name, revision.revision, revision.bundle_sha256)
            for name, model in wanted.items()
            for revision in model.revisions
        }
        for key, status in list(self._statuses.items()):
            failed = status.state == fleet_pb.REVISION_STATE_FAILED
            if failed and (*key, status.bundle_sha256) not in keys:
                del self._statuses[key]

    def _running(self) -> list[fleet_pb.DesiredModel]:
        """Return what the engine serves in the form of desired models."""
        return [
            tell_model(
                name,
                [
                    fleet_pb.DesiredRevision(
                        revision=number,
                        bundle_sha256=revision.info.digest,
                        size_bytes=revision.info.size_bytes,
                    )
                    for number, revision in model.revisions.items()
                    if (name, number) not in self._lingering
                ],
                model.routes,
                model.shadows,
            )
            for name, model in sorted(self._engine.table.models.items())
        ]


def _tuning(revision: LoadedRevision) -> fleet_pb.Tuning:
    info = revision.info
    found = fleet_pb.Tuning(
        workers=revision.workers,
        threads=info.threads,
        joined_batch=revision.joined_batch,
        set_by_hand=info.set_by_hand,
    )
    if (measured := info.tuning) is not None:
        found.aim, found.processor = measured.aim, measured.processor
        found.cores, found.onnxruntime = measured.cores, measured.onnxruntime
        found.measured_time.FromMilliseconds(round(measured.measured_at * 1000))
        for point in measured.points:
            found.points.add(
                threads=point.threads,
                callers=point.callers,
                batch_size=point.rows,
                rows_per_second=point.rows_per_second,
                latency_us=point.run_seconds * 1e6,
            )
    return found


def _duration(seconds: float) -> duration_pb2.Duration:
    duration = duration_pb2.Duration()
    duration.FromMilliseconds(round(seconds * 1000))
    return duration
