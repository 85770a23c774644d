"""From images to tensors and answers, by one revision from beginning to end."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from pollard.runtime.errors import ImageInvalid, RuntimeFault
from pollard.runtime.transforms import Geometry, Transformed
from pollard.services.common.errors import ServiceError
from pollard.services.common.telemetry.traces import current_span, within
from pollard.services.preprocess.answers import (
    Answer,
    Augmentation,
    Options,
    Segmented,
    answer_of,
    outputs_wanted,
)
from pollard.services.preprocess.counts import Counts
from pollard.services.preprocess.decode_pool import DecodePool
from pollard.services.preprocess.errors import (
    AnswerTooLarge,
    DecoderCrashed,
    DecodeTimeout,
    InferenceFailed,
    RequestInvalid,
    RevisionGone,
    RevisionNotReady,
    RevisionUnknown,
    TensorRefused,
)
from pollard.services.preprocess.inference_client import InferenceClient, Work
from pollard.services.preprocess.shadowing import ImageShadows
from pollard.services.preprocess.snapshot import Current, Selector, ServedRevision, Snapshot
from pollard.services.preprocess.streams import MAX_IN_WORK

MAX_IMAGES = 256

T = TypeVar("T")

Failure: TypeAlias = RuntimeFault | ServiceError
"""Why there is no answer for an image."""

_NO_OPTIONS = Options()

_FREE: AbstractAsyncContextManager[object] = nullcontext()

# Left free in a message for everything but the tensor.
_MESSAGE_OVERHEAD_BYTES = 64 * 1024


@dataclass(frozen=True)
class Batch:
    """Several images as one tensor."""

    revision: ServedRevision
    """Whose steps were used."""
    array: NDArray[np.generic]
    """The images along the first dimension."""
    geometries: tuple[Geometry, ...]


@dataclass(frozen=True)
class Prediction:
    """The answer for one image."""

    revision: ServedRevision
    """Which revision answered."""
    answer: Answer
    """By the revision's task."""
    preprocess_seconds: float
    inference_seconds: float
    postprocess_seconds: float


