"""What the clients raise.

    PollardError
    ├── InvalidBundle            a directory that is no bundle, or a damaged one
    ├── InvalidAnswer            a server's answer that cannot be understood
    ├── AliasSwitchFailed        servers refused the revision; the alias stayed where it was
    │   └── AliasSwitchTimeout   the switch had not ended when the wait did
    └── RequestFailed            a server, or the way to it, answered with a status
        ├── Cancelled
        ├── Unknown
        ├── InvalidArgument
        ├── DeadlineExceeded
        ├── NotFound
        ├── AlreadyExists
        ├── PermissionDenied
        ├── ResourceExhausted
        ├── FailedPrecondition
        ├── Aborted
        ├── OutOfRange
        ├── Unimplemented
        ├── Internal
        ├── Unavailable
        ├── DataLoss
        └── Unauthenticated

A value that the client itself can see to be wrong raises ValueError or TypeError before anything
is sent.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import grpc
from google.protobuf import message as protobuf_message
from google.rpc import code_pb2, error_details_pb2, status_pb2

_STATUS_DETAILS_KEY = "grpc-status-details-bin"
_REQUEST_ID_KEY = "x-request-id"


class PollardError(Exception):
    """Root of everything that the clients raise on purpose."""


class InvalidBundle(PollardError):
    """A directory does not hold a bundle, or its files do not match its manifest."""


class InvalidAnswer(PollardError):
    """A server's answer cannot be understood; its version may not fit this client's."""


@dataclass(frozen=True)
class ServerFailure:
    """One server's refusal of a revision."""

    server_id: str
    """Id of the server."""
    code: str
    """Name of the gRPC status, such as "INVALID_ARGUMENT"."""
    message: str
    """Why, for people."""
    reason: str = ""
    """Why, for programs: `ErrorInfo.reason`, in upper snake case; empty when there is none."""


class AliasSwitchFailed(PollardError):
    """An alias did not move; requests still go where they went before.

    Attributes:
        alias: Resource name, "models/{model}/aliases/{alias}".
        wanted: Revision that the alias should have moved to.
        serving: Revision that requests go to; 0 for none.
        failures: The servers that refused, with their reasons.
    """

    def __init__(
        self,
        message: str,
        *,
        alias: str,
        wanted: int,
        serving: int,
        failures: tuple[ServerFailure, ...] = (),
    ) -> None:
        super().__init__(message)
        self.alias = alias
        self.wanted = wanted
        self.serving = serving
        self.failures = failures


class AliasSwitchTimeout(AliasSwitchFailed):
    """The switch had not ended when the wait did. It goes on by itself and may still succeed."""


@dataclass(frozen=True)
class ErrorDetails:
    """The machine-readable part of a failed request (`google.rpc.ErrorInfo`)."""

    reason: str = ""
    """Reason in upper snake case, such as "MODEL_NOT_FOUND"; empty when the server gave none."""
    domain: str = ""
    """Who defines the reason; "pollard.ai" for Pollard's services."""
    metadata: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    """The values that the message speaks of."""


class RequestFailed(PollardError):
    """A request failed with a gRPC status.

    Attributes:
        code: The status.
        message: What the server said.
        details: Reason, domain and metadata, where the server gave them.
        address: The server's address.
        method: Full gRPC method name, such as "/pollard.vision.v1.VisionService/Predict".
        request_id: What the request is called in the server's logs and traces; empty when the
            server did not say.
    """

    code: grpc.StatusCode = grpc.StatusCode.UNKNOWN

    def __init__(
        self,
        message: str,
        *,
        details: ErrorDetails,
        address: str,
        method: str,
        request_id: str = "",
    ) -> None:
        super().__init__(message)
        self.request_id = request_id
        self.message = message
        self.details = details
        self.address = address
        self.method = method

    @property
    def reason(self) -> str:
        """Reason in upper snake case; empty when the server gave none."""
        return self.details.reason

    @property
    def metadata(self) -> Mapping[str, str]:
        """The values that the message speaks of."""
        return self.details.metadata


class Cancelled(RequestFailed):
    """The request was cancelled."""

    code = grpc.StatusCode.CANCELLED


class Unknown(RequestFailed):
    """The server, or something between, failed without saying how."""

    code = grpc.StatusCode.UNKNOWN


class InvalidArgument(RequestFailed):
    """Something in the request is wrong whatever the state of the server."""

    code = grpc.StatusCode.INVALID_ARGUMENT


class DeadlineExceeded(RequestFailed):
    """No answer came in time."""

    code = grpc.StatusCode.DEADLINE_EXCEEDED


