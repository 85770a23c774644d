"""`pollard models watch`: what happens in the registry, while it happens."""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import Annotated

import typer
from rich.console import ConsoleDimensions
from rich.live import Live

from pollard.client import (
    DeadlineExceeded,
    Event,
    Model,
    ModelsClient,
    RequestFailed,
    Rollout,
    Unavailable,
)
from pollard.client._names import checked_model
from pollard.client.cli import event_view, watch_view
from pollard.client.cli._common import (
    MODELS_SERVER,
    ModelsServerOption,
    TimeoutOption,
    note,
    print_json_line,
    stdout,
)
from pollard.client.environment import connection

_DRAW_SECONDS = 0.5
_LOOK_SECONDS = 2.0
_KEPT = 200


def register(app: typer.Typer) -> None:
    """Add the command to `pollard models`."""
    app.command()(watch)


def watch(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL", help="Only this model.", callback=lambda name: _checked(name)
        ),
    ] = None,
    start: Annotated[
        int | None,
        typer.Option(metavar="SEQUENCE", min=1, help="First event wanted; by default from now on."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Write a line of JSON for each event.")
    ] = False,
    server: ModelsServerOption = MODELS_SERVER,
    timeout: TimeoutOption = 30.0,
) -> None:
    """Watch the models: where aliases lead, rollouts, every change. Ctrl-C ends it.

    In a pipe, or with --json, one line for each event. A manager that goes away is waited for, and
    no event is lost or told twice.
    """
    with ModelsClient(server, timeout=timeout, **connection()) as client:
        models = [client.model(model)] if model is not None else client.models()
        try:
            if stdout().is_terminal and not as_json:
                _live(client, model, start, models)
            else:
                _lines(client, model, start, as_json=as_json)
        except KeyboardInterrupt:
            return


def _checked(name: str | None) -> str | None:
    if name is None:
        return None
    try:
        return checked_model(name)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def _lines(client: ModelsClient, model: str | None, start: int | None, *, as_json: bool) -> None:
    def say_connection(failure: RequestFailed | None) -> None:
        if failure is None:
            note(f"Watching {client.address}; Ctrl-C ends it.")
        else:
            note(f"Waiting for the manager at {client.address}: {failure.message}")

    for event in client.watch_events(model, start=start, on_connection=say_connection):
        if as_json:
            print_json_line(event)
        else:
            print(event_view.line(event), flush=True)


class _Feed:
    """Takes events in, in a thread of its own."""

    def __init__(self, client: ModelsClient, model: str | None, start: int | None) -> None:
        self.events: deque[Event] = deque(client.events(model, limit=20)[::-1], maxlen=_KEPT)
        self.arrived = threading.Event()
        self.trouble = ""
        self.failure: BaseException | None = None
        if start is not None:
            self.events.clear()
        elif self.events:
            # From the newest that is shown on, so that nothing between the two calls is missing.
            start = self.events[-1].sequence + 1
        self._watch = client.watch_events(model, start=start, on_connection=self._told)
        threading.Thread(target=self._take, name="events", daemon=True).start()

    def _take(self) -> None:
        try:
            for event in self._watch:
                self.events.append(event)
                self.arrived.set()
        except BaseException as error:
            self.failure = error
            self.arrived.set()

    def _told(self, failure: RequestFailed | None) -> None:
        self.trouble = "" if failure is None else failure.message
        self.arrived.set()


def _live(client: ModelsClient, model: str | None, start: int | None, models: list[Model]) -> None:
    feed = _Feed(client, model, start)
    board = _Board(client, model, models)
    console = stdout()
    before: tuple[watch_view.Seen, ConsoleDimensions] | None = None
    with Live(console=console, auto_refresh=False, vertical_overflow="crop") as live:
        while feed.failure is None:
            seen = watch_view.Seen(
                client.address, feed.trouble, board.models, board.rollouts, tuple(feed.events)
            )
            if (now := (seen, console.size)) != before:
                live.update(watch_view.picture(seen, console), refresh=True)
                before = now
            board.look(changed=feed.arrived.wait(_DRAW_SECONDS))
            feed.arrived.clear()
    raise feed.failure


class _Board:
    """The models as they are now."""

    def __init__(self, client: ModelsClient, model: str | None, models: list[Model]) -> None:
        self._client = client
        self._model = model
        self.models = models
        self.rollouts: dict[str, list[Rollout]] = {}
        self._looked = 0.0
        self._stale = False
        self.look(changed=True)

    def look(self, *, changed: bool) -> None:
        """Ask again if there is reason to; leave all as it is while the manager is away."""
        self._stale = self._stale or changed
        now = time.monotonic()
        if now - self._looked < (_DRAW_SECONDS if self._stale else _LOOK_SECONDS):
            return
        self._looked = now
        self._stale = False
        try:
            if self._model is not None:
                self.models = [self._client.model(self._model)]
            else:
                self.models = self._client.models()
            self.rollouts = {item.name: [] for item in watch_view.shown_first(self.models)}
            for each in self._client.rollouts(self._model, running_only=True):
                if each.model in self.rollouts:
                    self.rollouts[each.model].append(each)
        except (Unavailable, DeadlineExceeded):
            return
