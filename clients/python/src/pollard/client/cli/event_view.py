"""How events look to people: as a table, and as one line each."""

from __future__ import annotations

import re
from collections.abc import Iterable
from datetime import UTC, datetime

from rich.table import Table
from rich.text import Text

from pollard.client import Event
from pollard.client.cli._common import ago, printable

_PLACES = (
    (re.compile(r"models/([^/]+)/revisions/([0-9]+)"), r"\1/\2"),
    (re.compile(r"models/([^/]+)/aliases/([^/]+)"), r"\1 \2"),
    (re.compile(r"models/([^/]+)/rollouts/([0-9]+)"), r"\1 rollout \2"),
    (re.compile(r"models/([^/]+)"), r"\1"),
)


def place(resource: str) -> str:
    """Return a resource name shorter, as people say it: "flowers/3", "flowers production"."""
    for pattern, words in _PLACES:
        if found := pattern.fullmatch(resource):
            return found.expand(words)
    return resource


def who(actor: str) -> str:
    """Return an actor shorter: a server's id, an address without its family."""
    return actor.removeprefix("servers/").removeprefix("ipv4:").removeprefix("ipv6:")


def line(event: Event) -> str:
    """Return an event as one line, with names as programs use them."""
    words = f"{_moment(event)} {event.action} {event.resource} {event.detail} ({event.actor})"
    return " ".join(printable(words).splitlines())


def table(events: Iterable[Event], *, clock: bool = False) -> Table:
    """Return events as a table that is readable at 80 columns.

    Args:
        events: In the order in which they are shown.
        clock: Give the time of day (local) instead of how long ago it was, as for a view that
            stands a while.
    """
    made = Table("WHEN", "WHAT", "ON", "DETAIL", box=None, pad_edge=False)
    made.columns[0].no_wrap = made.columns[1].no_wrap = True
    for event in events:
        made.add_row(
            _clock(event.time) if clock else ago(event.time),
            event.action,
            Text(place(event.resource), overflow="fold"),
            Text(printable(f"{event.detail} ({who(event.actor)})".lstrip()), overflow="fold"),
        )
    return made


def _clock(moment: datetime | None) -> str:
    return "–" if moment is None else moment.astimezone().strftime("%H:%M:%S")


def _moment(event: Event) -> str:
    if event.time is None:
        return "–"
    return event.time.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
