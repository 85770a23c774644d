"""Large tensors are taken out of a request's bytes, and nothing else changes."""

from __future__ import annotations

import random

import grpc
import numpy as np
import pytest

from pollard.inference import grpc_service_pb2 as pb
from pollard.runtime.sessions import TensorInfo
from pollard.services.inference.errors import RequestInvalid
from pollard.services.inference.protocol import unpack
from pollard.services.inference.tensors import decode_inputs
from pollard.services.inference.wire import take_out_tensors

LARGE = 80_000


def image_request(*sizes: int) -> pb.ModelInferRequest:
    request = pb.ModelInferRequest(model_name="m", id="é")
    request.parameters["priority"].int64_param = 3
    for number, size in enumerate(sizes):
        tensor = request.inputs.add(name=f"x{number}", datatype="UINT8", shape=[1, size])
        tensor.parameters["p"].string_param = "v"
        request.raw_input_contents.append(bytes([number]) * size)
    request.outputs.add(name="y")
    return request


@pytest.mark.parametrize("sizes", [(LARGE,), (LARGE, 3), (0, LARGE, 127, 128, 40_000)])
def test_what_is_taken_out_and_the_rest_are_the_request(sizes: tuple[int, ...]) -> None:
    request = image_request(*sizes)
    data = request.SerializeToString()
    left, raw = unpack(data)
    assert raw is not None
    assert [bytes(each) for each in raw] == list(request.raw_input_contents)
    assert not left.raw_input_contents
    left.raw_input_contents.extend(request.raw_input_contents)
    assert left == request


def test_fields_may_come_in_any_order_and_more_than_once() -> None:
    first = pb.ModelInferRequest(raw_input_contents=[b"a" * LARGE], model_name="old")
    second = image_request(LARGE)
    data = first.SerializeToString() + second.SerializeToString()
    left, raw = unpack(data)
    whole = pb.ModelInferRequest.FromString(data)
    assert raw is not None
    assert [bytes(each) for each in raw] == list(whole.raw_input_contents)
    assert left.model_name == whole.model_name == "m"


def test_a_tensor_of_bytes_stays_where_it_came() -> None:
    request = pb.ModelInferRequest(raw_input_contents=[bytes(range(200)) * (LARGE // 200)])
    request.inputs.add(name="x", datatype="UINT8", shape=[1, LARGE])
    data = request.SerializeToString()
    left, raw = unpack(data)
    read = decode_inputs(left, [TensorInfo("x", "UINT8", (-1, LARGE))], 8, taken_out=raw)["x"]
    assert np.shares_memory(read, np.frombuffer(data, np.uint8))
    assert not read.flags.writeable
    assert read.tobytes() == request.raw_input_contents[0]


@pytest.mark.parametrize("name", ["", "m", "mm", "mmm", "mmmm"])
def test_larger_elements_stay_where_they_came_wherever_that_is(name: str) -> None:
    values = np.arange(LARGE, dtype=np.float32)[None]
    request = pb.ModelInferRequest(model_name=name, raw_input_contents=[values.tobytes()])
    request.inputs.add(name="x", datatype="FP32", shape=values.shape)
    data = request.SerializeToString()
    left, raw = unpack(data)
    read = decode_inputs(left, [TensorInfo("x", "FP32", (-1, LARGE))], 8, taken_out=raw)["x"]
    assert np.shares_memory(read, np.frombuffer(data, np.uint8))
    assert (read == values).all()


def test_text_is_read_from_what_was_taken_out() -> None:
    word = "wörter".encode() * 12_000
    request = pb.ModelInferRequest(raw_input_contents=[len(word).to_bytes(4, "little") + word])
    request.inputs.add(name="x", datatype="BYTES", shape=[1])
    left, raw = unpack(request.SerializeToString())
    assert raw is not None
    read = decode_inputs(left, [TensorInfo("x", "BYTES", (-1,))], 8, taken_out=raw)["x"]
    assert read.tolist() == [word.decode()]


def test_small_requests_are_left_to_protobuf() -> None:
    data = image_request(100).SerializeToString()
    assert take_out_tensors(data) is None
    request, raw = unpack(data)
    assert raw is None
    assert len(request.raw_input_contents) == 1


def test_what_protobuf_refuses_is_refused() -> None:
    whole = image_request(LARGE).SerializeToString()
    generator = random.Random(5)
    broken = [whole[:end] for end in (*range(LARGE, len(whole) - 1, 7), len(whole) - 1)]
    for _ in range(300):
        changed = bytearray(whole)
        changed[generator.randrange(120)] = generator.randrange(256)
        broken.append(bytes(changed))
    refused = 0
    for data in broken:
        try:
            expected = pb.ModelInferRequest.FromString(data)
        except Exception:
            refused += 1
            with pytest.raises(RequestInvalid):
                unpack(data)
            continue
        request, raw = unpack(data)
        if raw is not None:
            request.raw_input_contents.extend(bytes(each) for each in raw)
        assert request == expected
    assert refused > 50


def test_unknown_fields_and_very_many_fields_are_left_to_protobuf() -> None:
    tensor = pb.ModelInferRequest(raw_input_contents=[bytes(LARGE)]).SerializeToString()
    group = bytes([15 << 3 | 3, 15 << 3 | 4])
    two_bytes = bytes([0x82, 0x01, 0])
    varint = bytes([1 << 3 | 0, 5])
    for odd in (group, two_bytes, varint, b"\x12\x00" * 100):
        assert take_out_tensors(tensor + odd) is None


async def test_a_large_request_is_answered_as_a_small_one(stub, tensor_request) -> None:
    request = tensor_request([[1, 2, 3, 4]] * 8)
    request.parameters["note"].string_param = "x" * LARGE
    response = await stub.ModelInfer(request, timeout=10)
    answer = np.frombuffer(response.raw_output_contents[0], np.float32)
    assert answer.reshape(8, 4).tolist() == [[2, 3, 4, 5]] * 8
    request.raw_input_contents.append(b"more")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.ModelInfer(request, timeout=10)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "got 2" in caught.value.details()
