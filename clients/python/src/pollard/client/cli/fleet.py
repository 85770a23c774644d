"""`pollard fleet`: the servers and what they run."""

from __future__ import annotations

import typer

from pollard.client import ModelsClient, Server
from pollard.client.cli._common import (
    MODELS_SERVER,
    JsonOption,
    ModelsServerOption,
    TimeoutOption,
    ago,
    print_json,
    say,
    show_table,
)


def register(app: typer.Typer) -> None:
    """Add `pollard fleet`."""
    app.command()(fleet)


def fleet(
    as_json: JsonOption = False,
    server: ModelsServerOption = MODELS_SERVER,
    timeout: TimeoutOption = 30.0,
) -> None:
    """List the servers, and what they run."""
    with ModelsClient(server, timeout=timeout) as client:
        servers = client.servers()
    if as_json:
        print_json(servers)
        return
    if not servers:
        say("No server has reported yet; `pollard up` or `pollard serve` starts some.")
        return
    show_table(
        ["SERVER", "KIND", "ADDRESS", "CONNECTED", "STATE", "RUNS"],
        [
            [
                item.server_id,
                item.kind.lower(),
                item.address,
                "yes" if item.connected else f"no, last seen {ago(item.last_seen_time)}",
                str(item.acked_version),
                _runs(item),
            ]
            for item in servers
        ],
    )
    for item in servers:
        if item.last_refusal:
            say(f"{item.server_id} refused: {item.last_refusal}")


def _runs(server: Server) -> str:
    return (
        ", ".join(
            f"{item.model}/{item.revision} {item.state.lower()}"
            + (f" ({item.variant})" if item.variant else "")
            for item in server.revisions
        )
        or "–"
    )
