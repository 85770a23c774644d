"""Decode workers: processes that may hang or crash without harm.

Images come from strangers and are decoded by C code, so that happens in child
processes with limits. A worker that takes too long is killed, one that ends is
replaced, and an image whose worker ended is tried once more.
"""

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
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import structlog

from pollard.runtime import errors as runtime_errors
from pollard.runtime.transforms import Geometry, Transformed
from pollard.services.common.call_metrics import Buckets
from pollard.services.common.errors import StartupError
from pollard.services.common.lifecycle import spawn
from pollard.services.common.telemetry.traces import mark
from pollard.services.preprocess.errors import (
    DecoderCrashed,
    DecodersBusy,
    DecodeTimeout,
    WorkerLost,
)
from pollard.services.preprocess.worker import HEADER, WorkerLimits

_log = structlog.get_logger("pollard.preprocess.decode")

OUTCOMES = ("decoded", "refused", "timeout", "crashed", "busy")

_START_SECONDS = 30.0
_ATTEMPTS = 2

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

_KINDS: tuple[type[runtime_errors.RuntimeFault], ...] = (
    runtime_errors.ImageInvalid,
    *runtime_errors.ImageInvalid.__subclasses__(),
    runtime_errors.StepsInvalid,
    runtime_errors.TensorInvalid,
)
_FAULTS = {kind.reason: kind for kind in _KINDS}


