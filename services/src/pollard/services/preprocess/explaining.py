"""Saliency maps: a classifier is asked about many partly covered copies of one image."""

from __future__ import annotations

import asyncio
import io
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pollard.bundle.v1 import bundle_pb2
from pollard.runtime.errors import RuntimeFault
from pollard.runtime.postprocess import ScoredClass, classify_batch
from pollard.runtime.saliency import Saliency, cover, fitted, map_to_image, overlay, random_masks
from pollard.runtime.transforms import Geometry, decode, resize
from pollard.services.preprocess.decode_pool import DecodePool
from pollard.services.preprocess.errors import (
    ExplainersBusy,
    InferenceFailed,
    NotExplainable,
    RequestInvalid,
)
from pollard.services.preprocess.inference_client import InferenceClient, Work
from pollard.services.preprocess.prediction import by_one_revision
from pollard.services.preprocess.snapshot import Current, Selector, ServedRevision

MAP_SIDE = 224
"""Longest side of a map, in pixels: the masks are coarser than that."""

OVERLAY_SIDE = 1024
"""Longest side of the picture, in pixels."""

MAX_WAITING = 8
"""Requests that wait while another one is worked on. One at a time, because each asks the
inference servers hundreds of times, and they have others to answer."""

_IN_FLIGHT = 2
"""Batches that are asked at the same time."""

_LARGEST_BATCH = 16

_MAX_BATCH_BYTES = 16 << 20

_SEED = 0


@dataclass(frozen=True)
class Explanation:
    """Which parts of an image a class's score rests on."""

    revision: ServedRevision
    label: ScoredClass
    values: NDArray[np.float32]
    """Between 0 and 1, [height, width] of the upright image, scaled down."""
    overlay_png: bytes
    """The map painted over the image; empty when not asked for."""


class Explainer:
    """Explains with what the current snapshot says. Belongs to the event loop's thread."""

    def __init__(
        self, current: Current, pool: DecodePool, client: InferenceClient, masks: int
    ) -> None:
        """Take the parts.

        Args:
            current: Holds the snapshot in force.
            pool: Decodes and transforms.
            client: Runs models.
            masks: Copies of an image that are asked about.
        """
        self._current = current
        self._pool = pool
        self._client = client
        self._masks = masks
        self._turn = asyncio.Semaphore(1)
        self._waiting = 0

    async def explain(
        self,
        selector: Selector,
        content: bytes,
        *,
        class_index: int | None,
        painted: bool,
        deadline: float,
    ) -> Explanation:
        """Explain one image.

        Args:
            selector: Which revision.
            content: The encoded image.
            class_index: Which class; None means the best one.
            painted: Whether the map is also wanted as a picture.
            deadline: When the answer must be there, by the loop's clock.

        Raises:
            NotExplainable: the model's task is not classification.
            RequestInvalid: there is no such class.
            ExplainersBusy: too many others wait.
            RuntimeFault, ServiceError: as `Predictor.predict`.
        """
        if self._waiting >= MAX_WAITING:
            raise ExplainersBusy(
                f"{MAX_WAITING} explanations wait already; try again later", limit=MAX_WAITING
            )
        self._waiting += 1
        try:
            await self._turn.acquire()
        finally:
            self._waiting -= 1
        try:
            return await by_one_revision(
                self._current,
                selector,
                lambda revision: self._explain_by(
                    revision, content, class_index, painted=painted, deadline=deadline
                ),
            )
        finally:
            self._turn.release()

    async def _explain_by(
        self,
        revision: ServedRevision,
        content: bytes,
        class_index: int | None,
        *,
        painted: bool,
        deadline: float,
    ) -> Explanation:
        pipeline = revision.image_pipeline()
        if revision.manifest.postprocess.WhichOneof("task") != "classification":
            raise NotExplainable(
                f"revision {revision.revision} of model {revision.model!r} is no classifier: only "
                "a classification is explained",
                model=revision.model,
                revision=revision.revision,
            )
        transformed = await self._pool.transform(revision.steps, content)
        # With five crops, that in the centre explains best.
        tensor = transformed.batch[-1]
        first = await self._classes(revision, tensor[None], deadline)
        label = _wanted(revision, first[0], class_index)
        channels_first = pipeline.layout == "CHW"
        height, width = tensor.shape[1:] if channels_first else tensor.shape[:2]
        saliency = Saliency(height, width)
        size = _batch_size(revision.manifest, tensor.nbytes)
        batches = iter(range(0, self._masks, size))

        async def ask() -> None:
            for begin in batches:
                count = min(size, self._masks - begin)
                masks, batch = await asyncio.to_thread(
                    _covered, tensor, count, begin, channels_first=channels_first
                )
                answers = await self._classes(revision, batch, deadline)
                scores = [_score(answer, label.class_index) for answer in answers]
                saliency.add(masks, np.array(scores))

        tasks = [asyncio.create_task(ask()) for _ in range(_IN_FLIGHT)]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
        geometry = transformed.geometry
        values = saliency.values()
        picture = b""
        if painted:
            picture = await self._painted(content, values, geometry)
        return Explanation(revision, label, map_to_image(values, geometry, MAP_SIDE), picture)

    async def _classes(
        self, revision: ServedRevision, batch: NDArray[np.generic], deadline: float
    ) -> list[list[ScoredClass]]:
        task = revision.manifest.postprocess.classification
        name = task.output or revision.manifest.outputs[0].name
        answer = await self._client.infer(
            Work(revision.model, revision.revision, revision.input.name, batch, [name]),
            lambda: self._current.snapshot.endpoints_for(revision.model, revision.revision),
            deadline,
        )
        try:
            classes = classify_batch(answer, revision.manifest, revision.labels, top_k=1 << 31)
        except RuntimeFault as error:
            raise InferenceFailed(
                f"revision {revision.revision} of model {revision.model!r} gave no answer that "
                f"its manifest describes: {error}",
                model=revision.model,
                revision=revision.revision,
            ) from error
        return classes

    async def _painted(
        self, content: bytes, values: NDArray[np.float32], geometry: Geometry
    ) -> bytes:
        width, height = fitted(geometry, OVERLAY_SIDE)
        steps = bundle_pb2.Manifest(preprocess=[decode(), resize(width, height)])
        image = await self._pool.transform(steps.SerializeToString(), content)
        return await asyncio.to_thread(_paint, image.array, values, geometry)


