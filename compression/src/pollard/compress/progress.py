"""Progress of long work: bars on a terminal, silence elsewhere."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Step(Protocol):
    """One running piece of work."""

    def advance(self, count: int = 1, note: str = "") -> None:
        """Count finished units; ``note`` replaces the text behind the bar."""


class Reporter:
    """Takes what there is to say. This one says nothing; subclasses do.

    It also knows how much time is given, because whoever reports how far work is can tell
    that it takes too long.
    """

    max_seconds: float | None = None
    """What was given to the whole work; None for no limit."""
    _until: float = math.inf

    def allow(self, seconds: float | None) -> None:
        """Give time to the work that begins now; None for no limit."""
        self.max_seconds = seconds
        self._until = math.inf if seconds is None else time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds that are left, 0 when they are over; infinite without a limit."""
        return max(0.0, self._until - time.monotonic())

    @contextmanager
    def step(self, title: str, total: int) -> Iterator[Step]:
        """Announce work of ``total`` units."""
        del title, total
        yield _Silent()

    def say(self, message: str) -> None:
        """Pass on a finding that the user should read."""
        del message


class _Silent:
    def advance(self, count: int = 1, note: str = "") -> None:
        del count, note


class ConsoleReporter(Reporter):
    """Bars and findings on a terminal; findings only when it is none."""

    def __init__(self, console: Console) -> None:
        self.console = console

    @contextmanager
    def step(self, title: str, total: int) -> Iterator[Step]:
        """Show a bar while the work runs."""
        if not self.console.is_terminal:
            yield _Silent()
            return
        columns = (
            TextColumn("{task.description:<28}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=self.console, transient=True) as progress:
            task = progress.add_task(title, total=total, note="")

            class _Bar:
                def advance(self, count: int = 1, note: str = "") -> None:
                    if note:
                        progress.update(task, advance=count, note=note)
                    else:
                        progress.update(task, advance=count)

            yield _Bar()

    def say(self, message: str) -> None:
        """Print a line."""
        self.console.print(message, highlight=False, markup=False, soft_wrap=True)
