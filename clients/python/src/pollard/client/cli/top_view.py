"""How `pollard top` looks: to people, in 80 columns, and to programs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from pollard.client import _convert
from pollard.client._names import alias_name
from pollard.client.cli._common import ago
from pollard.client.cli.rollout_view import where
from pollard.client.cli.top_rates import Key, Rates
from pollard.client.types import Alias, Event, Model, Rollout
from pollard.models.v1 import fleet_service_pb2 as pb

_NONE = Rates()

_LEGEND = (
    "REQ/S, P50, P99 in the engine; QUEUE waits now; IMG/S by the vision service;\n"
    "ON: inference servers that answer by it, of those connected."
)


@dataclass(frozen=True)
class Standing:
    """What is seen in one look."""

    address: str
    """Of the manager."""
    servers: Sequence[pb.Server]
    rates: dict[tuple[str, Key], Rates]
    covered_seconds: float
    """Over how long rates were taken."""
    models: Sequence[Model]
    rollouts: Sequence[Rollout]
    """Those that go on."""
    events: Sequence[Event]
    trouble: str = ""
    """Why the manager cannot be asked; then the rest is what it said last."""

    def without_manager(self, why: str) -> Standing:
        """Return the same, to which the manager adds nothing now."""
        return replace(self, trouble=why)


def picture(standing: Standing) -> RenderableType:
    """Return it for people."""
    away = [server for server in standing.servers if not server.connected]
    connected = len(standing.servers) - len(away)
    head = Text.assemble(
        ("pollard top", "bold"),
        f"  {standing.address}  {connected} of {len(standing.servers)} servers connected  ",
        (
            f"rates over {standing.covered_seconds:.0f} s"
            if standing.covered_seconds
            else "no rates yet",
            "dim",
        ),
    )
    parts: list[RenderableType] = [head]
    if standing.trouble:
        parts.append(
            Text(
                f"THE MANAGER IS AWAY, below is what it said last: {standing.trouble}",
                style="bold red",
                overflow="fold",
            )
        )
    for server in away:
        seen = ago(_convert.server(server).last_seen_time)
        words = f"AWAY: {server.hello.server_id} ({_kind(server).lower()}, {server.hello.address})"
        parts.append(Text(f"{words}, last heard {seen}", style="bold red", overflow="fold"))
    if not standing.servers:
        parts.append(Text("No server has reported yet; `pollard up` starts some.", style="yellow"))
    parts += [Text(""), _revisions(standing)]
    for title, lines in (
        ("Switches", list(_switches(standing.models))),
        ("Rollouts", list(_rollouts(standing.rollouts))),
        ("Last changes", list(_changes(standing.events))),
    ):
        if lines:
            parts += [Text(""), Text(title, style="bold"), *lines]
    if standing.servers:
        parts += [Text(""), Text(_LEGEND, style="dim")]
    return Group(*parts)


def _kind(server: pb.Server) -> str:
    return pb.ServerKind.Name(server.hello.kind).removeprefix("SERVER_KIND_")


def _revisions(standing: Standing) -> RenderableType:
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column("REVISION", overflow="ellipsis", max_width=24, no_wrap=True)
    table.add_column("ALIAS", overflow="ellipsis", max_width=14, no_wrap=True)
    for name in ("REQ/S", "P50 ms", "P99 ms", "QUEUE", "FAIL/S", "IMG/S", "ON"):
        table.add_column(name, justify="right", no_wrap=True)
    rows = list(_rows(standing))
    for row in rows:
        failing = row.inference.failed_per_second or row.images.failed_per_second
        not_everywhere = row.ready < row.servers
        table.add_row(
            f"{row.key[0]}/{row.key[1]}",
            ", ".join(row.aliases) or "–",
            _rate(row.inference.per_second),
            _ms(row.inference.latency.milliseconds(0.5)),
            _ms(row.inference.latency.milliseconds(0.99)),
            str(row.inference.waiting),
            Text(
                _rate(row.inference.failed_per_second + row.images.failed_per_second),
                style="bold red" if failing else "",
            ),
            _rate(row.images.per_second),
            Text(f"{row.ready}/{row.servers}", style="yellow" if not_everywhere else ""),
        )
    if not rows:
        return Text("Nothing is served.", style="dim")
    return table


@dataclass(frozen=True)
class _Row:
    key: Key
    aliases: tuple[str, ...]
    inference: Rates
    images: Rates
    ready: int
    """Inference servers that answer by it."""
    servers: int
    """Inference servers that are connected."""
    states: dict[str, str]
    """By server, whatever its kind."""


def _rows(standing: Standing) -> Iterator[_Row]:
    connected = [server for server in standing.servers if server.connected]
    names: dict[Key, list[str]] = {}
    for model in standing.models:
        for alias in model.aliases:
            names.setdefault((model.name, alias.revision), []).append(alias.name)
    keys = {(item.model, item.revision) for server in connected for item in server.report.revisions}
    for key in sorted(keys):
        states = {
            server.hello.server_id: pb.RevisionState.Name(item.state).removeprefix(
                "REVISION_STATE_"
            )
            for server in connected
            for item in server.report.revisions
            if (item.model, item.revision) == key
        }
        engines = [s for s in connected if s.hello.kind == pb.SERVER_KIND_INFERENCE]
        yield _Row(
            key,
            tuple(sorted(names.get(key, ()))),
            standing.rates.get(("INFERENCE", key), _NONE),
            standing.rates.get(("PREPROCESS", key), _NONE),
            sum(states.get(server.hello.server_id) == "READY" for server in engines),
            len(engines),
            states,
        )


def _switches(models: Sequence[Model]) -> Iterator[Text]:
    for model in models:
        for alias in model.aliases:
            if alias.state != "ACTIVE":
                failed = alias.state == "FAILED"
                yield Text(_switch(alias), style="red" if failed else "", overflow="fold")


def _switch(alias: Alias) -> str:
    name = f"{alias.model} {alias.name}"
    if alias.state == "FAILED":
        return f"{name}: stays at {alias.revision or 'nothing'}: {alias.error}"
    return f"{name}: {alias.revision or 'nothing'} → {alias.pending_revision}, " + (
        "servers load it" if alias.state == "LOADING" else "routes change"
    )


def _rollouts(rollouts: Sequence[Rollout]) -> Iterator[Text]:
    for item in rollouts:
        words = f"{item.model} {item.alias}: {item.base_revision} → {item.revision}, {where(item)}"
        yield Text(words, overflow="fold")


def _changes(events: Sequence[Event]) -> Iterator[Text]:
    for event in events:
        line = f"{ago(event.time):>10}  {_short(event.resource)}: {event.detail}"
        yield Text(line, overflow="ellipsis", no_wrap=True)


def _short(resource: str) -> str:
    """Return a resource's name as people say it: "flowers production", "flowers/3"."""
    name = resource.removeprefix("models/").replace("/aliases/", " ")
    return name.replace("/revisions/", "/").replace("/rollouts/", " rollout ")