class NotFound(RequestFailed):
    """A model, revision, alias or other resource does not exist."""

    code = grpc.StatusCode.NOT_FOUND


class AlreadyExists(RequestFailed):
    """A resource of that name exists."""

    code = grpc.StatusCode.ALREADY_EXISTS


class PermissionDenied(RequestFailed):
    """The caller may not do this."""

    code = grpc.StatusCode.PERMISSION_DENIED


class ResourceExhausted(RequestFailed):
    """A disk, a quota or a message limit is full."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED


class FailedPrecondition(RequestFailed):
    """The resource is not in a state that allows this."""

    code = grpc.StatusCode.FAILED_PRECONDITION


class Aborted(RequestFailed):
    """Something else changed the resource in between."""

    code = grpc.StatusCode.ABORTED


class OutOfRange(RequestFailed):
    """An offset or a sequence number lies outside what there is."""

    code = grpc.StatusCode.OUT_OF_RANGE


class Unimplemented(RequestFailed):
    """The server does not offer this method."""

    code = grpc.StatusCode.UNIMPLEMENTED


class Internal(RequestFailed):
    """The server failed; its log says more."""

    code = grpc.StatusCode.INTERNAL


class Unavailable(RequestFailed):
    """The server cannot be reached or does not answer now; trying again may help."""

    code = grpc.StatusCode.UNAVAILABLE


class DataLoss(RequestFailed):
    """Bytes were damaged on the way or on disk."""

    code = grpc.StatusCode.DATA_LOSS


class Unauthenticated(RequestFailed):
    """The caller did not say who it is, or not believably."""

    code = grpc.StatusCode.UNAUTHENTICATED


_BY_CODE: Mapping[grpc.StatusCode, type[RequestFailed]] = {
    cls.code: cls for cls in RequestFailed.__subclasses__()
}


def from_rpc_error(error: grpc.RpcError, *, address: str, method: str) -> RequestFailed:
    """Turn what grpc raised into the class of its status."""
    code = error.code() if isinstance(error, grpc.Call | grpc.aio.AioRpcError) else None
    text = error.details() if isinstance(error, grpc.Call | grpc.aio.AioRpcError) else str(error)
    cls = _BY_CODE.get(code, Unknown) if code is not None else Unknown
    return cls(
        text or f"the server gave no message (status {cls.code.name})",
        details=_details(error),
        address=address,
        method=method,
        request_id=_request_id(error),
    )


def image_failure(
    code: int, message: str, reason: str, *, address: str, method: str
) -> RequestFailed:
    """Return the error of one image among several, as the class of its status."""
    by_number = {status.value[0]: cls for status, cls in _BY_CODE.items()}
    return by_number.get(code, Unknown)(
        message,
        details=ErrorDetails(reason=reason, domain="pollard.ai" if reason else ""),
        address=address,
        method=method,
    )


def server_failure(server_id: str, status: status_pb2.Status) -> ServerFailure:
    """Read one server's `google.rpc.Status`."""
    return ServerFailure(
        server_id=server_id,
        code=_code_name(status.code),
        message=status.message,
        reason=_error_info(status).reason,
    )


def _details(error: grpc.RpcError) -> ErrorDetails:
    if not isinstance(error, grpc.Call | grpc.aio.AioRpcError):
        return ErrorDetails()
    # Read here and not with grpc_status, whose helper raises when the status on the wire and the
    # one in the details differ; a client should report what it got.
    for key, value in error.trailing_metadata() or ():
        if key == _STATUS_DETAILS_KEY and isinstance(value, bytes):
            try:
                return _error_info(status_pb2.Status.FromString(value))
            except protobuf_message.DecodeError:  # what failed is still known without them
                return ErrorDetails()
    return ErrorDetails()


def _request_id(error: grpc.RpcError) -> str:
    if isinstance(error, grpc.Call | grpc.aio.AioRpcError):
        for key, value in error.trailing_metadata() or ():
            if key == _REQUEST_ID_KEY and isinstance(value, str):
                return value
    return ""


def _error_info(status: status_pb2.Status) -> ErrorDetails:
    for detail in status.details:
        info = error_details_pb2.ErrorInfo()
        if detail.Is(info.DESCRIPTOR) and detail.Unpack(info):
            return ErrorDetails(info.reason, info.domain, MappingProxyType(dict(info.metadata)))
    return ErrorDetails()


def _code_name(number: int) -> str:
    try:
        return str(code_pb2.Code.Name(code_pb2.Code.ValueType(number)))
    except (ValueError, AttributeError):
        return f"CODE_{number}"
