"""Where log lines go: what cannot be written costs lines, and never the service.

A log's disk may be full, its reader gone, or alive and not reading: then a write fails, or does not
come back. Whoever writes here only leaves the line behind; a thread writes it. What waits is
limited. Beyond that lines are lost, and a line says how many once the log can be written again.
"""

from __future__ import annotations

import atexit
import contextlib
import io
import os
import select
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable

_PIECE_BYTES = 4096
"""Written at once (PIPE_BUF): several processes may share a pipe, and lines are to stay whole."""

_PAUSE_SECONDS = 0.5
"""Before what could not be written is tried again."""

_LAST_SECONDS = 2.0
"""How long the end of a process waits for a log that takes nothing."""


def _in_words(lost: int, why: str) -> str:
    return f"{lost} lines of the log were lost: {why}"


class LogStream(io.TextIOBase):
    """Text that a thread writes to a file descriptor, line by line.

    Takes the place of `sys.stderr`. Never raises, never waits.
    """

    encoding = "utf-8"
    errors = "backslashreplace"

    def __init__(self, descriptor: int | None, *, most_bytes: int = 1 << 20) -> None:
        """Begin with nothing written.

        Args:
            descriptor: Where lines go; None drops them. It is not closed.
            most_bytes: Most that waits to be written.
        """
        self.descriptor = descriptor
        """May be taken away: then nothing is written any more."""
        self.most_bytes = most_bytes
        """May be changed."""
        self.describe: Callable[[int, str], str] = _in_words
        """Makes the line that says how many lines were lost, and why."""
        self._begin_anew()
        # In a child by fork there is no thread, and what waits is the parent's.
        os.register_at_fork(after_in_child=self._begin_anew)

    def _begin_anew(self) -> None:
        # Reentrant: a finalizer may log at any moment, in a thread that is just in here.
        self._changed = threading.Condition(threading.RLock())
        self._begun = threading.local()
        self._lines: deque[bytes] = deque()
        self._waiting = 0
        """Bytes that wait to be written, or are being written."""
        self._lost = 0
        self._telling = False
        """Whether it is being told how many lines were lost."""
        self._failing = False
        """Whether the last write failed."""
        self._failure = ""
        """Why one failed since lines were lost last."""
        self._thread: threading.Thread | None = None

    def writable(self) -> bool:
        """Say yes."""
        return True

    def fileno(self) -> int:
        """Return the descriptor.

        Raises:
            OSError: there is none.
        """
        if self.descriptor is None:
            raise io.UnsupportedOperation("fileno")
        return self.descriptor

    def isatty(self) -> bool:
        """Say whether people look on."""
        return self.descriptor is not None and os.isatty(self.descriptor)

    def close(self) -> None:
        """Leave it open: whoever logs last must not fail."""

    def write(self, text: str) -> int:
        """Leave text behind; it is written when its line is complete."""
        whole = getattr(self._begun, "text", "") + text
        end = whole.rfind("\n") + 1
        self._begun.text = whole[end:]
        if end:
            self._leave(whole[:end])
        return len(text)

    def flush(self) -> None:
        """Leave behind what this thread has begun; waits for nothing."""
        begun = getattr(self._begun, "text", "")
        if begun:
            self._begun.text = ""
            self._leave(begun)

    def drain(self, seconds: float = _LAST_SECONDS) -> bool:
        """Wait until all is written, for a limited time; say whether it is.

        What fails once more is not waited for.
        """
        self.flush()
        until = time.monotonic() + seconds
        with self._changed:
            # Whoever pauses after a failure tries again now.
            self._failing = False
            self._changed.notify_all()
            while self._is_busy() and not self._failing and self._thread is not None:
                if not self._changed.wait(max(0.0, until - time.monotonic())):
                    break
            return not self._is_busy()

    def _is_busy(self) -> bool:
        return bool(self._waiting or self._lost or self._telling)

    def _leave(self, text: str) -> None:
        if self.descriptor is None:
            return
        data = text.encode(self.encoding, self.errors)
        if sys.is_finalizing():
            self._write_last(data)
            return
        begun = None
        with self._changed:
            # One that is larger than all room has its turn when nothing else waits.
            if self._waiting and self._waiting + len(data) > self.most_bytes:
                self._lost += max(1, data.count(b"\n"))
                return
            self._lines.append(data)
            self._waiting += len(data)
            if self._thread is None:
                begun = threading.Thread(target=self._write_all, name="log", daemon=True)
                self._thread = begun
            self._changed.notify_all()
        if begun is not None:
            try:
                begun.start()
            except RuntimeError:  # No thread can be had now; the next line tries again.
                self._thread = None

    def _write_last(self, data: bytes) -> None:
        """Write what an interpreter says that is being taken down, if it can be written at once.

        The thread has ended, and may have had the lock.
        """
        with contextlib.suppress(OSError, ValueError):
            if self.descriptor is not None and select.select([], [self.descriptor], [], 0)[1]:
                os.write(self.descriptor, data[:_PIECE_BYTES])

    def _write_all(self) -> None:
        while True:
            with self._changed:
                while not (self._lines or self._lost):
                    self._changed.wait()
                # What has been lost until now came after these lines, or there was room for it.
                lines, self._lines = self._lines, deque()
                lost, self._lost = self._lost, 0
                self._telling = bool(lost)
            self._write_out(lines)
            if lost:
                why = self._failure or "they came faster than they could be written"
                self._failure = ""
                self._write_out([f"{self.describe(lost, why)}\n".encode()])
            with self._changed:
                self._telling = False
                self._waiting -= sum(map(len, lines))
                if not self._lost:
                    self._failure = ""
                self._changed.notify_all()

    def _write_out(self, lines: Iterable[bytes]) -> None:
        piece = b""
        for line in lines:
            if piece and len(piece) + len(line) > _PIECE_BYTES:
                self._write_piece(piece)
                piece = b""
            piece += line
        self._write_piece(piece)

    def _write_piece(self, piece: bytes) -> None:
        rest = memoryview(piece)
        while rest and self.descriptor is not None:
            try:
                rest = rest[os.write(self.descriptor, rest) :]
                self._failing = False
            except BlockingIOError:
                # Somebody else who has this file, too, wants no write to wait.
                select.select([], [self.descriptor], [], _PAUSE_SECONDS)
            except OSError as error:
                self._failure = error.strerror or str(error)
                with self._changed:
                    self._failing = True
                    self._changed.notify_all()
                    self._changed.wait_for(lambda: not self._failing, _PAUSE_SECONDS)


_streams: dict[int, LogStream] = {}


def stream_of(file: object) -> LogStream | None:
    """Return what writes for a file of this process, such as `sys.stderr`.

    None for one that only this program knows, which can neither be full nor block.
    """
    if file is None:
        return LogStream(None)
    if isinstance(file, LogStream):
        return file
    try:
        descriptor = file.fileno()  # type: ignore[attr-defined] # whatever has none is caught
    except (AttributeError, OSError, ValueError):
        return None
    if descriptor not in _streams:
        _streams[descriptor] = LogStream(descriptor)
        atexit.register(_streams[descriptor].drain)
    return _streams[descriptor]


def take_over() -> None:
    """Have all that this program prints written in this way, too."""
    for name in ("stdout", "stderr"):
        stream = stream_of(getattr(sys, name))
        if stream is not None:
            setattr(sys, name, stream)
