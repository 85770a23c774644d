"""Between the protocol's tensors and NumPy's arrays.

Nothing here knows gRPC. Raw inputs are viewed, not copied: the array of an input shares the memory
of the request's bytes and is read-only. Only elements of several bytes that begin anywhere in them
are copied to where such elements may lie.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from pollard.bundle.v1 import bundle_pb2
from pollard.inference import grpc_service_pb2 as pb
from pollard.runtime.sessions import Array, TensorInfo
from pollard.runtime.tensors import NUMPY, protocol_name
from pollard.services.inference.errors import FeatureNotOffered, LoadRefused, RequestInvalid
from pollard.services.inference.parameters import Place, class_count, shared_place

_CONTENTS: dict[str, str] = {
    "BOOL": "bool_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}
"""The field of InferTensorContents for each type; FP16 and BF16 have none and travel raw only."""

RawTensor = bytes | memoryview
"""A tensor's bytes, or where they lie in the bytes of the request."""


def declared(spec: bundle_pb2.TensorSpec) -> TensorInfo:
    """Return the manifest's declaration of a tensor in the form that sessions use.

    Raises:
        LoadRefused: the protocol has no such type.
    """
    datatype = protocol_name(spec.data_type)
    if datatype not in NUMPY:
        raise LoadRefused(
            f"tensor {spec.name!r} is of type {datatype}, which this server cannot carry",
            tensor=spec.name,
            datatype=datatype,
        )
    return TensorInfo(spec.name, datatype, tuple(spec.shape))


def batches(info: TensorInfo) -> bool:
    """Tell whether the first dimension is a free one, and so the batch."""
    return bool(info.shape) and info.shape[0] == -1


def zeros(info: TensorInfo, batch: int) -> Array:
    """Return zeros of the tensor's type and shape; free dimensions but the batch are 1."""
    shape = [1 if size == -1 else size for size in info.shape]
    if batches(info):
        shape[0] = batch
    if info.datatype == "BYTES":
        return np.full(shape, "", dtype=np.object_)
    return np.zeros(shape, dtype=NUMPY[info.datatype])


