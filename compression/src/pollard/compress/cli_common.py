"""What the commands of compression share: options that say an input, progress, errors, figures."""

from __future__ import annotations

import errno
import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from pollard.compress.progress import Reporter
    from pollard.compress.spec import InputSpec


Device = Annotated[
    str,
    typer.Option(
        "--device",
        help="What PyTorch computes on: auto (a GPU where it can use one), cpu, cuda, or cuda:N.",
    ),
]


MAX_SEED = 2**63 - 1
MAX_THREADS = 1024
"""Libraries that are asked for more than the system grants end the process without a word."""


def make_spec(size: str | None, mean: str, std: str) -> InputSpec | None:
    """Read the options that say what a factory's model takes."""
    if size is None:
        return None
    from pollard.compress.spec import InputSpec, parse_channels, parse_size

    height, width, channels = parse_size(size)
    return InputSpec(
        height,
        width,
        channels,
        parse_channels(mean, channels, "mean"),
        parse_channels(std, channels, "std"),
        augmentation="shift",
    )


def make_reporter(console: Console) -> Reporter:
    """Return what shows progress."""
    from pollard.compress.progress import ConsoleReporter

    return ConsoleReporter(console)


class _Terminated(KeyboardInterrupt):
    """SIGTERM has come."""


@contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM end the work as Ctrl-C does, so that it is cleared up behind it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise _Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def check_files(*paths: Path | None) -> None:
    """See that files can be written before any work is done that would be lost.

    Raises:
        UsageInvalid: one is a directory, or its directory cannot be made or written to.
    """
    from pollard.compress.errors import UsageInvalid

    for path in paths:
        if path is None:
            continue
        if path.is_dir():
            raise UsageInvalid(f"{path} is a directory; give the name of a file to write")
        # Directories are made where they are missing.
        above = next((each for each in path.absolute().parents if os.path.lexists(each)), None)
        if above is not None and not (above.is_dir() and os.access(above, os.W_OK)):
            raise UsageInvalid(f"{path} cannot be written: {above} is no directory to write in")


@contextmanager
def errors(
    json_file: Path | None, kept: Callable[[], str] = lambda: "nothing was written"
) -> Iterator[Console]:
    """Turn errors, Ctrl-C and SIGTERM into a line for people and the proper exit code.

    Args:
        json_file: Where a refusal's figures go.
        kept: Says what there is of work that was stopped, and how to go on.
    """
    # Before PyTorch is imported: threads that spin while they wait for each other make
    # training several times slower on a machine that does anything else.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from rich.console import Console

    from pollard.client.errors import PollardError
    from pollard.compress.errors import CompressionError, DeviceFailed, GateRefused
    from pollard.runtime.errors import RuntimeFault

    console, problems = Console(), Console(stderr=True)
    try:
        with _terminable():
            check_files(json_file)
            yield console
    except KeyboardInterrupt as error:
        terminated = isinstance(error, _Terminated)
        told = f"Stopped by {'SIGTERM' if terminated else 'Ctrl-C'}; {kept()}."
        problems.print(told, markup=False, highlight=False, soft_wrap=True)
        # As a shell tells of a process that the signal has ended.
        raise typer.Exit(143 if terminated else 130) from error
    except GateRefused as error:
        write_json(json_file, {"refused": str(error), **error.figures})
        problems.print(f"Refused: {error}", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(error.exit_code) from error
    except DeviceFailed as error:
        told = f"Error: {error} ({kept()})."
        problems.print(told, markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(error.exit_code) from error
    except CompressionError as error:
        problems.print(f"Error: {error}", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(error.exit_code) from error
    except MemoryError as error:
        told = f"the memory does not suffice: {error}" if str(error) else "the memory is full"
        problems.print(f"Error: {told}", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(1) from error
    except (RuntimeFault, PollardError, OSError) as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            where = f" for {error.filename}" if error.filename else ""
            told = f"Error: no space is left on the disk{where}; {kept()}."
            problems.print(told, markup=False, highlight=False, soft_wrap=True)
            raise typer.Exit(1) from error
        problems.print(f"Error: {error}", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(1) from error


def write_json(path: Path | None, content: dict[str, Any]) -> None:
    """Write figures for machines, if they are asked for."""
    if path is not None:
        from pollard.compress.codec import strict

        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(strict(content), indent=2, allow_nan=False)
        path.write_text(text + "\n", encoding="utf-8")
