"""CUDA graphs: the thread that captured one replays it, and captures disturb no run.

While onnxruntime captures a stream, CUDA forbids all other threads much of what they do all the
time, such as to allocate or to copy and wait, and breaks off the capture if they do it. A thread
can put itself out of that: it asks for the capture mode "thread local", in which only a capture of
its own forbids it anything (`cudaThreadExchangeStreamCaptureMode` in the CUDA Runtime API). Every
thread that uses a GPU does so here. Where one cannot, a capture, which is part of loading a model
and takes milliseconds, waits until that thread's run is over, and its runs wait for captures.
"""

from __future__ import annotations

import contextlib
import ctypes
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

from pollard.runtime import cuda
from pollard.runtime.errors import DeviceFault, ModelLoadFailed


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
_threads = threading.local()
_FREE = contextlib.nullcontext()


def keep_apart() -> bool:
    """Let captures of other threads not forbid this one anything, and tell whether they do not."""
    apart: bool | None = getattr(_threads, "apart", None)
    if apart is None:
        mode = ctypes.c_int(cuda.CAPTURE_MODE_THREAD_LOCAL)
        try:
            runtime = cuda.Runtime.get()
            runtime.call("cudaThreadExchangeStreamCaptureMode", ctypes.byref(mode))
            apart = True
        except (ModelLoadFailed, DeviceFault, AttributeError):
            apart = False
        _threads.apart = apart
    return apart


def running(graphs: bool) -> contextlib.AbstractContextManager[None]:
    """Use a GPU while no capture forbids it; without graphs there is none."""
    return _gate.shared() if graphs and not keep_apart() else _FREE


@contextlib.contextmanager
def capturing() -> Iterator[None]:
    """Capture while no thread runs that a capture forbids something, and nobody else captures."""
    keep_apart()
    with _gate.alone():
        yield


class _Call:
    """A function on its way to a thread, and what came of it."""

    __slots__ = ("_done", "_error", "_function", "_value")

    def __init__(self, function: Callable[[], Any]) -> None:
        self._function: Callable[[], Any] | None = function
        self._value: Any = None
        self._error: BaseException | None = None
        # A bare lock: a future wakes whoever waits through a condition, which takes several times
        # as long, and this is done for every batch.
        self._done = threading.Lock()
        self._done.acquire()

    def make(self) -> None:
        try:
            assert self._function is not None  # noqa: S101 - made once
            self._value = self._function()
        except BaseException as error:
            self._error = error
        self._function = None
        self._done.release()

    def outcome(self) -> Any:
        self._done.acquire()
        if self._error is not None:
            raise self._error
        return self._value


class OwnThread:
    """A thread that calls functions for others, one after the other."""

    def __init__(self, name: str) -> None:
        """Start it."""
        self._calls: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        # Daemon: a run that never ends must not keep the process from exiting.
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def call(self, function: Callable[[], Any]) -> Any:
        """Have a function called, and return what it returns or raise what it raises."""
        call = _Call(function)
        self._calls.put(call)
        try:
            return call.outcome()
        finally:
            # An error's traceback names this frame: without this, both would wait for the
            # collector of cycles.
            del call

    def close(self) -> None:
        """Let it end after what waits."""
        self._calls.put(None)

    def _run(self) -> None:
        while True:
            call = self._calls.get()
            if call is None:
                return
            call.make()
            # Until the next call nothing is kept of this one.
            del call
