"""What a manager tells Prometheus: its registry, aliases and rollouts, and the fleet as it sees it.

Everything is read when it is asked for; what was deleted leaves no series behind.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from pollard.models.v1 import fleet_service_pb2 as fleet_pb
from pollard.models.v1 import model_service_pb2 as pb
from pollard.services.common.errors import ServiceError
from pollard.services.models.fleet import Fleet
from pollard.services.models.leader import Leadership
from pollard.services.models.schema import Alias, Bundle, Model, Revision, Rollout
from pollard.services.models.store import Store

_PATIENCE_SECONDS = 3.0
"""How long a scrape waits for the database: less than Prometheus waits for the scrape."""

_KINDS = {
    fleet_pb.SERVER_KIND_INFERENCE: "inference",
    fleet_pb.SERVER_KIND_PREPROCESS: "preprocess",
}

_ROLLOUT_STATES: dict[int, str] = {
    int(number): name.removeprefix("STATE_").lower()
    for name, number in pb.Rollout.State.items()
    if number
}


@dataclass
class _Registry:
    """What the database says at one moment."""

    models: int = 0
    revisions: int = 0
    bundles: int = 0
    bundle_bytes: int = 0
    aliases: list[tuple[str, str, int, bool]] = field(default_factory=list)
    """Model, alias, revision, and whether its last switch failed."""
    rollouts: list[tuple[str, str, int, float]] = field(default_factory=list)
    """Of those that run: model, alias, revision, and its share of the requests."""
    states: Counter[str] = field(default_factory=Counter)
    """Rollouts by state, the ended ones too."""


class ManagerMetrics(Collector):
    """The registry and the fleet of one manager."""

    def __init__(self, store: Store, fleet: Fleet, leadership: Leadership) -> None:
        """Read them at each scrape."""
        self._store = store
        self._fleet = fleet
        self._leadership = leadership
        self._registry: _Registry | None = None
        self._reading: asyncio.Task[_Registry] | None = None

    async def prepare(self) -> None:
        """Ask the database; while it cannot be had, nothing is told of the registry."""
        self._registry = None
        # A database that keeps silent is asked once, not again with each scrape.
        if self._reading is None:
            self._reading = asyncio.create_task(self._store.read(_read), name="metrics-read")
        reading = self._reading
        if not (await asyncio.wait({reading}, timeout=_PATIENCE_SECONDS))[0]:
            return
        if self._reading is reading:
            self._reading = None
        with contextlib.suppress(ServiceError):
            self._registry = reading.result()

    def collect(self) -> Iterable[Metric]:
        """Return what is known."""
        yield _leads(self._leadership.leading)
        yield _registry_up(self._registry is not None)
        if self._registry is not None:
            yield from _of_registry(self._registry)
        if self._leadership.leading:
            yield from _of_fleet(self._fleet.servers())


def families_of_manager() -> list[Metric]:
    """Return every family that a manager may tell, without values."""
    return [
        _leads(False),
        _registry_up(False),
        *_of_registry(_Registry()),
        *_of_fleet(()),
    ]


def _leads(leading: bool) -> Metric:
    words = "1 if this manager takes the steps of switches and rollouts."
    return _gauge("pollard_manager_leads", words, float(leading))


def _registry_up(answered: bool) -> Metric:
    return _gauge("pollard_registry_up", "1 if the registry's database answered.", float(answered))


def _read(session: Session) -> _Registry:
    alive = Model.delete_time.is_(None)
    found = _Registry(
        models=session.scalar(select(func.count()).select_from(Model).where(alive)) or 0,
        revisions=session.scalar(
            select(func.count()).select_from(Revision).where(Revision.delete_time.is_(None))
        )
        or 0,
    )
    bundles = session.execute(select(func.count(), func.sum(Bundle.size_bytes))).one()
    found.bundles, found.bundle_bytes = int(bundles[0]), int(bundles[1] or 0)
    failed = pb.Alias.STATE_FAILED
    found.aliases = [
        (model, name, revision, state == failed)
        for model, name, revision, state in session.execute(
            select(Alias.model, Alias.name, Alias.revision, Alias.state)
            .join(Model, Model.name == Alias.model)
            .where(alive)
        )
    ]
    for state, count in session.execute(
        select(Rollout.state, func.count()).group_by(Rollout.state)
    ):
        found.states[_ROLLOUT_STATES.get(state, "unknown")] += count
    found.rollouts = [
        (row.model, row.alias, row.revision, row.steps[min(row.step, len(row.steps) - 1)] / 100)
        for row in session.scalars(select(Rollout).where(Rollout.end_time.is_(None)))
        if row.steps
    ]
    return found


def _of_registry(found: _Registry) -> Iterator[Metric]:
    yield _gauge("pollard_registry_models", "Models that are registered.", found.models)
    yield _gauge("pollard_registry_revisions", "Revisions that are registered.", found.revisions)
    yield _gauge("pollard_registry_bundles", "Bundles that are stored.", found.bundles)
    yield _gauge("pollard_registry_bundle_bytes", "Size of all bundles.", found.bundle_bytes)
    points = GaugeMetricFamily(
        "pollard_alias_revision",
        "Number of the revision that an alias points at; 0 for none.",
        labels=["model", "alias"],
    )
    broken = GaugeMetricFamily(
        "pollard_alias_failed", "1 if the alias's last switch failed.", labels=["model", "alias"]
    )
    for model, alias, revision, failed in found.aliases:
        points.add_metric([model, alias], revision)
        broken.add_metric([model, alias], float(failed))
    yield points
    yield broken
    rollouts = GaugeMetricFamily(
        "pollard_rollouts", "Rollouts by state, the ended ones too.", labels=["state"]
    )
    for state in _ROLLOUT_STATES.values():
        rollouts.add_metric([state], found.states[state])
    yield rollouts
    share = GaugeMetricFamily(
        "pollard_rollout_share",
        "Share of requests, 0 to 1, of the step at which a running rollout is.",
        labels=["model", "alias", "version"],
    )
    for model, alias, revision, part in found.rollouts:
        share.add_metric([model, alias, str(revision)], part)
    yield share


def _of_fleet(servers: Iterable[fleet_pb.Server]) -> Iterator[Metric]:
    count = GaugeMetricFamily(
        "pollard_fleet_servers",
        "Servers that are known, by kind and whether they are connected.",
        labels=["kind", "connected"],
    )
    states = GaugeMetricFamily(
        "pollard_fleet_revision_servers",
        "Servers at which a revision is in a state: ready, failed, loading, …",
        labels=["model", "version", "kind", "state"],
    )
    kinds: Counter[tuple[str, str]] = Counter(
        {(kind, connected): 0 for kind in _KINDS.values() for connected in ("true", "false")}
    )
    revisions: Counter[tuple[str, str, str, str]] = Counter()
    for server in servers:
        kind = _KINDS.get(server.hello.kind, "other")
        kinds[kind, "true" if server.connected else "false"] += 1
        if not server.connected:
            continue
        for status in server.report.revisions:
            state = fleet_pb.RevisionState.Name(status.state)
            state = state.removeprefix("REVISION_STATE_").lower()
            revisions[status.model, str(status.revision), kind, state] += 1
    for labels, number in sorted(kinds.items()):
        count.add_metric(labels, number)
    for names, number in sorted(revisions.items()):
        states.add_metric(names, number)
    yield count
    yield states


def _gauge(name: str, words: str, value: float) -> Metric:
    return GaugeMetricFamily(name, words, value=value)
