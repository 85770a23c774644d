"""Bringing the snapshot to what the manager wants.

Everything new is fetched and checked first; then one reference is switched.
A model whose new revisions cannot be had keeps its routes where they were.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from types import MappingProxyType

import structlog

from pollard.models.v1 import fleet_service_pb2 as fleet_pb
from pollard.runtime.bundle import Bundle, check_file
from pollard.runtime.errors import BundleError
from pollard.runtime.images import ImageLimits
from pollard.services.common.bundle_source import BundleSource, cache_fault
from pollard.services.common.desired import follow_routes, follow_shadows, tell_model
from pollard.services.common.fleet_agent import Applied, Failure, RevisionKey
from pollard.services.common.status import to_proto
from pollard.services.preprocess.counts import Counts
from pollard.services.preprocess.inference_client import InferenceClient
from pollard.services.preprocess.snapshot import (
    Current,
    Missing,
    ServedModel,
    ServedRevision,
    Snapshot,
)

_log = structlog.get_logger("pollard.preprocess.sync")


class PreprocessMember:
    """The preprocess server as a member of the fleet."""

    def __init__(
        self,
        current: Current,
        client: InferenceClient,
        limits: ImageLimits | None = None,
        on_change: Callable[[], None] = lambda: None,
        counts: Counts | None = None,
    ) -> None:
        """Bring ``current`` to each desired state.

        Args:
            current: Holds the snapshot that requests are served from.
            client: Lets go of inference servers that are no longer there.
            limits: How large images may be.
            on_change: Called when the state of a revision has changed.
            counts: What is counted of each revision.
        """
        self._counts = counts or Counts()
        self._current = current
        self._client = client
        self._limits = limits
        self.on_change = on_change
        self._failed: dict[tuple[str, int], fleet_pb.RevisionStatus] = {}

    def statuses(self) -> list[fleet_pb.RevisionStatus]:
        """Return the state of every revision that is wanted."""
        ready = [
            fleet_pb.RevisionStatus(
                model=model.name,
                revision=number,
                state=fleet_pb.REVISION_STATE_READY,
                counters=self._counts.of(model.name, number).to_proto(),
                bundle_sha256=revision.digest,
            )
            for model in self._current.snapshot.models.values()
            for number, revision in model.revisions.items()
            if (model.name, number) not in self._failed
        ]
        return [*ready, *self._failed.values()]

    async def apply(
        self,
        state: fleet_pb.DesiredState,
        bundles: BundleSource,
        hopeless: Mapping[RevisionKey, BaseException] = MappingProxyType({}),
    ) -> Applied:
        """Bring the snapshot to ``state`` as far as possible; see `FleetMember.apply`."""
        before = self._current.snapshot
        outcomes = await asyncio.gather(
            *(self._prepare_model(model, before, bundles, hopeless) for model in state.models)
        )
        # From here on nothing waits, so no newer state can come in between.
        failures = tuple(failure for _, failed in outcomes for failure in failed)
        missing = {
            desired.model: Missing(
                frozenset(failure.revision for failure in failed) - model.revisions.keys(),
                frozenset(route.alias for route in desired.routes) - model.routes.keys(),
            )
            for desired, (model, failed) in zip(state.models, outcomes, strict=True)
            if failed
        }
        snapshot = Snapshot(
            models=MappingProxyType(
                {model.name: model for model, _ in outcomes if model.revisions or model.routes}
            ),
            endpoints=tuple(endpoint.address for endpoint in state.inference_endpoints),
            missing=MappingProxyType(missing),
            refused=MappingProxyType(
                {
                    endpoint.address: frozenset(
                        (item.model, item.revision) for item in endpoint.refused
                    )
                    for endpoint in state.inference_endpoints
                    if endpoint.refused
                }
            ),
        )
        self._current.snapshot = snapshot
        self._client.retain(snapshot.endpoints)
        digests = {
            (model.model, revision.revision): revision.bundle_sha256
            for model in state.models
            for revision in model.revisions
        }
        self._failed = {
            (failure.model, failure.revision): fleet_pb.RevisionStatus(
                model=failure.model,
                revision=failure.revision,
                state=fleet_pb.REVISION_STATE_FAILED,
                error=to_proto(failure.error),
                bundle_sha256=digests[failure.model, failure.revision],
            )
            for failure in failures
        }
        self.on_change()
        for model in snapshot.models.values():
            old = before.models.get(model.name)
            if old is None or old.routes != model.routes:
                routes = {alias: list(targets) for alias, targets in model.routes.items()}
                _log.info("routes", model=model.name, routes=routes)
        running = fleet_pb.DesiredState(
            models=[_desired(model) for model in snapshot.models.values()],
            inference_endpoints=state.inference_endpoints,
        )
        return Applied(running=running, failures=failures)

    async def _prepare_model(
        self,
        desired: fleet_pb.DesiredModel,
        before: Snapshot,
        bundles: BundleSource,
        hopeless: Mapping[RevisionKey, BaseException],
    ) -> tuple[ServedModel, list[Failure]]:
        served = before.models.get(desired.model) or ServedModel(desired.model)
        available: dict[int, ServedRevision] = {}
        failures: list[Failure] = []
        for wanted in desired.revisions:
            old = served.revisions.get(wanted.revision)
            if old is not None and old.digest == wanted.bundle_sha256:
                available[wanted.revision] = old
                continue
            if (why := hopeless.get((desired.model, wanted.revision))) is not None:
                failures.append(Failure(desired.model, wanted.revision, why))
                continue
            try:
                available[wanted.revision] = await self._prepare(desired.model, wanted, bundles)
            except Exception as error:
                _log.warning(
                    "refused", model=desired.model, revision=wanted.revision, error=str(error)
                )
                failures.append(Failure(desired.model, wanted.revision, error))
        routes, revisions = follow_routes(desired, available, served.routes, served.revisions)
        model = ServedModel(
            desired.model,
            MappingProxyType(revisions),
            MappingProxyType(routes),
            MappingProxyType(follow_shadows(desired, routes, revisions)),
        )
        return model, failures

    async def _prepare(
        self, model: str, wanted: fleet_pb.DesiredRevision, bundles: BundleSource
    ) -> ServedRevision:
        try:
            return await self._fetch_and_prepare(model, wanted, bundles)
        except BundleError as error:
            # The copy in the cache has been damaged since it was checked on arrival.
            _log.warning(
                "a cached manifest is damaged; fetching it again",
                model=model,
                revision=wanted.revision,
                digest=wanted.bundle_sha256,
                error=error.message,
            )
            await bundles.discard(wanted.bundle_sha256)
            return await self._fetch_and_prepare(model, wanted, bundles)

    async def _fetch_and_prepare(
        self, model: str, wanted: fleet_pb.DesiredRevision, bundles: BundleSource
    ) -> ServedRevision:
        path = await bundles.fetch_description(wanted.bundle_sha256)

        def prepare() -> ServedRevision:
            bundle = Bundle.open(path, verify=False, expect=wanted.bundle_sha256)
            for file in bundle.manifest.files:
                if file.path == bundle.manifest.postprocess.labels_file:
                    check_file(path, file)
            return ServedRevision.build(
                model,
                wanted.revision,
                wanted.bundle_sha256,
                wanted.size_bytes,
                bundle.manifest,
                bundle.labels,
                self._limits,
            )

        try:
            return await asyncio.to_thread(prepare)
        except OSError as error:
            raise cache_fault(error, wanted.bundle_sha256) from error


def _desired(model: ServedModel) -> fleet_pb.DesiredModel:
    return tell_model(
        model.name,
        [
            fleet_pb.DesiredRevision(
                revision=number, bundle_sha256=revision.digest, size_bytes=revision.size_bytes
            )
            for number, revision in model.revisions.items()
        ],
        model.routes,
        model.shadows,
    )
