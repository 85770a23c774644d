from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from pollard.compress import export, quantize
from pollard.compress.data import Part
from pollard.compress.evaluate import session_predictor, torch_predictor
from pollard.compress.macs import example_input
from pollard.compress.quantize import QuantizeConfig
from pollard.compress.shortcuts import rewrite_shortcuts
from pollard.compress.spec import InputSpec
from pollard.compress.zoo import find
from pollard.runtime.machine import Machine
from pollard.runtime.sessions import open_session

UNEVEN = InputSpec(16, 16, 3, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
EVEN = InputSpec(16, 16, 3, (0.0,) * 3, (1.0,) * 3)


def _net() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * 64, 5),
    ).eval()


def _part(spec: InputSpec, count: int = 40) -> Part:
    images = export.probe_images(spec, count, seed=5)
    return Part("synthetic/train", images, np.zeros(count, np.int64))


def _quantize(
    net: nn.Module, spec: InputSpec, config: QuantizeConfig | None = None
) -> onnx.ModelProto:
    core = export.export_core(net, spec)
    return quantize.quantize(core, spec, _part(spec), config or QuantizeConfig())


def _optimized(model: onnx.ModelProto, folder: Path) -> list[str]:
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(
        export.serialize(model), options, providers=["CPUExecutionProvider"]
    )
    return [node.op_type for node in onnx.load(folder / "optimized.onnx").graph.node]


@pytest.mark.parametrize("spec", [EVEN, UNEVEN])
def test_answers_stay_close_to_the_float_model(spec: InputSpec) -> None:
    net = _net()
    # With full weights, processors without VNNI add up what does not fit into 16 bits.
    config = QuantizeConfig(reduce_range=not Machine.detect().has_vnni)
    model = _quantize(net, spec, config)
    images = _part(spec).images
    want = torch_predictor(net, spec)(images)
    got = session_predictor(open_session(export.serialize(model), target="cpu-int8"))(images)
    assert np.abs(got - want).max() < 0.05 * np.ptp(want)


@pytest.mark.parametrize("spec", [EVEN, UNEVEN])
def test_every_convolution_and_dense_layer_runs_in_8_bits(spec: InputSpec, tmp_path: Path) -> None:
    operators = _optimized(_quantize(_net(), spec), tmp_path)
    assert operators.count("QLinearConv") == 2
    assert not {"Conv", "Gemm", "MatMul", "FusedConv", "Relu"} & set(operators)


def test_pixels_with_one_scale_are_the_quantized_input(tmp_path: Path) -> None:
    operators = _optimized(_quantize(_net(), EVEN), tmp_path)
    assert "QuantizeLinear" not in operators


def test_a_residual_network_keeps_no_float_operator_but_its_end(tmp_path: Path) -> None:
    entry = find("resnet20-cifar")
    torch.manual_seed(0)
    net = entry.build(10).eval()
    rewrite_shortcuts(net, example_input(entry.spec))
    operators = _optimized(_quantize(net, entry.spec), tmp_path)
    assert operators.count("QLinearConv") == 21
    assert operators.count("QLinearAdd") == 9
    assert not {"Conv", "FusedConv", "Add", "Pad", "Slice", "Relu"} & set(operators)


def test_without_vnni_weights_keep_to_seven_bits_and_nothing_is_required() -> None:
    config = QuantizeConfig(reduce_range=True)
    model = _quantize(_net(), EVEN, config)
    weights = [
        onnx.numpy_helper.to_array(tensor)
        for tensor in model.graph.initializer
        if tensor.data_type == onnx.TensorProto.INT8 and len(tensor.dims) >= 2
    ]
    assert len(weights) == 3
    assert all(np.abs(weight.astype(int)).max() <= 64 for weight in weights)
    assert quantize.requirements(config) == []
    assert quantize.requirements(QuantizeConfig()) == ["avx512_vnni"]


def test_depthwise_weights_keep_eight_bits_because_their_sums_do_not_saturate(
    depthwise_core: Callable[..., tuple[nn.Module, onnx.ModelProto, InputSpec]],
) -> None:
    _, core, spec = depthwise_core()
    model = quantize.quantize(core, spec, _part(spec), QuantizeConfig(reduce_range=True))
    most = {
        tensor.dims[1] == 1: int(np.abs(onnx.numpy_helper.to_array(tensor).astype(int)).max())
        for tensor in model.graph.initializer
        if tensor.data_type == onnx.TensorProto.INT8 and len(tensor.dims) == 4
    }
    assert most == {True: 127, False: 64}


def test_weights_are_quantized_per_channel() -> None:
    model = _quantize(_net(), EVEN)
    scales = [
        onnx.numpy_helper.to_array(tensor).shape
        for tensor in model.graph.initializer
        if tensor.name.endswith("_scale")
    ]
    assert (16,) in scales


def test_the_same_model_gives_the_same_bytes() -> None:
    one, other = (export.serialize(_quantize(_net(), UNEVEN)) for _ in range(2))
    assert one == other


def test_a_norm_over_maps_stays_float_and_the_rest_runs_in_8_bits() -> None:
    net = _net()
    net.insert(3, nn.LayerNorm([16, 8, 8]))
    config = QuantizeConfig(reduce_range=not Machine.detect().has_vnni)
    model = _quantize(net, UNEVEN, config)
    makers = {output: node.op_type for node in model.graph.node for output in node.output}
    nodes = {node.op_type: node for node in model.graph.node}
    assert nodes["LayerNormalization"].input[1] not in makers
    assert makers[nodes["Conv"].input[1]] == "DequantizeLinear"
    images = _part(UNEVEN).images
    want = torch_predictor(net, UNEVEN)(images)
    got = session_predictor(open_session(export.serialize(model), target="cpu-int8"))(images)
    assert np.abs(got - want).max() < 0.05 * np.ptp(want)
