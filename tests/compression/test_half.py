from __future__ import annotations

import sys

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper
from torch import nn

from pollard.compress import export, half
from pollard.compress.errors import HalfOverflow
from pollard.compress.evaluate import session_predictor, torch_predictor
from pollard.compress.spec import InputSpec
from pollard.runtime.sessions import open_session

SPEC = InputSpec(12, 10, 3, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def _net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 4),
    ).eval()


@pytest.fixture(scope="module")
def core() -> onnx.ModelProto:
    return export.export_core(_net(), SPEC)


def test_weights_and_arithmetic_are_float16_and_inputs_and_outputs_keep_their_types(
    core: onnx.ModelProto,
) -> None:
    model = half.to_float16(export.attach_pixels(core, SPEC))
    assert {t.data_type for t in model.graph.initializer} <= {
        TensorProto.FLOAT16,
        TensorProto.INT64,
    }
    session = open_session(export.serialize(model))
    assert [(i.name, i.datatype) for i in session.inputs] == [("image", "UINT8")]
    assert [(o.name, o.datatype) for o in session.outputs] == [("logits", "FP32")]
    images = export.probe_images(SPEC, 5)
    wanted = torch_predictor(_net(), SPEC)(images)
    got = session_predictor(session)(images)
    assert 0 < np.abs(got - wanted).max() < 5e-3 * np.ptp(wanted)


def test_a_float_input_is_cast_first(core: onnx.ModelProto) -> None:
    model = half.to_float16(core)
    assert model.graph.node[0].op_type == "Cast"
    assert open_session(export.serialize(model)).inputs[0].datatype == "FP32"


def test_the_source_is_not_changed(core: onnx.ModelProto) -> None:
    before = core.SerializeToString(deterministic=True)
    half.to_float16(core)
    assert core.SerializeToString(deterministic=True) == before


def test_layers_can_stay_in_float(core: onnx.ModelProto) -> None:
    name = next(node.name for node in core.graph.node if node.op_type == "Conv")
    model = half.to_float16(core, keep_float=[name])
    kinds = {t.name: t.data_type for t in model.graph.initializer}
    node = next(node for node in model.graph.node if node.name == name)
    assert kinds[node.input[1]] == TensorProto.FLOAT


@pytest.mark.parametrize("value", [1e5, float("nan")])
def test_weights_beyond_float16_are_refused_by_name(core: onnx.ModelProto, value: float) -> None:
    model = onnx.ModelProto()
    model.CopyFrom(core)
    tensor = next(t for t in model.graph.initializer if t.data_type == TensorProto.FLOAT)
    values = numpy_helper.to_array(tensor).copy()
    values.flat[0] = value
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    with pytest.raises(HalfOverflow, match=tensor.name):
        half.to_float16(model)


def test_the_path_of_imports_stays_as_it_was(core: onnx.ModelProto) -> None:
    before = list(sys.path)
    half.to_float16(core)
    assert sys.path == before


def _scaled(core: onnx.ModelProto, factor: float) -> onnx.ModelProto:
    """Return the model on pixels with its first weights multiplied."""
    model = export.attach_pixels(core, SPEC)
    tensor = next(t for t in model.graph.initializer if t.name == "0.weight")
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * factor, tensor.name))
    return model


def test_activations_are_told_by_layer(core: onnx.ModelProto) -> None:
    images = export.probe_images(SPEC, 6)
    ranges = half.check_range(_scaled(core, 1.0), [images[:4], images[4:]])
    assert {"0", "5"} <= ranges.keys()
    # The logits are among them.
    wanted = torch_predictor(_net(), SPEC)(images)
    assert ranges["5"] == pytest.approx(np.abs(wanted).max(), rel=1e-4)


def test_activations_near_the_end_of_float16_are_refused_by_layer(core: onnx.ModelProto) -> None:
    images = export.probe_images(SPEC, 4)
    reached = half.check_range(_scaled(core, 1.0), [images])["0"]
    factor = half.LARGEST / reached
    half.check_range(_scaled(core, factor * 0.4), [images])
    with pytest.raises(HalfOverflow, match=r"beyond 32752, .* in 0 \("):
        half.check_range(_scaled(core, factor * 0.6), [images])


def test_emulation_rounds_after_every_operator(core: onnx.ModelProto) -> None:
    converted = half.to_float16(export.attach_pixels(core, SPEC))
    images = export.probe_images(SPEC, 5)
    wanted = torch_predictor(_net(), SPEC)(images)
    got = session_predictor(open_session(export.serialize(half.emulated(converted))))(images)
    assert 0 < np.abs(got - wanted).max() < 5e-3 * np.ptp(wanted)
    # The logits themselves have passed through float16.
    np.testing.assert_array_equal(got, got.astype(np.float16).astype(np.float32))


def test_emulation_overflows_where_float16_does(core: onnx.ModelProto) -> None:
    images = export.probe_images(SPEC, 4)
    reached = half.check_range(_scaled(core, 1.0), [images])["0"]
    model = half.to_float16(_scaled(core, 1.5 * half.LARGEST / reached))
    emulated = session_predictor(open_session(export.serialize(half.emulated(model))))(images)
    assert not np.isfinite(emulated).all()