def _covered(
    tensor: NDArray[np.generic], count: int, begin: int, *, channels_first: bool
) -> tuple[NDArray[np.float32], NDArray[np.generic]]:
    """Return masks and what they leave of an image; the same ones for every request."""
    height, width = tensor.shape[1:] if channels_first else tensor.shape[:2]
    masks = random_masks(count, height, width, np.random.default_rng([_SEED, begin]))
    return masks, cover(tensor, masks, channels_first=channels_first)


def _paint(image: NDArray[np.generic], values: NDArray[np.float32], geometry: Geometry) -> bytes:
    pixels = np.asarray(image, np.uint8)
    placed = map_to_image(values, geometry, OVERLAY_SIDE, smooth=True)
    file = io.BytesIO()
    Image.fromarray(overlay(pixels, placed)).save(file, "PNG", compress_level=3)
    return file.getvalue()


def _wanted(
    revision: ServedRevision, classes: list[ScoredClass], class_index: int | None
) -> ScoredClass:
    if class_index is None:
        return classes[0]
    if class_index >= len(classes):
        raise RequestInvalid(
            f"class_index is {class_index}; revision {revision.revision} of model "
            f"{revision.model!r} has the classes 0 to {len(classes) - 1}",
            field="class_index",
        )
    return next(each for each in classes if each.class_index == class_index)


def _score(classes: list[ScoredClass], class_index: int) -> float:
    return next(each.score for each in classes if each.class_index == class_index)


def _batch_size(manifest: bundle_pb2.Manifest, image_bytes: int) -> int:
    """Return what every variant takes at once: which of them a server runs is its own affair."""
    return min(
        _LARGEST_BATCH,
        max(1, _MAX_BATCH_BYTES // image_bytes),
        *(max(1, each.max_batch_size) for each in manifest.variants),
    )
