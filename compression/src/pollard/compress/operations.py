"""What a module computes for one image, operator by operator, as onnxruntime will run it.

A traced list: batch norms are folded into the convolution in front of them, and
activations and residual additions belong to the layer that they follow, because the
runtime fuses them. Channels are known by the layers that they come from, so that the
list can be read for other widths without tracing again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from pollard.compress.macs import COUNTED, example_input
from pollard.compress.spec import InputSpec

# Operators that move or name memory and compute nothing.
_FREE = frozenset({
    "view", "_unsafe_view", "reshape", "flatten", "t", "transpose", "permute", "unsqueeze",
    "squeeze", "expand", "alias", "detach", "clone", "contiguous", "dropout", "select",
    "split", "split_with_sizes", "chunk", "slice", "to", "_to_copy", "lift_fresh", "unbind",
})  # fmt: skip

# PyTorch's name → the name here; the rest is listed by its own name.
_NAMES = {
    "relu": "Relu", "relu_": "Relu", "hardtanh": "Clip", "hardtanh_": "Clip", "clamp": "Clip",
    "hardswish": "HardSwish", "hardswish_": "HardSwish", "hardsigmoid": "HardSigmoid",
    "hardsigmoid_": "HardSigmoid", "sigmoid": "Sigmoid", "silu": "Silu", "silu_": "Silu",
    "gelu": "Gelu", "leaky_relu": "LeakyRelu", "leaky_relu_": "LeakyRelu", "tanh": "Tanh",
    "add": "Add", "add_": "Add", "mul": "Mul", "mul_": "Mul", "cat": "Concat",
    "max_pool2d_with_indices": "MaxPool", "max_pool2d": "MaxPool", "avg_pool2d": "AveragePool",
    "_adaptive_avg_pool2d": "GlobalAveragePool", "mean": "GlobalAveragePool",
    "upsample_nearest2d": "Resize", "upsample_bilinear2d": "Resize", "constant_pad_nd": "Pad",
    "native_batch_norm": "Norm", "_native_batch_norm_legit_no_training": "Norm",
    "_native_batch_norm_legit": "Norm", "cudnn_batch_norm": "Norm",
}  # fmt: skip

# Activations that a layer in front of them takes in.
_FUSED = ("Relu", "Clip")

Pieces = tuple[tuple[str, int], ...]
"""Where channels come from: layer and how many; "" is the input or cannot be said."""


@dataclass(frozen=True)
class Operation:
    """One operator with what is fused into it."""

    name: str
    """The layer, or the module that it runs in and what it is."""
    kind: str
    """Such as "Conv", "Gemm", "Add", "MaxPool"."""
    inputs: Pieces
    """Where its input channels come from."""
    outputs: Pieces
    """For a layer itself; otherwise the input's."""
    height: int
    """Of the input, in pixels."""
    width: int
    out_height: int
    out_width: int
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    activation: str = ""
    """Fused behind it: "Relu" or "Clip"."""
    adds: bool = False
    """Whether a residual addition is fused behind it."""

    @property
    def is_layer(self) -> bool:
        """Whether it has weights that channels can be taken from."""
        return self.kind in ("Conv", "ConvTranspose", "Gemm")

    def channels(self, kept: Mapping[str, float] | None = None) -> tuple[int, int]:
        """Return input and output channels.

        Args:
            kept: Layer → share of its outputs that is left; 1 where it is not named.
        """
        return _count(self.inputs, kept), _count(self.outputs, kept)

    def within(self, block: str) -> bool:
        """Whether it runs inside the module of this name."""
        place = self.name.partition("/")[0]
        return place == block or place.startswith(f"{block}.")


def _count(pieces: Pieces, kept: Mapping[str, float] | None) -> int:
    if kept is None:
        return sum(count for _, count in pieces)
    return round(sum(count * kept.get(layer, 1.0) for layer, count in pieces))


@dataclass
class _Value:
    """What is known of a tensor while tracing."""

    pieces: Pieces
    producer: int | None = None
    uses: int = 0


def list_operations(module: nn.Module, spec: InputSpec | Tensor) -> list[Operation]:
    """Trace a module with one image and return what it computes, in order.

    Convolutions that are called with bare weights and operators that only move
    memory are left out.
    """
    tracer = _Tracer(module)
    example = example_input(spec)
    was_training = module.training
    module.eval()
    try:
        with torch.no_grad():
            tracer.run(example)
    finally:
        module.train(was_training)
    return [op for op in tracer.operations if op is not None]