class Predictor:
    """Transforms and predicts with what the current snapshot says."""

    def __init__(
        self,
        current: Current,
        pool: DecodePool,
        client: InferenceClient,
        max_message_bytes: int = 64 * 1024**2,
        counts: Counts | None = None,
    ) -> None:
        """Take the parts; nothing is started.

        Args:
            current: Holds the snapshot in force.
            pool: Decodes and transforms.
            client: Runs models.
            max_message_bytes: Largest answer.
            counts: Where images are counted.
        """
        self._counts = counts or Counts()
        self.shadows = ImageShadows(current, pool, client, self._counts)
        self._current = current
        self._pool = pool
        self._client = client
        self._max_tensor_bytes = max_message_bytes - _MESSAGE_OVERHEAD_BYTES

    async def transform(
        self,
        selector: Selector,
        contents: Sequence[bytes],
        turns: asyncio.Semaphore | None = None,
    ) -> Batch:
        """Make one tensor of several images.

        Args:
            selector: Whose steps.
            contents: The encoded images.
            turns: Held while an image is transformed, where several calls
                belong together; `turns` makes one.

        Raises:
            ImageInvalid, DecodeTimeout, DecoderCrashed: one of the images is
                bad; ``metadata["image_index"]`` says which.
            RevisionUnknown, RevisionNotReady, ModelTakesNoImages: there are no
                steps to use.
            RequestInvalid: the images do not fit into one tensor.
            AnswerTooLarge: the tensor does not fit into one message.
            DecodersBusy: too much waits already.
        """
        revision = self._current.snapshot.choose(selector)
        pipeline = revision.image_pipeline()
        if pipeline.output_shape is not None:
            size = math.prod(pipeline.output_shape) * pipeline.dtype.itemsize * pipeline.views
            self._check_size(size * len(contents), len(contents))
        held = turns or self.turns()

        async def one(index: int, content: bytes) -> Transformed:
            async with held:
                try:
                    with within("preprocess"):
                        return await self._pool.transform(revision.steps, content)
                except (RuntimeFault, ServiceError) as error:
                    error.metadata["image_index"] = str(index)
                    if len(contents) > 1:
                        error.message = f"image {index}: {error.message}"
                    raise

        tasks = [asyncio.create_task(one(i, content)) for i, content in enumerate(contents)]
        try:
            results = await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
        for index, result in enumerate(results):
            if result.array.shape != results[0].array.shape:
                raise RequestInvalid(
                    f"image {index} gives a tensor of shape {list(result.array.shape)}, image 0 "
                    f"one of {list(results[0].array.shape)}: this model takes images as large "
                    "as they are; send them one by one",
                    image_index=index,
                )
        self._check_size(sum(result.array.nbytes for result in results), len(results))
        return Batch(
            revision,
            np.concatenate([result.batch for result in results]),
            tuple(
                geometry
                for result in results
                for geometry in (result.geometries or (result.geometry,))
            ),
        )

    def _check_size(self, size: int, images: int) -> None:
        if size > self._max_tensor_bytes:
            raise AnswerTooLarge(
                f"the tensors of {images} images take {size} bytes, an answer holds "
                f"{self._max_tensor_bytes}; send fewer images at once",
                size_bytes=size,
                limit_bytes=self._max_tensor_bytes,
            )

    def _check_answer(self, answer: Answer) -> None:
        if not isinstance(answer, Segmented):
            return
        # Varints of at most 3 bytes each for a run of ordinary length.
        size = len(answer.png or b"") or 6 * len(answer.runs[0] if answer.runs else ())
        if size > self._max_tensor_bytes:
            raise AnswerTooLarge(
                f"the mask takes {size} bytes, an answer holds {self._max_tensor_bytes}; send a "
                "smaller image, or ask for a PNG",
                size_bytes=size,
                limit_bytes=self._max_tensor_bytes,
            )

    async def predict(
        self,
        selector: Selector,
        content: bytes,
        *,
        deadline: float,
        options: Options = _NO_OPTIONS,
        turns: AbstractAsyncContextManager[object] = _FREE,
    ) -> Prediction:
        """Answer for one image.

        Should the revision vanish from the inference servers on the way, one
        is chosen again and the image transformed again.

        Args:
            selector: Which revision.
            content: The encoded image.
            deadline: When the answer must be there, by the loop's clock.
            options: What the answer is to hold.
            turns: Held while the image is transformed; `turns` makes one.

        Raises:
            ImageInvalid and the others of `transform`.
            NotOffered, NotAugmentable: as `outputs_wanted`.
            InferenceUnavailable, RequestExpired, TensorRefused,
            InferenceFailed: as `InferenceClient.infer`.
        """
        return await by_one_revision(
            self._current,
            selector,
            lambda revision: self._predict_by(
                revision,
                content,
                deadline=deadline,
                options=options,
                turns=turns,
            ),
        )

    async def predict_batch(
        self,
        selector: Selector,
        contents: Sequence[bytes | Failure],
        *,
        deadline: float,
        options: Options = _NO_OPTIONS,
    ) -> list[Prediction | Failure]:
        """Answer for several images by one revision, for each with an answer or its own error.

        Args:
            selector: Which revision.
            contents: The encoded images; an error stands for an image that is
                known to be bad.
            deadline: When the answers must be there, by the loop's clock.
            options: What the answer is to hold.

        Raises:
            The errors of `predict` but those that are about one image.
        """
        turns = self.turns()
        in_work = asyncio.Semaphore(MAX_IN_WORK)

        async def one(
            revision: ServedRevision, index: int, content: bytes | Failure
        ) -> Prediction | Failure:
            if not isinstance(content, bytes):
                return content
            async with in_work:
                try:
                    return await self._predict_by(
                        revision,
                        content,
                        deadline=deadline,
                        options=options,
                        turns=turns,
                    )
                except (ImageInvalid, DecoderCrashed, DecodeTimeout) as error:
                    error.metadata["image_index"] = str(index)
                    return error

        async def all_of_them(revision: ServedRevision) -> list[Prediction | Failure]:
            # A model that cannot answer is the request's failure, not that of each image.
            outputs_wanted(revision, options)
            tasks = [
                asyncio.create_task(one(revision, index, content))
                for index, content in enumerate(contents)
            ]
            try:
                return await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()

        return await by_one_revision(self._current, selector, all_of_them)

    def turns(self) -> asyncio.Semaphore:
        """Return what keeps one request from taking more places than keep the workers busy.

        More would only take others' turns.
        """
        return asyncio.Semaphore(self._pool.places)

    async def _predict_by(
        self,
        revision: ServedRevision,
        content: bytes,
        *,
        deadline: float,
        options: Options,
        turns: AbstractAsyncContextManager[object] = _FREE,
    ) -> Prediction:
        outputs = outputs_wanted(revision, options)
        span = current_span()
        if span is not None and span.recorded:
            span.set(model=revision.model, revision=revision.revision, image_bytes=len(content))
        started = time.perf_counter()
        try:
            steps = revision.steps
            if options.augmentation is Augmentation.FIVE_CROP:
                steps = revision.five_crop_steps
            with within("preprocess"):
                async with turns:
                    transformed = await self._pool.transform(steps, content)
        except (RuntimeFault, ServiceError) as error:
            error.metadata["image_index"] = "0"
            self._counts.failed(revision.model, revision.revision, error)
            raise
        decoded = time.perf_counter()
        views = transformed.batch
        if options.augmentation is Augmentation.FLIP:
            width_axis = 3 if revision.image_pipeline().layout == "CHW" else 2
            views = np.concatenate([views, np.flip(views, width_axis)])
        try:
            answer = await self._infer(revision, views, outputs, deadline)
        except TensorRefused as error:
            self._counts.failed(revision.model, revision.revision, error)
            raise
        answered = time.perf_counter()
        try:
            with within("answer"):
                found = await answer_of(
                    revision,
                    answer,
                    transformed.geometries or (transformed.geometry,),
                    _size(transformed, revision.image_pipeline().layout),
                    options,
                )
                self._check_answer(found)
        except (RuntimeFault, KeyError, ValueError) as error:
            # The caller's image is not to blame for what the model gives.
            self._counts.of(revision.model, revision.revision).fail()
            raise InferenceFailed(
                f"revision {revision.revision} of model {revision.model!r} gave no answer that "
                f"its manifest describes: {error}",
                model=revision.model,
                revision=revision.revision,
            ) from error
        self._counts.succeeded(revision.model, revision.revision, time.perf_counter() - started)
        if options.augmentation is Augmentation.NONE and self._current.snapshot.has_image_shadows:
            self.shadows.offer(revision, content, answer)
        return Prediction(
            revision,
            found,
            preprocess_seconds=decoded - started,
            inference_seconds=answered - decoded,
            postprocess_seconds=time.perf_counter() - answered,
        )

    async def _infer(
        self,
        revision: ServedRevision,
        views: NDArray[np.generic],
        outputs: list[str],
        deadline: float,
    ) -> dict[str, NDArray[np.generic]]:
        # One by one, because a model may take no larger batch; the inference
        # server puts together what comes at the same time.
        def infer(view: NDArray[np.generic]) -> Coroutine[Any, Any, dict[str, NDArray[np.generic]]]:
            return self._client.infer(
                Work(revision.model, revision.revision, revision.input.name, view, outputs),
                lambda: self._current.snapshot.endpoints_for(revision.model, revision.revision),
                deadline,
            )

        if len(views) == 1:
            return await infer(views)
        tasks = [asyncio.create_task(infer(view)) for view in views[:, np.newaxis]]
        try:
            answers = await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
        return {name: np.concatenate([answer[name] for answer in answers]) for name in outputs}


