"""Python clients of Pollard's services, sync and asyncio.

    from pollard.client import VisionClient

    with VisionClient("127.0.0.1:8011") as vision:
        print(vision.predict("seven.png", "digits").labels[0])

Every request has a deadline, and every failure is a class of `pollard.client.errors`.
"""

from pollard.client._async.inference import AsyncInferenceClient
from pollard.client._async.models import AsyncModelsClient
from pollard.client._async.vision import AsyncVisionClient
from pollard.client._channel import (
    DEFAULT_INFERENCE_ADDRESS,
    DEFAULT_MAX_MESSAGE_BYTES,
    DEFAULT_MODELS_ADDRESS,
    DEFAULT_TIMEOUT_SECONDS,
    DEFAULT_VISION_ADDRESS,
    RetryPolicy,
)
from pollard.client._images import ImageLike
from pollard.client._sync.inference import InferenceClient
from pollard.client._sync.models import ModelsClient
from pollard.client._sync.vision import VisionClient
from pollard.client._upload import ProgressCallback
from pollard.client.errors import (
    Aborted,
    AliasSwitchFailed,
    AliasSwitchTimeout,
    AlreadyExists,
    Cancelled,
    DataLoss,
    DeadlineExceeded,
    ErrorDetails,
    FailedPrecondition,
    Internal,
    InvalidAnswer,
    InvalidArgument,
    InvalidBundle,
    NotFound,
    OutOfRange,
    PermissionDenied,
    PollardError,
    RequestFailed,
    ResourceExhausted,
    ServerFailure,
    Unauthenticated,
    Unavailable,
    Unimplemented,
    Unknown,
)
from pollard.client.types import (
    Accuracy,
    Alias,
    DamagedFile,
    Event,
    Geometry,
    InferResult,
    Model,
    ModelMetadata,
    Prediction,
    Progress,
    Pushed,
    RepositoryEntry,
    Revision,
    ScoredLabel,
    Server,
    ServerMetadata,
    ServerRevision,
    TensorInfo,
    Timings,
    Transformed,
    Variant,
    Verified,
)

__all__ = [
    "DEFAULT_INFERENCE_ADDRESS",
    "DEFAULT_MAX_MESSAGE_BYTES",
    "DEFAULT_MODELS_ADDRESS",
    "DEFAULT_TIMEOUT_SECONDS",
    "DEFAULT_VISION_ADDRESS",
    "Aborted",
    "Accuracy",
    "Alias",
    "AliasSwitchFailed",
    "AliasSwitchTimeout",
    "AlreadyExists",
    "AsyncInferenceClient",
    "AsyncModelsClient",
    "AsyncVisionClient",
    "Cancelled",
    "DamagedFile",
    "DataLoss",
    "DeadlineExceeded",
    "ErrorDetails",
    "Event",
    "FailedPrecondition",
    "Geometry",
    "ImageLike",
    "InferResult",
    "InferenceClient",
    "Internal",
    "InvalidAnswer",
    "InvalidArgument",
    "InvalidBundle",
    "Model",
    "ModelMetadata",
    "ModelsClient",
    "NotFound",
    "OutOfRange",
    "PermissionDenied",
    "PollardError",
    "Prediction",
    "Progress",
    "ProgressCallback",
    "Pushed",
    "RepositoryEntry",
    "RequestFailed",
    "ResourceExhausted",
    "RetryPolicy",
    "Revision",
    "ScoredLabel",
    "Server",
    "ServerFailure",
    "ServerMetadata",
    "ServerRevision",
    "TensorInfo",
    "Timings",
    "Transformed",
    "Unauthenticated",
    "Unavailable",
    "Unimplemented",
    "Unknown",
    "Variant",
    "Verified",
    "VisionClient",
]
