"""A network that is there only as an ONNX file: it can be quantized and packed, not cut.

The file becomes a module that ONNX Runtime runs in float, so that everything that asks a
parent for its answers asks this one, too.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

from pollard.compress.errors import ModelUnknown
from pollard.compress.macs import LayerCost
from pollard.compress.spec import InputSpec
from pollard.runtime.sessions import Session, open_session

# As :mod:`pollard.compress.export` calls the ends of a network.
_INPUT, _OUTPUT = "normalized", "logits"

# Quantizing per channel needs it.
_LEAST_OPSET = 13

# Newer ones are for types that no network of these has, and onnxruntime lags behind onnx.
_MOST_IR = 10

_QUANTIZED = {"QuantizeLinear", "DequantizeLinear", "QLinearConv", "ConvInteger", "QLinearMatMul"}


class OnnxModule(nn.Module):
    """A float network from an ONNX file, from float32 [batch, channels, height, width].

    Args:
        core: From :func:`read_core`.
        spec: What it takes.
    """

    def __init__(self, core: onnx.ModelProto, spec: InputSpec) -> None:
        super().__init__()
        self.core = core
        self.digest = hashlib.sha256(core.SerializeToString(deterministic=True)).hexdigest()
        self._costs = _layer_costs(core, spec)
        self._session: Session | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits; no gradient comes back from here."""
        if self._session is None:
            self._session = open_session(self.core.SerializeToString())
        feeds = {_INPUT: x.detach().cpu().contiguous().numpy()}
        answer = torch.from_numpy(np.asarray(self._session.run(feeds, [_OUTPUT])[_OUTPUT]))
        return answer.to(x.device)

    def extra_repr(self) -> str:
        """Tell two files apart."""
        return self.digest

    def costs_of_layers(self) -> list[LayerCost]:
        """Return what its convolutions and dense layers cost, in their order."""
        return self._costs

    def count_of_parameters(self) -> int:
        """Return the number of its float constants."""
        return sum(
            int(np.prod(tensor.dims, dtype=np.int64))
            for tensor in self.core.graph.initializer
            if tensor.data_type == TensorProto.FLOAT
        )

    def __getstate__(self) -> dict[str, Any]:
        # A session can be neither copied nor sent to another process.
        return {**self.__dict__, "_session": None}


def read_core(path: Path, spec: InputSpec) -> onnx.ModelProto:
    """Read a float network from an ONNX file and give its ends the names used here.

    Args:
        path: One float32 input [batch, channels, height, width], or [batch, height, width,
            channels], and one output [batch, classes].
        spec: What it takes.

    Raises:
        ModelUnknown: it is no such file; the message says why.
    """
    try:
        model = onnx.load(path)
        onnx.checker.check_model(model)
    except Exception as error:  # protobuf's, onnx's and the operating system's own kinds
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelUnknown(f"{path} cannot be read as an ONNX file: {first}") from error
    if found := sorted({node.op_type for node in model.graph.node} & _QUANTIZED):
        raise ModelUnknown(
            f"{path} is quantized already ({', '.join(found)}); give the float file it came from"
        )
    model = _modern(model, path)
    model.ir_version = min(model.ir_version, _MOST_IR)
    _plain_constants(model)
    _name_ends(model, path, spec)
    _name_nodes(model)
    del model.graph.value_info[:]
    return model


def _modern(model: onnx.ModelProto, path: Path) -> onnx.ModelProto:
    opset = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 0)
    if opset >= _LEAST_OPSET:
        return model
    try:
        return onnx.version_converter.convert_version(model, _LEAST_OPSET)
    except Exception as error:  # the converter raises whatever its adapters raise
        raise ModelUnknown(
            f"{path} has opset {opset}, quantizing needs {_LEAST_OPSET}, and it cannot be "
            f"converted: {str(error).strip().splitlines()[0]}. Export it anew"
        ) from error


def _plain_constants(model: onnx.ModelProto) -> None:
    """Make constants initializers, and no inputs, in place."""
    graph = model.graph
    rest = []
    for node in graph.node:
        value = next((a.t for a in node.attribute if a.name == "value"), None)
        if node.op_type == "Constant" and value is not None:
            tensor = graph.initializer.add()
            tensor.CopyFrom(value)
            tensor.name = node.output[0]
        else:
            rest.append(node)
    del graph.node[:]
    graph.node.extend(rest)
    constants = {tensor.name for tensor in graph.initializer}
    inputs = [value for value in graph.input if value.name not in constants]
    del graph.input[:]
    graph.input.extend(inputs)