async def by_one_revision(
    current: Current, selector: Selector, run: Callable[[ServedRevision], Awaitable[T]]
) -> T:
    """Run something by the revision that is chosen; by another, when it vanishes on the way.

    A request that takes longer than revisions stay after a swap, and meets one swap after another,
    chooses anew as often as the routes have changed meanwhile; ``run`` ends when its time is over.

    Raises:
        RevisionUnknown, RevisionNotReady: there is none to use.
    """
    tried: list[Snapshot] = []
    # By the same routes only once more: then they lead nowhere, and would again.
    while len(tried) < 2 or tried[-1] is not tried[-2]:
        tried = [*tried[-1:], current.snapshot]
        revision = tried[-1].choose(selector)
        try:
            return await run(revision)
        except RevisionGone:
            if selector.revision is not None:
                raise RevisionUnknown(
                    f"revision {revision.revision} of model {revision.model!r} is on no "
                    "inference server any more",
                    model=revision.model,
                    revision=revision.revision,
                ) from None
    raise RevisionNotReady(
        f"revision {revision.revision} of model {revision.model!r} is on no inference server "
        "now; try again later",
        model=revision.model,
        revision=revision.revision,
    )


def _size(transformed: Transformed, layout: str) -> tuple[int, int]:
    """Return width and height of the input tensor in pixels."""
    _, first, second, third = transformed.batch.shape
    return (third, second) if layout == "CHW" else (second, first)