def decode_inputs(
    request: pb.ModelInferRequest,
    specs: Sequence[TensorInfo],
    max_batch_size: int,
    read_shared: Callable[[Place], bytes] | None = None,
    taken_out: Sequence[RawTensor] | None = None,
) -> dict[str, Array]:
    """Return the request's inputs as arrays by name, checked against the model.

    Args:
        request: The request.
        specs: The model's inputs.
        max_batch_size: Largest first dimension; 0 if the model does not batch.
        read_shared: Gives the bytes of an input that lies in shared memory.
        taken_out: The raw contents, where they were taken out of the request.

    Raises:
        RequestInvalid: an input is unknown, missing, given twice, of the wrong type, shape or
            number of bytes, or its elements are missing or given in two ways.
        ServiceError: what `read_shared` raises.
    """
    raw = request.raw_input_contents if taken_out is None else taken_out
    usual = _usual_input(request, raw, specs, max_batch_size)
    if usual is not None:
        return usual
    model = request.model_name
    tensors = request.inputs
    places: dict[int, Place] = {}
    for index, tensor in enumerate(tensors):
        if tensor.parameters:
            place = shared_place(tensor.name, tensor.parameters)
            if place is not None:
                places[index] = place
    direct = len(tensors) - len(places)
    if raw and len(raw) != direct:
        raise RequestInvalid(
            f"expected {direct} raw input contents for model '{model}', one for each input that "
            f"is not in shared memory, got {len(raw)}",
            model=model,
        )
    next_raw = iter(raw)
    by_name = {spec.name: spec for spec in specs}
    arrays: dict[str, Array] = {}
    batch: int | None = None
    for index, tensor in enumerate(tensors):
        spec = by_name.get(tensor.name)
        if spec is None:
            raise RequestInvalid(
                f"unexpected inference input '{tensor.name}' for model '{model}'; it has "
                f"{_names(by_name)}",
                model=model,
                input=tensor.name,
            )
        if tensor.name in arrays:
            raise RequestInvalid(
                f"input '{tensor.name}' already exists in request for model '{model}'",
                model=model,
                input=tensor.name,
            )
        shape = _check_declaration(tensor, spec, model)
        if max_batch_size and batches(spec):
            if shape[0] > max_batch_size:
                raise RequestInvalid(
                    f"inference request batch-size must be <= {max_batch_size} for '{model}', "
                    f"got {shape[0]}",
                    model=model,
                    max_batch_size=max_batch_size,
                )
            if batch is not None and shape[0] != batch:
                raise RequestInvalid(
                    f"input '{tensor.name}' batch size does not match other inputs for "
                    f"'{model}': {shape[0]} and {batch}",
                    model=model,
                    input=tensor.name,
                )
            batch = shape[0]
        if index in places:
            if tensor.HasField("contents"):
                raise RequestInvalid(
                    "contents field must not be specified when using shared memory for "
                    f"'{tensor.name}' for model '{model}'",
                    model=model,
                    input=tensor.name,
                )
            data = _read(places[index], read_shared, spec, shape, model)
            arrays[tensor.name] = from_raw(data, spec.datatype, shape, tensor.name, model)
        elif raw:
            if tensor.HasField("contents"):
                raise RequestInvalid(
                    "contents field must not be specified when using raw_input_contents for "
                    f"'{tensor.name}' for model '{model}'",
                    model=model,
                    input=tensor.name,
                )
            arrays[tensor.name] = from_raw(next(next_raw), spec.datatype, shape, tensor.name, model)
        else:
            arrays[tensor.name] = _from_contents(tensor, spec.datatype, shape, model)
    missing = [name for name in by_name if name not in arrays]
    if missing:
        raise RequestInvalid(
            f"expected {len(by_name)} inputs but got {len(arrays)} inputs for model '{model}'. "
            f"Got input(s) {_names(arrays)}, but missing required input(s) {_names(missing)}. "
            "Please provide all required input(s).",
            model=model,
        )
    return arrays


def _usual_input(
    request: pb.ModelInferRequest,
    raw: Sequence[RawTensor],
    specs: Sequence[TensorInfo],
    max_batch_size: int,
) -> dict[str, Array] | None:
    """Return the input of the request that nearly all are: one, raw, and as it should be.

    None leaves it to `decode_inputs`, which takes longer and says what is wrong.
    """
    tensors = request.inputs
    if len(specs) != 1 or len(tensors) != 1 or len(raw) != 1:
        return None
    tensor, spec, data = tensors[0], specs[0], raw[0]
    datatype = spec.datatype
    if tensor.name != spec.name or tensor.datatype != datatype or datatype in ("BYTES", "BOOL"):
        return None
    shape, wanted = tuple(tensor.shape), spec.shape
    if shape != wanted:
        if wanted[:1] != (-1,) or len(shape) != len(wanted) or shape[1:] != wanted[1:]:
            return None
        if shape[0] <= 0 or (max_batch_size and shape[0] > max_batch_size):
            return None
        wanted = wanted[1:]
    if -1 in wanted:
        return None
    kind = NUMPY[datatype]
    if len(data) != math.prod(shape) * kind.itemsize:
        return None
    if tensor.parameters or tensor.HasField("contents"):
        return None
    return {spec.name: np.ndarray(shape, kind, data)}


def _read(
    place: Place,
    read_shared: Callable[[Place], bytes] | None,
    spec: TensorInfo,
    shape: tuple[int, ...],
    model: str,
) -> bytes:
    if read_shared is None:
        raise FeatureNotOffered("tensors in shared memory are not offered; send raw contents")
    if spec.datatype != "BYTES":
        # Before anything is read: the size is the client's word, and may be anything.
        _check_size(place.byte_size, spec.datatype, shape, spec.name, model)
    return read_shared(place)


