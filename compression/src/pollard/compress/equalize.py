"""Make the channels between two layers equally wide before their ranges are measured.

Cross-layer equalisation (Nagel et al., 2019): where a convolution's output goes through a
rectifier into one other layer, a channel can be made larger in the first and smaller in
the second, and the network computes the same. Weights have a scale of their own for each
output channel here, so what is balanced is one channel's activations against the weights
that read them (as in SmoothQuant, Xiao et al., 2022); in front of a depthwise layer, whose
weights read one channel each, all channels can be made equally wide for nothing.

Factors are powers of two: the float network gives the same numbers bit by bit, but for
what a rectifier with an upper bound cuts beyond all that calibration saw.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

# Largest power of two that a channel is multiplied by.
_MOST = 12

# What multiplies its output when its input is multiplied, channel by channel.
_HOMOGENEOUS = {"Relu", "LeakyRelu", "MaxPool", "AveragePool", "GlobalAveragePool"}


@dataclass(frozen=True)
class Pair:
    """Two layers, the second of which alone reads what the first gives."""

    first: str
    """Name of the node that gives the channels."""
    second: str
    """Name of the node that reads them."""
    tensor: str
    """What the second reads."""
    bounded: bool
    """Whether a rectifier between them has an upper bound."""


def find_pairs(core: onnx.ModelProto) -> list[Pair]:
    """Return the pairs of layers whose channels can be balanced."""
    graph = core.graph
    constants = {tensor.name for tensor in graph.initializer}
    uses: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            uses.setdefault(name, []).append(node)
    outputs = {value.name for value in graph.output}

    def only_reader(name: str) -> onnx.NodeProto | None:
        readers = uses.get(name, [])
        return readers[0] if len(readers) == 1 and name not in outputs else None

    def own_weights(node: onnx.NodeProto) -> bool:
        return all(name in constants and len(uses[name]) == 1 for name in node.input[1:] if name)

    found = []
    for node in graph.node:
        if node.op_type != "Conv" or not own_weights(node):
            continue
        name, bounded = node.output[0], False
        reader = only_reader(name)
        while reader is not None and reader.input[0] == name:
            if reader.op_type == "Conv":
                if own_weights(reader):
                    found.append(Pair(node.name, reader.name, name, bounded))
                break
            if reader.op_type == "Clip" and _starts_at_zero(core, reader):
                bounded = True
            elif reader.op_type not in _HOMOGENEOUS:
                break
            name = reader.output[0]
            reader = only_reader(name)
    return found


def _starts_at_zero(core: onnx.ModelProto, node: onnx.NodeProto) -> bool:
    if len(node.input) < 2:
        return False
    for tensor in core.graph.initializer:
        if tensor.name == node.input[1]:
            return float(numpy_helper.to_array(tensor).ravel()[0]) == 0.0
    return False


def equalize(
    core: onnx.ModelProto, pairs: list[Pair], peaks: dict[str, NDArray[np.float64]]
) -> onnx.ModelProto:
    """Return a copy of a float model with balanced channels.

    Args:
        core: It is not changed.
        pairs: Of :func:`find_pairs`.
        peaks: Tensor of a pair → largest magnitude of each channel.
    """
    model = onnx.ModelProto()
    model.CopyFrom(core)
    nodes = {node.name: node for node in model.graph.node}
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    for pair in pairs:
        first, second = nodes[pair.first], nodes[pair.second]
        reading = numpy_helper.to_array(tensors[second.input[1]])
        group = next((a.i for a in second.attribute if a.name == "group"), 1)
        factors = np.exp2(_exponents(reading, group, peaks[pair.tensor], pair.bounded))
        _multiply(tensors[first.input[1]], factors.reshape(-1, 1, 1, 1))
        if len(first.input) > 2 and first.input[2]:
            _multiply(tensors[first.input[2]], factors)
        _multiply(tensors[second.input[1]], _by_input(1 / factors, reading.shape, group))
    return model


def _exponents(
    reading: NDArray[np.float32], group: int, peaks: NDArray[np.float64], bounded: bool
) -> NDArray[np.float64]:
    """Return the power of two that each channel is multiplied by."""
    outs, each = reading.shape[:2]
    top = peaks.max(initial=0.0)
    live = peaks > top * 1e-9
    if top <= 0:
        return np.zeros_like(peaks)
    safe = np.where(live, peaks, top)
    if each == 1 and group == outs:
        wanted = top / safe
    else:
        parts = np.abs(reading).reshape(group, outs // group, each, -1)
        weights = parts.max(axis=(1, 3)).reshape(-1).astype(np.float64)
        live &= weights > 0
        balance = np.sqrt(np.where(live, weights, 1.0) / safe)
        # The widest channel stays as wide as the widest was.
        wanted = balance * top / (balance * safe)[live].max(initial=1e-30)
    exponents = np.floor(np.log2(wanted) + 1e-9)
    # Where a rectifier has an upper bound, a smaller channel would be cut later than before.
    low = 0 if bounded else -_MOST
    return np.where(live, np.clip(exponents, low, _MOST), 0.0)


def _by_input(
    factors: NDArray[np.float64], shape: tuple[int, ...], group: int
) -> NDArray[np.float64]:
    """Return one factor per weight from one per input channel."""
    outs, each = shape[:2]
    spread = np.repeat(factors.reshape(group, each), outs // group, axis=0)
    return spread.reshape(outs, each, *[1] * (len(shape) - 2))


def _multiply(tensor: onnx.TensorProto, factors: NDArray[np.float64]) -> None:
    values = numpy_helper.to_array(tensor) * factors.astype(np.float32)
    tensor.CopyFrom(numpy_helper.from_array(values.astype(np.float32), tensor.name))
