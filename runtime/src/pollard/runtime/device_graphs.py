"""CUDA graphs: the thread that captured one replays it, and captures happen alone.

While a stream is captured, CUDA forbids other threads much of what they do all the time, such as
to allocate or to copy and wait, and breaks off the capture if they do it. So a capture, which is
part of loading a model and takes milliseconds, waits until no run is under way, and runs wait for
it. That holds only where graphs are used; elsewhere nothing is locked.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any


class _Gate:
    """Many may be inside, or one who wants to be alone; that one goes first."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside = 0
        self._alone = False
        self._waiting = 0

    @contextlib.contextmanager
    def shared(self) -> Iterator[None]:
        with self._changed:
            while self._alone or self._waiting:
                self._changed.wait()
            self._inside += 1
        try:
            yield
        finally:
            with self._changed:
                self._inside -= 1
                self._changed.notify_all()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        with self._changed:
            self._waiting += 1
            while self._alone or self._inside:
                self._changed.wait()
            self._waiting -= 1
            self._alone = True
        try:
            yield
        finally:
            with self._changed:
                self._alone = False
                self._changed.notify_all()


_gate = _Gate()


@contextlib.contextmanager
def running(graphs: bool) -> Iterator[None]:
    """Use a GPU while nobody captures; without graphs there is nobody to wait for."""
    if not graphs:
        yield
        return
    with _gate.shared():
        yield


@contextlib.contextmanager
def capturing() -> Iterator[None]:
    """Use the GPUs alone."""
    with _gate.alone():
        yield


class OwnThread:
    """A thread that calls functions for others, one after the other."""

    def __init__(self, name: str) -> None:
        """Start it."""
        self._calls: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None] = (
            queue.SimpleQueue()
        )
        # Daemon: a run that never ends must not keep the process from exiting.
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def call(self, function: Callable[[], Any]) -> Any:
        """Have a function called, and return what it returns or raise what it raises."""
        outcome: Future[Any] = Future()
        self._calls.put((function, outcome))
        return outcome.result()

    def close(self) -> None:
        """Let it end after what waits."""
        self._calls.put(None)

    def _run(self) -> None:
        while True:
            call = self._calls.get()
            if call is None:
                return
            function, outcome = call
            try:
                outcome.set_result(function())
            except BaseException as error:
                outcome.set_exception(error)
            # Until the next call nothing is kept of this one.
            del call, function, outcome
