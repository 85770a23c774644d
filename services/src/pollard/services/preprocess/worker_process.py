"""The parent's end of one decode worker: its process, its socket, and the images that it has."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import socket
import subprocess
import sys
import time
from collections import deque
from typing import Protocol, cast

import numpy as np
from numpy.typing import NDArray

from pollard.runtime.transforms import Transformed
from pollard.services.common.telemetry.traces import Span
from pollard.services.preprocess.errors import WorkerLost
from pollard.services.preprocess.worker import HEADER, WorkerLimits

_KEPT_BYTES = str(16 * 1024**2)
_WORKER_ENVIRONMENT = {
    # Decoding needs no linear algebra; its threads would cost memory.
    "OPENBLAS_NUM_THREADS": "1",
    # glibc gives the memory of every image back to the kernel and takes it anew, page by page,
    # for the next: a tenth of the time of a small photograph. A worker keeps this much instead.
    "MALLOC_MMAP_THRESHOLD_": _KEPT_BYTES,
    "MALLOC_TRIM_THRESHOLD_": _KEPT_BYTES,
}

# No honest worker answers with more; a decoder that was taken over might.
_MAX_HEAD_BYTES = 64 * 1024
_MAX_TENSOR_BYTES = 2**31

_SOCKET_BYTES = 1024**2
"""Asked of the kernel, which gives less: a worker puts a tensor there and goes on to the next."""

_PATIENCE_SECONDS = 0.1
"""How long an image waits behind another before a second worker may take it."""


class Job:
    """One image on its way to a tensor."""

    __slots__ = ("attempts", "began", "content", "outcome", "span", "steps", "waits")

    def __init__(
        self, steps: bytes, content: bytes, outcome: asyncio.Future[Transformed], span: Span | None
    ) -> None:
        self.steps = steps
        self.content = content
        self.outcome = outcome
        """Done when nobody needs the tensor any more, too."""
        self.span = span
        self.attempts = 0
        """Workers that ended while they worked on it."""
        self.waits = False
        """Whether no worker has begun it."""
        self.began = 0.0


class Owner(Protocol):
    """Whom a worker tells what happens to it and its images."""

    def begun(self, job: Job) -> None:
        """The worker has turned to an image."""

    def answered(
        self, worker: WorkerProcess, job: Job, head: bytes, tensor: NDArray[np.uint8]
    ) -> bool:
        """The worker has answered for an image; False means that the answer makes no sense."""

    def held_up(self, worker: WorkerProcess, behind: list[Job]) -> None:
        """The worker takes long over an image; it has these as well."""

    def expired(self, worker: WorkerProcess, job: Job, behind: list[Job]) -> None:
        """The worker took too long over an image and is being killed; it had these as well."""

    def lost(self, worker: WorkerProcess, jobs: list[Job]) -> None:
        """The worker has ended; it was at the first of these."""


class WorkerProcess(asyncio.BufferedProtocol):
    """A worker process. It answers in the order in which it is given images.

    Answers are received into the memory in which they stay: no copy is made of a tensor.
    """

    def __init__(self, limits: WorkerLimits, owner: Owner) -> None:
        """Start the process; `connect` waits until it is ready."""
        self._owner = owner
        self._limits = limits
        self._jobs: deque[Job] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self.late = False
        """Whether it takes long over the image that it has in hand."""
        self._transport: asyncio.Transport | None = None
        self._ready: asyncio.Future[None] | None = None
        self._header = bytearray(HEADER.size)
        self._parts: list[memoryview] = []
        self._filled = 0
        self._await_header()
        ours, theirs = socket.socketpair()
        self._socket = ours
        ours.setblocking(False)
        with theirs:
            for end in (ours, theirs):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BYTES)
            try:
                # -P: the working directory is no place to import from.
                self.process = subprocess.Popen(
                    [
                        *(sys.executable, "-P", "-m", "pollard.services.preprocess.worker"),
                        str(theirs.fileno()),
                        json.dumps(dataclasses.asdict(limits)),
                    ],
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    # Ctrl-C in a terminal is for the service, which drains first.
                    start_new_session=True,
                    env={**os.environ, **_WORKER_ENVIRONMENT},
                )
            except BaseException:
                ours.close()
                raise
        self.pid = self.process.pid

    @property
    def jobs(self) -> int:
        """Number of images that it has been given and has not answered for."""
        return len(self._jobs)

    @property
    def current(self) -> Job | None:
        """The image that it works on."""
        return self._jobs[0] if self._jobs else None

    async def connect(self) -> None:
        """Wait until the worker is ready.

        Raises:
            WorkerLost: it ended.
        """
        loop = asyncio.get_running_loop()
        self._ready = loop.create_future()
        await loop.create_unix_connection(lambda: self, sock=self._socket)
        await self._ready

    def give(self, job: Job) -> None:
        """Hand over an image; the worker turns to it when it has answered for those before it."""
        self._jobs.append(job)
        if self._transport is not None:
            self._transport.write(HEADER.pack(len(job.steps), len(job.content)) + job.steps)
            if job.content:
                self._transport.write(job.content)
        if len(self._jobs) == 1:
            self._turn_to(job)

    def kill(self) -> None:
        """End the process, whatever it is doing."""
        if self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self.process.kill()
        if self._transport is not None:
            self._transport.abort()
        else:
            self._socket.close()

    async def reap(self) -> int:
        """Wait until the process has ended; return its exit code."""
        self.kill()
        return await asyncio.to_thread(self.process.wait)

    def _turn_to(self, job: Job) -> None:
        job.began = time.perf_counter()
        patience = min(_PATIENCE_SECONDS, self._limits.timeout_seconds / 2)
        self._timer = asyncio.get_running_loop().call_later(patience, self._hold_up, patience)
        self._owner.begun(job)

    def _hold_up(self, waited: float) -> None:
        self.late = True
        left = self._limits.timeout_seconds - waited
        self._timer = asyncio.get_running_loop().call_later(left, self._expire)
        if len(self._jobs) > 1:
            self._owner.held_up(self, list(self._jobs)[1:])

    def _expire(self) -> None:
        job, *behind = self._jobs
        self._jobs.clear()
        self.kill()
        self._owner.expired(self, job, behind)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self.late = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport (called by asyncio)."""
        # Not an isinstance check: uvloop's transports are none by name.
        self._transport = cast(asyncio.Transport, transport)

    def get_buffer(self, sizehint: int) -> memoryview:
        """Say where what comes next belongs (called by asyncio)."""
        return self._parts[0][self._filled :]

    def buffer_updated(self, nbytes: int) -> None:
        """Take note of what has come (called by asyncio)."""
        self._filled += nbytes
        if self._filled < len(self._parts[0]):
            return
        self._parts.pop(0)
        self._filled = 0
        if self._in_header:
            self._read_header()
        if not self._parts:
            self._finish()

    def _await_header(self) -> None:
        self._in_header = True
        self._filled = 0
        self._parts = [memoryview(self._header)]

    def _read_header(self) -> None:
        self._in_header = False
        head_size, tensor_size = HEADER.unpack(self._header)
        if head_size > _MAX_HEAD_BYTES or tensor_size > _MAX_TENSOR_BYTES:
            self._await_header()
            self.kill()
            return
        self._head = bytearray(head_size)
        # Not cleared first, unlike a bytearray; aligned for every element type.
        self._tensor: NDArray[np.uint8] = np.empty(tensor_size, np.uint8)
        self._parts = [part for part in (memoryview(self._head), self._tensor.data) if len(part)]

    def _finish(self) -> None:
        head, tensor = bytes(self._head), self._tensor
        del self._head, self._tensor
        self._await_header()
        if self._ready is not None and not self._ready.done():
            self._ready.set_result(None)
            return
        # An answer that nobody asked for comes of a decoder that was taken over.
        if not self._jobs or not self._owner.answered(self, self._jobs[0], head, tensor):
            self.kill()

    def done(self) -> None:
        """Turn to the next image: the first one has its answer."""
        self._jobs.popleft()
        self._stop_timer()
        if self._jobs:
            self._turn_to(self._jobs[0])

    def connection_lost(self, error: Exception | None) -> None:
        """The worker has ended (called by asyncio)."""
        self._stop_timer()
        if self._ready is not None and not self._ready.done():
            self._ready.set_exception(WorkerLost())
        jobs = list(self._jobs)
        self._jobs.clear()
        self._owner.lost(self, jobs)
