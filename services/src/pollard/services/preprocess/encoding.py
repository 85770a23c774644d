"""Options and answers of VisionService as messages."""

from __future__ import annotations

from google.protobuf import duration_pb2

from pollard.services.preprocess.answers import (
    Augmentation,
    Classified,
    Detected,
    Options,
    Segmented,
)
from pollard.services.preprocess.errors import RequestInvalid
from pollard.services.preprocess.explaining import Explanation
from pollard.services.preprocess.prediction import Prediction
from pollard.vision.v1 import vision_service_pb2 as vision_pb

_AUGMENTATIONS = {
    vision_pb.AUGMENTATION_UNSPECIFIED: Augmentation.NONE,
    vision_pb.AUGMENTATION_FLIP: Augmentation.FLIP,
    vision_pb.AUGMENTATION_FIVE_CROP: Augmentation.FIVE_CROP,
}


def read_options(message: vision_pb.PredictOptions) -> Options:
    """Return what a request wants.

    Raises:
        RequestInvalid: an option has a value that means nothing.
    """
    if message.augmentation not in _AUGMENTATIONS:
        raise RequestInvalid(f"options.augmentation {message.augmentation} is unknown")
    if message.mask_encoding not in vision_pb.MaskEncoding.values():
        raise RequestInvalid(f"options.mask_encoding {message.mask_encoding} is unknown")
    threshold = message.score_threshold if message.HasField("score_threshold") else None
    if threshold is not None and not 0 <= threshold <= 1:
        raise RequestInvalid(
            f"options.score_threshold is {threshold:g}; it lies between 0 and 1",
            field="options.score_threshold",
        )
    return Options(
        top_k=message.top_k,
        embedding=message.embedding,
        score_threshold=threshold,
        run_lengths=message.mask_encoding == vision_pb.MASK_ENCODING_RUN_LENGTH,
        augmentation=_AUGMENTATIONS[message.augmentation],
    )


def to_response(prediction: Prediction) -> vision_pb.PredictResponse:
    """Return an answer as a message."""
    response = vision_pb.PredictResponse(
        model=prediction.revision.model,
        revision=prediction.revision.revision,
        timings=vision_pb.Timings(
            preprocess=_duration(prediction.preprocess_seconds),
            inference=_duration(prediction.inference_seconds),
            postprocess=_duration(prediction.postprocess_seconds),
        ),
    )
    answer = prediction.answer
    if isinstance(answer, Classified):
        _fill_classification(response.classification, answer)
    elif isinstance(answer, Detected):
        _fill_detection(response.detection, answer)
    elif isinstance(answer, Segmented):
        _fill_segmentation(response.segmentation, answer)
    else:
        response.embedding.values.extend(answer.vector.tolist())
    return response


def to_explanation(explanation: Explanation) -> vision_pb.ExplainResponse:
    """Return a saliency map as a message."""
    index, label, score = explanation.label
    height, width = explanation.values.shape
    return vision_pb.ExplainResponse(
        model=explanation.revision.model,
        revision=explanation.revision.revision,
        label=vision_pb.ScoredLabel(index=index, label=label, score=score),
        height=height,
        width=width,
        values=explanation.values.reshape(-1).tolist(),
        overlay_png=explanation.overlay_png,
    )


def _fill_classification(message: vision_pb.Classification, answer: Classified) -> None:
    message.SetInParent()
    for index, label, score in answer.classes:
        message.labels.add(index=index, label=label, score=score)
    if answer.embedding is not None:
        message.embedding.values.extend(answer.embedding.tolist())


def _fill_detection(message: vision_pb.Detection, answer: Detected) -> None:
    message.width, message.height = answer.width, answer.height
    for box in answer.boxes:
        message.objects.add(
            label=vision_pb.ScoredLabel(index=box.class_index, label=box.label, score=box.score),
            x1=box.x1,
            y1=box.y1,
            x2=box.x2,
            y2=box.y2,
        )


def _fill_segmentation(message: vision_pb.Segmentation, answer: Segmented) -> None:
    message.width, message.height = answer.width, answer.height
    for area in answer.areas:
        message.areas.add(index=area.class_index, label=area.label, score=area.share)
    if answer.png is not None:
        message.png = answer.png
    elif answer.runs is not None:
        classes, lengths = answer.runs
        message.run_lengths.classes.extend(classes.tolist())
        message.run_lengths.lengths.extend(lengths.tolist())


def _duration(seconds: float) -> duration_pb2.Duration:
    duration = duration_pb2.Duration()
    duration.FromNanoseconds(int(seconds * 1e9))
    return duration
