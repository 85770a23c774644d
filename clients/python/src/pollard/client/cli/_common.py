"""What the commands share: output for people and programs, and checks of their arguments."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table
from rich.text import Text

from pollard.client import DEFAULT_MODELS_ADDRESS, types
from pollard.client._channel import checked_address
from pollard.client._names import checked_alias, checked_model, request_id_of
from pollard.client._quorum import quorum_of
from pollard.client.cli._words import fail as fail
from pollard.client.cli._words import printable as printable
from pollard.client.cli._words import warn as warn

T = TypeVar("T")


def checked_quorum(text: str) -> str:
    """Return a quorum as it was written, or say why it is none."""
    quorum_of(text)
    return text


def stdout() -> Console:
    """Return a console on what is standard output now."""
    return Console(file=sys.stdout, highlight=False)


def stderr() -> Console:
    """Return a console on what is standard error now."""
    return Console(file=sys.stderr, highlight=False)


def say(message: str) -> None:
    """Write a line for people to standard output, whatever it contains."""
    stdout().print(printable(message), markup=False, soft_wrap=True)


def make_table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """Return a table. Cells are plain text, folded where the terminal is too narrow."""
    table = Table(*headers, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*(Text(printable(cell), overflow="fold") for cell in row))
    return table


def show_picture(picture: RenderableType) -> None:
    """Write something to standard output, never cut or folded for a pipe."""
    console = stdout()
    if not console.is_terminal:
        console.width = 10_000
    console.print(picture)


def show_table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Write a table to standard output. Cells are plain text, never cut for a pipe."""
    show_picture(make_table(headers, rows))


def checked_by(check: Callable[[str], str]) -> Callable[[str | None], str | None]:
    """Make a check of the client's into one of the command line's."""

    def callback(value: str | None) -> str | None:
        if value is None:
            return None
        try:
            return check(value)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None

    return callback


ModelArgument = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="Model name.", callback=checked_by(checked_model)),
]
AliasOption = Annotated[
    str | None,
    typer.Option("--alias", metavar="ALIAS", help="Alias.", callback=checked_by(checked_alias)),
]
RevisionOption = Annotated[
    int | None, typer.Option("--revision", metavar="N", min=1, help="Revision number.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Write JSON instead of a table.")]
ModelsServerOption = Annotated[
    str,
    typer.Option(
        "--server",
        metavar="HOST:PORT",
        envvar="POLLARD_MODELS_ADDRESS",
        help="Address of the model management service.",
        callback=checked_by(checked_address),
    ),
]
TimeoutOption = Annotated[
    float, typer.Option("--timeout", metavar="SECONDS", min=0.001, help="Deadline of each request.")
]
QuorumOption = Annotated[
    str | None,
    typer.Option(
        "--quorum",
        metavar="N|A/B|P%",
        help="Go on although some inference servers refuse the revision, if so many can run it; "
        "by default all have to.",
        callback=checked_by(checked_quorum),
    ),
]
EtagOption = Annotated[
    str,
    typer.Option(
        "--etag",
        metavar="ETAG",
        help="Only if nothing changed since; `show --json` and `rollout --json` give it.",
    ),
]
RequestIdOption = Annotated[
    str | None,
    typer.Option(
        "--request-id",
        metavar="UUID",
        help="The same command again with the same id, within a day, is carried out once.",
        callback=checked_by(request_id_of),
    ),
]
WaitOption = Annotated[
    bool, typer.Option(help="Wait until the switch has ended, and say how it ended.")
]
WaitTimeoutOption = Annotated[
    float,
    typer.Option("--wait-timeout", metavar="SECONDS", min=0.001, help="How long to wait for it."),
]
SignatureOption = Annotated[
    bool,
    typer.Option(
        "--allow-signature-change",
        help="Let the inputs differ from the current revision's; clients that send tensors break.",
    ),
]
MODELS_SERVER = DEFAULT_MODELS_ADDRESS


def plain(value: Any) -> Any:
    """Return the clients' types as what JSON can hold."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)
        }
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, datetime):
        return value.isoformat()
    if hasattr(value, "tolist"):
        return value.tolist()
    return value


def print_json(value: Any) -> None:
    """Write a value to standard output as indented JSON."""
    print(_json(value, indent=2))


def print_json_line(value: Any) -> None:
    """Write a value to standard output as one line of JSON, at once."""
    print(_json(value), flush=True)


def _json(value: Any, indent: int | None = None) -> str:
    # Escaped where the output's encoding may lack a character: programs get what was said.
    utf8 = (sys.stdout.encoding or "utf-8").lower().replace("-", "") == "utf8"
    return json.dumps(plain(value), indent=indent, ensure_ascii=not utf8)


def note(message: str) -> None:
    """Write a line about what goes on to standard error, beside the output itself."""
    print(printable(message), file=sys.stderr, flush=True)


def size(number: int) -> str:
    """Return a number of bytes for people."""
    if number < 1000:
        return f"{number} B"
    amount = float(number)
    for unit in ("kB", "MB", "GB"):
        amount /= 1000
        if amount < 1000 or unit == "GB":
            break
    return f"{amount:.1f} {unit}"


def ago(moment: datetime | None) -> str:
    """Return how long ago something was, for people."""
    if moment is None:
        return "–"
    seconds = max(0, int((datetime.now(UTC) - moment).total_seconds()))
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds // length} {unit} ago"
    return f"{seconds} s ago"


class TransferBar:
    """A progress bar on standard error; silent where that is no terminal."""

    def __init__(self, label: str) -> None:
        console = stderr()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task(label, total=None)

    def __enter__(self) -> Callable[[types.Progress], None]:
        self._bar.start()
        return self._moved

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def _moved(self, progress: types.Progress) -> None:
        self._bar.update(self._task, completed=progress.done_bytes, total=progress.total_bytes)
