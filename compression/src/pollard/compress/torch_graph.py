"""Run an ONNX graph in PyTorch, node by node.

What a graph computes between its nodes can so be looked at, changed and differentiated:
bias correction and training in 8 bits work on the very graph that is shipped, not on the
module that it came from. Knows the operators of convolutional networks, no others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from torch import Tensor
from torch.nn import functional

from pollard.compress import accelerator
from pollard.compress.errors import QuantizeFailed

Inputs = list[Tensor | None]
Attributes = dict[str, Any]
Observer = Callable[[onnx.NodeProto, Inputs, Tensor], Tensor]
"""Sees a node, its inputs and what it gave, and returns what it shall have given."""


class TorchGraph:
    """An ONNX graph of one input and one output.

    Raises:
        QuantizeFailed: it has an operator that is not known here; the message names it.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self.nodes = list(model.graph.node)
        unknown = sorted({node.op_type for node in self.nodes} - OPERATORS.keys() - _LINEAR)
        if unknown:
            raise QuantizeFailed(f"the operator {', '.join(unknown)} cannot be run in PyTorch")
        self.constants: dict[str, Tensor] = {
            tensor.name: torch.from_numpy(np.array(numpy_helper.to_array(tensor)))
            for tensor in model.graph.initializer
        }
        self._elsewhere: dict[torch.device, dict[str, Tensor]] = {}
        self.input = model.graph.input[0].name
        self.output = model.graph.output[0].name
        self._attributes = [
            {a.name: helper.get_attribute_value(a) for a in node.attribute} for node in self.nodes
        ]
        last = {name: index for index, node in enumerate(self.nodes) for name in node.input}
        self._free: dict[int, list[str]] = {}
        for name, index in last.items():
            if name not in self.constants and name != self.output:
                self._free.setdefault(index, []).append(name)

    def run(
        self,
        inputs: Tensor,
        observe: Observer | None = None,
        values: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Return the output.

        Args:
            inputs: What the graph takes.
            observe: Called behind every node that gives one tensor.
            values: Tensors that are known already, by name; nodes that would make them
                are not run.
        """
        known: dict[str, Any] = {self.input: inputs, **(values or {})}
        constants = self._on(inputs.device)
        kept = set(values or ())
        for index, node in enumerate(self.nodes):
            if node.output[0] not in kept:
                taken: Inputs = [
                    None if not name else known[name] if name in known else constants[name]
                    for name in node.input
                ]
                made = self._apply(node, taken, self._attributes[index])
                if isinstance(made, Tensor):
                    made = made if observe is None else observe(node, taken, made)
                    known[node.output[0]] = made
                else:
                    known.update(zip(node.output, made, strict=True))
            for name in self._free.get(index, ()):
                known.pop(name, None)
        result: Tensor = known[self.output]
        return result

    def _on(self, device: torch.device) -> dict[str, Tensor]:
        """Return the constants where the inputs are; shapes and axes stay where they are read."""
        if device == accelerator.CPU:
            return self.constants
        if device not in self._elsewhere:
            self._elsewhere[device] = {
                name: value if value.dtype == torch.int64 else value.to(device)
                for name, value in self.constants.items()
            }
        return self._elsewhere[device]

    def _apply(
        self, node: onnx.NodeProto, inputs: Inputs, attributes: Attributes
    ) -> Tensor | Sequence[Tensor]:
        if node.op_type == "QuantizeLinear":
            return quantize_linear(inputs, attributes)
        if node.op_type == "DequantizeLinear":
            return dequantize_linear(inputs, attributes)
        return OPERATORS[node.op_type](inputs, attributes)


_LINEAR = {"QuantizeLinear", "DequantizeLinear"}


def _along(values: Tensor, like: Tensor, axis: int) -> Tensor:
    """Shape one value per channel so that it meets the axis of ``like``."""
    if values.ndim == 0 or values.numel() == 1:
        return values.reshape(())
    shape = [1] * like.ndim
    shape[axis] = -1
    return values.reshape(shape)


def quantize_linear(inputs: Inputs, attributes: Attributes) -> Tensor:
    """Return whole numbers, uint8 or int8, as ONNX's QuantizeLinear."""
    x, scale, zero = _need(inputs[0]), _need(inputs[1]), _need(inputs[2])
    axis = attributes.get("axis", 1)
    limits = torch.iinfo(zero.dtype)
    whole = torch.round(x / _along(scale, x, axis)) + _along(zero, x, axis)
    return whole.clamp(limits.min, limits.max).to(zero.dtype)


def dequantize_linear(inputs: Inputs, attributes: Attributes) -> Tensor:
    """Return floats, as ONNX's DequantizeLinear."""
    x, scale = _need(inputs[0]), _need(inputs[1])
    zero = inputs[2] if len(inputs) > 2 else None
    axis = attributes.get("axis", 1)
    wide = x.to(torch.int64)
    if zero is not None:
        wide = wide - _along(zero.to(torch.int64), x, axis)
    return (wide * _along(scale.to(torch.float64), x, axis)).to(torch.float32)


def _need(value: Tensor | None) -> Tensor:
    if value is None:
        raise QuantizeFailed("an operator lacks an input")
    return value


def _pads(attributes: Attributes, rank: int = 2) -> list[int]:
    if attributes.get("auto_pad", b"NOTSET") not in (b"NOTSET", b""):
        raise QuantizeFailed("padding that the operator chooses itself cannot be run in PyTorch")
    return list(attributes.get("pads", [0] * (2 * rank)))


def _padded(x: Tensor, attributes: Attributes, value: float) -> tuple[Tensor, tuple[int, int]]:
    top, left, bottom, right = _pads(attributes)
    if (top, left) == (bottom, right):
        return x, (top, left)
    return functional.pad(x, (left, right, top, bottom), value=value), (0, 0)


def _pair(attributes: Attributes, name: str, default: int = 1) -> tuple[int, int]:
    first, second = attributes.get(name, (default, default))
    return first, second


def _convolution(inputs: Inputs, attributes: Attributes) -> Tensor:
    x, weight = _need(inputs[0]), _need(inputs[1])
    if x.ndim != 4:
        raise QuantizeFailed("only convolutions of pictures can be run in PyTorch")
    x, padding = _padded(x, attributes, 0.0)
    return functional.conv2d(
        x, weight, inputs[2] if len(inputs) > 2 else None, _pair(attributes, "strides"), padding,
        _pair(attributes, "dilations"), attributes.get("group", 1),
    )  # fmt: skip


def _transposed(inputs: Inputs, attributes: Attributes) -> Tensor:
    top, left, bottom, right = _pads(attributes)
    if (top, left) != (bottom, right):
        raise QuantizeFailed("a transposed convolution with uneven padding")
    return functional.conv_transpose2d(
        _need(inputs[0]), _need(inputs[1]), inputs[2] if len(inputs) > 2 else None,
        _pair(attributes, "strides"), (top, left), _pair(attributes, "output_padding", 0),
        attributes.get("group", 1), _pair(attributes, "dilations"),
    )  # fmt: skip


def _gemm(inputs: Inputs, attributes: Attributes) -> Tensor:
    a, b = _need(inputs[0]), _need(inputs[1])
    a = a.mT if attributes.get("transA", 0) else a
    b = b.mT if attributes.get("transB", 0) else b
    made: Tensor = attributes.get("alpha", 1.0) * (a @ b)
    if len(inputs) > 2 and inputs[2] is not None:
        made = made + attributes.get("beta", 1.0) * inputs[2]
    return made


def _max_pool(inputs: Inputs, attributes: Attributes) -> Tensor:
    x, padding = _padded(_need(inputs[0]), attributes, -torch.inf)
    return functional.max_pool2d(
        x, _pair(attributes, "kernel_shape"), _pair(attributes, "strides"), padding,
        _pair(attributes, "dilations"), bool(attributes.get("ceil_mode", 0)),
    )  # fmt: skip


def _average_pool(inputs: Inputs, attributes: Attributes) -> Tensor:
    top, left, bottom, right = _pads(attributes)
    if (top, left) != (bottom, right):
        raise QuantizeFailed("an average over uneven padding")
    return functional.avg_pool2d(
        _need(inputs[0]), _pair(attributes, "kernel_shape"), _pair(attributes, "strides"),
        (top, left), bool(attributes.get("ceil_mode", 0)),
        bool(attributes.get("count_include_pad", 0)),
    )  # fmt: skip


def _integers(value: Tensor | None) -> list[int]:
    return [int(number) for number in _need(value).tolist()]


def _mean(inputs: Inputs, attributes: Attributes) -> Tensor:
    x = _need(inputs[0])
    axes = attributes.get("axes") or (_integers(inputs[1]) if len(inputs) > 1 else None)
    return x.mean(dim=axes or list(range(x.ndim)), keepdim=bool(attributes.get("keepdims", 1)))


def _reshape(inputs: Inputs, attributes: Attributes) -> Tensor:
    x = _need(inputs[0])
    wanted = _integers(inputs[1])
    if not attributes.get("allowzero", 0):
        wanted = [x.shape[i] if size == 0 else size for i, size in enumerate(wanted)]
    return x.reshape(wanted)


def _split(inputs: Inputs, attributes: Attributes) -> Sequence[Tensor]:
    x, axis = _need(inputs[0]), attributes.get("axis", 0)
    if len(inputs) > 1 and inputs[1] is not None:
        return torch.split(x, _integers(inputs[1]), axis)
    return torch.split(x, -(-x.shape[axis] // attributes["num_outputs"]), axis)


def _slice(inputs: Inputs, _: Attributes) -> Tensor:
    x = _need(inputs[0])
    starts, ends = _integers(inputs[1]), _integers(inputs[2])
    axes = _integers(inputs[3]) if len(inputs) > 3 else list(range(len(starts)))
    steps = _integers(inputs[4]) if len(inputs) > 4 else [1] * len(starts)
    cut = [slice(None)] * x.ndim
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        if step < 0:
            raise QuantizeFailed("a slice backwards cannot be run in PyTorch")
        cut[axis] = slice(start, end, step)
    return x[tuple(cut)]


def _pad(inputs: Inputs, attributes: Attributes) -> Tensor:
    x, pads = _need(inputs[0]), _integers(inputs[1])
    if attributes.get("mode", b"constant") != b"constant" or len(pads) != 2 * x.ndim:
        raise QuantizeFailed("only padding with a constant can be run in PyTorch")
    value = float(inputs[2].item()) if len(inputs) > 2 and inputs[2] is not None else 0.0
    both = [(pads[i], pads[i + x.ndim]) for i in reversed(range(x.ndim))]
    return functional.pad(x, [size for pair in both for size in pair], value=value)


def _clip(inputs: Inputs, _: Attributes) -> Tensor:
    low = inputs[1] if len(inputs) > 1 else None
    high = inputs[2] if len(inputs) > 2 else None
    return torch.clamp(_need(inputs[0]), low, high)


def _layer_norm(inputs: Inputs, attributes: Attributes) -> Tensor:
    x = _need(inputs[0])
    shape = x.shape[attributes.get("axis", -1) :]
    bias = inputs[2] if len(inputs) > 2 else None
    return functional.layer_norm(x, shape, inputs[1], bias, attributes.get("epsilon", 1e-5))


def _unary(function: Callable[[Tensor], Tensor]) -> Callable[[Inputs, Attributes], Tensor]:
    return lambda inputs, _: function(_need(inputs[0]))


def _binary(
    function: Callable[[Tensor, Tensor], Tensor],
) -> Callable[[Inputs, Attributes], Tensor]:
    return lambda inputs, _: function(_need(inputs[0]), _need(inputs[1]))


OPERATORS: dict[str, Callable[[Inputs, Attributes], Tensor | Sequence[Tensor]]] = {
    "Conv": _convolution,
    "ConvTranspose": _transposed,
    "Gemm": _gemm,
    "MatMul": _binary(torch.matmul),
    "Add": _binary(torch.add),
    "Sub": _binary(torch.sub),
    "Mul": _binary(torch.mul),
    "Div": _binary(torch.div),
    "Relu": _unary(functional.relu),
    "Sigmoid": _unary(torch.sigmoid),
    "Tanh": _unary(torch.tanh),
    "HardSwish": _unary(functional.hardswish),
    "Identity": _unary(lambda x: x),
    "Erf": _unary(torch.erf),
    "Clip": _clip,
    "LeakyRelu": lambda i, a: functional.leaky_relu(_need(i[0]), a.get("alpha", 0.01)),
    "Elu": lambda i, a: functional.elu(_need(i[0]), a.get("alpha", 1.0)),
    "HardSigmoid": lambda i, a: torch.clamp(
        a.get("alpha", 0.2) * _need(i[0]) + a.get("beta", 0.5), 0.0, 1.0
    ),
    "Gelu": lambda i, a: functional.gelu(
        _need(i[0]), approximate=a.get("approximate", b"none").decode()
    ),
    "Softmax": lambda i, a: torch.softmax(_need(i[0]), a.get("axis", -1)),
    "MaxPool": _max_pool,
    "AveragePool": _average_pool,
    "GlobalAveragePool": _unary(lambda x: x.mean(dim=list(range(2, x.ndim)), keepdim=True)),
    "ReduceMean": _mean,
    "Concat": lambda i, a: torch.cat([_need(x) for x in i], a["axis"]),
    "Split": _split,
    "Slice": _slice,
    "Pad": _pad,
    "Reshape": _reshape,
    "Flatten": lambda i, a: _need(i[0]).flatten(a.get("axis", 1)),
    "Transpose": lambda i, a: _need(i[0]).permute(a["perm"]),
    "Squeeze": lambda i, _: torch.squeeze(_need(i[0]), _integers(i[1])),
    "Unsqueeze": lambda i, _: _unsqueeze(_need(i[0]), _integers(i[1])),
    "LayerNormalization": _layer_norm,
}


def _unsqueeze(x: Tensor, axes: list[int]) -> Tensor:
    for axis in sorted(axes):
        x = x.unsqueeze(axis)
    return x
