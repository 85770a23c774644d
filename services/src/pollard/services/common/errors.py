"""The errors of the services, in one tree. Nothing here knows about gRPC.

::

    ServiceError
    ├── Unauthenticated      it is not known who asks
    ├── PermissionDenied     it is known, and they may not
    ├── InvalidRequest       the request can never succeed as it is
    ├── NotFound             what the request names does not exist
    ├── AlreadyExists        what the request would create exists
    ├── FailedPrecondition   the state of the system forbids it
    ├── Conflict             somebody else changed it in between
    ├── OutOfRange           a position beyond what there is
    ├── ResourceExhausted    disk, memory or a limit is used up
    ├── Unavailable          not now; trying again may help
    ├── DeadlineExceeded     no time is left for it
    ├── DataLoss             bytes were damaged
    ├── Unimplemented        this version does not do it
    └── Internal             something went wrong here that the caller cannot help

:mod:`pollard.services.common.status` maps the tree to gRPC statuses.
"""

from __future__ import annotations


class ServiceError(Exception):
    """Root of every error that a service raises on purpose.

    Args:
        message: What happened, which value, and what to do next.
        reason: Machine-readable, in upper snake case; travels as
            ``ErrorInfo.reason``.
        metadata: Every dynamic value of the message, by name.
    """

    def __init__(self, message: str, *, reason: str, **metadata: object) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason
        self.metadata = {key: str(value) for key, value in metadata.items()}


class Unauthenticated(ServiceError):
    """It is not known who asks."""


class PermissionDenied(ServiceError):
    """It is known who asks, and they may not."""


class InvalidRequest(ServiceError):
    """The request can never succeed as it is."""


class NotFound(ServiceError):
    """What the request names does not exist."""


class AlreadyExists(ServiceError):
    """What the request would create exists."""


class FailedPrecondition(ServiceError):
    """The state of the system forbids it."""


class Conflict(ServiceError):
    """Somebody else changed it in between."""


class OutOfRange(ServiceError):
    """A position beyond what there is."""


class ResourceExhausted(ServiceError):
    """Disk, memory or a limit is used up."""

    retry_seconds: float | None = None
    """When trying again may help, where that is known."""


class Unavailable(ServiceError):
    """Not now; trying again may help."""


class DeadlineExceeded(ServiceError):
    """No time is left for it."""


class DataLoss(ServiceError):
    """Bytes were damaged."""


class Unimplemented(ServiceError):
    """This version does not do it."""


class Internal(ServiceError):
    """Something went wrong here that the caller cannot help; the message may be told."""


class StartupError(Exception):
    """The server cannot start; the message is for the operator."""


class UsageFault(StartupError):
    """A flag has a value that it cannot have: whoever gave it has to give another."""

    exit_code = 2
    """What a command ends with, as for every other misuse of it."""


def out_of_threads(error: BaseException) -> bool:
    """Tell whether an error says that the system gives this process no more threads."""
    return isinstance(error, RuntimeError) and str(error) == "can't start new thread"
