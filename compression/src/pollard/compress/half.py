"""Float16 files for CUDA: weights and arithmetic in 16 bits, pixels in, float32 logits out.

The conversion is onnxruntime's own (`onnxruntime.transformers.float16`); what goes in and comes out
keeps its type, so that a float16 file takes the place of a float32 one.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable
from typing import Any

import numpy as np
import onnx
import onnx_ir
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from pollard.compress.errors import ExportFailed, HalfOverflow
from pollard.compress.export import serialize, strip_metadata
from pollard.compress.ort_tools import make_importable
from pollard.runtime.sessions import open_session

MULTIPLES = (32, 16, 8)
"""Multiples tried for widths: tensor cores take float16 channels in eights, and more is better."""

LARGEST = 65504.0
"""Largest finite float16."""

HEADROOM = 2.0
"""Activations may reach the largest float16 over this on images that were seen: others reach
further."""

# Operators whose outputs are values that went in: there is nothing to round.
_EXACT = frozenset(
    {
        *("Concat", "Expand", "Flatten", "Gather", "Identity", "MaxPool", "Max", "Min", "Pad"),
        *("Relu", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze"),
    }
)


def to_float16(model: onnx.ModelProto, *, keep_float: Collection[str] = ()) -> onnx.ModelProto:
    """Return a float32 model with weights and arithmetic in float16.

    Args:
        model: What to convert; it is not changed. Its inputs and outputs keep their types.
        keep_float: Names of nodes that go on in float32.

    Raises:
        HalfOverflow: a weight is not finite, or too large for float16.
        ExportFailed: the converter gives up.
    """
    for tensor in model.graph.initializer:
        if tensor.data_type != TensorProto.FLOAT:
            continue
        largest = _largest(numpy_helper.to_array(tensor))
        if not largest <= LARGEST:
            raise HalfOverflow(
                f"the weights {tensor.name!r} reach {largest:.4g}, and float16 ends at "
                f"{LARGEST:g}; a float16 file of this model cannot be made"
            )
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    # The converter infers types itself, and takes weights that are listed here for activations.
    del copy.graph.value_info[:]
    try:
        half: onnx.ModelProto = _converter()(
            copy, keep_io_types=True, node_block_list=sorted(keep_float)
        )
        half = _sorted(half)
        strip_metadata(half)
        onnx.checker.check_model(half)
    except Exception as error:  # the converter raises whatever its steps raise
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ExportFailed(f"the model cannot be converted to float16: {first}") from error
    return half


def check_range(model: onnx.ModelProto, batches: Iterable[NDArray[np.uint8]]) -> dict[str, float]:
    """Check that no activation of a float32 model comes near the end of float16.

    Args:
        model: Takes uint8 images.
        batches: Images that are like those that it will be asked.

    Returns:
        The largest magnitude that each layer gave, by the layer's name.

    Raises:
        HalfOverflow: some go too far; the message names the layers.
    """
    probed, layers = _probed(model)
    session = open_session(serialize(probed))
    seen = dict.fromkeys(layers, 0.0)
    for images in batches:
        found = session.run({session.inputs[0].name: images}, list(layers))
        for output, value in found.items():
            largest = _largest(np.asarray(value))
            seen[output] = max(seen[output], largest)
    by_layer: dict[str, float] = {}
    for output, largest in seen.items():
        by_layer[layers[output]] = max(by_layer.get(layers[output], 0.0), largest)
    limit = LARGEST / HEADROOM
    # Written so that NaN, which `_largest` gives as infinity, fails.
    beyond = [f"{name} ({value:.4g})" for name, value in by_layer.items() if not value <= limit]
    if beyond:
        raise HalfOverflow(
            f"activations go beyond {limit:g}, half of what float16 holds, in "
            f"{', '.join(beyond[:5])}{' and more' if len(beyond) > 5 else ''}; a float16 file "
            "could overflow. Batch norms behind these layers keep them small; or use target "
            "cpu-fp32"
        )
    return by_layer


def emulated(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a float32 model that computes what a float16 one does, for the CPU.

    onnxruntime has no float16 kernels for most operators on x86 and computes such files in float32
    from one end to the other. Here each operator's result is rounded to float16 and too large ones
    become infinite, as on CUDA, where sums are taken in float32, too.
    """
    inferred = onnx.shape_inference.infer_shapes(model)
    graph = inferred.graph
    kinds = {
        value.name: value.type.tensor_type.elem_type
        for value in (*graph.input, *graph.value_info, *graph.output)
    }
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    del copy.graph.value_info[:]
    for tensor in copy.graph.initializer:
        _widen(tensor)
    nodes: list[onnx.NodeProto] = []
    for node in copy.graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                _widen(attribute.t)
        rounded = [name for name in node.output if kinds.get(name) == TensorProto.FLOAT16]
        if node.op_type == "Cast" and rounded:
            next(a for a in node.attribute if a.name == "to").i = TensorProto.FLOAT
        elif node.op_type in _EXACT:
            rounded = []
        for index, name in enumerate(node.output):
            if name in rounded:
                node.output[index] = f"{name}_exact"
        nodes.append(node)
        for name in rounded:
            half = f"{name}_half"
            nodes.append(
                helper.make_node("Cast", [f"{name}_exact"], [half], to=TensorProto.FLOAT16)
            )
            nodes.append(helper.make_node("Cast", [half], [name], to=TensorProto.FLOAT))
    del copy.graph.node[:]
    copy.graph.node.extend(nodes)
    onnx.checker.check_model(copy)
    return copy


