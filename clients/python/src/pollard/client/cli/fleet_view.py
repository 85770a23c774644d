"""How the fleet looks to people: the servers, what runs on how many of them, and what changed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from pollard.client import Server
from pollard.client.cli._common import ago, make_table, printable
from pollard.client.types import ServerRevision

_KINDS = ("INFERENCE", "PREPROCESS")


def picture(servers: Sequence[Server]) -> RenderableType:
    """Return the servers, and under them which revision runs on how many of them."""
    parts: list[RenderableType] = [
        make_table(
            ["SERVER", "KIND", "ADDRESS", "CONNECTED", "VERSION"],
            [
                [
                    item.server_id,
                    item.kind.lower(),
                    item.address,
                    "yes" if item.connected else f"no, seen {ago(item.last_seen_time)}",
                    item.software_version or "–",
                ]
                for item in servers
            ],
        )
    ]
    if any(item.revisions for item in servers):
        parts += [Text(""), _revisions(servers)]
    problems = list(_problems(servers))
    if problems:
        parts += [Text(""), *problems]
    return Group(*parts)


def changes(before: Sequence[Server] | None, now: Sequence[Server]) -> Iterator[str]:
    """Yield a line for each thing that changed; for everything that is, when there is no before."""
    old = {item.server_id: item for item in before or ()}
    for item in now:
        was = old.pop(item.server_id, None)
        if was is None or was.connected != item.connected:
            state = "connected" if item.connected else "not connected"
            yield f"{item.server_id} ({item.kind.lower()}, {item.address}): {state}"
        known = {(run.model, run.revision): _state(run) for run in (was.revisions if was else ())}
        for run in item.revisions:
            state = _state(run)
            if known.pop((run.model, run.revision), None) != state:
                yield f"{item.server_id}: {run.model}/{run.revision} {state}"
        for model, revision in known:
            yield f"{item.server_id}: {model}/{revision} is gone"
        if item.last_refusal and (was is None or was.last_refusal != item.last_refusal):
            yield f"{item.server_id} refused: {item.last_refusal}"
    for name in old:
        yield f"{name} is forgotten"


def _state(run: ServerRevision) -> str:
    error = f": {run.error}" if run.error else ""
    variant = f" ({run.variant})" if run.variant else ""
    return f"{run.state.lower()}{variant}{error}"


def _revisions(servers: Iterable[Server]) -> Table:
    """One row for each revision: in which state it is on how many servers of either kind."""
    found: dict[tuple[str, int], dict[str, Counter[str]]] = {}
    for server in servers:
        for run in server.revisions:
            row = found.setdefault((run.model, run.revision), {kind: Counter() for kind in _KINDS})
            variant = f" ({run.variant})" if run.variant else ""
            away = "" if server.connected else ", when last seen"
            row.setdefault(server.kind, Counter())[f"{run.state.lower()}{variant}{away}"] += 1
    return make_table(
        ["REVISION", "ON INFERENCE SERVERS", "ON PREPROCESS SERVERS"],
        [
            [f"{model}/{revision}", *(_counts(row[kind]) for kind in _KINDS)]
            for (model, revision), row in sorted(found.items())
        ],
    )


def _counts(states: Counter[str]) -> str:
    return ", ".join(f"{count} {state}" for state, count in sorted(states.items())) or "–"


def _problems(servers: Iterable[Server]) -> Iterator[Text]:
    for server in servers:
        said = set()
        for run in server.revisions:
            if run.error:
                said.add(run.error)
                name = f"{run.model}/{run.revision}"
                yield _problem(f"{server.server_id} does not run {name}: {run.error}")
        if server.last_refusal and not any(error in server.last_refusal for error in said):
            yield _problem(f"{server.server_id} refused: {server.last_refusal}")


def _problem(words: str) -> Text:
    return Text(printable(words), overflow="fold")