def _rate(number: float) -> str:
    if not number:
        return "0"
    return f"{number:.1f}" if number < 100 else f"{number:.0f}"


def _ms(number: float | None) -> str:
    if number is None:
        return "–"
    return f"{number:.2f}" if number < 10 else f"{number:.1f}" if number < 100 else f"{number:.0f}"


def plain(standing: Standing) -> dict[str, Any]:
    """Return it for programs."""
    return {
        "time": datetime.now(UTC).isoformat(),
        "manager": {
            "address": standing.address,
            "answers": not standing.trouble,
            "error": standing.trouble,
        },
        "rates_over_seconds": round(standing.covered_seconds, 3),
        "servers": [
            {
                "server_id": server.hello.server_id,
                "kind": _kind(server),
                "address": server.hello.address,
                "connected": server.connected,
                "last_seen_time": _convert.server(server).last_seen_time,
            }
            for server in standing.servers
        ],
        "revisions": [
            {
                "model": row.key[0],
                "revision": row.key[1],
                "aliases": row.aliases,
                "requests_per_second": round(row.inference.per_second, 3),
                "failed_per_second": round(row.inference.failed_per_second, 3),
                "rejected_per_second": round(row.inference.rejected_per_second, 3),
                "p50_ms": row.inference.latency.milliseconds(0.5),
                "p99_ms": row.inference.latency.milliseconds(0.99),
                "waiting": row.inference.waiting,
                "in_flight": row.inference.in_flight,
                "images_per_second": round(row.images.per_second, 3),
                "images_failed_per_second": round(row.images.failed_per_second, 3),
                "states": row.states,
            }
            for row in _rows(standing)
        ],
        "switches": [
            {
                "alias": alias_name(model.name, alias.name),
                "state": alias.state,
                "revision": alias.revision,
                "pending_revision": alias.pending_revision,
                "error": alias.error,
            }
            for model in standing.models
            for alias in model.aliases
            if alias.state != "ACTIVE"
        ],
        "rollouts": [
            {
                "model": item.model,
                "rollout": item.number,
                "alias": item.alias,
                "base_revision": item.base_revision,
                "revision": item.revision,
                "state": item.state,
                "step": item.step,
                "steps": item.steps,
            }
            for item in standing.rollouts
        ],
        "events": standing.events,
    }
