"""Single operators as small ONNX graphs, in float and in 8 bits, to be timed by themselves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from pollard.compress.operations import Operation

_OPSET = 20

_UNARY = {
    "Relu": "Relu", "Clip": "Clip", "HardSwish": "HardSwish", "HardSigmoid": "HardSigmoid",
    "Sigmoid": "Sigmoid", "Gelu": "Gelu", "LeakyRelu": "LeakyRelu", "Tanh": "Tanh", "elu": "Elu",
}  # fmt: skip

# What can be built; operators of other kinds are not measured by themselves.
KINDS = frozenset({
    "Conv", "ConvTranspose", "Gemm", "Add", "Mul", "Norm", "Silu", "MaxPool", "AveragePool",
    "GlobalAveragePool", "Concat", "Resize", "Pad", "Pixels", "QuantizedPixels", *_UNARY,
})  # fmt: skip


@dataclass(frozen=True)
class Kernel:
    """What decides how long an operator takes; a row of the latency table."""

    kind: str
    in_channels: int
    out_channels: int
    height: int
    width: int
    out_height: int
    out_width: int
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    activation: str = ""
    adds: bool = False

    @property
    def key(self) -> str:
        """Name of the row, such as "Conv 16-32 32x32-16x16 k3x3 s2x2 p1x1 Relu"."""
        parts = [
            self.kind,
            f"{self.in_channels}-{self.out_channels}",
            f"{self.height}x{self.width}-{self.out_height}x{self.out_width}",
        ]
        for letter, pair, default in (
            ("k", self.kernel, (1, 1)),
            ("s", self.stride, (1, 1)),
            ("p", self.padding, (0, 0)),
            ("d", self.dilation, (1, 1)),
        ):
            if pair != default:
                parts.append(f"{letter}{pair[0]}x{pair[1]}")
        if self.groups != 1:
            parts.append(f"g{self.groups}")
        if self.adds:
            parts.append("+Add")
        if self.activation:
            parts.append(f"+{self.activation}")
        return " ".join(parts)


def kernel_of(operation: Operation, channels: tuple[int, int]) -> Kernel | None:
    """Return the row of an operation with these input and output channels, if there can be one."""
    if operation.kind not in KINDS:
        return None
    ins, outs = max(1, channels[0]), max(1, channels[1])
    groups = operation.groups
    if groups > 1:
        # A depthwise layer has as many groups as channels, whatever their number.
        groups = ins if groups == operation.channels()[0] else groups
        if ins % groups or outs % groups:
            return None
    return Kernel(
        operation.kind, ins, outs, operation.height, operation.width, operation.out_height,
        operation.out_width, operation.kernel, operation.stride, operation.padding,
        operation.dilation, groups, operation.activation, operation.adds,
    )  # fmt: skip


def build_graph(kernels: dict[str, Kernel], batch: int, quantized: bool) -> onnx.ModelProto:
    """Return a model with every kernel side by side; names of nodes begin with the dict's keys."""
    made = _Graph(batch, quantized)
    for prefix, kernel in kernels.items():
        made.add(prefix, kernel)
    graph = helper.make_graph(made.nodes, "kernels", made.inputs, made.outputs, made.constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=10)


