"""Copies of requests on another revision: at low priority, only while a worker is idle.

The request itself is answered before its copy is so much as looked at. One thread of low priority
runs the copies, whatever the number of revisions; the few that wait for it are bounded in number
and in bytes, and what finds no idle worker is dropped and counted.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import random
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING

import structlog

from pollard.runtime.sessions import Array
from pollard.services.common.shadows import compare_answers
from pollard.services.inference.errors import ExecutionFailed, ShadowDropped
from pollard.services.inference.workers import Outputs

if TYPE_CHECKING:
    from pollard.services.inference.revision import LoadedRevision

_log = structlog.get_logger("pollard.inference.shadowing")

MAX_WAITING = 16
"""Copies that wait for the thread."""

MAX_WAITING_BYTES = 64 << 20
"""Sum of their inputs and of the answers that they are compared with."""

_NICENESS = 10


@dataclass(eq=False, slots=True)
class _Copy:
    """A request to run on another revision."""

    target: LoadedRevision
    feeds: Mapping[str, Array]
    outputs: tuple[str, ...]
    expected: Array | None
    """What the base revision answered; None if somebody else compares."""
    answer: Future[Outputs] | None
    """Of somebody who waits for it."""
    size: int


class ShadowRunner:
    """The thread that runs copies. `submit` may be called on any thread."""

    def __init__(self, idle: Callable[[], bool]) -> None:
        """Start nothing yet.

        Args:
            idle: Tells from any thread whether a worker has nothing to do.
        """
        self._idle = idle
        self._queue: queue.SimpleQueue[_Copy | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._waiting = self._waiting_bytes = 0
        self._thread: threading.Thread | None = None
        self._closed = False

    def submit(
        self, target: LoadedRevision, feeds: Mapping[str, Array], output: str, expected: Array
    ) -> None:
        """Run a copy later and compare its answer, or drop it.

        Args:
            target: Revision to run it on.
            feeds: Inputs by name; not changed by anybody any more.
            output: Output to compare.
            expected: What the base revision answered.
        """
        size = expected.nbytes + sum(array.nbytes for array in feeds.values())
        if not self._put(_Copy(target, feeds, (output,), expected, None, size)):
            target.counters.shadows().drop()

    async def run(
        self, target: LoadedRevision, feeds: Mapping[str, Array], outputs: Sequence[str]
    ) -> Outputs:
        """Run a copy for somebody who compares it, and counts it.

        Raises:
            ShadowDropped: no worker is idle, or too many wait.
            ExecutionFailed: onnxruntime failed on it.
        """
        answer: Future[Outputs] = Future()
        size = sum(array.nbytes for array in feeds.values())
        if not self._put(_Copy(target, feeds, tuple(outputs), None, answer, size)):
            raise ShadowDropped("too many shadows wait already")
        return await asyncio.wrap_future(answer)

    def close(self) -> None:
        """End the thread; copies that wait are dropped."""
        self._closed = True
        if self._thread is not None:
            self._queue.put(None)

    def _put(self, copy: _Copy) -> bool:
        with self._lock:
            full = (
                self._closed
                or self._waiting >= MAX_WAITING
                # A large one alone has its chance.
                or (self._waiting > 0 and self._waiting_bytes + copy.size > MAX_WAITING_BYTES)
            )
            if full:
                return False
            self._waiting += 1
            self._waiting_bytes += copy.size
            if self._thread is None:
                # Daemon: a run that never ends must not keep the process from exiting.
                self._thread = threading.Thread(target=self._work, name="shadows", daemon=True)
                self._thread.start()
        self._queue.put(copy)
        return True

    def _work(self) -> None:
        _lower_priority()
        while (copy := self._queue.get()) is not None:
            try:
                self._run(copy)
            except Exception as error:
                _log.error("a shadow could not be compared", exc_info=error)
            with self._lock:
                self._waiting -= 1
                self._waiting_bytes -= copy.size
            del copy

    def _run(self, copy: _Copy) -> None:
        # The session is held by this reference also if the revision is freed meanwhile.
        session = copy.target.session if self._idle() and not self._closed else None
        if session is None:
            if copy.answer is None:
                copy.target.counters.shadows().drop()
            else:
                _settle(copy.answer, ShadowDropped("no worker is idle"))
            return
        try:
            outputs = session.run(copy.feeds, copy.outputs)
            if copy.answer is None and copy.expected is not None:
                agreed, distances = compare_answers(outputs[copy.outputs[0]], copy.expected)
        except Exception as error:
            if copy.answer is None:
                copy.target.counters.shadows().fail()
            else:
                words = (str(error).strip().splitlines() or [type(error).__name__])[0]
                failed = ExecutionFailed(f"onnxruntime could not run the shadow: {words}")
                _settle(copy.answer, failed)
            return
        if copy.answer is not None:
            _settle(copy.answer, outputs)
        else:
            copy.target.counters.shadows().compare(agreed, distances)


def _settle(answer: Future[Outputs], outcome: Outputs | Exception) -> None:
    # The event loop may be closed, or nobody wait any more.
    with contextlib.suppress(RuntimeError, asyncio.InvalidStateError):
        if not answer.set_running_or_notify_cancel():
            return
        if isinstance(outcome, Exception):
            answer.set_exception(outcome)
        else:
            answer.set_result(outcome)


class Shadowing:
    """What a base revision does with each of its answers while it has shadows."""

    def __init__(self, runner: ShadowRunner) -> None:
        self._runner = runner
        self._targets: list[tuple[LoadedRevision, float, str]] = []

    def add(self, target: LoadedRevision, share: float, output: str) -> None:
        """Copy a share of the requests, 0 to 1, to `target` and compare `output`."""
        target.counters.shadows()  # made here, once: what counts runs on several threads
        self._targets.append((target, share, output))

    def offer(self, feeds: Mapping[str, Array], outputs: Outputs) -> None:
        """Copy a request that was answered, or do not; on any thread, and in next to no time."""
        for target, share, output in self._targets:
            # A request that did not want this output has nothing to be compared with.
            if random.random() < share and output in outputs:
                self._runner.submit(target, feeds, output, outputs[output])


def _lower_priority() -> None:
    # On Linux niceness belongs to the thread.
    if hasattr(os, "setpriority"):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