def _widen(tensor: onnx.TensorProto) -> None:
    if tensor.data_type == TensorProto.FLOAT16:
        values = numpy_helper.to_array(tensor).astype(np.float32)
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))


def _probed(model: onnx.ModelProto) -> tuple[onnx.ModelProto, dict[str, str]]:
    """Return the model with the largest magnitude of each activation as an output, and its layer's
    name by that output."""
    graph = onnx.shape_inference.infer_shapes(model).graph
    floats = {
        value.name
        for value in (*graph.value_info, *graph.output)
        if value.type.tensor_type.elem_type == TensorProto.FLOAT
    }
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    weights = {tensor.name for tensor in copy.graph.initializer}
    layers: dict[str, str] = {}
    for node in list(copy.graph.node):
        if node.op_type in _EXACT or node.op_type == "Cast":
            continue
        for name in node.output:
            if name not in floats:
                continue
            magnitude, largest = f"{name}_magnitude", f"{name}_largest"
            copy.graph.node.append(helper.make_node("Abs", [name], [magnitude]))
            copy.graph.node.append(
                helper.make_node("ReduceMax", [magnitude], [largest], keepdims=0)
            )
            copy.graph.output.append(helper.make_tensor_value_info(largest, TensorProto.FLOAT, []))
            owned = next((each for each in node.input[1:2] if each in weights), "")
            layers[largest] = owned.removesuffix(".weight") or node.name or name
    return copy, layers


def _sorted(model: onnx.ModelProto) -> onnx.ModelProto:
    # The converter appends its casts, and nodes must come after those that they read.
    graph = onnx_ir.from_proto(model)
    graph.graph.sort()
    return onnx_ir.to_proto(graph)


def _largest(values: NDArray[Any]) -> float:
    """Return the largest magnitude; infinite if there is a NaN."""
    if not values.size:
        return 0.0
    return float(np.nan_to_num(np.abs(values), nan=np.inf, posinf=np.inf).max())


def _converter() -> Any:
    make_importable()
    from onnxruntime.transformers.float16 import convert_float_to_float16

    logging.getLogger("onnxruntime.transformers.float16").setLevel(logging.ERROR)
    return convert_float_to_float16