@dataclass
class _Tracer:
    module: nn.Module
    operations: list[Operation | None] = field(default_factory=list)
    # By id; the tensors are kept alive so that no id is used twice.
    _values: dict[int, _Value] = field(default_factory=dict)
    _alive: list[Tensor] = field(default_factory=list)
    _stack: list[str] = field(default_factory=lambda: [""])

    def run(self, example: Tensor) -> None:
        names = {layer: name for name, layer in self.module.named_modules()}
        handles = []
        for layer, name in names.items():
            handles.append(layer.register_forward_pre_hook(self._enter(name)))
            handles.append(layer.register_forward_hook(self._leave))
        self._know(example, _Value((("", example.shape[1]),)))
        try:
            with _Watch(self):
                self.module(example)
        finally:
            for handle in handles:
                handle.remove()
        self._alive.clear()
        self._values.clear()

    def _enter(self, name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            self._stack.append(name)

        return hook

    def _leave(self, *_: Any) -> None:
        self._stack.pop()

    def _know(self, tensor: Tensor, value: _Value) -> None:
        self._values[id(tensor)] = value
        self._alive.append(tensor)

    def see(self, called: str, args: tuple[Any, ...], result: Any) -> None:
        """Take in one call of PyTorch's dispatcher."""
        tensors = [t for t in _flat(args) if isinstance(t, Tensor)]
        known = [t for t in tensors if id(t) in self._values]
        outputs = [t for t in _flat((result,)) if isinstance(t, Tensor)]
        if not known or not outputs:
            return
        values = [self._values[id(t)] for t in known]
        for value in values:
            value.uses += 1
        first, out = values[0], outputs[0]
        if called in _FREE:
            for output in outputs:
                self._know(output, self._moved(first, known[0], output))
            return
        kind = _NAMES.get(called, called)
        if called in ("convolution", "addmm", "mm", "linear"):
            self._layer(called, known[0], first, out)
            return
        index = first.producer
        producer = self.operations[index] if index is not None else None
        if kind == "Norm" and producer is not None and producer.is_layer:
            self._know(out, dataclasses.replace(first, uses=0))
            return
        if kind in _FUSED and producer is not None and index is not None:
            fits = producer.is_layer or producer.kind == "Add"
            if fits and not producer.activation and first.uses == 1:
                self.operations[index] = dataclasses.replace(producer, activation=kind)
                self._know(out, _Value(first.pieces, index))
                return
        if kind == "Add" and len(known) == 2 and known[0].shape == known[1].shape:
            for value in sorted(values, key=lambda v: v.producer or -1, reverse=True):
                index = value.producer
                layer = self.operations[index] if index is not None else None
                if layer is None or index is None or not layer.is_layer or value.uses != 1:
                    continue
                if layer.adds or layer.activation or layer.kind == "Gemm":
                    continue
                self.operations[index] = dataclasses.replace(layer, adds=True)
                self._know(out, _Value(first.pieces, index))
                return
        pieces = first.pieces
        if kind == "Concat" and len(known) == len(tensors):
            pieces = tuple(piece for value in values for piece in value.pieces)
        elif out.ndim > 1 and out.shape[1] != known[0].shape[1]:
            widest = max(zip(known, values, strict=True), key=lambda pair: pair[0].shape[1])
            pieces = (
                widest[1].pieces if widest[0].shape[1] == out.shape[1] else (("", out.shape[1]),)
            )
        source = max(known, key=lambda t: t.numel())
        self._know(out, _Value(pieces, len(self.operations)))
        height, width = _plane(source)
        out_height, out_width = _plane(out)
        kernel, stride, padding = (1, 1), (1, 1), (0, 0)
        if kind in ("MaxPool", "AveragePool"):
            kernel = _pair(args[1])
            stride = _pair(args[2]) if len(args) > 2 and args[2] else kernel
            padding = _pair(args[3]) if len(args) > 3 else (0, 0)
        name = f"{self._stack[-1]}/{kind.lower()}"
        made = Operation(name, kind, pieces, pieces, height, width, out_height, out_width)
        self.operations.append(
            dataclasses.replace(made, kernel=kernel, stride=stride, padding=padding)
        )

    def _moved(self, value: _Value, before: Tensor, after: Tensor) -> _Value:
        """Follow channels through a reshape, a slice or a permutation."""
        old, new = _channels(before), _channels(after)
        if old == new or old == 0:
            return dataclasses.replace(value, uses=0)
        # Flattening multiplies them, splitting leaves a share.
        pieces = tuple((name, round(count * new / old)) for name, count in value.pieces)
        if sum(count for _, count in pieces) != new:
            pieces = (("", new),)
        return _Value(pieces, None)

    def _layer(self, called: str, source: Tensor, value: _Value, out: Tensor) -> None:
        name = self._stack[-1]
        layer = self.module.get_submodule(name) if name else self.module
        if not isinstance(layer, COUNTED) or isinstance(layer, nn.Conv1d | nn.Conv3d):
            self._know(out, _Value((("", _channels(out)),)))
            return
        height, width = _plane(source)
        out_height, out_width = _plane(out)
        outputs = ((name, _channels(out)),)
        if isinstance(layer, nn.Linear):
            made = Operation(name, "Gemm", value.pieces, outputs, height, width, height, width)
        else:
            convolution: Any = layer
            padding = convolution.padding
            if isinstance(padding, str):
                padding = tuple(d * (k - 1) // 2 for d, k in zip(
                    convolution.dilation, convolution.kernel_size, strict=True))  # fmt: skip
            transposed = isinstance(layer, nn.ConvTranspose2d)
            made = Operation(
                name,
                "ConvTranspose" if transposed else "Conv",
                value.pieces,
                outputs,
                height,
                width,
                out_height,
                out_width,
                tuple(convolution.kernel_size),
                tuple(convolution.stride),
                tuple(padding),
                tuple(convolution.dilation),
                int(convolution.groups),
            )
        self._know(out, _Value(outputs, len(self.operations)))
        self.operations.append(made)


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch lacks the type
    """Passes every call on, and tells the tracer of it."""

    def __init__(self, tracer: _Tracer) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch lacks the type
        self._tracer = tracer

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        del types
        result = func(*args, **(kwargs or {}))
        self._tracer.see(func.overloadpacket.__name__, args, result)
        return result


def _flat(values: Any) -> list[Any]:
    flat: list[Any] = []
    for value in values:
        flat.extend(_flat(value) if isinstance(value, list | tuple) else [value])
    return flat


def _plane(tensor: Tensor) -> tuple[int, int]:
    if tensor.ndim == 4:
        return int(tensor.shape[2]), int(tensor.shape[3])
    return 1, 1


def _channels(tensor: Tensor) -> int:
    if tensor.ndim == 4:
        return int(tensor.shape[1])
    return int(tensor.shape[-1]) if tensor.ndim else 0


def _pair(value: Any) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    values = [int(each) for each in value]
    return (values[0], values[-1]) if values else (1, 1)
