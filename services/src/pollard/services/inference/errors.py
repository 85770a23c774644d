"""The errors of the inference engine: leaves of the tree in `common.errors`.

::

    InvalidRequest
    ├── RequestInvalid     the request does not fit the model
    └── LoadOutdated       a newer order for the same model has overtaken the load
    NotFound
    ├── ModelUnknown       no such model, version or alias on this server
    └── RegionUnknown      no shared memory region of this name
    AlreadyExists
    └── RegionExists       a shared memory region of this name is registered
    Unavailable
    ├── ModelNotReady      known, but not loaded yet, or refused
    ├── QueueFull          more requests wait than may wait
    ├── QueueTimeout       it waited longer than it may
    ├── ServerStopping     the server, or the revision, takes no new requests
    ├── DeviceFailed       the GPU failed, is full or is lost
    ├── ControlDisabled    models are not loaded and unloaded by request here
    └── ProtocolRestricted the call lacks the key that its method is restricted to
    DeadlineExceeded
    └── RequestExpired     its deadline passed before it was run
    Unimplemented
    └── FeatureNotOffered  a part of the protocol that this server does not implement
    FailedPrecondition
    └── LoadRefused        a revision cannot be loaded here
    ResourceExhausted
    ├── MemoryShort        there is not enough memory for a revision beside what runs
    └── ShadowDropped      a copy of a request was not run, because no worker was idle
    Internal
    ├── RegionFailed       a shared memory region cannot be had, or is too small
    └── PollFailed         a model is not in the repository, or its configuration is unreadable
    ServiceError
    └── ExecutionFailed    onnxruntime failed on a request that looked valid

Clients of the Open Inference Protocol know the wording of the first three from Triton, and some of
them look at it.
"""

from __future__ import annotations

from pollard.services.common import errors


class RequestInvalid(errors.InvalidRequest):
    """The request does not fit the model."""

    def __init__(self, message: str, **metadata: object) -> None:
        super().__init__(message, reason="REQUEST_INVALID", **metadata)


class LoadOutdated(errors.InvalidRequest):
    """A newer order for the same model has overtaken the load."""

    def __init__(self, message: str, **metadata: object) -> None:
        super().__init__(message, reason="LOAD_OUTDATED", **metadata)


class ModelUnknown(errors.NotFound):
    """There is no such model, version or alias on this server."""

    def __init__(self, message: str, **metadata: object) -> None:
        super().__init__(message, reason="MODEL_UNKNOWN", **metadata)


class RegionUnknown(errors.NotFound):
    """There is no shared memory region of this name."""

    def __init__(self, message: str, **metadata: object) -> None:
        super().__init__(message, reason="REGION_UNKNOWN", **metadata)


class RegionExists(errors.AlreadyExists):
    """A shared memory region of this name is registered already."""

    def __init__(self, message: str, **metadata: object) -> None:
        super().__init__(message, reason="REGION_EXISTS", **metadata)


class RegionFailed(errors.Internal):
    """A shared memory region cannot be opened, has shrunk, or is too small for an output."""

    def __init__(self, message: str, **metadata: object) -> None:
        super().__init__(message, reason="REGION_FAILED", **metadata)


class PollFailed(errors.Internal):
    """A model is not in the repository, or its configuration cannot be read."""

    def __init__(self, message: str, **metadata: object) -> None:
        super().__init__(message, reason="POLL_FAILED", **metadata)


class ControlDisabled(errors.Unavailable):
    """Models are not loaded and unloaded by request on this server."""

    def __init__(self, message: str, **metadata: object) -> None:
        super().__init__(message, reason="CONTROL_DISABLED", **metadata)


class ProtocolRestricted(errors.Unavailable):
    """The call lacks the metadata that its method is restricted to."""

    def __init__(self, message: str, **metadata: object) -> None:
        super().__init__(message, reason="PROTOCOL_RESTRICTED", **metadata)


class ModelNotReady(errors.Unavailable):
    """The model is known, but is not loaded yet or could not be."""

    def __init__(self, message: str, **metadata: object) -> None:
        super().__init__(message, reason="MODEL_NOT_READY", **metadata)


class QueueFull(errors.Unavailable):
    """More requests wait for the model than may wait."""

    def __init__(self, message: str, **metadata: object) -> None:
        super().__init__(message, reason="QUEUE_FULL", **metadata)


class QueueTimeout(errors.Unavailable):
    """The request waited longer than it, or the queue's policy, allows."""

    def __init__(self, message: str, **metadata: object) -> None:
        super().__init__(message, reason="QUEUE_TIMEOUT", **metadata)


class ServerStopping(errors.Unavailable):
    """The server, or the revision, takes no new requests."""

    def __init__(self, message: str, **metadata: object) -> None:
        super().__init__(message, reason="SERVER_STOPPING", **metadata)


class DeviceFailed(errors.Unavailable):
    """The GPU failed on the request, has no memory for it, or is lost."""

    def __init__(self, message: str, *, reason: str = "DEVICE_FAULT", **metadata: object) -> None:
        super().__init__(message, reason=reason, **metadata)


class RequestExpired(errors.DeadlineExceeded):
    """The deadline passed before the request was run."""

    def __init__(self, message: str, **metadata: object) -> None:
        super().__init__(message, reason="REQUEST_EXPIRED", **metadata)


class FeatureNotOffered(errors.Unimplemented):
    """The request uses a part of the protocol that this server does not implement."""

    def __init__(self, message: str, **metadata: object) -> None:
        super().__init__(message, reason="FEATURE_NOT_OFFERED", **metadata)


class LoadRefused(errors.FailedPrecondition):
    """A revision cannot be loaded on this server."""

    def __init__(self, message: str, **metadata: object) -> None:
        super().__init__(message, reason="LOAD_REFUSED", **metadata)


class MemoryShort(errors.ResourceExhausted):
    """There is not enough memory to load the revision beside what runs."""

    def __init__(self, message: str, **metadata: object) -> None:
        super().__init__(message, reason="MEMORY_SHORT", **metadata)


class ExecutionFailed(errors.Internal):
    """onnxruntime failed on a request that looked valid."""

    def __init__(self, message: str, **metadata: object) -> None:
        super().__init__(message, reason="EXECUTION_FAILED", **metadata)


class ShadowDropped(errors.ResourceExhausted):
    """A copy of a request was not run."""

    def __init__(self, message: str, **metadata: object) -> None:
        super().__init__(message, reason="SHADOW_DROPPED", **metadata)