def _check_declaration(
    tensor: pb.ModelInferRequest.InferInputTensor, spec: TensorInfo, model: str
) -> tuple[int, ...]:
    if tensor.datatype != spec.datatype:
        raise RequestInvalid(
            f"inference input '{spec.name}' data-type is '{tensor.datatype}', but model '{model}' "
            f"expects '{spec.datatype}'",
            model=model,
            input=spec.name,
            expected=spec.datatype,
        )
    shape = tuple(tensor.shape)
    fits = len(shape) == len(spec.shape) and all(
        size > 0 and wanted in (-1, size) for size, wanted in zip(shape, spec.shape, strict=True)
    )
    if not fits:
        raise RequestInvalid(
            f"unexpected shape for input '{spec.name}' for model '{model}'. "
            f"Expected {_dims(spec.shape)}, got {_dims(shape)}. "
            "Every dimension must be at least 1; -1 stands for any size.",
            model=model,
            input=spec.name,
            expected=_dims(spec.shape),
            actual=_dims(shape),
        )
    return shape


def from_raw(
    data: RawTensor, datatype: str, shape: tuple[int, ...], name: str, model: str
) -> Array:
    """View the raw bytes of a tensor as an array.

    Parts of a message lie anywhere, so its elements need not be aligned; sessions take it so.

    Raises:
        RequestInvalid: the number of bytes is not that of the shape, or BYTES are malformed.
    """
    count = math.prod(shape)
    if datatype == "BYTES":
        return _strings(_split_bytes(bytes(data), count, name, model), shape, name, model)
    _check_size(len(data), datatype, shape, name, model)
    kind = NUMPY[datatype]
    if datatype == "BOOL":
        # Any other byte than 0 and 1 is undefined as a boolean.
        return np.not_equal(np.frombuffer(data, np.uint8).reshape(shape), 0)
    return np.frombuffer(data, kind).reshape(shape)


def _check_size(size: int, datatype: str, shape: tuple[int, ...], name: str, model: str) -> None:
    expected = math.prod(shape) * NUMPY[datatype].itemsize
    if size != expected:
        raise RequestInvalid(
            f"input byte size mismatch for input '{name}' for model '{model}'. "
            f"Expected {expected}, got {size}",
            model=model,
            input=name,
            expected=expected,
            actual=size,
        )


def _split_bytes(data: bytes, count: int, name: str, model: str) -> list[bytes]:
    elements: list[bytes] = []
    position = 0
    while position < len(data) and len(elements) <= count:
        start = position + 4
        length = int.from_bytes(data[position:start], "little")
        position = start + length
        if position > len(data):
            raise RequestInvalid(
                f"incomplete string data for inference input '{name}' for model '{model}': an "
                f"element of {length} bytes does not fit into the {len(data)} bytes given",
                model=model,
                input=name,
            )
        elements.append(data[start:position])
    if len(elements) != count:
        raise RequestInvalid(
            f"expected {count} string elements for inference input '{name}' for model '{model}', "
            f"got {'more' if len(elements) > count else len(elements)}",
            model=model,
            input=name,
        )
    return elements


