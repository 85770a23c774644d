"""Bundles made to hurt: refused by name, in the child, and the manager goes on."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from typing import Any

import grpc
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from pollard.bundle.v1 import bundle_pb2

INPUT = helper.make_tensor_value_info("image", TensorProto.UINT8, ["n", 4, 4, 1])
OUTPUT = helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["n", 3])


def model(change: Callable[[onnx.ModelProto], None] = lambda made: None, opset: int = 17) -> bytes:
    """The graph of `bundles`, changed."""
    weights = np.zeros((16, 3), np.float32)
    nodes = [
        helper.make_node("Cast", ["image"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Flatten", ["float"], ["flat"]),
        helper.make_node("MatMul", ["flat", "weights"], ["scores"]),
    ]
    made = helper.make_model(
        helper.make_graph(
            nodes, "g", [INPUT], [OUTPUT], [numpy_helper.from_array(weights, "weights")]
        ),
        opset_imports=[helper.make_opsetid("", opset)],
        ir_version=9,
    )
    change(made)
    return made.SerializeToString()


def external(location: str, **entries: str) -> Callable[[onnx.ModelProto], None]:
    def change(made: onnx.ModelProto) -> None:
        tensor = made.graph.initializer[0]
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in {"location": location, **entries}.items():
            tensor.external_data.add(key=key, value=value)

    return change


def lying_length(made: onnx.ModelProto) -> None:
    made.graph.initializer[0].dims[0] = 1 << 20


def giant(made: onnx.ModelProto) -> None:
    made.graph.initializer[0].dims[0] = 1 << 62


def nested(made: onnx.ModelProto) -> None:
    body = helper.make_graph([], "b", [], [])
    for _ in range(24):
        body = helper.make_graph(
            [helper.make_node("If", ["c"], ["d"], then_branch=body)], "b", [], []
        )
    made.graph.node.append(helper.make_node("If", ["c"], ["d"], then_branch=body))


def cyclic(made: onnx.ModelProto) -> None:
    made.graph.node[0].input[0] = "scores"
    made.graph.node[2].input[0] = "float"


def grows(made: onnx.ModelProto) -> None:
    """A few bytes of graph that ask for 4 TiB when they run."""
    size = numpy_helper.from_array(np.array([1 << 40], np.int64), "size")
    made.graph.initializer.append(size)
    made.graph.node.insert(0, helper.make_node("ConstantOfShape", ["size"], ["much"]))
    made.graph.node.insert(1, helper.make_node("ReduceSum", ["much"], ["sum"], keepdims=0))
    made.graph.node[-1].output[0] = "before"
    made.graph.node.append(helper.make_node("Add", ["before", "sum"], ["scores"]))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (model(external("../../etc/passwd")), "'../../etc/passwd', which is not a file"),
        (model(external("/etc/passwd")), "'/etc/passwd', which is not a file"),
        (model(external("weights.bin")), "not a file of the bundle"),
        (model(external("model.onnx", offset="10", length="99999999")), "up to byte 100000009"),
        (model(external("model.onnx", offset="-5")), "reads cpu-fp32/model.onnx"),
        (model(external("model.onnx", offset="many")), "no range"),
        (model(lying_length), "declares 12582912 bytes and holds 192"),
        (model(giant), "impossible dimensions"),
        (model(nested), "nested more than 64 deep"),
        (model(cyclic), "cpu-fp32"),
        (model(grows), "within the memory of a check"),
        (model(opset=99), "newer opset"),
        (model()[:-10], "cut off"),
        (model()[:5], "cut off"),
        (b"\xff" * 64, "cut off or damaged"),
        (b"\x0a\x00", "no graph"),
        (b"not a model at all", ""),
    ],
    ids=[
        "up and out",
        "absolute",
        "not in the bundle",
        "beyond the end",
        "before the start",
        "no number",
        "lying length",
        "giant",
        "nested",
        "cyclic",
        "grows",
        "opset",
        "truncated",
        "five bytes",
        "endless numbers",
        "empty",
        "text",
    ],
)
async def test_a_hostile_graph_is_refused(
    suite: Any, bundles: Any, helpers: Any, content: bytes, words: str
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await suite.client.push(bundles.tar(1, model=content))
    assert raised.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert helpers.info_of(raised.value).reason == "MODEL_LOAD_FAILED"
    assert words in raised.value.details()
    assert not list(suite.service.blobs)
    assert not list(suite.service.store.uploads.iterdir())


def with_golden(helpers: Any) -> bundle_pb2.Manifest:
    manifest = helpers.manifest()
    manifest.variants[0].golden_file = "cpu-fp32/golden.npz"
    return manifest


def zipped(**entries: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def bomb() -> bytes:
    buffer = io.BytesIO()
    with (
        zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("input/image.npy", "w", force_zip64=True) as entry,
    ):
        for _ in range(1100):
            entry.write(bytes(1 << 20))
    return buffer.getvalue()


def pickled() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **{"input/image": np.array([object], dtype=object)})
    return buffer.getvalue()


def wrong_shape() -> bytes:
    buffer = io.BytesIO()
    values = {"input/image": np.zeros((1, 5), np.uint8), "output/scores": np.zeros((1, 3))}
    np.savez(buffer, **values)
    return buffer.getvalue()


LIE = b"\x93NUMPY\x01\x00v\x00" + (
    b"{'descr': '|u1', 'fortran_order': False, 'shape': (4611686018427387904,), }".ljust(117)
    + b"\n"
)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (bomb(), "bytes unpacked"),
        (pickled(), "not a readable NumPy archive"),
        (zipped(**{"input/image.npy": LIE}), "not a readable NumPy archive"),
        (b"PK\x03\x04 and then nothing", "not a readable NumPy archive"),
        (zipped(**{"else.npy": b""}), ""),
        (wrong_shape(), "golden inputs"),
    ],
    ids=["bomb", "pickle", "lying shape", "no archive", "nothing of use", "wrong shape"],
)
async def test_a_hostile_golden_file_is_refused(
    suite: Any, bundles: Any, helpers: Any, content: bytes, words: str
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await suite.client.push(
            bundles.tar(1, says=with_golden(helpers), **{"cpu-fp32/golden.npz": content})
        )
    assert raised.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert words in raised.value.details()
    assert not list(suite.service.blobs)


async def test_weights_in_a_file_of_the_bundle_are_taken(suite: Any, bundles: Any) -> None:
    weights = np.ones((16, 3), np.float32).tobytes()
    content = model(external("weights.bin", length=str(len(weights))))
    pushed = await suite.client.push(
        bundles.tar(1, model=content, **{"cpu-fp32/weights.bin": weights})
    )
    assert pushed.revision.revision == 1


async def test_a_graph_that_never_ends_is_ended(
    suite_with: Any, bundles: Any, helpers: Any
) -> None:
    def endless(made: onnx.ModelProto) -> None:
        body = helper.make_graph(
            [
                helper.make_node("Identity", ["go"], ["go_on"]),
                helper.make_node("Identity", ["x"], ["y"]),
            ],
            "body",
            [
                helper.make_tensor_value_info("i", TensorProto.INT64, []),
                helper.make_tensor_value_info("go", TensorProto.BOOL, []),
                helper.make_tensor_value_info("x", TensorProto.FLOAT, None),
            ],
            [
                helper.make_tensor_value_info("go_on", TensorProto.BOOL, []),
                helper.make_tensor_value_info("y", TensorProto.FLOAT, None),
            ],
        )
        made.graph.node[-1].output[0] = "once"
        made.graph.initializer.extend(
            [
                numpy_helper.from_array(np.array(1 << 62, np.int64), "times"),
                numpy_helper.from_array(np.array(True), "go_in"),
            ]
        )
        made.graph.node.append(
            helper.make_node("Loop", ["times", "go_in", "once"], ["scores"], body=body)
        )

    async with suite_with(check_timeout_seconds=3.0) as suite:
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await suite.client.push(bundles.tar(1, model=model(endless)))
        assert helpers.info_of(raised.value).reason == "CHECK_TIMEOUT"


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda m: setattr(m.variants[0], "max_batch_size", 2**32 - 1), "max_batch_size"),
        (lambda m: m.inputs[0].shape.__setitem__(1, 2**62), "max_batch_size"),
        (lambda m: setattr(m.variants[0].requirements, "opset", 3), "opset 3"),
    ],
    ids=["batch", "dimension", "opset"],
)
async def test_a_manifest_of_nonsense_values_is_refused(
    suite: Any, bundles: Any, helpers: Any, change: Any, field: str
) -> None:
    from google.protobuf import json_format

    from pollard.runtime.bundle import Bundle

    bundle = bundles.make(1)
    manifest = bundle_pb2.Manifest()
    manifest.CopyFrom(bundle.manifest)
    change(manifest)
    raw = json_format.MessageToJson(manifest, preserving_proto_field_name=True).encode()
    (bundle.path / "manifest.json").write_bytes(raw)

    class Plain:
        path, digest = bundle.path, ""

    Plain.manifest = manifest
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await suite.client.push(helpers.packed(Plain))
    assert raised.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert field in raised.value.details()
    assert isinstance(bundle, Bundle)
