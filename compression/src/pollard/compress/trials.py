"""Where the trials of a search run: in processes of this machine, or wherever else.

The search hands out points and takes what comes back; what is asked for next never depends
on who ran them, on how many ran at a time, or on which ended first.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor
from contextlib import suppress
from functools import partial
from multiprocessing.synchronize import Event
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from pollard.compress.search import Outcome, Point

    Evaluate = Callable[[Point], Outcome]


class TrialsLost(BrokenExecutor):
    """Trials cannot be run any more; the message says why, to people."""


class Trials(Protocol):
    """Runs trials for as long as it is entered."""

    @property
    def at_once(self) -> int:
        """How many are worth handing out at a time, at least 1; it may change."""

    def submit(self, point: Point) -> Future[Outcome]:
        """Begin a trial.

        Its future raises a CompressionError where the point cannot be reached, and a
        BrokenExecutor where no trial could.
        """

    def __enter__(self) -> Trials:
        """Begin to take trials."""

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """End; what still runs is wanted no more."""


class Processes:
    """Runs trials in processes of this machine.

    Args:
        evaluate: Runs a trial; it is called in other processes.
        workers: How many of them.
        initializer: Called first in every such process.
    """

    def __init__(
        self, evaluate: Evaluate, workers: int = 1, initializer: Callable[[], None] | None = None
    ) -> None:
        self._evaluate = evaluate
        self._workers = workers
        # Spawned, not forked: PyTorch's threads do not survive a fork.
        context = multiprocessing.get_context("spawn")
        self._stop = context.Event()
        begin = partial(_begin, os.getpid(), self._stop, initializer)
        self._pool = ProcessPoolExecutor(workers, context, begin)
        self._begun: list[Future[Outcome]] = []

    @property
    def at_once(self) -> int:
        """One for each process."""
        return self._workers

    def submit(self, point: Point) -> Future[Outcome]:
        """Begin a trial in the next process that is free."""
        self._begun.append(self._pool.submit(self._evaluate, point))
        return self._begun[-1]

    def __enter__(self) -> Processes:
        """Begin to take trials; processes start with the first ones."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """End all processes, busy or not."""
        # Nobody waits for trials that nobody wants any more. Idle processes end by themselves, and
        # then put away what libraries have made in them, such as locks.
        if not all(trial.done() for trial in self._begun):
            self._stop.set()
        self._pool.shutdown(cancel_futures=True)


def _begin(parent: int, stop: Event, initializer: Callable[[], None] | None) -> None:
    """Prepare a process for trials; it ends when the one that started it is gone or says so."""

    def watch() -> None:
        while os.getppid() == parent and not stop.wait(0.5):
            pass
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    # Ctrl-C reaches all processes of a terminal; the first of them decides.
    with suppress(ValueError):
        import signal

        signal.signal(signal.SIGINT, signal.SIG_IGN)
    if initializer is not None:
        initializer()
