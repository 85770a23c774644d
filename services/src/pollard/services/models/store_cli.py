"""`pollard store`.

This module is imported by every `pollard` command, so it imports nothing heavy by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from pollard.services.models.backup import Info
    from pollard.services.models.settings import ModelsSettings

app = typer.Typer(
    help="Back up what a manager keeps, and restore it.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

_Store = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="The manager's --store. `pollard up` keeps it in the folder models of its --data-dir. "
        "Like the other options, it is taken from --config and the environment as by `pollard "
        "serve models`.",
    ),
]
_DatabaseUrl = Annotated[
    str | None, typer.Option(metavar="URL", help="The manager's --database-url.")
]
_Blobs = Annotated[str | None, typer.Option(metavar="WHERE", help="The manager's --blobs.")]
_Endpoint = Annotated[
    str | None, typer.Option(metavar="URL", help="The manager's --blobs-endpoint.")
]
_Config = Annotated[
    Path | None, typer.Option(metavar="FILE", help="TOML file with the manager's settings.")
]


@app.callback()
def store() -> None:
    """Back up what a manager keeps, and restore it."""


@app.command()
def backup(
    directory: Annotated[
        Path,
        typer.Argument(
            metavar="DIR", help="Directory for the backup: new, or that of an earlier one."
        ),
    ],
    store: _Store = None,
    database_url: _DatabaseUrl = None,
    blobs: _Blobs = None,
    blobs_endpoint: _Endpoint = None,
    config: _Config = None,
) -> None:
    """Write the registry as it is at one moment, and every bundle, into a directory.

    The manager may be running. Every file is compared with its digest on the way. Into the
    directory of an earlier backup only what is new is written. Ends with 1 if files are damaged;
    all others are in the backup then.
    """
    from pollard.services.models.backup import back_up
    from pollard.services.models.blobs import open_blobs
    from pollard.services.models.database import make_database
    from pollard.services.models.store import DATABASE

    told = _settings(store, database_url, blobs, blobs_endpoint, config)
    database = make_database(told.database_url, told.store, DATABASE)
    kept = open_blobs(told.blobs, told.blobs_endpoint, told.store / "blobs")
    with _progress("Backing up") as progress:
        info = back_up(database, kept, directory, progress)
    print(f"Backup: {directory}: {_content(info)}")
    if info.damaged:
        print(
            f"{len(info.damaged)} files are damaged or missing and not in it; `pollard models "
            "verify` says which bundles they belong to:"
        )
        for sha256 in info.damaged[:20]:
            print(f"  {sha256}")
        raise typer.Exit(1)


@app.command()
def restore(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Directory of the backup.")],
    store: _Store = None,
    database_url: _DatabaseUrl = None,
    blobs: _Blobs = None,
    blobs_endpoint: _Endpoint = None,
    config: _Config = None,
    skip_damaged: Annotated[
        bool,
        typer.Option(
            "--skip-damaged",
            help="Restore what is whole though files of the backup are damaged or missing; ends "
            "with 1 then. Their bundles have to be pushed again.",
        ),
    ] = False,
) -> None:
    """Make a manager's store from a backup, where there is none yet.

    The store must not exist or be empty, and so must the database. Every file is compared with its
    digest; the store is there only when all of it is. Then start the manager with the same options.
    """
    from pollard.services.models.backup import read_info
    from pollard.services.models.backup import restore as restore_backup
    from pollard.services.models.blobs import open_blobs
    from pollard.services.models.database import make_database
    from pollard.services.models.store import DATABASE

    told = _settings(store, database_url, blobs, blobs_endpoint, config)
    known = read_info(directory).damaged
    with _progress("Restoring") as progress:
        info = restore_backup(
            directory,
            told.store,
            lambda made: make_database(told.database_url, made, DATABASE),
            lambda made: open_blobs(told.blobs, told.blobs_endpoint, made / "blobs"),
            progress,
            skip_damaged=skip_damaged,
        )
    print(f"Restored: {told.store}: {_content(info)}")
    if known:
        print(f"{len(known)} files were damaged already when the backup was made.")
    if left_out := [digest for digest in info.damaged if digest not in known]:
        print(
            f"{len(left_out)} files are damaged or missing in the backup, and were left out; start "
            "the manager, let `pollard models verify` say which bundles they belong to, and push "
            "those again:"
        )
        for sha256 in left_out[:20]:
            print(f"  {sha256}")
        raise typer.Exit(1)


def _settings(
    store: Path | None,
    database_url: str | None,
    blobs: str | None,
    blobs_endpoint: str | None,
    config: Path | None,
) -> ModelsSettings:
    from pollard.services.models.settings import ModelsSettings

    flags = {
        "store": store,
        "database_url": database_url,
        "blobs": blobs,
        "blobs_endpoint": blobs_endpoint,
    }
    return ModelsSettings.load(flags, config)


@contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """Draw a bar on standard error, where that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _content(info: Info) -> str:
    models = "1 model" if info.models == 1 else f"{info.models} models"
    return f"{models}, {info.blobs} files, {info.blob_bytes:,} bytes"
