"""Clients that keep asking while something is done to the services, and check every answer.

`pollard demo` and `pollard drill` use it; nothing else of `pollard.client` imports it. Each answer
is compared with what the revision that it names answers offline, so an answer by another revision
is found however alike the two are.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from array import array
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pollard.client import (
    AsyncInferenceClient,
    AsyncVisionClient,
    PollardError,
    Prediction,
    RetryPolicy,
)

IMAGE, TENSOR = "image", "tensor"
KINDS = (IMAGE, TENSOR)

_TIMEOUT_SECONDS = 10.0
_KEPT_PROBLEMS = 10
_MOST_IN_FLIGHT = 512
_RETRY_PAUSE_SECONDS = 0.05


class Question(Protocol):
    """One thing to ask."""

    @property
    def png(self) -> bytes:
        """The file that is sent to VisionService."""

    @property
    def tensor(self) -> NDArray[Any]:
        """The input that is sent to ModelInfer, with the batch as first dimension."""


class RightAnswers(Protocol):
    """What one revision answers; `pollard.runtime.reference.Reference` is one."""

    input_name: str
    output_name: str

    @property
    def classes(self) -> int:
        """Number of classes."""

    def matches_scores(self, index: int, scores: NDArray[np.float64]) -> bool:
        """Say whether the scores of a question are this revision's, (classes,)."""

    def matches_output(self, index: int, output: NDArray[np.float32]) -> bool:
        """Say whether an output tensor is this revision's, (1, classes)."""


@dataclass(frozen=True, slots=True)
class Answered:
    """One request that was answered."""

    kind: str
    """IMAGE or TENSOR."""
    started: float
    """When it was due to be sent, on the monotonic clock."""
    ended: float
    """When the answer was there."""
    revision: int
    """Revision that the answer names."""


class Answers(Sequence[Answered]):
    """Requests that were answered, in the order of their answers.

    Kept as plain numbers: hundreds of thousands of objects would make the garbage collector stop
    the clients now and then, and that would be measured as the services' latency.
    """

    def __init__(self) -> None:
        self._kinds, self._revisions = array("b"), array("q")
        self._started, self._ended = array("d"), array("d")

    def add(self, kind: str, started: float, ended: float, revision: int) -> None:
        """Note one."""
        self._kinds.append(KINDS.index(kind))
        self._started.append(started)
        self._ended.append(ended)
        self._revisions.append(revision)

    def __len__(self) -> int:
        return len(self._kinds)

    def __iter__(self) -> Iterator[Answered]:
        return (self._at(index) for index in range(len(self)))

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self._at(each) for each in range(*index.indices(len(self)))]
        return self._at(index)

    def _at(self, index: int) -> Answered:
        kind = KINDS[self._kinds[index]]
        return Answered(kind, self._started[index], self._ended[index], self._revisions[index])

    @property
    def started(self) -> NDArray[np.float64]:
        """When each was due, as an array."""
        return np.array(self._started)

    @property
    def ended(self) -> NDArray[np.float64]:
        """When each was answered, as an array."""
        return np.array(self._ended)

    @property
    def revisions(self) -> NDArray[np.int64]:
        """Which revision answered each, as an array."""
        return np.array(self._revisions)

    def are(self, kind: str) -> NDArray[np.bool_]:
        """Which are of a kind, as an array."""
        found: NDArray[np.bool_] = np.equal(np.array(self._kinds), KINDS.index(kind))
        return found


