"""Which inference servers refuse a revision that routes lead to.

A server tries a revision that it could not load again whenever it gets a new desired state, and
says meanwhile that it is loading. So that this is no news each time, a refusal counts until the
server has loaded the revision, is gone, or no route leads to the revision any more.
"""

from __future__ import annotations

from collections.abc import Mapping

from google.rpc import status_pb2
from sqlalchemy import select
from sqlalchemy.orm import Session

from pollard.models.v1 import fleet_service_pb2 as fleet_pb
from pollard.models.v1 import model_service_pb2 as pb
from pollard.services.models.events import MANAGER, record
from pollard.services.models.fleet_view import FleetView, Key
from pollard.services.models.rollout_rows import running
from pollard.services.models.schema import Alias
from pollard.services.models.standing import Standing
from pollard.services.models.store import now_us

_SETTLED = (pb.Alias.STATE_ACTIVE, pb.Alias.STATE_SWITCHING)


class Refusals:
    """Remembers refusals, and has the aliases show them."""

    def __init__(self) -> None:
        self._found: dict[Key, dict[str, status_pb2.Status]] = {}
        self._shown: set[tuple[str, str]] | None = None
        """Aliases that show some; None before they were looked for."""

    def of_server(self, server_id: str) -> list[Key]:
        """Return what a server refuses, sorted."""
        return sorted(key for key, servers in self._found.items() if server_id in servers)

    def excuses(self, server_id: str, key: Key) -> bool:
        """Tell whether nobody waits for a server to load a revision."""
        return server_id in self._found.get(key, {})

    def of_revision(self, key: Key) -> Mapping[str, status_pb2.Status]:
        """Return which servers refuse a revision, with their reasons."""
        return dict(self._found.get(key, {}))

    def observe(self, session: Session, view: FleetView, standing: Standing) -> None:
        """Take in what the servers say of the revisions that routes lead to."""
        if self._shown is None:
            self._remember(session)
        servers = {
            server.server_id: server
            for server in view.servers
            if server.kind == fleet_pb.SERVER_KIND_INFERENCE
        }
        found: dict[Key, dict[str, status_pb2.Status]] = {}
        for key in standing.routed():
            kept = {
                server_id: status
                for server_id, status in self._found.get(key, {}).items()
                if server_id in servers
            }
            mentioning = [server for server in servers.values() if key in server.revisions]
            stored = standing.stored.get(key) if mentioning else None
            if stored is not None:
                for server in mentioning:
                    report = server.report_of(key, stored)
                    if report is None:
                        continue
                    if report.state == fleet_pb.REVISION_STATE_READY:
                        kept.pop(server.server_id, None)
                    elif report.state == fleet_pb.REVISION_STATE_FAILED:
                        kept[server.server_id] = report.error or status_pb2.Status(
                            message="no reason given"
                        )
            if kept:
                found[key] = kept
        self._found = found
        self._show(session)

    def add(self, key: Key, refusals: Mapping[str, status_pb2.Status]) -> None:
        """Note refusals that an alias already shows."""
        if refusals:
            self._found.setdefault(key, {}).update(refusals)

    def _remember(self, session: Session) -> None:
        self._shown = set()
        for alias in session.scalars(select(Alias).where(Alias.state.in_(_SETTLED))):
            if alias.failures:
                self._shown.add((alias.model, alias.name))
                self.add((alias.model, alias.revision), _decoded(alias.failures))
        for rollout in running(session):
            if rollout.loaded:
                self.add((rollout.model, rollout.revision), _decoded(rollout.failures))

    def _show(self, session: Session) -> None:
        """Bring what the aliases show to what is the case."""
        shown = self._shown or set()
        if not self._found and not shown:
            return
        models = {model for model, _ in self._found} | {model for model, _ in shown}
        still: set[tuple[str, str]] = set()
        for alias in session.scalars(
            select(Alias).where(
                Alias.model.in_(models), Alias.state.in_(_SETTLED), Alias.pending_revision == 0
            )
        ):
            now = self._found.get((alias.model, alias.revision), {})
            before = _decoded(alias.failures)
            if now or before:
                # Also where they end here: the transaction may yet fail.
                still.add((alias.model, alias.name))
            if now == before:
                continue
            alias.failures = encoded(now)
            if now.keys() == before.keys():
                continue  # another reason, of the same servers
            alias.update_time = now_us()
            alias.etag = record(
                session,
                MANAGER,
                "ALIAS_REFUSED" if now.keys() - before.keys() else "ALIAS_ACCEPTED",
                f"models/{alias.model}/aliases/{alias.name}",
                _words(alias.revision, before, now),
                model=alias.model,
            )
        self._shown = still
        session.flush()


def encoded(refusals: Mapping[str, status_pb2.Status]) -> list[dict[str, str]]:
    """Return refusals as rows keep them."""
    return [
        {"server_id": server_id, "status": status.SerializeToString().hex()}
        for server_id, status in sorted(refusals.items())
    ]


def _decoded(failures: list[dict[str, str]]) -> dict[str, status_pb2.Status]:
    return {
        failure["server_id"]: status_pb2.Status.FromString(bytes.fromhex(failure["status"]))
        for failure in failures
    }


def _words(
    revision: int, before: Mapping[str, status_pb2.Status], now: Mapping[str, status_pb2.Status]
) -> str:
    new = sorted(now.keys() - before.keys())
    if new:
        return f"revision {revision} is refused by {', '.join(new)}: {now[new[0]].message}"
    old = ", ".join(sorted(before.keys() - now.keys()))
    return f"revision {revision} is no longer refused by {old}"