class DecodePool:
    """A fixed number of decode workers, handed one image at a time each."""

    def __init__(
        self,
        workers: int = 0,
        limits: WorkerLimits | None = None,
        max_waiting_bytes: int = 512 * 1024**2,
    ) -> None:
        """Prepare the pool; `start` starts it.

        Args:
            workers: Number of processes; 0 means one for each usable core.
            limits: What each image may use.
            max_waiting_bytes: Largest sum of the sizes of the images that wait
                for a worker, in bytes.
        """
        self.workers = workers or len(os.sched_getaffinity(0))
        self.limits = limits or WorkerLimits()
        self._max_waiting_bytes = max_waiting_bytes
        self._waiting_bytes = 0
        self._waiting = 0
        self.outcomes = dict.fromkeys(OUTCOMES, 0)
        """Images that were given to the pool, by what became of them."""
        self.replaced = 0
        """Workers that ended or were killed, and were replaced."""
        self.durations = Buckets()
        """Time to decode and transform an image, without waiting, in seconds."""
        self._in_work = 0
        self._starting: set[_Worker] = set()
        self._alive: set[_Worker] = set()
        # Last in, first out: with little to do, few workers stay warm in the caches.
        self._idle: asyncio.LifoQueue[_Worker] = asyncio.LifoQueue()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._closing = False

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers that are alive."""
        return [worker.process.pid for worker in self._alive]

    @property
    def in_work(self) -> int:
        """Number of images that workers have in hand."""
        return self._in_work

    @property
    def waiting(self) -> int:
        """Number of images that wait for a worker."""
        return self._waiting

    @property
    def waiting_bytes(self) -> int:
        """Size of the images that wait for a worker."""
        return self._waiting_bytes

    @property
    def has_idle_worker(self) -> bool:
        """Whether a worker has nothing to do."""
        return not self._idle.empty()

    async def start(self) -> None:
        """Start every worker and wait until they are ready.

        Raises:
            StartupError: a worker could not be started.
        """
        try:
            await asyncio.gather(*(self._start_worker() for _ in range(self.workers)))
        except (OSError, TimeoutError, WorkerLost) as error:
            await self.close()
            raise StartupError(f"a decode worker could not be started: {error!r}") from error

    async def close(self) -> None:
        """Kill the workers. Images in work fail with DecoderCrashed."""
        self._closing = True
        workers = [*self._starting, *self._alive]
        for worker in workers:
            worker.kill()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(worker.reap() for worker in workers))
        self._alive.clear()

    async def transform(self, steps: bytes, content: bytes) -> Transformed:
        """Decode and transform one image in a worker.

        A caller that is cancelled while it waits costs nothing; one that is
        cancelled later leaves the worker to finish, or to be killed in time.

        Args:
            steps: A serialised Manifest that holds the steps and nothing else.
            content: The encoded image.

        Raises:
            ImageInvalid: what `Pipeline.apply` says of the image.
            DecodeTimeout: it took too long.
            DecoderCrashed: the worker ended while it worked on it, twice.
            DecodersBusy: too many images wait already.
        """
        try:
            transformed = await self._transform(steps, content)
        except runtime_errors.RuntimeFault:
            self.outcomes["refused"] += 1
            raise
        except DecodeTimeout:
            self.outcomes["timeout"] += 1
            raise
        except DecoderCrashed:
            self.outcomes["crashed"] += 1
            raise
        except DecodersBusy:
            self.outcomes["busy"] += 1
            raise
        self.outcomes["decoded"] += 1
        return transformed

    async def _transform(self, steps: bytes, content: bytes) -> Transformed:
        if len(content) > self.limits.max_image_bytes:
            # Not worth the way to a worker.
            raise runtime_errors.ImageTooLarge(
                f"the image has {len(content)} bytes; "
                f"at most {self.limits.max_image_bytes} are allowed",
                size_bytes=len(content),
                limit_bytes=self.limits.max_image_bytes,
            )
        for _ in range(_ATTEMPTS):
            worker = await self._acquire(len(content))
            mark("a decoder is free")
            job = spawn(self._tasks, self._work(worker, steps, content), "decode")
            outcome = await asyncio.shield(job)
            if isinstance(outcome, Transformed):
                return outcome
            if not isinstance(outcome, WorkerLost):
                raise outcome
        raise DecoderCrashed(
            f"the decoder crashed on the image {_ATTEMPTS} times; send another encoding of it",
            attempts=_ATTEMPTS,
        )

    async def _acquire(self, size: int) -> _Worker:
        if self._idle.empty() and self._waiting_bytes + size > self._max_waiting_bytes:
            raise DecodersBusy(
                f"images of {self._waiting_bytes} bytes wait for a decoder already; "
                "try again later",
                waiting_bytes=self._waiting_bytes,
            )
        self._waiting_bytes += size
        self._waiting += 1
        try:
            while True:
                worker = await self._idle.get()
                if worker in self._alive:
                    return worker
        finally:
            self._waiting_bytes -= size
            self._waiting -= 1

    async def _work(self, worker: _Worker, steps: bytes, content: bytes) -> Transformed | Exception:
        # Errors are returned: nobody may be there any more to take a raised one.
        self._in_work += 1
        began = time.perf_counter()
        try:
            head, tensor = await worker.call(steps, content, self.limits.timeout_seconds)
        except TimeoutError:
            worker.kill()
            _log.warning("image took too long, its decode worker was killed", pid=worker.pid)
            return DecodeTimeout(
                f"decoding the image took longer than {self.limits.timeout_seconds:g} s",
                timeout_seconds=self.limits.timeout_seconds,
            )
        except WorkerLost as lost:
            return lost
        finally:
            self._in_work -= 1
            self.durations.add(time.perf_counter() - began)
        if worker in self._alive:
            self._idle.put_nowait(worker)
        try:
            return _parse(head, tensor)
        except (KeyError, TypeError, ValueError) as error:
            # A decoder that was taken over may answer anything.
            worker.kill()
            _log.error("decode worker gave a malformed answer", pid=worker.pid, error=repr(error))
            return WorkerLost()

    async def _start_worker(self) -> None:
        worker = _Worker(self.limits, self._lost)
        self._starting.add(worker)
        try:
            async with asyncio.timeout(_START_SECONDS):
                await worker.connect()
        except BaseException:
            await worker.reap()
            raise
        finally:
            self._starting.discard(worker)
        self._alive.add(worker)
        self._idle.put_nowait(worker)

    def _lost(self, worker: _Worker) -> None:
        """A worker ended: put another one in its place."""
        if self._closing or worker not in self._alive:
            return
        self._alive.discard(worker)
        spawn(self._tasks, self._replace(worker), "replace decode worker")

    async def _replace(self, worker: _Worker) -> None:
        code = await worker.reap()
        self.replaced += 1
        _log.warning("decode worker ended and is replaced", pid=worker.pid, exit_code=code)
        pause = 0.1
        while True:
            try:
                return await self._start_worker()
            except (OSError, TimeoutError, WorkerLost) as error:
                _log.error("decode worker could not be started", error=repr(error))
            await asyncio.sleep(pause)
            pause = min(pause * 2, 5.0)


def _parse(head: bytes, tensor: bytes) -> Transformed | Exception:
    answer = json.loads(head)
    if "error" in answer:
        kind = _FAULTS.get(answer["error"], runtime_errors.ImageInvalid)
        return kind(str(answer["message"]), **{str(k): v for k, v in answer["metadata"].items()})
    array = np.frombuffer(tensor, np.dtype(answer["dtype"])).reshape(answer["shape"])
    return Transformed(
        array,
        Geometry(**answer["geometry"]),
        tuple(Geometry(**geometry) for geometry in answer["geometries"]),
    )


class _Worker(asyncio.Protocol):
    """The parent's end of one worker process."""

    def __init__(self, limits: WorkerLimits, lost: Callable[[_Worker], None]) -> None:
        self._lost = lost
        self._buffer = bytearray()
        self._transport: asyncio.Transport | None = None
        self._answer: asyncio.Future[tuple[bytes, bytes]] | None = None
        ours, theirs = socket.socketpair()
        self._socket = ours
        ours.setblocking(False)
        with theirs:
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

    async def connect(self) -> None:
        """Wait until the worker is ready."""
        loop = asyncio.get_running_loop()
        self._answer = loop.create_future()
        await loop.create_unix_connection(lambda: self, sock=self._socket)
        await self._answer

    async def call(self, steps: bytes, content: bytes, timeout: float) -> tuple[bytes, bytes]:
        """Send one image and return the answer's two parts.

        Raises:
            WorkerLost: the worker ended.
            TimeoutError: no answer in time.
        """
        if self._transport is None or self._transport.is_closing():
            raise WorkerLost
        self._answer = asyncio.get_running_loop().create_future()
        self._transport.write(HEADER.pack(len(steps), len(content)) + steps)
        if content:
            self._transport.write(content)
        async with asyncio.timeout(timeout):
            return await self._answer

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

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport (called by asyncio)."""
        # Not an isinstance check: uvloop's transports are none by name.
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        """Gather an answer (called by asyncio)."""
        self._buffer += data
        if len(self._buffer) < HEADER.size:
            return
        head_size, tensor_size = HEADER.unpack_from(self._buffer)
        if head_size > _MAX_HEAD_BYTES or tensor_size > _MAX_TENSOR_BYTES:
            self.kill()
            return
        end = HEADER.size + head_size + tensor_size
        if len(self._buffer) < end:
            return
        middle = HEADER.size + head_size
        with memoryview(self._buffer) as view:
            answer = (bytes(view[HEADER.size : middle]), bytes(view[middle:end]))
        self._buffer.clear()
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(answer)

    def connection_lost(self, error: Exception | None) -> None:
        """The worker has ended (called by asyncio)."""
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(WorkerLost())
        self._lost(self)
