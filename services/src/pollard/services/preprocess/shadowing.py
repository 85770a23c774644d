"""Shadows of images: where two revisions prepare images differently, the image itself is copied.

Tensors cannot be copied then: they hold the wrong pixels. After an image was answered, it is
transformed again by the other revision's steps, if a decode worker is idle, and run there marked as
a copy; the answers are compared here. A few images at most are in work or wait, bounded in number
and in bytes; the others are dropped and counted.
"""

from __future__ import annotations

import asyncio
import random

import numpy as np
import structlog
from numpy.typing import NDArray

from pollard.runtime.errors import RuntimeFault
from pollard.services.common.errors import ServiceError
from pollard.services.common.lifecycle import cancel, spawn
from pollard.services.common.shadows import compare_answers
from pollard.services.preprocess.counts import Counts
from pollard.services.preprocess.decode_pool import DecodePool
from pollard.services.preprocess.errors import DecodersBusy, ShadowDropped
from pollard.services.preprocess.inference_client import InferenceClient, Work
from pollard.services.preprocess.snapshot import Current, ServedRevision

_log = structlog.get_logger("pollard.preprocess.shadowing")

MAX_IN_WORK = 4
"""Images that are copied at the same time."""

MAX_BYTES = 64 << 20
"""Sum of their sizes, encoded."""

_SECONDS = 30.0
"""Longest time for one copy."""


class ImageShadows:
    """Copies of images. Belongs to the event loop's thread."""

    def __init__(
        self, current: Current, pool: DecodePool, client: InferenceClient, counts: Counts
    ) -> None:
        """Take the parts; nothing is started.

        Args:
            current: Holds the snapshot in force.
            pool: Decodes and transforms.
            client: Runs models.
            counts: Where copies are counted.
        """
        self._current = current
        self._pool = pool
        self._client = client
        self._counts = counts
        self._tasks: set[asyncio.Task[None]] = set()
        self._bytes = 0

    def offer(
        self,
        revision: ServedRevision,
        content: bytes,
        answer: dict[str, NDArray[np.generic]],
    ) -> None:
        """Copy an image that was answered, or do not; returns at once."""
        model = self._current.snapshot.models.get(revision.model)
        if model is None:
            return
        for rule in model.shadows.values():
            wanted = rule.transform_again and rule.base_revision == revision.revision
            if not wanted or random.random() >= rule.share:
                continue
            target = model.revisions[rule.revision]
            expected = answer.get(rule.output)
            if expected is None:
                continue
            busy = len(self._tasks) >= MAX_IN_WORK or self._bytes + len(content) > MAX_BYTES
            if busy or not self._pool.has_idle_worker:
                self._counts.of(target.model, target.revision).shadows().drop()
                continue
            self._bytes += len(content)
            spawn(self._tasks, self._copy(target, content, rule.output, expected), "shadow")

    async def close(self) -> None:
        """Drop what is in work."""
        await cancel(*self._tasks)

    async def _copy(
        self,
        target: ServedRevision,
        content: bytes,
        output: str,
        expected: NDArray[np.generic],
    ) -> None:
        counters = self._counts.of(target.model, target.revision).shadows()
        try:
            async with asyncio.timeout(_SECONDS):
                transformed = await self._pool.transform(target.steps, content)
                answer = await self._client.infer_shadow(
                    Work(
                        target.model,
                        target.revision,
                        target.input.name,
                        transformed.batch[:1],
                        [output],
                    ),
                    self._current.snapshot.endpoints,
                    _SECONDS,
                )
            agreed, distances = compare_answers(answer[output], expected)
        except (ShadowDropped, DecodersBusy, TimeoutError):
            counters.drop()
        except (RuntimeFault, ServiceError, KeyError, ValueError) as error:
            _log.info(
                "a shadow failed", model=target.model, revision=target.revision, error=str(error)
            )
            counters.fail()
        else:
            counters.compare(agreed, distances)
        finally:
            self._bytes -= len(content)
