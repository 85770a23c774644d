"""`pollard fleet`: the servers and what they run."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Annotated

import typer
from rich.console import Group
from rich.live import Live
from rich.text import Text

from pollard.client import DeadlineExceeded, ModelsClient, Server, Unavailable
from pollard.client.cli import fleet_view
from pollard.client.cli._common import (
    MODELS_SERVER,
    JsonOption,
    ModelsServerOption,
    TimeoutOption,
    note,
    print_json,
    print_json_line,
    printable,
    say,
    show_picture,
    stdout,
)
from pollard.client.environment import connection

_LOOK_SECONDS = 1.0
_NOBODY = "No server has reported yet; `pollard up` or `pollard serve` starts some."


def register(app: typer.Typer) -> None:
    """Add `pollard fleet`."""
    app.command()(fleet)


def fleet(
    watch: Annotated[
        bool,
        typer.Option(
            "--watch", help="Go on looking, until Ctrl-C; a line for each change in a pipe."
        ),
    ] = False,
    as_json: JsonOption = False,
    server: ModelsServerOption = MODELS_SERVER,
    timeout: TimeoutOption = 30.0,
) -> None:
    """List the servers, and which revision runs on how many of them.

    With --json everything about each server, with --watch too a line whenever something changed.
    """
    with ModelsClient(server, timeout=timeout, **connection()) as client:
        servers = client.servers()
        if watch:
            try:
                _follow(client, servers, as_json=as_json)
            except KeyboardInterrupt:
                return
    if as_json:
        print_json(servers)
    elif not servers:
        say(_NOBODY)
    else:
        show_picture(fleet_view.picture(servers))


def _follow(client: ModelsClient, servers: list[Server], *, as_json: bool) -> None:
    console = stdout()
    if console.is_terminal and not as_json:
        with Live(_standing(servers, ""), console=console, auto_refresh=False) as live:
            for found, trouble in _looks(client, servers):
                live.update(_standing(found, trouble), refresh=True)
        return
    before: list[Server] | None = None
    told = ""
    for found, trouble in _looks(client, servers):
        if trouble != told:
            note(trouble or "The manager answers again.")
            told = trouble
        changed = list(fleet_view.changes(before, found))
        if as_json:
            if changed or before is None:
                print_json_line(found)
        else:
            for line in changed:
                print(printable(line), flush=True)
        before = found


def _looks(client: ModelsClient, servers: list[Server]) -> Iterator[tuple[list[Server], str]]:
    """Yield what the manager says of its servers, again and again, and why it cannot be asked."""
    trouble = ""
    while True:
        yield servers, trouble
        time.sleep(_LOOK_SECONDS)
        try:
            servers, trouble = client.servers(), ""
        except (Unavailable, DeadlineExceeded) as error:
            trouble = f"Waiting for the manager at {client.address}: {error.message}"


def _standing(servers: list[Server], trouble: str) -> Group:
    shown = fleet_view.picture(servers) if servers else Text(_NOBODY)
    return Group(shown, Text(""), Text(trouble or "Ctrl-C ends.", style="dim"))