def _from_contents(
    tensor: pb.ModelInferRequest.InferInputTensor, datatype: str, shape: tuple[int, ...], model: str
) -> Array:
    field = _CONTENTS.get(datatype)
    if field is None:
        raise RequestInvalid(
            f"{datatype} data must be given in raw_input_contents for input '{tensor.name}' for "
            f"model '{model}'",
            model=model,
            input=tensor.name,
        )
    values = getattr(tensor.contents, field)
    filled = {f.name for f, _ in tensor.contents.ListFields()}
    if not filled:
        raise RequestInvalid(
            f"unable to find data for input tensor '{tensor.name}' for model '{model}' in request: "
            f"give raw_input_contents or contents.{field}",
            model=model,
            input=tensor.name,
        )
    count = math.prod(shape)
    if filled != {field} or len(values) != count:
        got = ", ".join(f"{len(getattr(tensor.contents, f))} in {f}" for f in sorted(filled))
        raise RequestInvalid(
            f"unexpected number of elements for input '{tensor.name}' for model '{model}'. "
            f"Expected {count} in {field}, got {got}",
            model=model,
            input=tensor.name,
        )
    if datatype == "BYTES":
        return _strings(list(values), shape, tensor.name, model)
    kind = NUMPY[datatype]
    try:
        return np.array(values, dtype=kind).reshape(shape)
    except OverflowError as error:
        raise RequestInvalid(
            f"an element of input '{tensor.name}' for model '{model}' does not fit {datatype}: "
            f"{error}",
            model=model,
            input=tensor.name,
        ) from None


def _strings(elements: Sequence[bytes], shape: tuple[int, ...], name: str, model: str) -> Array:
    array = np.empty(len(elements), dtype=np.object_)
    try:
        # onnxruntime's string tensors hold text, so bytes that are not UTF-8 cannot reach a model.
        array[:] = [element.decode("utf-8") for element in elements]
    except UnicodeDecodeError as error:
        raise RequestInvalid(
            f"an element of input '{name}' for model '{model}' is not UTF-8: {error}",
            model=model,
            input=name,
        ) from None
    return array.reshape(shape)


class WantedOutput(NamedTuple):
    """An output that a request asks for, and how."""

    spec: TensorInfo
    classes: int = 0
    """How many of the best classes; 0 wants the tensor itself."""
    place: Place | None = None
    """Where in shared memory to put it; None puts it into the answer."""


def select_outputs(
    request: pb.ModelInferRequest, specs: Sequence[TensorInfo]
) -> list[WantedOutput]:
    """Return the outputs that the request asks for, in its order; all if it names none.

    Raises:
        RequestInvalid: an output is unknown, asked for twice, or in a way that it cannot be had.
    """
    outputs = request.outputs
    if not outputs:
        return [WantedOutput(spec) for spec in specs]
    if len(outputs) == 1 and outputs[0].name == specs[0].name and not outputs[0].parameters:
        return [WantedOutput(specs[0])]
    by_name = {spec.name: spec for spec in specs}
    chosen: dict[str, WantedOutput] = {}
    for output in outputs:
        spec = by_name.get(output.name)
        if spec is None:
            raise RequestInvalid(
                f"unexpected inference output '{output.name}' for model '{request.model_name}'; "
                f"it has {_names(by_name)}",
                model=request.model_name,
                output=output.name,
            )
        if output.name in chosen:
            raise RequestInvalid(
                f"output '{output.name}' already requested for model '{request.model_name}'",
                model=request.model_name,
                output=output.name,
            )
        classes, place = 0, None
        if output.parameters:
            classes = class_count(output.name, output.parameters)
            place = shared_place(output.name, output.parameters)
            if classes and place is not None:
                raise RequestInvalid(
                    f"shared memory can't be used with classification for output '{output.name}'",
                    output=output.name,
                )
        chosen[output.name] = WantedOutput(spec, classes, place)
    return list(chosen.values())


def to_raw(array: Array) -> bytes:
    """Return the raw bytes of an output."""
    if array.dtype != np.object_ and array.dtype.kind not in "US":
        return array.tobytes()
    parts: list[bytes] = []
    for element in array.ravel():
        data = element if isinstance(element, bytes) else str(element).encode("utf-8")
        parts += (len(data).to_bytes(4, "little"), data)
    return b"".join(parts)


def _names(names: Iterable[str]) -> str:
    return "[" + ",".join(f"'{name}'" for name in names) + "]"


def _dims(shape: Sequence[int]) -> str:
    return "[" + ",".join(str(size) for size in shape) + "]"
