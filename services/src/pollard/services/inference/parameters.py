"""The options that requests and their tensors carry beside the tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from pollard.inference import grpc_service_pb2 as pb
from pollard.services.inference.errors import RequestInvalid

_REGION = "shared_memory_region"
_SIZE = "shared_memory_byte_size"
_OFFSET = "shared_memory_offset"

_NUMBER = ("int64_param", "uint64_param")

_TYPES: dict[str, tuple[str, ...]] = {
    "timeout": ("int64_param",),
    "priority": _NUMBER,
    "sequence_id": (*_NUMBER, "string_param"),
    "sequence_start": ("bool_param",),
    "sequence_end": ("bool_param",),
    "triton_enable_empty_final_response": ("bool_param",),
}
"""Parameters of a request that have a meaning in the protocol, with the types that they may have.
Those about sequences mean nothing to models without state, which all models here are."""


@dataclass(frozen=True, slots=True)
class RequestOptions:
    """What a request asks for beside its tensors."""

    wait_seconds: float = 0.0
    """Longest that it may wait in the queue; 0 leaves that to the model."""
    priority: int = 0
    """1 is the highest; 0 leaves it to the model."""
    final_response: bool = False
    """Whether its last answer on a stream should be marked."""


_DEFAULT = RequestOptions()


def request_options(request: pb.ModelInferRequest) -> RequestOptions:
    """Return the options of a request.

    Raises:
        RequestInvalid: one has the wrong type, or is reserved and unknown.
    """
    if not request.parameters:
        return _DEFAULT
    wait_seconds, priority, final = 0.0, 0, False
    parameters = request.parameters
    for name in parameters:
        allowed = _TYPES.get(name)
        if allowed is None:
            if name.startswith("triton_"):
                raise RequestInvalid(
                    f"parameter keys starting with 'triton_' are reserved: unexpected key '{name}'",
                    parameter=name,
                )
            continue
        value = parameters[name]
        kind = value.WhichOneof("parameter_choice")
        if kind not in allowed:
            raise RequestInvalid(
                f"invalid value type for '{name}' parameter, expected {' or '.join(allowed)}, got "
                f"{kind or 'nothing'}",
                parameter=name,
            )
        if name == "timeout":
            wait_seconds = max(0, value.int64_param) / 1e6
        elif name == "priority":
            priority = max(0, getattr(value, kind))
        elif name == "triton_enable_empty_final_response":
            final = value.bool_param
    return RequestOptions(wait_seconds, priority, final)


class Place(NamedTuple):
    """Where in shared memory a tensor lies."""

    region: str
    offset: int
    byte_size: int


def shared_place(tensor: str, parameters: Mapping[str, pb.InferParameter]) -> Place | None:
    """Return where a tensor lies in shared memory; None if it does not.

    Raises:
        RequestInvalid: the parameters are incomplete or of the wrong type.
    """
    if _REGION not in parameters:
        for name in (_SIZE, _OFFSET):
            if name in parameters:
                raise RequestInvalid(
                    f"'{name}' requires '{_REGION}' for tensor '{tensor}'", tensor=tensor
                )
        return None
    if parameters[_REGION].WhichOneof("parameter_choice") != "string_param":
        raise RequestInvalid(
            f"invalid value type for '{_REGION}' parameter for tensor '{tensor}', expected "
            "string_param",
            tensor=tensor,
        )
    if _SIZE not in parameters:
        raise RequestInvalid(
            f"'{_SIZE}' must be specified along with '{_REGION}' for tensor '{tensor}'",
            tensor=tensor,
        )
    return Place(
        parameters[_REGION].string_param,
        _number(tensor, parameters, _OFFSET),
        _number(tensor, parameters, _SIZE),
    )


def class_count(output: str, parameters: Mapping[str, pb.InferParameter]) -> int:
    """Return how many classes of an output are wanted; 0 if all its scores are.

    Raises:
        RequestInvalid: it is not a positive integer.
    """
    if "classification" not in parameters:
        return 0
    value = parameters["classification"]
    if value.WhichOneof("parameter_choice") != "int64_param":
        raise RequestInvalid(
            "invalid value type for 'classification' parameter, expected int64_param",
            output=output,
        )
    if value.int64_param <= 0:
        raise RequestInvalid(
            f"invalid value for 'classification' parameter, expected > 0, got {value.int64_param}",
            output=output,
        )
    return value.int64_param


def _number(tensor: str, parameters: Mapping[str, pb.InferParameter], name: str) -> int:
    # Looking a name up in a map of messages would put it there.
    if name not in parameters:
        return 0
    value = parameters[name]
    kind = value.WhichOneof("parameter_choice")
    if kind not in _NUMBER:
        raise RequestInvalid(
            f"invalid value type for '{name}' parameter for tensor '{tensor}', expected "
            "int64_param",
            tensor=tensor,
        )
    number: int = getattr(value, kind)
    return number