def _name_ends(model: onnx.ModelProto, path: Path, spec: InputSpec) -> None:
    graph = model.graph
    if len(graph.input) != 1 or len(graph.output) != 1:
        raise ModelUnknown(
            f"{path} has {len(graph.input)} inputs and {len(graph.output)} outputs; a network of "
            "one input and one output can be quantized"
        )
    given, made = graph.input[0], graph.output[0]
    kind = given.type.tensor_type.elem_type
    if kind != TensorProto.FLOAT:
        raise ModelUnknown(
            f"{path} takes {TensorProto.DataType.Name(kind)}; give a file that takes float32, "
            "normalised by --mean and --std, as training frameworks write it"
        )
    shape = [
        d.dim_value if d.HasField("dim_value") else -1 for d in given.type.tensor_type.shape.dim
    ]
    first = (spec.channels, spec.height, spec.width)
    last = (spec.height, spec.width, spec.channels)
    fits = [
        len(shape) == 4 and all(a in (-1, b) for a, b in zip(shape[1:], wanted, strict=True))
        for wanted in (first, last)
    ]
    if not any(fits):
        raise ModelUnknown(
            f"{path} takes {shape}, which is no image of {spec.height}x{spec.width}x"
            f"{spec.channels}; does --input-size say what it takes?"
        )
    inner = f"{_INPUT}_inner" if _names(graph) & {_INPUT, _OUTPUT} else ""
    for old, new in ((given.name, _INPUT), (made.name, _OUTPUT)):
        if inner:
            _rename(graph, new, f"{new}_inner")
            old = f"{new}_inner" if old == new else old
        _rename(graph, old, new)
    if not fits[0]:
        _rename(graph, _INPUT, f"{_INPUT}_last")
        node = helper.make_node(
            "Transpose", [_INPUT], [f"{_INPUT}_last"], name="channels_last", perm=[0, 2, 3, 1]
        )
        rest = list(graph.node)
        del graph.node[:]
        graph.node.extend([node, *rest])
    del graph.input[:]
    graph.input.append(helper.make_tensor_value_info(_INPUT, TensorProto.FLOAT, ["batch", *first]))
    dims = [
        d.dim_value if d.HasField("dim_value") else None for d in made.type.tensor_type.shape.dim
    ]
    del graph.output[:]
    graph.output.append(
        helper.make_tensor_value_info(
            _OUTPUT, TensorProto.FLOAT, ["batch", *dims[1:]] if dims else None
        )
    )


def _sizes(value: onnx.ValueInfoProto) -> list[int | None]:
    """Return the sizes of a tensor, None where they are free."""
    dims = value.type.tensor_type.shape.dim
    return [dim.dim_value if dim.HasField("dim_value") else None for dim in dims]


def _names(graph: onnx.GraphProto) -> set[str]:
    return {name for node in graph.node for name in (*node.input, *node.output)}


def _rename(graph: onnx.GraphProto, old: str, new: str) -> None:
    if old == new:
        return
    for node in graph.node:
        for names in (node.input, node.output):
            for index, name in enumerate(names):
                if name == old:
                    names[index] = new
    for tensor in graph.initializer:
        if tensor.name == old:
            tensor.name = new


def _name_nodes(model: onnx.ModelProto) -> None:
    """Give every node a name of its own, by which layers can stay in float."""
    seen: set[str] = set()
    for index, node in enumerate(model.graph.node):
        if not node.name or node.name in seen:
            node.name = f"{node.op_type}_{index}"
        seen.add(node.name)


def _layer_costs(core: onnx.ModelProto, spec: InputSpec) -> list[LayerCost]:
    sized = onnx.ModelProto()
    sized.CopyFrom(core)
    sized.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    for value in sized.graph.output:
        value.type.tensor_type.ClearField("shape")
    inferred = onnx.shape_inference.infer_shapes(sized).graph
    shapes = {
        value.name: [d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in (*inferred.value_info, *inferred.input, *inferred.output)
    }
    weights = {tensor.name: list(tensor.dims) for tensor in core.graph.initializer}
    found = []
    for node in core.graph.node:
        if node.op_type not in ("Conv", "ConvTranspose", "Gemm", "MatMul"):
            continue
        shape = weights.get(node.input[1]) if len(node.input) > 1 else None
        if shape is None:
            continue
        out = shapes.get(node.output[0], [])
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        groups = int(attributes.get("group", 1))
        size = int(np.prod(shape, dtype=np.int64))
        plane = int(np.prod(out[2:], dtype=np.int64)) if len(out) > 2 else 1
        if node.op_type == "Conv":
            ins, outs = shape[1] * groups, shape[0]
        elif node.op_type == "ConvTranspose":
            ins, outs = shape[0], shape[1] * groups
            taken = shapes.get(node.input[0], [])
            plane = int(np.prod(taken[2:], dtype=np.int64)) if len(taken) > 2 else 1
        else:
            turned = node.op_type == "Gemm" and attributes.get("transB", 0)
            ins, outs = (shape[1], shape[0]) if turned else (shape[0], shape[-1])
            plane = 1
        bias = weights.get(node.input[2]) if len(node.input) > 2 else None
        parameters = size + (int(np.prod(bias, dtype=np.int64)) if bias else 0)
        name = node.input[1].removesuffix(".weight")
        spread = "×".join(str(d) for d in out[2:]) or "1"
        found.append(LayerCost(name, node.op_type, ins, outs, spread, size * plane, parameters))
    return found
