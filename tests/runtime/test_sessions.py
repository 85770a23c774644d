from __future__ import annotations

import io
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper

from pollard.bundle.v1 import bundle_pb2
from pollard.runtime.errors import BundleCorrupt, GoldenMismatch, ModelLoadFailed, SignatureMismatch
from pollard.runtime.sessions import check_golden, check_signature, open_session


def test_a_bundle_s_model_runs_and_agrees_with_its_golden_outputs(make_bundle):
    bundle = make_bundle()
    session = open_session(bundle.model_path("cpu-fp32"))
    check_signature(session, bundle.manifest)
    check_golden(session, bundle, "cpu-fp32")
    assert session.inputs[0].datatype == "UINT8"
    assert session.inputs[0].shape == (-1, 8, 8, 1)


def test_many_threads_share_one_session(make_bundle):
    bundle = make_bundle()
    session = open_session(bundle.model_path("cpu-fp32"))
    images = np.random.default_rng(0).integers(0, 256, (64, 1, 8, 8, 1), dtype=np.uint8)
    alone = [session.run({"image": image})["scores"] for image in images]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda image: session.run({"image": image})["scores"], images))
    np.testing.assert_array_equal(together, alone)


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x08\x0a"])
def test_a_file_that_is_no_model_is_refused(tmp_path, content):
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(ModelLoadFailed, match="cannot load"):
        open_session(path)


def test_cuda_that_is_not_there_is_an_error_and_no_silent_fallback(make_bundle):
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has CUDA")
    with pytest.raises(ModelLoadFailed, match="CUDAExecutionProvider"):
        open_session(make_bundle().model_path("cpu-fp32"), target="cuda-fp16")


def _lie(change):
    def edit(manifest: bundle_pb2.Manifest) -> None:
        change(manifest)

    return edit


@pytest.mark.parametrize(
    "change",
    [
        lambda m: setattr(m.inputs[0], "data_type", bundle_pb2.DATA_TYPE_FP32),
        lambda m: m.inputs[0].shape.__setitem__(1, 9),
        lambda m: m.inputs[0].shape.append(1),
        lambda m: m.outputs[0].shape.__setitem__(1, 7),
        lambda m: m.inputs.add(name="second", data_type=bundle_pb2.DATA_TYPE_FP32, shape=[1]),
    ],
    ids=["dtype", "size", "rank", "classes", "another input"],
)
def test_a_manifest_that_lies_about_the_graph_is_found(make_bundle, change):
    bundle = make_bundle(edit=change)
    session = open_session(bundle.model_path("cpu-fp32"))
    with pytest.raises(SignatureMismatch):
        check_signature(session, bundle.manifest)


def _archive(**arrays) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


IMAGE = np.zeros((1, 8, 8, 1), np.uint8)


@pytest.mark.parametrize(
    ("arrays", "error"),
    [
        ({"input/image": IMAGE, "output/scores": np.ones((1, 3), np.float32)}, GoldenMismatch),
        (
            {"input/image": IMAGE, "output/scores": np.full((1, 3), np.nan, np.float32)},
            GoldenMismatch,
        ),
        ({"input/image": IMAGE, "output/scores": np.zeros((1, 4), np.float32)}, GoldenMismatch),
        ({"input/other": IMAGE, "output/scores": np.zeros((1, 3), np.float32)}, GoldenMismatch),
        ({"output/scores": np.zeros((1, 3), np.float32)}, BundleCorrupt),
    ],
    ids=["values", "nan", "shape", "wrong input", "no inputs"],
)
def test_golden_outputs_that_do_not_agree_are_found(make_bundle, arrays, error):
    bundle = make_bundle(files={"cpu-fp32/golden.npz": _archive(**arrays)})
    session = open_session(bundle.model_path("cpu-fp32"))
    with pytest.raises(error):
        check_golden(session, bundle, "cpu-fp32")


def test_a_golden_file_with_pickled_objects_is_refused(make_bundle):
    hostile = _archive(**{"input/image": np.array([{"a": 1}], dtype=object)})
    bundle = make_bundle(files={"cpu-fp32/golden.npz": hostile})
    with pytest.raises(BundleCorrupt):
        bundle.golden("cpu-fp32")


class Arrivals:
    """onnxruntime's session, which keeps what it was given."""

    def __init__(self, raw: onnxruntime.InferenceSession) -> None:
        self._raw = raw
        self.arrays: list[np.ndarray] = []

    def run(self, names: list[str], feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        self.arrays.extend(feeds.values())
        return self._raw.run(names, feeds)


@pytest.mark.parametrize("skipped", range(9))
def test_elements_may_lie_anywhere_and_are_copied_only_where_they_must(skipped: int) -> None:
    graph = helper.make_graph(
        [helper.make_node("Neg", ["x"], ["y"])],
        "negative",
        [helper.make_tensor_value_info("x", TensorProto.DOUBLE, ["n", 1000])],
        [helper.make_tensor_value_info("y", TensorProto.DOUBLE, ["n", 1000])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    session = open_session(model.SerializeToString())
    session.raw = arrivals = Arrivals(session.raw)
    values = np.arange(2000, dtype=np.float64).reshape(2, 1000)
    memory = np.zeros(values.nbytes + 16, np.uint8)
    skipped -= memory.ctypes.data % 8
    room = memory[skipped % 8 :][: values.nbytes]
    room[:] = values.reshape(-1).view(np.uint8)
    given = np.ndarray(values.shape, np.float64, room.data)
    np.testing.assert_array_equal(session.run({"x": given})["y"], -values)
    (arrived,) = arrivals.arrays
    assert arrived.flags.aligned
    assert np.shares_memory(arrived, memory) == given.flags.aligned


def test_bf16_is_carried_as_its_bits() -> None:
    nodes = [
        helper.make_node("Cast", ["x"], ["wide"], to=TensorProto.FLOAT),
        helper.make_node("Add", ["wide", "z"], ["sum"]),
        helper.make_node("Cast", ["sum"], ["y"], to=TensorProto.BFLOAT16),
    ]
    graph = helper.make_graph(
        nodes,
        "bf16",
        [
            helper.make_tensor_value_info("x", TensorProto.BFLOAT16, ["n", 2]),
            helper.make_tensor_value_info("z", TensorProto.FLOAT, [1]),
        ],
        [
            helper.make_tensor_value_info("y", TensorProto.BFLOAT16, ["n", 2]),
            helper.make_tensor_value_info("sum", TensorProto.FLOAT, ["n", 2]),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    session = open_session(model.SerializeToString())
    assert [info.datatype for info in (*session.inputs, *session.outputs)] == [
        "BF16",
        "FP32",
        "BF16",
        "FP32",
    ]
    bits = np.frombuffer(b"\x80\x3f\x00\x40", np.uint16).reshape(1, 2)  # 1 and 2
    outputs = session.run({"x": bits, "z": np.float32([1])})
    assert outputs["y"].dtype == np.uint16
    assert outputs["y"].tolist() == [[0x4000, 0x4040]]  # 2 and 3
    assert outputs["sum"].tolist() == [[2, 3]]
