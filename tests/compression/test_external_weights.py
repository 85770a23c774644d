"""Models whose weights lie in a file of their own are the same models."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from pollard.compress import external_weights


def network(weights: list[onnx.TensorProto]) -> onnx.ModelProto:
    shape = ["batch", 64]
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "large"], ["product"], name="product"),
            helper.make_node("Add", ["product", "small"], ["y"], name="sum"),
        ],
        "network",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        weights,
        doc_string="A layer.",
        value_info=[helper.make_tensor_value_info("product", TensorProto.FLOAT, shape)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    helper.set_model_props(model, {"made by": "a test"})
    return model


@pytest.fixture
def model() -> onnx.ModelProto:
    generator = np.random.default_rng(0)
    large = generator.standard_normal((64, 64)).astype(np.float32)
    small = generator.standard_normal(64).astype(np.float32)
    return network(
        [numpy_helper.from_array(large, "large"), numpy_helper.from_array(small, "small")]
    )


def test_a_small_model_is_one_file(model: onnx.ModelProto, tmp_path: Path) -> None:
    external_weights.save(model, tmp_path / "m.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"]
    assert onnx.load(tmp_path / "m.onnx") == model


def test_what_is_large_of_a_large_model_lies_beside_it(
    model: onnx.ModelProto, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(external_weights, "_WHOLE_BYTES", 1024)
    before = model.SerializeToString(deterministic=True)
    external_weights.save(model, tmp_path / "m.onnx")
    assert model.SerializeToString(deterministic=True) == before
    assert (tmp_path / "m.onnx.weights").stat().st_size == 4 * 64 * 64
    assert (tmp_path / "m.onnx").stat().st_size < 4096

    # All else is as it was: metadata, shapes, the weights that are small.
    read = onnx.load(tmp_path / "m.onnx")
    for tensor in read.graph.initializer:
        tensor.ClearField("data_location")
        assert not tensor.external_data
    for tensor in model.graph.initializer:
        tensor.ClearField("data_location")
    assert read == model

    x = np.random.default_rng(1).standard_normal((3, 64)).astype(np.float32)
    inside, outside = (
        onnxruntime.InferenceSession(source, providers=["CPUExecutionProvider"]).run(None, {"x": x})
        for source in (before, str(tmp_path / "m.onnx"))
    )
    assert np.array_equal(inside[0], outside[0])


def test_weights_that_are_no_raw_bytes_stay_in_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(external_weights, "_WHOLE_BYTES", 0)
    large = helper.make_tensor("large", TensorProto.FLOAT, (64, 64), np.ones(64 * 64))
    small = helper.make_tensor("small", TensorProto.FLOAT, (64,), np.ones(64))
    external_weights.save(network([large, small]), tmp_path / "m.onnx")
    assert onnx.load(tmp_path / "m.onnx") == network([large, small])