class _Graph:
    """Collects nodes; each operator stands between quantizers as in a quantized network."""

    def __init__(self, batch: int, quantized: bool) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self.constants: list[onnx.TensorProto] = []
        self._batch, self._quantized = batch, quantized
        self._generator = np.random.default_rng(0)
        self._prefix = ""
        self._count = 0

    def add(self, prefix: str, k: Kernel) -> None:
        """Add one kernel with inputs and an output of its own."""
        self._prefix, self._count = prefix, 0
        if k.kind.endswith("Pixels"):
            self._pixels(k)
            return
        flat = k.kind == "Gemm"
        shape = [k.in_channels] if flat else [k.in_channels, k.height, k.width]
        if k.kind == "Concat":
            shape[0] = max(1, k.in_channels // 2)
        if k.kind == "Pad":
            shape[0] = max(1, k.in_channels // 2)
        pooled = k.kind == "MaxPool" and self._quantized
        x = self._channels_last(prefix, k) if pooled else self._source(shape)
        outs = [k.out_channels] if flat else [k.out_channels, k.out_height, k.out_width]
        result = self._operator(k, x, shape, outs)
        if k.adds:
            result = self._step("Add", [result, self._source(outs)])
        if k.activation and not self._quantized:
            result = self._step(k.activation, [result, *self._bounds(k.activation)])
        self._finish(result)

    def _operator(self, k: Kernel, x: str, shape: list[int], outs: list[int]) -> str:
        if k.kind in ("Conv", "ConvTranspose"):
            return self._convolution(k, x)
        if k.kind == "Gemm":
            weight = self._weight((k.out_channels, k.in_channels), k.in_channels, 0)
            return self._step("Gemm", [x, *weight], transB=1)
        if k.kind in ("Add", "Mul"):
            return self._step(k.kind, [x, self._source(shape)])
        if k.kind == "Norm":
            scaled = self._step("Mul", [x, self._per_channel(k.in_channels)])
            return self._step("Add", [scaled, self._per_channel(k.in_channels)])
        if k.kind == "Silu":
            return self._step("Mul", [x, self._step("Sigmoid", [x])])
        if k.kind in ("MaxPool", "AveragePool"):
            return self._step(
                k.kind, [x], kernel_shape=list(k.kernel), strides=list(k.stride),
                pads=[*k.padding, *k.padding],
            )  # fmt: skip
        if k.kind == "GlobalAveragePool":
            axes = self._constant(np.array([2, 3], np.int64))
            return self._step("ReduceMean", [x, axes], keepdims=1)
        if k.kind == "Concat":
            other = self._source([k.in_channels - shape[0], *shape[1:]])
            return self._step("Concat", [x, other], axis=1)
        if k.kind == "Resize":
            scales = np.array([1, 1, k.out_height / k.height, k.out_width / k.width], np.float32)
            return self._step(
                "Resize", [x, "", self._constant(scales)], mode="nearest",
                coordinate_transformation_mode="asymmetric", nearest_mode="floor",
            )  # fmt: skip
        if k.kind == "Pad":
            missing = k.out_channels - shape[0]
            pads = np.array([0, missing // 2, 0, 0, 0, missing - missing // 2, 0, 0], np.int64)
            return self._step("Pad", [x, self._constant(pads)])
        return self._step(_UNARY[k.kind], [x, *self._bounds(k.kind)])

    def _convolution(self, k: Kernel, x: str) -> str:
        transposed = k.kind == "ConvTranspose"
        ins, outs = (k.in_channels, k.out_channels)
        form = (ins, outs // k.groups) if transposed else (outs, ins // k.groups)
        fan = ins // k.groups * k.kernel[0] * k.kernel[1]
        weight = self._weight((*form, *k.kernel), fan, 1 if transposed else 0, outs)
        return self._step(
            k.kind, [x, *weight], kernel_shape=list(k.kernel), strides=list(k.stride),
            pads=[*k.padding, *k.padding], dilations=list(k.dilation), group=k.groups,
        )  # fmt: skip

    def _channels_last(self, prefix: str, k: Kernel) -> str:
        """Return the output of a convolution: behind one pooling has the layout of 8 bits."""
        self._prefix = f"before-{prefix}"
        x = self._source([1, k.height, k.width])
        weight = self._weight((k.in_channels, 1, 1, 1), 1, 0)
        result = self._step("Conv", [x, *weight], kernel_shape=[1, 1])
        self._prefix = prefix
        return result

    def _bounds(self, kind: str) -> list[str]:
        if kind != "Clip":
            return []
        return [self._constant(np.array(v, np.float32)) for v in (0.0, 6.0)]

    def _weight(
        self, shape: tuple[int, ...], fan: int, axis: int, outs: int | None = None
    ) -> list[str]:
        """Return names of a weight and a bias; 8-bit ones where those are wanted."""
        outs = outs or shape[axis]
        if not self._quantized or axis == 1:  # no 8-bit kernel for transposed convolutions
            weight = self._generator.normal(0, fan**-0.5, shape).astype(np.float32)
            return [self._constant(weight), self._constant(np.zeros(outs, np.float32))]
        values = self._generator.integers(-127, 128, shape).astype(np.int8)
        scale = np.full(outs, 0.01, np.float32)
        names = []
        for value, by in ((values, scale), (np.zeros(outs, np.int32), scale * np.float32(0.02))):
            zero = self._constant(np.zeros(outs, value.dtype))
            inputs = [self._constant(value), self._constant(by), zero]
            names.append(self._node("DequantizeLinear", inputs, axis=0))
        return names

    def _per_channel(self, channels: int) -> str:
        shape = (1, channels, 1, 1)
        if not self._quantized:
            return self._constant(np.ones(shape, np.float32))
        return self._dequantize(self._constant(np.full(shape, 200, np.uint8)))

    def _source(self, shape: list[int]) -> str:
        name = f"{self._prefix}.x{len(self.inputs)}"
        kind = TensorProto.UINT8 if self._quantized else TensorProto.FLOAT
        self.inputs.append(helper.make_tensor_value_info(name, kind, [self._batch, *shape]))
        return self._dequantize(name) if self._quantized else name

    def _step(self, operator: str, inputs: list[str], **attributes: Any) -> str:
        result = self._node(operator, inputs, **attributes)
        return self._dequantize(self._quantize(result)) if self._quantized else result

    def _finish(self, result: str) -> None:
        if self._quantized:
            result = self.nodes.pop().input[0]  # the last one gives 8 bits, as to a neighbour
        kind = TensorProto.UINT8 if self._quantized else TensorProto.FLOAT
        self.outputs.append(helper.make_tensor_value_info(result, kind, None))

    def _pixels(self, k: Kernel) -> None:
        source = f"{self._prefix}.x{len(self.inputs)}"
        shape = [self._batch, k.height, k.width, k.in_channels]
        self.inputs.append(helper.make_tensor_value_info(source, TensorProto.UINT8, shape))
        moved = self._node("Transpose", [source], perm=[0, 3, 1, 2])
        if k.kind == "QuantizedPixels":
            result, kind = moved, TensorProto.UINT8
        elif self._quantized:
            scale = self._constant(np.linspace(0.01, 0.02, k.in_channels, dtype=np.float32))
            zero = self._constant(np.full(k.in_channels, 120, np.uint8))
            made = self._node("DequantizeLinear", [moved, scale, zero], axis=1)
            result, kind = self._quantize(made), TensorProto.UINT8
        else:
            cast = self._node("Cast", [moved], to=TensorProto.FLOAT)
            mean = self._constant(np.full((1, k.in_channels, 1, 1), 120, np.float32))
            result, kind = self._node("Sub", [cast, mean]), TensorProto.FLOAT
        self.outputs.append(helper.make_tensor_value_info(result, kind, None))

    def _quantize(self, name: str) -> str:
        return self._node("QuantizeLinear", [name, *self._scale()])

    def _dequantize(self, name: str) -> str:
        return self._node("DequantizeLinear", [name, *self._scale()])

    def _scale(self) -> list[str]:
        return [
            self._constant(np.array(0.02, np.float32)), self._constant(np.array(128, np.uint8))
        ]  # fmt: skip

    def _node(self, operator: str, inputs: list[str], **attributes: Any) -> str:
        self._count += 1
        name = f"{self._prefix}.{self._count}"
        self.nodes.append(helper.make_node(operator, inputs, [name], name=name, **attributes))
        return name

    def _constant(self, value: NDArray[np.generic]) -> str:
        name = f"{self._prefix}.c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(value, name))
        return name
