from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import nn

from pollard.compress import export
from pollard.compress.biases import correct_biases
from pollard.compress.data import Part
from pollard.compress.quantize import QuantizeConfig, prepare
from pollard.compress.spec import InputSpec
from pollard.compress.torch_graph import TorchGraph

SPEC = InputSpec(16, 16, 3, (0.5,) * 3, (0.25,) * 3)


def test_the_answers_mean_comes_back_to_the_float_networks(
    depthwise_core: Callable[..., tuple[nn.Module, onnx.ModelProto, InputSpec]],
) -> None:
    _, core, spec = depthwise_core()
    part = Part("x", export.probe_images(spec, 64, seed=5), np.zeros(64, np.int64))
    prepared = prepare(core, spec, part, QuantizeConfig(reduce_range=True))
    ranges = prepared.collect().ranges("percentile-99.9")
    reader = prepared.read()
    batches = [feeds[export.CORE_INPUT] for feeds in iter(reader.get_next, None) if feeds]
    inputs = np.concatenate(batches)
    quantized = prepared.build_core(ranges)
    corrected = correct_biases(prepared.core, quantized, inputs)

    def means(model: object) -> NDArray[np.float32]:
        made: NDArray[np.float32] = TorchGraph(model).run(torch.from_numpy(inputs)).numpy()  # type: ignore[arg-type]
        return made.mean(axis=0)

    wanted = means(prepared.core)
    before = np.abs(means(quantized) - wanted).max()
    after = np.abs(means(prepared.build_core(ranges, core=corrected)) - wanted).max()
    assert after < 0.3 * before


def test_a_layer_without_a_bias_gets_one_and_the_rest_stays() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    part = Part("x", export.probe_images(SPEC, 8, seed=5), np.zeros(8, np.int64))
    prepared = prepare(export.export_core(net, SPEC), SPEC, part, QuantizeConfig())
    feeds = prepared.read().get_next()
    assert feeds is not None
    before = prepared.core.SerializeToString(deterministic=True)
    model = prepared.build_core(prepared.collect().ranges("min-max"))
    corrected = correct_biases(prepared.core, model, feeds[export.CORE_INPUT])
    assert [len(n.input) for n in corrected.graph.node if n.op_type == "Conv"] == [3, 3]
    assert prepared.core.SerializeToString(deterministic=True) == before
