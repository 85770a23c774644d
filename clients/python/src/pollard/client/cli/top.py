"""`pollard top`: what the services do now."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Annotated

import typer
from rich.live import Live

from pollard.client import DeadlineExceeded, ModelsClient, Rollout, Unavailable
from pollard.client.cli import top_view
from pollard.client.cli._common import (
    MODELS_SERVER,
    JsonOption,
    ModelsServerOption,
    TimeoutOption,
    print_json,
    print_json_line,
    show_picture,
    stdout,
)
from pollard.client.cli.top_rates import Meter
from pollard.client.cli.top_view import Standing
from pollard.client.environment import connection

_LOOK_SECONDS = 1.0

_PATIENCE_SECONDS = 15.0
"""How long `--once` waits for the second report of each server, which gives the first rates."""

_CHANGES = 5


def register(app: typer.Typer) -> None:
    """Add `pollard top`."""
    app.command()(top)


def top(
    once: Annotated[
        bool,
        typer.Option(
            "--once",
            help="Look until there are rates, some seconds, and write them once. So does a pipe.",
        ),
    ] = False,
    window: Annotated[
        float,
        typer.Option(
            "--window",
            metavar="SECONDS",
            min=1,
            max=3600,
            help="Over how long rates and percentiles are taken; servers report every 5 seconds.",
        ),
    ] = 15.0,
    as_json: JsonOption = False,
    server: ModelsServerOption = MODELS_SERVER,
    timeout: TimeoutOption = 10.0,
) -> None:
    """Show what the services do now: requests, latencies, queues, swaps and rollouts.

    Everything comes from the manager, which the servers report to; a token with the role viewer is
    enough. On a terminal it goes on until Ctrl-C; with --json, too, with a line for each look, but
    for --once.
    """
    with ModelsClient(server, timeout=timeout, **connection()) as client:
        console = stdout()
        eyes = _Eyes(client, Meter(window))
        live = not once and console.is_terminal and not as_json
        try:
            if live:
                seen = eyes.looks()
                # The first look before the screen is cleared: an error belongs below the command.
                first = top_view.picture(next(seen))
                with Live(first, console=console, screen=True, auto_refresh=False) as shown:
                    for standing in seen:
                        shown.update(top_view.picture(standing), refresh=True)
            elif as_json and not once:
                for standing in eyes.looks():
                    print_json_line(top_view.plain(standing))
            else:
                standing = eyes.until_rates()
                if as_json:
                    print_json(top_view.plain(standing))
                else:
                    show_picture(top_view.picture(standing))
        except KeyboardInterrupt:
            return


class _Eyes:
    """Asks the manager, and only what may have changed."""

    def __init__(self, client: ModelsClient, meter: Meter) -> None:
        self._client = client
        self.meter = meter
        self._newest = -1
        self._rollouts: list[Rollout] = []

    def look(self) -> Standing:
        """Ask once.

        Raises:
            PollardError: the manager cannot be asked.
        """
        client = self._client
        servers = client._servers()
        self.meter.note(servers)
        models = client.models()
        events = client.events(limit=_CHANGES)
        newest = events[0].sequence if events else 0
        if newest != self._newest:
            # Whatever a rollout does is an event.
            self._rollouts = client.rollouts(running_only=True)
            self._newest = newest
        return Standing(
            client.address,
            servers,
            self.meter.rates(),
            self.meter.covered,
            models,
            self._rollouts,
            events,
        )

    def looks(self) -> Iterator[Standing]:
        """Look again and again; while the manager is away, tell so over what was seen last."""
        standing = self.look()
        while True:
            yield standing
            time.sleep(_LOOK_SECONDS)
            try:
                standing = self.look()
            except (Unavailable, DeadlineExceeded) as error:
                standing = standing.without_manager(error.message)

    def until_rates(self) -> Standing:
        """Look until there are rates of all servers, but not for ever."""
        give_up = time.monotonic() + _PATIENCE_SECONDS
        while True:
            standing = self.look()
            if self.meter.knows_all or time.monotonic() >= give_up:
                return standing
            time.sleep(_LOOK_SECONDS / 2)
