"""Clients that keep asking while the revision is swapped, and check every answer."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from pollard.client import (
    AsyncInferenceClient,
    AsyncVisionClient,
    PollardError,
    Prediction,
    RetryPolicy,
)
from pollard.compress.demo.reference import Reference, Sample

IMAGE, TENSOR = "image", "tensor"

_TIMEOUT_SECONDS = 10.0
_KEPT_PROBLEMS = 10


@dataclass(frozen=True)
class Answered:
    """One request that was answered."""

    kind: str
    """IMAGE or TENSOR."""
    started: float
    """When it was sent, on the monotonic clock."""
    ended: float
    """When the answer was there."""
    revision: int
    """Revision that the answer names."""


@dataclass
class Traffic:
    """What the clients saw."""

    answered: list[Answered] = field(default_factory=list)
    failed: int = 0
    """Requests that ended with an error."""
    wrong: int = 0
    """Answers that are not what the revision that they name answers offline."""
    stale: int = 0
    """Requests sent after a swap had ended that the revision before still answered."""
    problems: list[str] = field(default_factory=list)
    """The first few of these, in words."""
    serving: int = 0
    """Revision that every request sent from now on must be answered by; 0 during a swap."""

    @property
    def total(self) -> int:
        """All requests."""
        return len(self.answered) + self.failed

    def problem(self, text: str) -> None:
        """Keep the first few problems in words."""
        if len(self.problems) < _KEPT_PROBLEMS:
            self.problems.append(text)


class Load:
    """A number of concurrent clients; each sends one kind of request after the other."""

    def __init__(
        self,
        *,
        model: str,
        vision: str,
        inference: str,
        samples: Sequence[Sample],
        references: Mapping[int, Reference],
        clients: int,
        kinds: Sequence[str] = (IMAGE, TENSOR),
    ) -> None:
        """Prepare the clients; `run` starts them.

        Args:
            model: Model name; requests name no revision.
            vision: Address of the vision service.
            inference: Address of the inference service.
            samples: What is sent, in turn.
            references: The right answers, by revision.
            clients: How many ask at the same time.
            kinds: What each client sends, in turn.
        """
        self.traffic = Traffic()
        self._model = model
        self._vision = vision
        self._inference = inference
        self._samples = samples
        self._references = references
        self._clients = clients
        self._kinds = kinds
        self._next = itertools.count()
        self._done = asyncio.Event()

    def finish(self) -> None:
        """Let each client end after its current request."""
        self._done.set()

    async def run(self) -> None:
        """Ask until told to finish."""
        async with asyncio.TaskGroup() as group:
            for number in range(self._clients):
                group.create_task(self._client(number))

    async def _client(self, number: int) -> None:
        # Without retries: a failure that a retry would hide is a failure here.
        retry = RetryPolicy.none()
        async with (
            AsyncVisionClient(self._vision, timeout=_TIMEOUT_SECONDS, retry=retry) as vision,
            AsyncInferenceClient(
                self._inference, timeout=_TIMEOUT_SECONDS, retry=retry
            ) as inference,
        ):
            for turn in itertools.count(number):
                if self._done.is_set():
                    return
                index = next(self._next) % len(self._samples)
                if self._kinds[turn % len(self._kinds)] == TENSOR:
                    await self._ask_tensor(inference, index)
                else:
                    await self._ask_image(vision, index)

    async def _ask_image(self, client: AsyncVisionClient, index: int) -> None:
        expected, started = self.traffic.serving, time.monotonic()
        classes = next(iter(self._references.values())).classes
        try:
            answer = await client.predict(self._samples[index].png, self._model, top_k=classes)
        except PollardError as error:
            self._failed(IMAGE, error)
            return
        reference = self._note(IMAGE, started, answer.revision, expected)
        if reference is not None and not reference.matches_scores(
            index, _by_class(answer, classes)
        ):
            self._wrong(IMAGE, index, answer.revision)

    async def _ask_tensor(self, client: AsyncInferenceClient, index: int) -> None:
        expected, started = self.traffic.serving, time.monotonic()
        first = next(iter(self._references.values()))
        try:
            answer = await client.infer(
                self._model, {first.input_name: self._samples[index].tensor}
            )
        except PollardError as error:
            self._failed(TENSOR, error)
            return
        reference = self._note(TENSOR, started, answer.version, expected)
        if reference is not None and not reference.matches_output(
            index, answer.outputs[reference.output_name]
        ):
            self._wrong(TENSOR, index, answer.version)

    def _note(self, kind: str, started: float, revision: int, expected: int) -> Reference | None:
        traffic = self.traffic
        traffic.answered.append(Answered(kind, started, time.monotonic(), revision))
        # A swap may have begun while the request was on its way; then either is right.
        if expected and traffic.serving == expected and revision != expected:
            traffic.stale += 1
            traffic.problem(f"{kind}: revision {revision} answered while {expected} was served")
        reference = self._references.get(revision)
        if reference is None:
            traffic.wrong += 1
            traffic.problem(f"{kind}: an answer names the unknown revision {revision}")
        return reference

    def _failed(self, kind: str, error: PollardError) -> None:
        self.traffic.failed += 1
        self.traffic.problem(f"{kind}: {type(error).__name__}: {error}")

    def _wrong(self, kind: str, index: int, revision: int) -> None:
        self.traffic.wrong += 1
        self.traffic.problem(
            f"{kind} {index}: the answer that names revision {revision} is not that revision's"
        )


def _by_class(answer: Prediction, classes: int) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    scores = np.full(classes, np.nan)
    for label in answer.labels:
        scores[label.index] = label.score
    return scores
