"""Measuring revisions that are loaded, while the server has nothing else to do.

Never at a load: whoever waits for a revision would wait for its measurement too. A measurement ends
as soon as a request comes or another load begins, and is tried again later.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol

import structlog

from pollard.runtime.errors import RuntimeFault
from pollard.runtime.sessions import Session
from pollard.services.common.errors import ServiceError
from pollard.services.common.lifecycle import spawn
from pollard.services.common.memory import return_memory
from pollard.services.inference.description import ModelDescription, ModelSource, Outline
from pollard.services.inference.errors import LoadRefused, MemoryShort
from pollard.services.inference.options import Given, largest_batch
from pollard.services.inference.revision import LoadedRevision
from pollard.services.inference.tensors import zeros
from pollard.services.inference.tuning import Aim, Tuning, Tunings, measure

_log = structlog.get_logger("pollard.inference.tuning")

_LOOK_SECONDS = 1.0
"""Between two looks whether the server is idle."""

_FIRST_WAIT_SECONDS, _LONGEST_WAIT_SECONDS = 2.0, 600.0
"""After a measurement that was broken off; the wait doubles each time."""

NICENESS = 10
"""Of threads that work beside requests."""


def lower_priority() -> None:
    """Let the calling thread, and those that it starts, take what time others leave."""
    # On Linux niceness belongs to the thread.
    if hasattr(os, "setpriority"):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)


@dataclass
class Subject:
    """A loaded revision that is to be measured."""

    revision: LoadedRevision
    source: ModelSource
    outline: Outline
    description: ModelDescription
    given: Given
    """What was set by hand, and so is not to be found out."""
    key: str
    """Under what the measurement is kept."""
    apply: Callable[[Tuning, Session | None], Session | None]
    """Runs the revision as was measured; returns the session that is not used any more. Called on
    the event loop's thread."""
    broken_off: int = 0
    """Measurements that were."""
    not_before: float = field(default=0.0)
    """When to try, on the clock of `time.monotonic`."""


class OpenModel(Protocol):
    """Opens a model with so many threads of a run."""

    def __call__(self, outline: Outline, threads: int) -> Session: ...


class CheckMemory(Protocol):
    """Raises MemoryShort if so many copies of a model do not fit."""

    def __call__(self, outline: Outline, copies: int = 1) -> None: ...


class IdleTuner:
    """Measures one revision after the other. Used from the event loop's thread."""

    def __init__(
        self,
        tunings: Tunings,
        *,
        aim: Aim,
        cores: int,
        open_model: OpenModel,
        check_memory: CheckMemory,
        occupied: Callable[[], bool],
    ) -> None:
        """Start with nothing to do.

        Args:
            tunings: Where measurements are kept.
            aim: What is looked for.
            cores: Cores of this machine.
            open_model: Opens a model, on any thread.
            check_memory: Tells whether a model fits beside what runs, on any thread.
            occupied: Tells from any thread whether requests are answered, or a revision loaded.
        """
        self._tunings = tunings
        self._aim: Aim = aim
        self._cores = cores
        self._open_model = open_model
        self._check_memory = check_memory
        self._occupied = occupied
        self._subjects: list[Subject] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False
        self._measuring = threading.Lock()
        self._interrupted = threading.Event()
        self._executor = ThreadPoolExecutor(
            1, thread_name_prefix="tuner", initializer=lower_priority
        )

    def want(self, subject: Subject) -> None:
        """Measure a revision as soon as there is time, unless it is freed before."""
        self._subjects.append(subject)
        if not self._tasks and not self._closed:
            spawn(self._tasks, self._run(), "measure-when-idle")

    def interrupt(self) -> None:
        """Break off the measurement that is under way: something is going to be loaded."""
        self._interrupted.set()

    def wait(self) -> None:
        """Wait, on another thread than the event loop's, until no measurement holds memory.

        It must have been interrupted, or it may take long.
        """
        with self._measuring:
            return

    def close(self) -> None:
        """Measure nothing any more."""
        self._closed = True
        for task in self._tasks:
            task.cancel()
        self._executor.shutdown(wait=False, cancel_futures=True)

    async def _run(self) -> None:
        while self._subjects:
            await asyncio.sleep(_LOOK_SECONDS)
            self._subjects = [each for each in self._subjects if not each.revision.retiring]
            now = time.monotonic()
            subject = next((each for each in self._subjects if each.not_before <= now), None)
            if subject is not None and not self._occupied():
                await self._try(subject)

    async def _try(self, subject: Subject) -> None:
        loop = asyncio.get_running_loop()
        info = subject.revision.info
        log = _log.bind(model=info.model, revision=info.revision)
        try:
            found = await loop.run_in_executor(self._executor, self._measure, subject)
        except (RuntimeFault, ServiceError, OSError) as error:
            # It runs well as it is. A folder may have changed or gone since it was read.
            log.warning("cannot be measured", error=str(error))
            self._subjects.remove(subject)
            return
        if found is None:
            subject.not_before = time.monotonic() + wait_seconds(subject.broken_off)
            subject.broken_off += 1
            # Others first: what broke it off need not be in their way.
            self._subjects.remove(subject)
            self._subjects.append(subject)
            return
        self._subjects.remove(subject)
        tuning, session = found
        unused = [subject.apply(tuning, session)]
        del found, session
        # A large session takes a while to be freed.
        await loop.run_in_executor(self._executor, _free, unused)
        revision = subject.revision
        log.info(
            "measured",
            workers=revision.workers,
            threads=revision.info.threads,
            joined_batch=revision.joined_batch,
            row_microseconds=round(tuning.row_seconds * 1e6, 1),
        )

    def _measure(self, subject: Subject) -> tuple[Tuning, Session | None] | None:
        """Measure a revision on the tuner's thread.

        Returns:
            What was found, and the model opened with as many threads, if it runs with others; None
            if there is something better to do, or no memory.
        """
        outline, description = subject.outline, subject.description
        sessions: dict[int, Session] = {}

        def opened(threads: int) -> Session:
            sessions[threads] = self._open_model(outline, threads)
            return sessions[threads]

        def stop() -> bool:
            gone = self._closed or subject.revision.retiring
            return gone or self._interrupted.is_set() or self._occupied()

        try:
            with self._measuring:
                self._interrupted.clear()
                # It is opened once more for each number of threads.
                self._check_memory(outline, copies=1 if subject.given.threads else 2)
                tuning = measure(
                    opened,
                    lambda rows: {each.name: zeros(each, rows) for each in description.inputs},
                    aim=self._aim,
                    cores=self._cores,
                    max_batch=largest_batch(description),
                    threads=subject.given.threads,
                    workers=subject.given.workers,
                    stop=stop,
                )
                if tuning is None:
                    return None
                if self._tunings.key(outline.model_file, outline.digest, self._aim) != subject.key:
                    # It measured another file than the one that runs.
                    raise LoadRefused("the model's file has changed since it was loaded")
                tuning = self._tunings.keep(subject.key, tuning)
                other = None
                if tuning.threads != subject.revision.info.threads:
                    other = sessions[tuning.threads]
                    subject.source.check(other)
                return tuning, other
        except MemoryShort:
            return None
        finally:
            sessions.clear()
            return_memory()


def wait_seconds(broken_off: int) -> float:
    """Return how long to wait after a measurement that was broken off, as so many before it."""
    return min(_LONGEST_WAIT_SECONDS, _FIRST_WAIT_SECONDS * 2.0 ** min(broken_off, 30))


def _free(sessions: list[Session | None]) -> None:
    sessions.clear()
    return_memory()