@dataclass
class Traffic:
    """What the clients saw."""

    answered: Answers = field(default_factory=Answers)
    failed: int = 0
    """Requests that ended with an error."""
    wrong: int = 0
    """Answers that are not what the revision that they name answers offline."""
    stale: int = 0
    """Requests sent after a swap had ended that the revision before still answered."""
    retried: int = 0
    """Times that a request was sent again, because the process that had it was killed."""
    late: int = 0
    """Requests that could not be sent when they were due, because too many were on their way."""
    problems: list[str] = field(default_factory=list)
    """The first few of these, in words."""
    turn: int = 0
    """Grows whenever `serving` is set."""
    _serving: int = 0

    @property
    def serving(self) -> int:
        """Revision that every request sent from now on must be answered by; 0 during a swap."""
        return self._serving

    @serving.setter
    def serving(self, revision: int) -> None:
        self._serving = revision
        self.turn += 1

    @property
    def total(self) -> int:
        """All requests."""
        return len(self.answered) + self.failed

    @property
    def bad(self) -> int:
        """Requests that failed or were answered wrongly."""
        return self.failed + self.wrong + self.stale

    def problem(self, text: str) -> None:
        """Keep the first few problems in words."""
        if len(self.problems) < _KEPT_PROBLEMS:
            self.problems.append(text)


Excuse = Callable[[str, float, PollardError], bool]
"""Says whether a failure is to be expected: kind, when it was sent, error. Such a request is sent
again, until its time is over."""


