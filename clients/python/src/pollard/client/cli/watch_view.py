"""How the registry looks while it is watched: aliases and rollouts above, events below."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from rich.console import Console, Group, RenderableType
from rich.text import Text

from pollard.client import Alias, Event, Model, Rollout
from pollard.client.cli import event_view
from pollard.client.cli._common import make_table
from pollard.client.cli.rollout_view import where

_MODELS = 8
"""Most models shown."""

_LONG_AGO = datetime.fromtimestamp(0, UTC)


def shown_first(models: Sequence[Model]) -> list[Model]:
    """Return the models that are shown: those that changed last, by name."""
    changed = sorted(models, key=lambda item: item.update_time or _LONG_AGO, reverse=True)
    return sorted(changed[:_MODELS], key=lambda item: item.name)


@dataclass(frozen=True)
class Seen:
    """What the view shows."""

    address: str
    """The manager's."""
    trouble: str
    """Why it cannot be reached; empty when it can."""
    models: Sequence[Model]
    """All of them."""
    rollouts: Mapping[str, Sequence[Rollout]]
    """Those that run, by model."""
    events: Sequence[Event]
    """Oldest first."""


def picture(seen: Seen, console: Console) -> RenderableType:
    """Return the whole view, not higher than the terminal: the newest events stay in sight."""
    shown = shown_first(seen.models)
    rows = list(_rows(shown, seen.rollouts)) or [["–", "–", "–", "there are no models yet"]]
    count = len(seen.models)
    state = f"{count} model{'' if count == 1 else 's'}. Ctrl-C ends."
    if seen.trouble:
        state = f"waiting for it: {seen.trouble}"
    parts: list[RenderableType] = [
        Text(
            f"Manager {seen.address}: {state}",
            style="bold red" if seen.trouble else "",
            overflow="ellipsis",
            no_wrap=True,
        ),
        Text(""),
        make_table(["MODEL", "ALIAS", "REVISION", "STATE"], rows),
    ]
    if count > len(shown):
        parts.append(Text(f"and {count - len(shown)} others that changed longer ago", style="dim"))
    parts.append(Text(""))
    head = Group(*parts)
    room = console.height - 1 - _lines(head, console)
    return Group(head, _events(seen.events, room, console))


def _events(events: Sequence[Event], room: int, console: Console) -> RenderableType:
    """Return as many of the newest events as there is room for."""
    if not events:
        return Text("Nothing has happened since.", style="dim")
    count = max(1, min(len(events), room - 1))
    while True:
        table = event_view.table(events[-count:], clock=True)
        excess = _lines(table, console) - room
        if excess <= 0 or count == 1:
            return table
        count = max(1, count - (excess + 1) // 2)


def _lines(part: RenderableType, console: Console) -> int:
    return len(console.render_lines(part, pad=False))


def _rows(
    models: Sequence[Model], rollouts: Mapping[str, Sequence[Rollout]]
) -> Iterator[list[str]]:
    for model in models:
        if not model.aliases:
            yield [model.name, "–", "–", f"{model.latest_revision} revisions, none is served"]
        running = {item.alias: item for item in rollouts.get(model.name, ())}
        for alias in model.aliases:
            yield [model.name, alias.name, *_alias(alias, running.get(alias.name))]


def _alias(alias: Alias, rollout: Rollout | None) -> list[str]:
    serving = str(alias.revision or "–")
    if rollout is not None:
        return [f"{serving} → {rollout.revision}", f"rollout {rollout.number}: {where(rollout)}"]
    if alias.pending_revision:
        serving = f"{serving} → {alias.pending_revision}"
    state = alias.state.lower()
    if alias.failures:
        state += f", refused by {', '.join(item.server_id for item in alias.failures)}"
    elif alias.error:
        state += f": {alias.error}"
    return [serving, state]
