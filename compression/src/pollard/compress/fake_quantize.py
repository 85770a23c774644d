"""Train in 8 bits: the quantized graph with float weights, rounded on every pass.

Quantization-aware training with straight-through gradients (Jacob et al., 2018). The graph
that is trained is the one that is shipped, so what onnxruntime fuses in one it fuses in the
other; batch norms are folded already, and the ranges of activations stay as calibrated.
"""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper
from torch import Tensor, nn

from pollard.compress.data import Dataset
from pollard.compress.eight_bits import Train
from pollard.compress.errors import QuantizeFailed
from pollard.compress.progress import Reporter
from pollard.compress.quantize import Prepared, depthwise_overrides
from pollard.compress.spec import InputSpec
from pollard.compress.torch_graph import Attributes, Inputs, TorchGraph, dequantize_linear
from pollard.compress.training import FitConfig, fit

# What onnxruntime's quantizer calls what it made of a constant.
_SUFFIX = "_quantized"

# Of the time that is left, what training may take.
_SHARE = 0.5


class FakeQuantized(nn.Module):
    """A quantized graph whose weights and biases are trainable floats.

    Takes what the PyTorch model takes; gives the logits that the 8-bit file gives, but for
    sums that float32 rounds differently.

    Args:
        prepared: What the file is made from.
        core: Its float graph, with the weights to start from.
        quantized: :meth:`Prepared.build_core` of that.

    Raises:
        QuantizeFailed: the graph has an operator that PyTorch cannot run.
    """

    def __init__(
        self, prepared: Prepared, core: onnx.ModelProto, quantized: onnx.ModelProto
    ) -> None:
        super().__init__()
        self._graph = _FakeGraph(quantized)
        shift = torch.from_numpy(prepared.shift.astype(np.float32))
        self.register_buffer("_shift", shift, persistent=False)
        wide = depthwise_overrides(core, prepared.config)
        floats = {tensor.name: tensor for tensor in core.graph.initializer}
        kinds = {tensor.name: tensor.data_type for tensor in quantized.graph.initializer}
        self._weights: list[tuple[str, str, str, int | None, int]] = []
        made: set[str] = set()
        for node in self._graph.nodes:
            if node.op_type != "DequantizeLinear" or node.input[0] not in kinds:
                continue
            name = node.input[0].removesuffix(_SUFFIX)
            if name not in floats or kinds[node.input[0]] not in (
                TensorProto.INT8,
                TensorProto.INT32,
            ):
                continue
            attribute = "p_" + name.replace(".", "__")
            if name not in made:
                value = torch.from_numpy(np.array(numpy_helper.to_array(floats[name])))
                self.register_parameter(attribute, nn.Parameter(value))
                made.add(name)
            axis: int | None = next((a.i for a in node.attribute if a.name == "axis"), 0)
            if kinds[node.input[0]] == TensorProto.INT32:
                axis = None  # biases have 32 bits: nothing to learn to live with
            most = 64 if prepared.config.reduce_range and name not in wide else 127
            self._weights.append((node.output[0], name, attribute, axis, most))

    def forward(self, x: Tensor) -> Tensor:
        values: dict[str, Tensor] = {}
        for output, _, attribute, axis, most in self._weights:
            weight: Tensor = getattr(self, attribute)
            values[output] = weight if axis is None else fake_weight(weight, axis, most)
        shift: Tensor = self.get_buffer("_shift")
        return self._graph.run(x - shift.reshape(1, -1, 1, 1), values=values)

    def write(self, core: onnx.ModelProto) -> onnx.ModelProto:
        """Return a copy of a float graph with the weights as they are now."""
        model = onnx.ModelProto()
        model.CopyFrom(core)
        tensors = {tensor.name: tensor for tensor in model.graph.initializer}
        for _, name, attribute, _, _ in self._weights:
            value: NDArray[np.float32] = getattr(self, attribute).detach().cpu().numpy()
            tensors[name].CopyFrom(numpy_helper.from_array(value, name))
        return model


def trainer(
    teacher: nn.Module,
    data: Dataset,
    spec: InputSpec,
    config: FitConfig,
    reporter: Reporter | None = None,
) -> Train:
    """Return what trains a network in 8 bits, with the parent as its teacher.

    Args:
        teacher: The parent, in float.
        data: Train and choose are used.
        spec: What both take.
        config: How; see :func:`pollard.compress.training.fit`.
        reporter: Told of progress.
    """

    def train(
        prepared: Prepared, core: onnx.ModelProto, quantized: onnx.ModelProto
    ) -> tuple[onnx.ModelProto, dict[str, Any]]:
        left = math.inf if reporter is None else reporter.left
        if left <= 0:
            raise QuantizeFailed("the time that was given is over")
        module = FakeQuantized(prepared, core, quantized)
        history = fit(
            module, data, spec, config, teacher=teacher, reporter=reporter,
            title="Training in 8 bits", seconds=_SHARE * left,
        )  # fmt: skip
        return module.write(core), {"learning_rate": config.learning_rate, **asdict(history)}

    return train


def fake_weight(weight: Tensor, axis: int, most: int) -> Tensor:
    """Round to ``most`` steps on both sides of zero, per channel, as the quantizer will."""
    with torch.no_grad():
        others = [i for i in range(weight.ndim) if i != axis]
        scale = (weight.abs().amax(dim=others) / most).clamp(min=1e-12)
        # Whole numbers would be looked at each time, and a GPU waited for.
        zero = torch.zeros_like(scale)
    return torch.fake_quantize_per_channel_affine(weight, scale, zero, axis, -most, most)


class _FakeGraph(TorchGraph):
    """Rounds at every QuantizeLinear and leaves the value a float that gradients pass."""

    def _apply(
        self, node: onnx.NodeProto, inputs: Inputs, attributes: Attributes
    ) -> Tensor | list[Tensor]:
        if node.op_type == "QuantizeLinear":
            x = inputs[0]
            assert x is not None  # noqa: S101 - the quantizer writes all three
            # From the processor's memory: asking a GPU would wait for all that it computes.
            scale, zero = (self.constants[name] for name in node.input[1:3])
            limits = torch.iinfo(zero.dtype)
            return torch.fake_quantize_per_tensor_affine(
                x, float(scale), int(zero), limits.min, limits.max
            )
        if node.op_type == "DequantizeLinear":
            x = inputs[0]
            if x is not None and x.is_floating_point():
                return x
            return dequantize_linear(inputs, attributes)
        return super()._apply(node, inputs, attributes)  # type: ignore[return-value]
