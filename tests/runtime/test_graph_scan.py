"""A look through a graph sees what stands in it, and refuses what is not true."""

from __future__ import annotations

import contextlib

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from pollard.runtime.errors import ModelLoadFailed
from pollard.runtime.graph_scan import ScanLimits, check_external, check_opset, scan_graph


def branching() -> onnx.ModelProto:
    """A graph with a branch, a constant in an attribute, a function and external data."""
    value = numpy_helper.from_array(np.ones((2, 3), np.float32), "value")
    branch = helper.make_graph(
        [helper.make_node("Constant", [], ["out"], value=value)],
        "branch",
        [],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, [2, 3])],
    )
    outside = TensorProto(name="outside", data_type=TensorProto.FLOAT, dims=[4])
    outside.data_location = TensorProto.EXTERNAL
    for key, text in (("location", "w.bin"), ("offset", "16"), ("length", "16")):
        outside.external_data.add(key=key, value=text)
    graph = helper.make_graph(
        [helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)],
        "g",
        [helper.make_tensor_value_info("c", TensorProto.BOOL, [])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 3])],
        [numpy_helper.from_array(np.zeros(7, np.int64), "seven"), outside],
    )
    function = helper.make_function(
        "own", "F", ["a"], ["b"], [helper.make_node("Relu", ["a"], ["b"])], []
    )
    return helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", 18), helper.make_opsetid("own", 1)],
        functions=[function],
    )


def test_everything_is_counted_wherever_it_stands(tmp_path):
    path = tmp_path / "m.onnx"
    path.write_bytes(branching().SerializeToString())
    found = scan_graph(path)
    assert found.opsets == {"": 18, "own": 1}
    assert found.nodes == 4
    assert found.tensors == 4
    assert found.weight_bytes == 2 * 24 + 56 + 16
    assert found.external == [("w.bin", 16, 16)]


def test_external_data_is_the_bundle_s_own_and_within_its_file(tmp_path):
    path = tmp_path / "m.onnx"
    path.write_bytes(branching().SerializeToString())
    found = scan_graph(path)
    check_external(found, "cpu/m.onnx", {"cpu/w.bin": 32})
    for sizes in ({"cpu/w.bin": 31}, {"w.bin": 32}, {}):
        with pytest.raises(ModelLoadFailed, match=r"w\.bin"):
            check_external(found, "cpu/m.onnx", sizes)


def test_the_opset_is_what_the_manifest_says(make_linear_model, tmp_path):
    path = tmp_path / "m.onnx"
    path.write_bytes(make_linear_model())
    found = scan_graph(path)
    check_opset(found, 18)
    check_opset(found, 0)
    with pytest.raises(ModelLoadFailed, match="opset 17"):
        check_opset(found, 17)


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        (ScanLimits(max_nodes=3), "more than 3 nodes"),
        (ScanLimits(max_depth=4), "nested more than 4"),
        (ScanLimits(max_weight_bytes=100), "more than 100 bytes"),
    ],
)
def test_limits_are_told_by_name(tmp_path, limits, words):
    path = tmp_path / "m.onnx"
    path.write_bytes(branching().SerializeToString())
    with pytest.raises(ModelLoadFailed, match=words):
        scan_graph(path, limits)


def test_an_empty_file_is_no_model(tmp_path):
    path = tmp_path / "m.onnx"
    path.touch()
    with pytest.raises(ModelLoadFailed, match="empty"):
        scan_graph(path)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_damaged_bytes_are_refused_or_read_never_worse(tmp_path, data):
    raw = bytearray(branching().SerializeToString())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, 20))
    path = tmp_path / "m.onnx"
    path.write_bytes(bytes(raw[: len(raw) - cut]))
    # Any other error fails the test.
    with contextlib.suppress(ModelLoadFailed):
        assert scan_graph(path).nodes <= len(raw)
