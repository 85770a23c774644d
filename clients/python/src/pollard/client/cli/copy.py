"""`pollard models copy`: a revision goes from one installation to another."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pollard.client import ModelsClient, Origin
from pollard.client._channel import checked_address
from pollard.client._names import checked_model
from pollard.client.cli._common import (
    MODELS_SERVER,
    AliasOption,
    JsonOption,
    ModelArgument,
    ModelsServerOption,
    TimeoutOption,
    TransferBar,
    checked_by,
    print_json,
    say,
    size,
    warn,
)
from pollard.client.environment import connection


def register(app: typer.Typer) -> None:
    """Add the command to `pollard models`."""
    app.command("copy")(copy)


def copy(
    model: ModelArgument,
    to: Annotated[
        str,
        typer.Option(
            "--to",
            metavar="HOST:PORT",
            help="Model management service of the other installation.",
            callback=checked_by(checked_address),
        ),
    ],
    revision: Annotated[
        int | None,
        typer.Argument(
            metavar="REVISION", min=1, help="Revision; default: what --alias points at."
        ),
    ] = None,
    alias: AliasOption = None,
    name: Annotated[
        str | None,
        typer.Option(
            "--as",
            metavar="NAME",
            help="Model name there; default: the same.",
            callback=checked_by(checked_model),
        ),
    ] = None,
    installation: Annotated[
        str | None,
        typer.Option(
            "--from-name",
            metavar="TEXT",
            help="What the copy's origin calls this installation; default: its address.",
        ),
    ] = None,
    spool: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Where bundles lie on their way; default: ~/.cache/pollard/copies.",
        ),
    ] = None,
    as_json: JsonOption = False,
    server: ModelsServerOption = MODELS_SERVER,
    timeout: TimeoutOption = 30.0,
) -> None:
    """Copy a revision to another installation, with its history.

    The bundle keeps its digest and its signature; notes and labels go with it, and the new
    revision names its origin. Nothing there is switched: `pollard models alias` or `rollout` with
    --server does that. A copy that broke off goes on when it is asked for again; one that is there
    already is not sent twice.
    """
    if revision is not None and alias is not None:
        raise typer.BadParameter("give REVISION or --alias, not both")
    with (
        ModelsClient(server, timeout=timeout, **connection()) as source,
        ModelsClient(to, timeout=timeout, **connection()) as target,
        TransferBar(f"copying {model}") as moved,
    ):
        done = source.copy(
            model,
            target,
            revision=revision,
            alias=alias,
            name=name,
            installation=installation,
            spool=spool,
            progress=moved,
        )
    for text in done.warnings:
        warn(text)
    if as_json:
        print_json(done)
        return
    there = f"{done.revision.model} revision {done.revision.revision} at {to}"
    if done.existed:
        say(f"{model} revision {done.source.revision} is there already: {there}.")
    else:
        say(
            f"{model} revision {done.source.revision} is now {there}: "
            f"{size(done.revision.size_bytes)}, bundle {done.revision.bundle_sha256[:12]}"
        )
    say(
        f"To serve it: pollard models alias {done.revision.model} production "
        f"{done.revision.revision} --server {to}"
    )


def origin_lines(origin: Origin | None) -> list[str]:
    """Return where a revision came from, for people; the nearest installation first."""
    lines = []
    while origin is not None:
        stored = f", stored {origin.create_time:%Y-%m-%d %H:%M} UTC" if origin.create_time else ""
        by = f" by {origin.creator}" if origin.creator else ""
        names = f" ({', '.join(origin.aliases)})" if origin.aliases else ""
        lines.append(
            f"{origin.installation}: {origin.model} revision {origin.revision}{names}{stored}{by}"
        )
        origin = origin.origin
    return lines
