"""What each page shows, put together from the manager's answers."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from sqlalchemy import select, tuple_
from sqlalchemy.orm import Session

from pollard.models.v1 import fleet_service_pb2 as fleet_pb
from pollard.models.v1 import model_service_pb2 as pb
from pollard.runtime.bundle import parse_manifest
from pollard.services.common.errors import ServiceError
from pollard.services.models import encode, names, rollout_rows, rollout_words, rollouts
from pollard.services.models.blobs import Blobs
from pollard.services.models.fleet import Fleet
from pollard.services.models.schema import Revision
from pollard.services.models.store import Store
from pollard.services.models.web.asking import PAGE, Manager
from pollard.services.models.web.course import Course, course
from pollard.services.models.web.figures import Summaries

Query = Mapping[str, str]

NEWEST = 8
"""Events beside other things."""

_READY = fleet_pb.REVISION_STATE_READY

_FOUND_AT_MOST = 5000
"""Models that a search by a part of the name looks through."""


@dataclass(frozen=True)
class View:
    """A page: its template and what the template is told."""

    template: str
    title: str
    content: dict[str, Any] = field(default_factory=dict)
    place: str = ""
    """Which entry of the navigation it belongs to."""
    tick_seconds: float = 2.0
    """How soon what changes without an event is shown."""
    path: str = ""
    """Where it is found, for a page that is the answer to a form."""

    def with_more(self, **content: Any) -> View:
        """Return the page with more content."""
        return replace(self, content=self.content | content)


@dataclass(frozen=True)
class Served:
    """One revision on one server."""

    server_id: str
    connected: bool
    status: fleet_pb.RevisionStatus


@dataclass(frozen=True)
class FleetState:
    """The fleet at a glance."""

    servers: list[fleet_pb.Server]
    version: int
    """Version of the desired state."""

    @property
    def connected(self) -> int:
        """How many servers have an open stream."""
        return sum(server.connected for server in self.servers)

    @property
    def in_step(self) -> int:
        """How many of them run what they should."""
        return sum(self.has_acked(server) for server in self.servers if server.connected)

    def has_acked(self, server: fleet_pb.Server) -> bool:
        """Tell whether a server runs what it should."""
        return not server.HasField("last_nack") and server.acked_version >= self.version

    def serving(self, model: str, number: int, digest: str) -> list[Served]:
        """Return what the servers say of a revision with that bundle."""
        return [
            Served(server.hello.server_id, server.connected, status)
            for server in self.servers
            for status in server.report.revisions
            if (status.model, status.revision) == (model, number)
            and status.bundle_sha256 in ("", digest)
        ]


class Views:
    """Makes the pages."""

    def __init__(self, store: Store, blobs: Blobs, fleet: Fleet) -> None:
        self._store = store
        self._blobs = blobs
        self._fleet = fleet

        async def read(digest: str) -> Any:
            raw = await asyncio.to_thread(blobs.read, digest)
            return await asyncio.to_thread(parse_manifest, raw)

        self._summaries = Summaries(read)

    async def close(self) -> None:
        """Stop what runs in the background."""
        await self._summaries.close()

    async def overview(self, manager: Manager, query: Query) -> View:
        """Show the models, what is being rolled out, and what has happened."""
        wanted = query.get("filter", "").strip()
        problem = ""
        try:
            models, token = await self._models(manager, wanted, query.get("page", ""))
        except ServiceError as error:
            if not wanted:
                raise
            models, token, problem = [], "", error.message
        production = {
            names.parse_model(model.name): alias.revision
            for model in models
            for alias in model.aliases
            if alias.name.endswith("/production") and alias.revision
        }
        digests = await self._digests(production.items())
        summaries = await self._summaries.of(digests.values())
        events, fleet, running = await asyncio.gather(
            manager.events(most=NEWEST), self._fleet_state(manager), self._running()
        )
        return View(
            "overview.html",
            "Models",
            {
                "models": models,
                "next": token,
                "wanted": wanted,
                "problem": problem,
                "summaries": {
                    model: summaries[digest]
                    for model, digest in digests.items()
                    if digest in summaries
                },
                "running": running,
                "events": events.events,
                "fleet": fleet,
            },
            place="models",
            tick_seconds=1.0 if running else 2.0,
        )

    async def model(self, manager: Manager, model: str, query: Query) -> View:
        """Show one model."""
        found = await manager.model(model)
        request = pb.ListRevisionsRequest(
            parent=found.name, page_size=PAGE, page_token=query.get("page", "")
        )
        listed = await manager.ask("ListRevisions", request, pb.ListRevisionsResponse)
        summaries = await self._summaries.of([each.bundle_sha256 for each in listed.revisions])
        ended, events, fleet, running = await asyncio.gather(
            manager.rollouts(model, NEWEST),
            manager.events(model, most=NEWEST),
            self._fleet_state(manager),
            self._running(model),
        )
        return View(
            "model.html",
            model,
            {
                "model": found,
                "name": model,
                "revisions": listed.revisions,
                "next": listed.next_page_token,
                "summaries": summaries,
                "running": running,
                "rollouts": [course(each) for each in ended],
                "events": events.events,
                "fleet": fleet,
                "serving": {
                    each.revision: fleet.serving(model, each.revision, each.bundle_sha256)
                    for each in listed.revisions
                },
            },
            place="models",
            path=f"/models/{model}",
            tick_seconds=1.0 if running else 2.0,
        )

    async def revision(self, manager: Manager, model: str, number: int) -> View:
        """Show one revision."""
        found = await manager.revision(model, number)
        of_model, fleet, running, last, summaries = await asyncio.gather(
            manager.model(model),
            self._fleet_state(manager),
            self._running(model),
            manager.rollouts(model, 1),
            self._summaries.of([found.bundle_sha256]),
        )
        return View(
            "revision.html",
            f"{model} {number}",
            {
                "revision": found,
                "model": of_model,
                "name": model,
                "summary": summaries.get(found.bundle_sha256),
                "serving": fleet.serving(model, number, found.bundle_sha256),
                "running": running,
                "after": int(last[0].name.rpartition("/")[2]) if last else 0,
                "form": _DEFAULTS,
            },
            place="models",
            path=f"/models/{model}/revisions/{number}",
        )

    async def report(self, manager: Manager, model: str, number: int) -> View:
        """Show the report of a revision's bundle in a frame."""
        found = await manager.revision(model, number)
        return View(
            "report.html",
            f"Report of {model} {number}",
            {"revision": found, "name": model},
            place="models",
        )

    async def rollout(self, manager: Manager, model: str, number: int) -> View:
        """Show one rollout."""
        found = course(await manager.rollout(model, number))
        revision = found.rollout.revision
        fleet, alias, digests = await asyncio.gather(
            self._fleet_state(manager),
            self._alias(manager, found.rollout),
            self._digests([(model, revision)]),
        )
        return View(
            "rollout.html",
            f"Rollout {number} of {model}",
            {
                "course": found,
                "name": model,
                "alias": alias,
                "events": await self._history(manager, found),
                "serving": fleet.serving(model, revision, digests.get(model, "")),
            },
            place="models",
            path=f"/models/{model}/rollouts/{number}",
            tick_seconds=1.0 if found.running else 2.0,
        )

    async def fleet(self, manager: Manager) -> View:
        """Show the servers."""
        state = await self._fleet_state(manager)
        return View("fleet.html", "Fleet", {"fleet": state}, place="fleet", tick_seconds=1.0)

    async def log(self, manager: Manager, query: Query) -> View:
        """Show the audit log."""
        model = query.get("model", "").strip()
        problem = ""
        try:
            if model:
                names.check_model_id(model)
            page = await manager.events(model, token=query.get("page", ""))
        except ServiceError as error:
            page, problem = pb.ListEventsResponse(), error.message
        return View(
            "log.html",
            "Audit log",
            {
                "events": page.events,
                "next": page.next_page_token,
                "model": model,
                "paged": bool(query.get("page")),
                "problem": problem,
            },
            place="log",
        )

    async def trial(self, manager: Manager, model: str, query: Query) -> View:
        """Show where an image can be tried on two revisions."""
        found = await manager.model(model)
        request = pb.ListRevisionsRequest(parent=found.name, page_size=PAGE)
        listed = await manager.ask("ListRevisions", request, pb.ListRevisionsResponse)
        running, fleet = await asyncio.gather(self._running(model), self._fleet_state(manager))
        digests = {each.revision: each.bundle_sha256 for each in listed.revisions}
        served = {
            status.revision
            for server in fleet.servers
            for status in server.report.revisions
            if server.connected
            and (status.model, status.state) == (model, _READY)
            and status.bundle_sha256 in ("", digests.get(status.revision))
        }
        return View(
            "trial.html",
            f"Try {model}",
            {
                "model": found,
                "name": model,
                "revisions": listed.revisions,
                "served": served,
                "left": query.get("left") or _first_choice(running),
                "right": query.get("right") or _second_choice(found, running),
                "outcome": None,
            },
            place="models",
        )

    async def _models(
        self, manager: Manager, wanted: str, token: str
    ) -> tuple[list[pb.Model], str]:
        """Return a page of models and the token of the next one.

        What has none of the signs of a filter is a part of a name.
        """
        if not wanted or any(sign in wanted for sign in '=:"'):
            request = pb.ListModelsRequest(page_size=PAGE, page_token=token, filter=wanted)
            answer = await manager.ask("ListModels", request, pb.ListModelsResponse)
            return list(answer.models), answer.next_page_token
        found: list[pb.Model] = []
        page = ""
        for _ in range(_FOUND_AT_MOST // 1000):
            request = pb.ListModelsRequest(page_size=1000, page_token=page)
            answer = await manager.ask("ListModels", request, pb.ListModelsResponse)
            found += [model for model in answer.models if wanted.lower() in model.name[7:]]
            page = answer.next_page_token
            if not page or len(found) >= PAGE:
                break
        return found[:PAGE], ""

    async def _digests(self, revisions: Iterable[tuple[str, int]]) -> dict[str, str]:
        """Return the bundles of revisions by their model."""
        keys = list(revisions)
        if not keys:
            return {}
        statement = select(Revision.model, Revision.bundle_sha256).where(
            tuple_(Revision.model, Revision.number).in_(keys)
        )

        def work(session: Session) -> dict[str, str]:
            return {row.model: row.bundle_sha256 for row in session.execute(statement)}

        return await self._store.read(work)

    async def _running(self, model: str = "") -> list[Course]:
        """Return the rollouts that run, with what they have seen."""

        def work(session: Session) -> list[pb.Rollout]:
            found = []
            for row in rollout_rows.running(session, model)[:PAGE]:
                message = encode.rollout(row)
                evidence = rollout_words.describe(session, row)
                if evidence is not None:
                    message.evidence.CopyFrom(evidence)
                found.append(message)
            return found

        return [course(each) for each in await self._store.read(work)]

    async def _alias(self, manager: Manager, rollout: pb.Rollout) -> pb.Alias | None:
        """Return the alias of a rollout; None where it was deleted since."""
        model = rollout.name.split("/")[1]
        request = pb.GetAliasRequest(name=f"models/{model}/aliases/{rollout.alias}")
        try:
            return (await manager.ask("GetAlias", request, pb.GetAliasResponse)).alias
        except ServiceError:
            return None

    async def _history(self, manager: Manager, found: Course) -> list[pb.Event]:
        """Return the events of a rollout, as far back as a page of its model's events goes."""
        page = await manager.events(found.model, most=4 * PAGE)
        return [event for event in page.events if event.resource == found.rollout.name]

    async def _fleet_state(self, manager: Manager) -> FleetState:
        try:
            servers = await manager.servers()
        except ServiceError:
            # Another manager leads and cannot be asked now; the registry is readable all the same.
            servers = []
        acked = max((server.acked_version for server in servers), default=0)
        # A manager that does not lead has no desired state of its own.
        return FleetState(servers, self._fleet.state.version or acked)


_DEFAULTS = {
    "alias": "production",
    "steps": ",".join(f"{step:g}" for step in rollouts.DEFAULT_STEPS),
    "hold": f"{rollouts.DEFAULT_HOLD_SECONDS:g}",
    "min_requests": str(rollouts.DEFAULT_MIN_REQUESTS),
    "max_error_rate": f"{rollouts.DEFAULT_MAX_ERROR_RATE * 100:g}",
    "max_p99_ratio": f"{rollouts.DEFAULT_MAX_P99_RATIO:g}",
    "shadow_percent": "",
    "min_agreement": "",
}


def _first_choice(running: list[Course]) -> str:
    return str(running[0].rollout.base_revision) if running else "production"


def _second_choice(model: pb.Model, running: list[Course]) -> str:
    if running:
        return str(running[0].rollout.revision)
    others = [names.parse_alias(alias.name)[1] for alias in model.aliases]
    if "canary" in others:
        return "canary"
    return next((alias for alias in others if alias != "production"), str(model.latest_revision))
