"""Requests through Triton's clients: each way, each type, each way to be wrong."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

VALUES = {
    "BOOL": np.array([[True, False]]),
    "UINT8": np.uint8([[0, 255]]),
    "UINT16": np.uint16([[0, 65535]]),
    "UINT32": np.uint32([[0, 2**32 - 1]]),
    "UINT64": np.uint64([[0, 2**64 - 1]]),
    "INT8": np.int8([[-128, 127]]),
    "INT16": np.int16([[-32768, 32767]]),
    "INT32": np.int32([[-(2**31), 2**31 - 1]]),
    "INT64": np.int64([[-(2**63), 2**63 - 1]]),
    "FP16": np.float16([[0.5, -2]]),
    "FP32": np.float32([[0.1, np.inf]]),
    "FP64": np.float64([[0.1, -1e300]]),
    "BF16": np.array([[0.5, -2]], ml_dtypes.bfloat16),
    "BYTES": np.array([["", "a\0ü"]], dtype=np.object_),
}


@pytest.mark.parametrize("datatype", VALUES)
async def test_every_type_comes_back_as_it_went(infer, inputs, datatype) -> None:
    values = VALUES[datatype]
    result = await infer(
        model_name=f"echo_{datatype.lower()}",
        inputs=[inputs["tensor"]("x", values, datatype)],
        request_id="this one",
    )
    response = result.get_response()
    assert (response.id, response.model_version) == ("this one", "1")
    assert response.outputs[0].datatype == datatype
    assert not response.outputs[0].HasField("contents")
    got = result.as_numpy("y")
    if datatype == "BYTES":
        assert got.tolist() == [[b"", "a\0ü".encode()]]
    else:
        np.testing.assert_array_equal(got, values)


async def test_several_inputs_and_outputs_in_any_order(infer, inputs) -> None:
    a = inputs["tensor"]("a", np.float32([[1, 2], [3, 4]]), "FP32")
    b = inputs["tensor"]("b", np.int32([[1, 1], [5, 5]]), "INT32")
    result = await infer(model_name="pair", inputs=[b, a])
    assert [output.name for output in result.get_response().outputs] == ["sum", "difference"]
    assert result.as_numpy("sum").tolist() == [[2, 3], [8, 9]]
    assert result.as_numpy("difference").tolist() == [[0, 1], [-2, -1]]
    wanted = [triton.InferRequestedOutput("difference")]
    result = await infer(model_name="pair", inputs=[a, b], outputs=wanted)
    assert [output.name for output in result.get_response().outputs] == ["difference"]


async def test_models_without_a_batch(infer, inputs) -> None:
    values = np.float32([1, 2, 3])
    result = await infer(model_name="flat", inputs=[inputs["tensor"]("x", values, "FP32")])
    assert result.as_numpy("y").tolist() == [2, 3, 4]
    # The first dimension is free, but by its configuration it is no batch.
    values = np.zeros((1000, 4), np.float32)
    result = await infer(model_name="free", inputs=[inputs["tensor"]("x", values, "FP32")])
    assert result.as_numpy("y").shape == (1000, 4)


@pytest.mark.parametrize(("version", "value"), [("", 2), ("1", 1), ("2", 2)])
async def test_versions(infer, inputs, version, value) -> None:
    result = await infer(model_name="adder", inputs=[inputs["x"]()], model_version=version)
    assert result.as_numpy("y").tolist() == [[value] * 4]
    assert result.get_response().model_version == str(value)


async def test_the_best_classes(infer, inputs) -> None:
    scores = np.float32([[0.5, 3, -1, 2], [9, 8, 7, 6]])
    wanted = [triton.InferRequestedOutput("y", class_count=2)]
    result = await infer(
        model_name="adder", inputs=[inputs["x"](scores)], outputs=wanted, model_version="1"
    )
    assert result.get_response().outputs[0].datatype == "BYTES"
    assert result.as_numpy("y").tolist() == [
        [b"4.000000:1:one", b"3.000000:3"],
        [b"10.000000:0:zero", b"9.000000:1:one"],
    ]
    wanted = [triton.InferRequestedOutput("y", class_count=99)]
    result = await infer(model_name="adder", inputs=[inputs["x"]()], outputs=wanted)
    assert result.as_numpy("y").shape == (1, 4)
    # A model without a batch ranks all it has; integers are written as such.
    flat = inputs["tensor"]("x", np.float32([1, 2, 3]), "FP32")
    result = await infer(model_name="flat", inputs=[flat], outputs=wanted)
    assert result.as_numpy("y").tolist() == [b"4.000000:2", b"3.000000:1", b"2.000000:0"]
    ints = inputs["tensor"]("x", np.int64([[7, 9]]), "INT64")
    result = await infer(model_name="echo_int64", inputs=[ints], outputs=wanted)
    assert result.as_numpy("y").tolist() == [[b"9:1", b"7:0"]]


async def test_parameters_that_mean_something_or_nothing_here(infer, inputs) -> None:
    result = await infer(
        model_name="adder",
        inputs=[inputs["x"]()],
        timeout=10_000_000,
        priority=1,
        sequence_id=7,
        sequence_start=True,
        parameters={"mine": "anything", "number": 1, "flag": True},
    )
    assert result.as_numpy("y").shape == (1, 4)


def _lie(made: triton.InferInput, shape: list[int] | None = None, raw: bytes | None = None):
    if shape is not None:
        made._input.shape[:] = shape
    if raw is not None:
        made._raw_content = raw
    return made


def _typed(made: triton.InferInput, count: int) -> triton.InferInput:
    made._input.contents.fp32_contents.extend([0.0] * count)
    return made


def _call(what: str, inputs) -> dict:
    x, tensor = inputs["x"], inputs["tensor"]
    y = triton.InferRequestedOutput
    a = tensor("a", np.zeros((1, 2), np.float32), "FP32")
    b = tensor("b", np.zeros((2, 2), np.int32), "INT32")
    wrong = tensor("x", np.zeros((1, 4), np.int32), "INT32")

    def text() -> triton.InferInput:
        return tensor("x", np.array([["a", "b"]], np.object_), "BYTES")

    calls = {
        "unknown model": {"model_name": "nobody", "inputs": [x()]},
        "unknown version": {"model_name": "adder", "inputs": [x()], "model_version": "9"},
        "not ready": {"model_name": "broken", "inputs": [x()]},
        "version not ready": {"model_name": "broken", "inputs": [x()], "model_version": "1"},
        "version no integer": {"model_name": "adder", "inputs": [x()], "model_version": "new"},
        "dtype": {"inputs": [wrong]},
        "shape": {"inputs": [x(np.zeros((1, 5)))]},
        "rank": {"inputs": [x(np.zeros(4))]},
        "negative": {"inputs": [_lie(x(), [-1, 4])]},
        "huge": {"model_name": "free", "inputs": [_lie(x(), [2**62, 4])]},
        "byte size": {"inputs": [_lie(x(), raw=bytes(15))]},
        "count": {"model_name": "pair", "inputs": [a]},
        "mixed batch": {"model_name": "pair", "inputs": [a, b]},
        "batch": {"inputs": [x(np.zeros((9, 4)))]},
        "twice": {"inputs": [x(), x()]},
        "unknown input": {"inputs": [tensor("z", np.zeros((1, 4), np.float32), "FP32")]},
        "unknown output": {"inputs": [x()], "outputs": [y("z")]},
        "output twice": {"inputs": [x()], "outputs": [y("y"), y("y")]},
        "both": {"inputs": [_typed(x(), 4)]},
        "no data": {"inputs": [triton.InferInput("x", [1, 4], "FP32")]},
        "bytes short": {"model_name": "echo_bytes", "inputs": [_lie(text(), raw=b"\1\0\0\0a")]},
        "bytes lie": {
            "model_name": "echo_bytes",
            "inputs": [_lie(text(), raw=b"\1\0\0\0a\xff\xff\xff\xff")],
        },
        "bytes many": {"model_name": "echo_bytes", "inputs": [_lie(text(), raw=bytes(12))]},
        "bytes not text": {
            "model_name": "echo_bytes",
            "inputs": [_lie(text(), raw=b"\1\0\0\0\xff\0\0\0\0")],
        },
        "class count": {"inputs": [x()], "outputs": [y("y")]},
        "class type": {"model_name": "echo_bytes", "inputs": [text()], "outputs": [y("y", 1)]},
    }
    call = {"model_name": "adder", **calls[what]}
    if what == "class count":
        call["outputs"][0]._output.parameters["classification"].int64_param = 0
    return call


WRONG = [
    ("unknown model", "NOT_FOUND", "Request for unknown model: 'nobody'"),
    ("unknown version", "NOT_FOUND", "Request for unknown model: 'adder' version 9"),
    ("not ready", "UNAVAILABLE", "at ready state"),
    ("version not ready", "UNAVAILABLE", "at ready state"),
    (
        "version no integer",
        "INVALID_ARGUMENT",
        "failed to get model version from specified version string",
    ),
    ("dtype", "INVALID_ARGUMENT", "data-type is 'INT32', but model 'adder' expects 'FP32'"),
    ("shape", "INVALID_ARGUMENT", "unexpected shape for input 'x' for model 'adder'"),
    ("rank", "INVALID_ARGUMENT", "unexpected shape for input 'x'"),
    ("negative", "INVALID_ARGUMENT", "unexpected shape for input 'x'"),
    ("huge", "INVALID_ARGUMENT", "input byte size mismatch for input 'x'"),
    ("byte size", "INVALID_ARGUMENT", "Expected 16, got 15"),
    ("count", "INVALID_ARGUMENT", "expected 2 inputs but got 1 inputs for model 'pair'"),
    ("mixed batch", "INVALID_ARGUMENT", "batch size does not match other inputs for 'pair'"),
    ("batch", "INVALID_ARGUMENT", "inference request batch-size must be <= 8 for 'adder'"),
    ("twice", "INVALID_ARGUMENT", "input 'x' already exists in request"),
    ("unknown input", "INVALID_ARGUMENT", "unexpected inference input 'z' for model 'adder'"),
    ("unknown output", "INVALID_ARGUMENT", "unexpected inference output 'z' for model 'adder'"),
    ("output twice", "INVALID_ARGUMENT", "output 'y' already requested"),
    (
        "both",
        "INVALID_ARGUMENT",
        "contents field must not be specified when using raw_input_contents for 'x' for model "
        "'adder'",
    ),
    ("no data", "INVALID_ARGUMENT", "unable to find data for input tensor 'x'"),
    ("bytes short", "INVALID_ARGUMENT", "expected 2 string elements"),
    ("bytes lie", "INVALID_ARGUMENT", "incomplete string data"),
    ("bytes many", "INVALID_ARGUMENT", "expected 2 string elements"),
    ("bytes not text", "INVALID_ARGUMENT", "is not UTF-8"),
    ("class count", "INVALID_ARGUMENT", "invalid value for 'classification' parameter"),
    ("class type", "INVALID_ARGUMENT", "unsupported type 'BYTES'"),
]


@pytest.mark.parametrize(("what", "status", "words"), WRONG, ids=[row[0] for row in WRONG])
async def test_what_is_wrong_has_its_status_and_its_words(
    infer, client, inputs, what, status, words
) -> None:
    with pytest.raises(InferenceServerException) as caught:
        await infer(**_call(what, inputs))
    assert words in caught.value.message()
    if caught.value.has_status:
        assert caught.value.status() == f"StatusCode.{status}"
    assert client.infer("adder", [inputs["x"]()]).as_numpy("y").shape == (1, 4)
