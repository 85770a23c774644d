"""Answers by the task of a revision: which outputs they take, and how they come of them."""

from __future__ import annotations

import asyncio
import dataclasses
import enum
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pollard.bundle.v1 import bundle_pb2
from pollard.runtime.detection import DetectedBox, detect
from pollard.runtime.postprocess import ScoredClass, classify_views, embed_views
from pollard.runtime.segmentation import UNSEEN, Area, areas, run_lengths, segment
from pollard.runtime.transforms import Geometry
from pollard.services.preprocess.errors import ModelTakesNoImages, NotAugmentable, NotOffered
from pollard.services.preprocess.snapshot import ServedRevision

_UNSEEN_COLOR = (224, 224, 192)
"""As in the pictures of the Pascal VOC data set, for what has no class."""

_PNG_LEVEL = 3
"""Masks have few edges: more effort makes them little smaller."""


class Augmentation(enum.Enum):
    """Which views of an image an answer rests on."""

    NONE = "none"
    FLIP = "flip"
    """The image and its mirror image."""
    FIVE_CROP = "five crop"
    """Corners and centre, in the place of a centre crop."""


@dataclass(frozen=True)
class Options:
    """What a request wants of an answer; what is not for the task is passed over."""

    top_k: int = 0
    """Number of classes; 0 means what the manifest says."""
    embedding: bool = False
    """Also give the embedding, where there is one."""
    score_threshold: float | None = None
    """For detections; None means what the manifest says."""
    run_lengths: bool = False
    """Masks as run lengths, not as PNG."""
    augmentation: Augmentation = Augmentation.NONE


@dataclass(frozen=True)
class Classified:
    """The best classes by falling score."""

    classes: list[ScoredClass]
    embedding: NDArray[np.generic] | None


@dataclass(frozen=True)
class Detected:
    """Boxes by falling score, in pixels of the upright image."""

    boxes: list[DetectedBox]
    width: int
    height: int


@dataclass(frozen=True)
class Segmented:
    """A class for each pixel of the upright image, as PNG or as run lengths."""

    width: int
    height: int
    areas: list[Area]
    png: bytes | None = None
    runs: tuple[NDArray[np.uint8], NDArray[np.int64]] | None = None


@dataclass(frozen=True)
class Embedded:
    """A vector."""

    vector: NDArray[np.float32]


Answer: TypeAlias = Classified | Detected | Segmented | Embedded


def outputs_wanted(revision: ServedRevision, options: Options) -> list[str]:
    """Return the names of the outputs that the answer takes.

    Raises:
        ModelTakesNoImages: the model is for tensors.
        NotAugmentable: its answers cannot be averaged over these views.
        NotOffered: its manifest describes an answer that this version does not know.
    """
    revision.image_pipeline()
    manifest = revision.manifest
    about = {"model": revision.model, "revision": revision.revision}
    if manifest.task in (bundle_pb2.TASK_RAW, bundle_pb2.TASK_UNSPECIFIED):
        raise ModelTakesNoImages(
            f"revision {revision.revision} of model {revision.model!r} gives tensors, not "
            "answers; use Transform and the inference service's ModelInfer",
            **about,
        )
    post = manifest.postprocess
    task = post.WhichOneof("task")
    first = manifest.outputs[0].name
    if task == "classification":
        outputs = [post.classification.output or first]
        vector = post.classification.embedding_output
        if options.embedding and vector and vector not in outputs:
            outputs.append(vector)
        return outputs
    if task == "detection":
        detection = post.detection
        names = [detection.boxes_output, detection.scores_output, detection.labels_output]
        return [name for name in names if name]
    if task == "segmentation":
        if options.augmentation is Augmentation.FIVE_CROP:
            raise NotAugmentable(
                f"revision {revision.revision} of model {revision.model!r} is for segmentation: "
                "five crops do not show the same pixels; AUGMENTATION_FLIP can be had",
                **about,
            )
        return [post.segmentation.output or first]
    if task == "embedding":
        return [post.embedding.output or first]
    raise NotOffered(
        f"the manifest of revision {revision.revision} of model {revision.model!r} does not say "
        "how its outputs become an answer; this version answers for classification, detection, "
        "segmentation and embedding",
        **about,
    )


async def answer_of(
    revision: ServedRevision,
    outputs: Mapping[str, NDArray[np.generic]],
    geometries: Sequence[Geometry],
    input_size: tuple[int, int],
    options: Options,
) -> Answer:
    """Return the answer for one image.

    Args:
        revision: That gave the outputs.
        outputs: By name; the first dimension counts the views of the image.
        geometries: Where the image went, for each view that the steps made.
        input_size: Width and height of the input tensor in pixels.
        options: What is wanted.

    Raises:
        RuntimeFault: the outputs are not what the manifest says.
    """
    manifest, labels = revision.manifest, revision.labels
    mirrored = options.augmentation is Augmentation.FLIP
    task = manifest.postprocess.WhichOneof("task")
    if task == "classification":
        classes = classify_views(outputs, manifest, labels, options.top_k)
        name = manifest.postprocess.classification.embedding_output
        vector = None
        if options.embedding and name:
            vector = outputs[name].mean(axis=0).reshape(-1)
        return Classified(classes, vector)
    if task == "embedding":
        return Embedded(embed_views(outputs, manifest))
    if task == "detection":
        views = [*geometries, *(mirror(each, input_size[0]) for each in geometries if mirrored)]
        # Comparing thousands of boxes would keep the event loop from others.
        boxes = await asyncio.to_thread(
            detect, outputs, manifest, views, labels, options.score_threshold
        )
        return Detected(boxes, geometries[0].width, geometries[0].height)
    return await asyncio.to_thread(
        _segmented, revision, outputs, geometries[0], input_size, options
    )


def mirror(geometry: Geometry, input_width: int) -> Geometry:
    """Return the geometry of the tensor that is mirrored left to right."""
    return dataclasses.replace(
        geometry, scale_x=-geometry.scale_x, offset_x=input_width - geometry.offset_x
    )


def _segmented(
    revision: ServedRevision,
    outputs: Mapping[str, NDArray[np.generic]],
    geometry: Geometry,
    input_size: tuple[int, int],
    options: Options,
) -> Segmented:
    mask = segment(
        outputs,
        revision.manifest,
        geometry,
        input_size,
        mirrored=options.augmentation is Augmentation.FLIP,
    )
    found = areas(mask, revision.labels)
    if options.run_lengths:
        return Segmented(geometry.width, geometry.height, found, runs=run_lengths(mask))
    palette = revision.manifest.postprocess.segmentation.palette
    return Segmented(geometry.width, geometry.height, found, png=_png(mask, palette))


def _png(mask: NDArray[np.uint8], palette: Sequence[int]) -> bytes:
    """One byte per pixel, the class; with a palette, that viewers show it in colours."""
    image = Image.fromarray(mask)
    if palette:
        colors = np.zeros((256, 3), np.uint8)
        colors[UNSEEN] = _UNSEEN_COLOR
        colors.reshape(-1)[: len(palette)] = palette
        image.putpalette(colors.tobytes())
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=_PNG_LEVEL)
    return file.getvalue()