class Load:
    """Clients that ask: each one request after the other, or all together so many a second."""

    def __init__(
        self,
        *,
        model: str,
        vision: str,
        inference: str,
        samples: Sequence[Question],
        references: Mapping[int, RightAnswers],
        clients: int,
        kinds: Sequence[str] = KINDS,
        alias: str | None = None,
        timeout: float = _TIMEOUT_SECONDS,
        excused: Excuse = lambda kind, sent, error: False,
        again_seconds: float | None = None,
        retry: RetryPolicy | None = None,
        pause: float = 0.0,
    ) -> None:
        """Prepare the clients; `run` or `run_at` starts them.

        Args:
            model: Model name; requests name no revision.
            vision: Address of the vision service.
            inference: Address of the inference service.
            samples: What is sent, in turn.
            references: The right answers, by revision.
            clients: How many ask at the same time.
            kinds: What each client sends, in turn.
            alias: Alias that requests follow; None for the one that they follow by themselves.
            timeout: Deadline of each request in seconds.
            excused: Tells which failures are sent again rather than counted.
            again_seconds: So long after it was due a request is sent again; None for `timeout`.
            retry: What the clients send again by themselves; nothing if None, since a failure that
                a retry would hide is a failure of a swap.
            pause: How long each client of `run` waits after an answer, in seconds. Clients that
                never wait take all of a small machine.
        """
        self.traffic = Traffic()
        self.references = dict(references)
        """The right answers, by revision; more may be added while it runs."""
        self._model = model
        self._vision = vision
        self._inference = inference
        self._samples = samples
        self._clients = clients
        self._kinds = kinds
        self._alias = alias
        self._timeout = timeout
        self._excused = excused
        self._pause = pause
        self._retry = retry or RetryPolicy.none()
        self._again_seconds = timeout if again_seconds is None else again_seconds
        self._next = itertools.count()
        self._done = asyncio.Event()

    def finish(self) -> None:
        """Let each client end after its current request."""
        self._done.set()

    async def run(self) -> None:
        """Ask until told to finish, each client one request after the other."""
        async with asyncio.TaskGroup() as group:
            for number in range(self._clients):
                group.create_task(self._client(number))

    async def run_at(self, rate: float) -> None:
        """Ask so many times a second, evenly, until told to finish.

        Latencies count from when a request was due, not from when it was sent: a service that
        stops for a while delays all that are due meanwhile.
        """
        async with contextlib.AsyncExitStack() as stack:
            asked = [await self._connected(stack) for _ in range(self._clients)]
            started, on_their_way = time.monotonic(), set[asyncio.Task[None]]()
            for number in itertools.count():
                due = started + number / rate
                while (ahead := due - time.monotonic()) > 0 and not self._done.is_set():
                    await asyncio.sleep(ahead)
                if self._done.is_set():
                    break
                if len(on_their_way) >= _MOST_IN_FLIGHT:
                    self.traffic.late += 1
                    await asyncio.wait(on_their_way, return_when=asyncio.FIRST_COMPLETED)
                kind = self._kinds[number % len(self._kinds)]
                task = asyncio.create_task(asked[number % len(asked)](kind, due))
                on_their_way.add(task)
                task.add_done_callback(on_their_way.discard)
            await asyncio.gather(*on_their_way)

    async def _client(self, number: int) -> None:
        async with contextlib.AsyncExitStack() as stack:
            ask = await self._connected(stack)
            for turn in itertools.count(number):
                if self._done.is_set():
                    return
                await ask(self._kinds[turn % len(self._kinds)], time.monotonic())
                if self._pause:
                    await asyncio.sleep(self._pause)

    async def _connected(
        self, stack: contextlib.AsyncExitStack
    ) -> Callable[[str, float], Coroutine[Any, Any, None]]:
        """Open one client's connections; return what asks one question."""
        retry = self._retry
        vision = await stack.enter_async_context(
            AsyncVisionClient(self._vision, timeout=self._timeout, retry=retry)
        )
        inference = await stack.enter_async_context(
            AsyncInferenceClient(self._inference, timeout=self._timeout, retry=retry)
        )

        async def ask(kind: str, due: float) -> None:
            index = next(self._next) % len(self._samples)
            send = self._ask_tensor(inference) if kind == TENSOR else self._ask_image(vision)
            while True:
                sent = time.monotonic()
                expected, turn = self.traffic.serving, self.traffic.turn
                try:
                    revision, check = await send(index)
                except PollardError as error:
                    late = time.monotonic() - due >= self._again_seconds
                    if late or not self._excused(kind, sent, error):
                        self.traffic.failed += 1
                        self.traffic.problem(f"{kind}: {type(error).__name__}: {error}")
                        return
                    self.traffic.retried += 1
                    await asyncio.sleep(_RETRY_PAUSE_SECONDS)
                    continue
                self._note(kind, index, due, revision, check)
                # A swap may have begun while the request was on its way; then either is right.
                if expected and turn == self.traffic.turn and revision != expected:
                    self.traffic.stale += 1
                    self.traffic.problem(
                        f"{kind}: revision {revision} answered while {expected} was served"
                    )
                return

        return ask

    def _ask_image(self, client: AsyncVisionClient) -> _Send:
        classes = next(iter(self.references.values())).classes

        async def send(index: int) -> tuple[int, _Check]:
            answer = await client.predict(
                self._samples[index].png, self._model, alias=self._alias, top_k=classes
            )
            scores = _by_class(answer, classes)
            return answer.revision, lambda right: right.matches_scores(index, scores)

        return send

    def _ask_tensor(self, client: AsyncInferenceClient) -> _Send:
        name = next(iter(self.references.values())).input_name

        async def send(index: int) -> tuple[int, _Check]:
            answer = await client.infer(
                self._model, {name: self._samples[index].tensor}, alias=self._alias
            )
            return answer.version, lambda right: right.matches_output(
                index, answer.outputs[right.output_name]
            )

        return send

    def _note(self, kind: str, index: int, due: float, revision: int, check: _Check) -> None:
        traffic = self.traffic
        traffic.answered.add(kind, due, time.monotonic(), revision)
        right = self.references.get(revision)
        if right is None:
            traffic.wrong += 1
            traffic.problem(f"{kind}: an answer names the unknown revision {revision}")
        elif not check(right):
            traffic.wrong += 1
            traffic.problem(
                f"{kind} {index}: the answer that names revision {revision} is not that revision's"
            )


_Check = Callable[[RightAnswers], bool]
_Send = Callable[[int], Awaitable[tuple[int, _Check]]]


def _by_class(answer: Prediction, classes: int) -> NDArray[np.float64]:
    scores = np.full(classes, np.nan)
    for label in answer.labels:
        scores[label.index] = label.score
    return scores
