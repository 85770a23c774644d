"""Bias correction: take back what rounding moves a channel's mean by.

After Nagel et al. (2019, §4.2), measured on images: layer by layer, with everything in
front of it in 8 bits already, the mean of each output channel is compared with the float
network's, and the difference goes into the bias.
"""

from __future__ import annotations

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from torch import Tensor

from pollard.compress.torch_graph import Inputs, TorchGraph

_LAYERS = {"Conv", "Gemm"}

# Values of the network's largest tensor; so many images are run at once.
_VALUES = 16 * 1024**2
_MOST_IMAGES = 128


def images_for(core: onnx.ModelProto) -> int:
    """Return how many images are run at once, so that memory stays bounded."""
    largest = 1
    for value in (*core.graph.value_info, *core.graph.input):
        sizes = [d.dim_value for d in value.type.tensor_type.shape.dim[1:]]
        largest = max(largest, int(np.prod([size or 1 for size in sizes], dtype=np.int64)))
    return int(np.clip(_VALUES // largest, 1, _MOST_IMAGES))


def correct_biases(
    core: onnx.ModelProto, quantized: onnx.ModelProto, inputs: NDArray[np.float32]
) -> onnx.ModelProto:
    """Return a copy of the float model whose biases make up for rounding.

    Args:
        core: The float model; it is not changed.
        quantized: What became of it, with the same float input.
        inputs: Images as both take them.

    Raises:
        QuantizeFailed: the graph has an operator that PyTorch cannot run.
    """
    wanted: dict[str, Tensor] = {}
    changes: dict[str, Tensor] = {}

    def remember(node: onnx.NodeProto, _: Inputs, made: Tensor) -> Tensor:
        if node.op_type in _LAYERS:
            wanted[node.name] = _channel_means(made)
        return made

    def correct(node: onnx.NodeProto, _: Inputs, made: Tensor) -> Tensor:
        if node.op_type not in _LAYERS or node.name not in wanted:
            return made
        change = wanted[node.name] - _channel_means(made)
        changes[node.name] = change
        return made + change.reshape(1, -1, *[1] * (made.ndim - 2))

    batch = torch.from_numpy(inputs)
    with torch.inference_mode():
        TorchGraph(core).run(batch, remember)
        TorchGraph(quantized).run(batch, correct)
    model = onnx.ModelProto()
    model.CopyFrom(core)
    add_to_biases(model, {name: change.numpy() for name, change in changes.items()})
    return model


def _channel_means(values: Tensor) -> Tensor:
    return values.mean(dim=(0, *range(2, values.ndim)))


def add_to_biases(model: onnx.ModelProto, changes: dict[str, NDArray[np.float32]]) -> None:
    """Add to the biases of nodes, by name, in place; a layer without a bias gets one."""
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    readers: dict[str, int] = {}
    for node in model.graph.node:
        for name in node.input:
            readers[name] = readers.get(name, 0) + 1
    for node in model.graph.node:
        if (change := changes.get(node.name)) is None:
            continue
        if len(node.input) > 2 and node.input[2]:
            tensor = tensors.get(node.input[2])
            # A bias that several layers share, or that is computed, is left alone.
            if tensor is None or readers[node.input[2]] > 1:
                continue
            bias = numpy_helper.to_array(tensor).astype(np.float64)
            beta = next((a.f for a in node.attribute if a.name == "beta"), 1.0) or 1.0
            made = (bias + change / beta).astype(np.float32).reshape(bias.shape)
            tensor.CopyFrom(numpy_helper.from_array(made, tensor.name))
        else:
            name = f"{node.output[0]}_bias"
            made = change.astype(np.float32)
            model.graph.initializer.append(numpy_helper.from_array(made, name))
            del node.input[2:]
            node.input.append(name)
