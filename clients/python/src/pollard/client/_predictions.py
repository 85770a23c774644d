"""What VisionService is asked and what it answers, as the types of `types.py`."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pollard.client import types
from pollard.client._convert import failure, seconds
from pollard.client.errors import InvalidAnswer, RequestFailed
from pollard.vision.v1 import vision_service_pb2

_AUGMENTATIONS = {
    None: vision_service_pb2.AUGMENTATION_UNSPECIFIED,
    "flip": vision_service_pb2.AUGMENTATION_FLIP,
    "five_crop": vision_service_pb2.AUGMENTATION_FIVE_CROP,
}


def options(
    top_k: int | None,
    embedding: bool,
    augmentation: str | None,
    score_threshold: float | None,
) -> vision_service_pb2.PredictOptions:
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be 1 or more, not {top_k}")
    if augmentation not in _AUGMENTATIONS:
        raise ValueError(f'augmentation must be "flip" or "five_crop", not {augmentation!r}')
    if score_threshold is not None and not 0 <= score_threshold <= 1:
        raise ValueError(f"score_threshold must be between 0 and 1, not {score_threshold}")
    return vision_service_pb2.PredictOptions(
        top_k=top_k or 0,
        embedding=embedding,
        augmentation=_AUGMENTATIONS[augmentation],
        score_threshold=score_threshold,
        # Needs no PNG decoder here.
        mask_encoding=vision_service_pb2.MASK_ENCODING_RUN_LENGTH,
    )


def prediction(response: vision_service_pb2.PredictResponse) -> types.Prediction:
    labels: tuple[types.ScoredLabel, ...] = ()
    vector: NDArray[np.float32] | None = None
    if response.HasField("classification"):
        labels = tuple(map(_scored, response.classification.labels))
        if response.classification.HasField("embedding"):
            vector = np.array(response.classification.embedding.values, np.float32)
    elif response.HasField("embedding"):
        vector = np.array(response.embedding.values, np.float32)
    detection, segmentation = response.detection, response.segmentation
    objects: tuple[types.DetectedObject, ...] | None = None
    mask: NDArray[np.uint8] | None = None
    size: tuple[int, int] | None = None
    if response.HasField("detection"):
        objects = tuple(
            types.DetectedObject(_scored(each.label), each.x1, each.y1, each.x2, each.y2)
            for each in detection.objects
        )
        size = (detection.width, detection.height)
    elif response.HasField("segmentation"):
        mask = _mask(segmentation)
        size = (segmentation.width, segmentation.height)
    return types.Prediction(
        model=response.model,
        revision=response.revision,
        labels=labels,
        embedding=vector,
        timings=types.Timings(
            seconds(response.timings.preprocess),
            seconds(response.timings.inference),
            seconds(response.timings.postprocess),
        ),
        objects=objects,
        mask=mask,
        areas=tuple(map(_scored, segmentation.areas)),
        size=size,
    )


def explanation(response: vision_service_pb2.ExplainResponse) -> types.Explanation:
    values = np.array(response.values, np.float32)
    if values.size != response.height * response.width:
        raise InvalidAnswer(
            f"the map has {values.size} values, not {response.height} × {response.width}"
        )
    return types.Explanation(
        model=response.model,
        revision=response.revision,
        label=_scored(response.label),
        values=values.reshape(response.height, response.width),
        overlay_png=response.overlay_png,
    )


def _scored(message: vision_service_pb2.ScoredLabel) -> types.ScoredLabel:
    return types.ScoredLabel(message.index, message.label, message.score)


def _mask(message: vision_service_pb2.Segmentation) -> NDArray[np.uint8]:
    runs = message.run_lengths
    classes = np.array(runs.classes, np.uint8)
    lengths = np.array(runs.lengths, np.int64)
    if len(classes) != len(lengths) or lengths.sum() != message.width * message.height:
        raise InvalidAnswer(
            f"the mask's runs do not fill an image of {message.width} × {message.height} pixels"
        )
    mask = np.repeat(classes, lengths).reshape(message.height, message.width)
    mask.flags.writeable = False
    return mask


def predict_result(
    result: vision_service_pb2.PredictResult, address: str, method: str
) -> types.Prediction | RequestFailed:
    if result.HasField("error"):
        return failure(result.error, address, method)
    return prediction(result.response)
