from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from torch import nn

from pollard.compress import export
from pollard.compress.data import Dataset, Part
from pollard.compress.evaluate import session_predictor, torch_predictor
from pollard.compress.fake_quantize import FakeQuantized, trainer
from pollard.compress.quantize import Prepared, QuantizeConfig, prepare
from pollard.compress.spec import InputSpec
from pollard.compress.training import FitConfig
from pollard.runtime.machine import Machine
from pollard.runtime.sessions import open_session

SPEC = InputSpec(16, 16, 3, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


Make = Callable[..., tuple[nn.Module, onnx.ModelProto, InputSpec]]


def ready(core: onnx.ModelProto, images: np.ndarray) -> Prepared:
    part = Part("x/train", images, np.zeros(len(images), np.int64))
    config = QuantizeConfig(len(images), reduce_range=not Machine.detect().has_vnni)
    return prepare(core, SPEC, part, config)


def test_what_is_trained_gives_what_the_file_gives(depthwise_core: Make) -> None:
    _, core, _ = depthwise_core()
    images = export.probe_images(SPEC, 32, seed=5)
    prepared = ready(core, images)
    ranges = prepared.collect().ranges("mse")
    module = FakeQuantized(prepared, prepared.core, prepared.build_core(ranges))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(1.03)
    trained = module.write(prepared.core)
    file = open_session(export.serialize(prepared.build(ranges, core=trained)), target="cpu-int8")
    want = torch_predictor(module, SPEC)(images)
    got = session_predictor(file)(images)
    # Biases are rounded in the file, and ties fall either way.
    assert np.abs(got - want).max() < 0.05 * np.ptp(want)
    assert np.corrcoef(got.ravel(), want.ravel())[0, 1] > 0.999


def test_training_in_8_bits_brings_the_answers_nearer_and_leaves_no_float_layer(
    depthwise_core: Make, tmp_path: Path
) -> None:
    net, core, _ = depthwise_core()
    images = export.probe_images(SPEC, 192, seed=5)
    labels = torch_predictor(net, SPEC)(images).argmax(axis=1)
    part = Part("x/train", images, labels)
    data = Dataset("x", [str(i) for i in range(5)], part, part, part, "")
    prepared = ready(core, images)
    # Ranges that cut far too much: what rounding alone costs here is too little to see.
    ranges = {
        name: (0.5 * low, 0.5 * high)
        for name, (low, high) in prepared.collect().ranges("min-max").items()
    }
    quantized = prepared.build_core(ranges)
    config = FitConfig(4, 32, 1e-3, distill_weight=1.0, distill_temperature=1.0)
    trained, told = trainer(net, data, SPEC, config)(prepared, prepared.core, quantized)
    assert len(told["loss"]) == 4
    wanted = torch_predictor(net, SPEC)(images)
    errors = []
    for weights in (prepared.core, trained):
        raw = export.serialize(prepared.build(ranges, core=weights))
        got = session_predictor(open_session(raw, target="cpu-int8"))(images)
        errors.append(float(np.abs(got - wanted).mean()))
    assert errors[1] < 0.7 * errors[0]

    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(raw, options, providers=["CPUExecutionProvider"])
    operators = [n.op_type for n in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert operators.count("QLinearConv") == 7
    assert not {"Conv", "FusedConv", "Gemm", "MatMul", "Clip", "Add"} & set(operators)
