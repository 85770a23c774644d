"""The errors of the preprocess service: leaves of the tree in `common.errors`.

::

    InvalidRequest
    ├── RequestInvalid       the request lacks something or contradicts itself
    ├── UriRefused           the image's URI is none that this server fetches
    └── DecoderCrashed       decoding the image ended the worker process, twice
    NotFound
    └── RevisionUnknown      no such model, revision or alias here
    FailedPrecondition
    ├── ModelTakesNoImages   the model is for tensors only
    ├── NotAugmentable       the model's steps leave nothing to crop
    ├── NotExplainable       the model's answers cannot be explained
    └── TensorRefused        the inference server refuses what the steps give
    ResourceExhausted
    └── AnswerTooLarge       the tensors do not fit into one message
    Unavailable
    ├── DecodersBusy         more images wait for a decoder than may wait
    ├── ExplainersBusy       more explanations wait than may wait
    ├── UriUnreachable       the image's URI gives nothing now
    ├── RevisionNotReady     routed to, but not here or not on an inference server yet
    └── InferenceUnavailable no inference server could be reached in time
    DeadlineExceeded
    ├── DecodeTimeout        decoding one image took longer than is allowed
    └── RequestExpired       the time for the request is over
    Unimplemented
    └── NotOffered           this version does not do it
    Internal
    └── InferenceFailed      an inference server failed, or its answer makes no sense

and, raised between the modules only: `WorkerLost`, `RevisionGone`.
"""

from __future__ import annotations

from pollard.services.common import errors


class RequestInvalid(errors.InvalidRequest):
    """The request lacks something or contradicts itself."""

    def __init__(self, message: str, **metadata: object) -> None:
        super().__init__(message, reason="REQUEST_INVALID", **metadata)


class UriRefused(errors.InvalidRequest):
    """The image's URI is none that this server fetches."""

    def __init__(self, message: str, **metadata: object) -> None:
        super().__init__(message, reason="URI_REFUSED", **metadata)


class DecoderCrashed(errors.InvalidRequest):
    """Decoding the image ended the worker process, and did so again."""

    def __init__(self, message: str, **metadata: object) -> None:
        super().__init__(message, reason="DECODER_CRASHED", **metadata)


class RevisionUnknown(errors.NotFound):
    """There is no such model, revision or alias."""

    def __init__(self, message: str, **metadata: object) -> None:
        super().__init__(message, reason="REVISION_UNKNOWN", **metadata)


class ModelTakesNoImages(errors.FailedPrecondition):
    """The model is for tensors only."""

    def __init__(self, message: str, **metadata: object) -> None:
        super().__init__(message, reason="MODEL_TAKES_NO_IMAGES", **metadata)


class NotAugmentable(errors.FailedPrecondition):
    """The model's steps do not allow the augmentation."""

    def __init__(self, message: str, **metadata: object) -> None:
        super().__init__(message, reason="NOT_AUGMENTABLE", **metadata)


class NotExplainable(errors.FailedPrecondition):
    """The model's answers cannot be explained."""

    def __init__(self, message: str, **metadata: object) -> None:
        super().__init__(message, reason="NOT_EXPLAINABLE", **metadata)


class TensorRefused(errors.FailedPrecondition):
    """The inference server refuses the tensor that the revision's own steps give."""

    def __init__(self, message: str, **metadata: object) -> None:
        super().__init__(message, reason="TENSOR_REFUSED", **metadata)


class AnswerTooLarge(errors.ResourceExhausted):
    """The tensors do not fit into one message."""

    def __init__(self, message: str, **metadata: object) -> None:
        super().__init__(message, reason="ANSWER_TOO_LARGE", **metadata)


class DecodersBusy(errors.Unavailable):
    """More images wait for a decoder than may wait."""

    def __init__(self, message: str, **metadata: object) -> None:
        super().__init__(message, reason="DECODERS_BUSY", **metadata)


class ExplainersBusy(errors.Unavailable):
    """More explanations wait than may wait."""

    def __init__(self, message: str, **metadata: object) -> None:
        super().__init__(message, reason="EXPLAINERS_BUSY", **metadata)


class UriUnreachable(errors.Unavailable):
    """The image's URI gives nothing now."""

    def __init__(self, message: str, **metadata: object) -> None:
        super().__init__(message, reason="URI_UNREACHABLE", **metadata)


class RevisionNotReady(errors.Unavailable):
    """A route leads to the revision, but it is not here or not served yet."""

    def __init__(self, message: str, **metadata: object) -> None:
        super().__init__(message, reason="REVISION_NOT_READY", **metadata)


class InferenceUnavailable(errors.Unavailable):
    """No inference server could be reached in time."""

    def __init__(self, message: str, **metadata: object) -> None:
        super().__init__(message, reason="INFERENCE_UNAVAILABLE", **metadata)


class DecodeTimeout(errors.DeadlineExceeded):
    """Decoding one image took longer than is allowed."""

    def __init__(self, message: str, **metadata: object) -> None:
        super().__init__(message, reason="DECODE_TIMEOUT", **metadata)


class RequestExpired(errors.DeadlineExceeded):
    """The time for the request is over."""

    def __init__(self, message: str, **metadata: object) -> None:
        super().__init__(message, reason="REQUEST_EXPIRED", **metadata)


class ShadowDropped(errors.ResourceExhausted):
    """A copy of an image was not run, because no worker was idle or no server could be reached."""

    def __init__(self, message: str, **metadata: object) -> None:
        super().__init__(message, reason="SHADOW_DROPPED", **metadata)


class NotOffered(errors.Unimplemented):
    """This version does not do it."""

    def __init__(self, message: str, **metadata: object) -> None:
        super().__init__(message, reason="NOT_OFFERED", **metadata)


class InferenceFailed(errors.Internal):
    """An inference server failed, or its answer makes no sense."""

    def __init__(self, message: str, **metadata: object) -> None:
        super().__init__(message, reason="INFERENCE_FAILED", **metadata)


class WorkerLost(Exception):
    """A decode worker ended in the middle of an image."""


class RevisionGone(Exception):
    """No inference server has the revision (any more)."""
