"""The Open Inference Protocol over the engine, from bytes to bytes.

Nothing here knows gRPC, so that any front end that carries requests and answers as bytes can use
it. The statuses and wordings are those that the protocol's clients know from Triton.
"""

from __future__ import annotations

from collections.abc import Mapping

from google.protobuf.message import DecodeError

from pollard.inference import grpc_service_pb2 as pb
from pollard.runtime.sessions import TensorInfo
from pollard.services.inference.engine import Engine
from pollard.services.inference.errors import FeatureNotOffered, RequestInvalid
from pollard.services.inference.revision import LoadedRevision
from pollard.services.inference.tensors import decode_inputs, select_outputs, to_raw

PLATFORM = "onnxruntime_onnx"

EXTENSIONS = ("model_repository",)
"""Optional parts of the protocol that are offered; only the index of the repository is."""

_SHARED_MEMORY = "shared_memory_"

_KNOWN_PARAMETERS = {
    "timeout": "int64_param",
    "priority": ("uint64_param", "int64_param"),
}
"""Parameters of a request that have a meaning, with the type that they must have."""


async def model_infer(
    engine: Engine,
    data: bytes,
    *,
    alias: str = "",
    sticky_key: str = "",
    seconds_left: float | None = None,
) -> bytes:
    """Answer a serialised ModelInferRequest with a serialised ModelInferResponse.

    Args:
        engine: Where to run it.
        data: The request.
        alias: Alias to follow if the request names no version; empty means "production".
        sticky_key: Requests with the same key get the same revision of a split alias.
        seconds_left: Time until the caller's deadline; None if it has none.

    Raises:
        ServiceError: as in `errors`; the engine is as it was.
    """
    try:
        request = pb.ModelInferRequest.FromString(data)
    except DecodeError as error:
        raise RequestInvalid(f"the request is not a ModelInferRequest: {error}") from None
    revision = engine.resolve(request.model_name, request.model_version, alias, sticky_key)
    try:
        seconds_left = _check_parameters(request, seconds_left)
        info = revision.info
        feeds = decode_inputs(request, info.inputs, info.max_batch_size)
        wanted = select_outputs(request, info.outputs)
    except Exception:
        revision.counters.reject()
        raise
    outputs = await engine.infer(revision, feeds, wanted, seconds_left)
    response = pb.ModelInferResponse(
        model_name=info.model, model_version=str(info.revision), id=request.id
    )
    for output in wanted:
        array = outputs[output.name]
        response.outputs.add(name=output.name, datatype=output.datatype, shape=array.shape)
        response.raw_output_contents.append(to_raw(array))
    return response.SerializeToString()


def _check_parameters(request: pb.ModelInferRequest, seconds_left: float | None) -> float | None:
    """Check the request's options; return the time left when its own timeout is counted in.

    Raises:
        RequestInvalid: an option has the wrong type, or is reserved and unknown.
        FeatureNotOffered: shared memory or classification is asked for.
    """
    for name, value in request.parameters.items():
        kind = value.WhichOneof("parameter_choice")
        allowed = _KNOWN_PARAMETERS.get(name)
        if allowed is not None:
            if kind not in ((allowed,) if isinstance(allowed, str) else allowed):
                raise RequestInvalid(
                    f"invalid value type for '{name}' parameter, expected {allowed}, got {kind}",
                    parameter=name,
                )
            if name == "timeout" and value.int64_param > 0:
                seconds = value.int64_param / 1e6
                seconds_left = seconds if seconds_left is None else min(seconds, seconds_left)
        elif name.startswith("triton_"):
            raise RequestInvalid(
                f"parameter keys starting with 'triton_' are reserved: unexpected key '{name}'",
                parameter=name,
            )
    for tensor in request.inputs:
        if tensor.parameters:
            _refuse_shared_memory(tensor.parameters)
    for output in request.outputs:
        if output.parameters:
            _refuse_shared_memory(output.parameters)
            if "classification" in output.parameters:
                raise FeatureNotOffered(
                    "the classification extension is not offered by this server; ask "
                    "pollard.vision.v1.VisionService for labels",
                    output=output.name,
                )
    return seconds_left


def _refuse_shared_memory(parameters: Mapping[str, object]) -> None:
    if any(name.startswith(_SHARED_MEMORY) for name in parameters):
        raise FeatureNotOffered(
            "tensors in shared memory are not offered by this server; send raw contents"
        )


def model_metadata(engine: Engine, revision: LoadedRevision) -> pb.ModelMetadataResponse:
    """Describe a loaded revision and the revisions beside it."""
    info = revision.info
    served = engine.table.models[info.model]
    return pb.ModelMetadataResponse(
        name=info.model,
        versions=[str(number) for number in sorted(served.revisions)],
        platform=PLATFORM,
        inputs=[_tensor(tensor) for tensor in info.inputs],
        outputs=[_tensor(tensor) for tensor in info.outputs],
        properties={
            "revision": str(info.revision),
            "bundle_sha256": info.digest,
            "variant": info.variant,
            "target": info.target,
            "max_batch_size": str(info.max_batch_size),
        },
    )


def _tensor(info: TensorInfo) -> pb.ModelMetadataResponse.TensorMetadata:
    return pb.ModelMetadataResponse.TensorMetadata(
        name=info.name, datatype=info.datatype, shape=info.shape
    )
