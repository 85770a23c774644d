"""Requests that are right, and each way in which one can be wrong."""

import grpc
import numpy as np
import pytest
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2

from pollard.inference import grpc_service_pb2 as pb
from pollard.runtime.sessions import TensorInfo
from pollard.services.inference.errors import RequestInvalid
from pollard.services.inference.tensors import decode_inputs

INVALID = grpc.StatusCode.INVALID_ARGUMENT
NOT_FOUND = grpc.StatusCode.NOT_FOUND


def values_of(response: pb.ModelInferResponse) -> np.ndarray:
    (output,) = response.outputs
    assert output.name == "y"
    assert output.datatype == "FP32"
    return np.frombuffer(response.raw_output_contents[0], np.float32).reshape(output.shape)


async def refused(call) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


@pytest.mark.parametrize("server", [0.0, 1e6], ids=["workers", "inline"], indirect=True)
async def test_raw_contents_are_run_and_answered_raw(stub, tensor_request) -> None:
    request = tensor_request([[1, 2, 3, 4], [5, 6, 7, 8]], id="request-7")
    response = await stub.ModelInfer(request, timeout=10)
    assert values_of(response).tolist() == [[2, 3, 4, 5], [6, 7, 8, 9]]
    assert response.id == "request-7"
    assert response.model_name == "adder"
    assert response.model_version == "1"
    assert not response.outputs[0].HasField("contents")


async def test_typed_contents_are_run_too(stub) -> None:
    request = pb.ModelInferRequest(model_name="adder", model_version="1")
    tensor = request.inputs.add(name="x", datatype="FP32", shape=[1, 4])
    tensor.contents.fp32_contents.extend([0, 1, 2, 3])
    response = await stub.ModelInfer(request, timeout=10)
    assert values_of(response).tolist() == [[1, 2, 3, 4]]


async def test_requested_outputs_are_honoured(stub, tensor_request) -> None:
    request = tensor_request()
    request.outputs.add(name="y")
    assert len((await stub.ModelInfer(request, timeout=10)).outputs) == 1
    request.outputs.add(name="z")
    error = await refused(stub.ModelInfer(request, timeout=10))
    assert error.code() == INVALID
    assert "unexpected inference output 'z' for model 'adder'" in error.details()


async def test_an_error_carries_one_error_info(stub) -> None:
    error = await refused(stub.ModelInfer(pb.ModelInferRequest(model_name="no"), timeout=10))
    details = dict(error.trailing_metadata())["grpc-status-details-bin"]
    status = status_pb2.Status.FromString(details)
    (packed,) = status.details
    assert isinstance(packed, any_pb2.Any)
    info = error_details_pb2.ErrorInfo()
    assert packed.Unpack(info)
    assert (info.reason, info.domain, info.metadata["model"]) == (
        "MODEL_UNKNOWN",
        "pollard.ai",
        "no",
    )


@pytest.mark.parametrize(
    ("model", "version", "code", "words"),
    [
        ("x", "", NOT_FOUND, "Request for unknown model: 'x' is not found"),
        ("x", "1", NOT_FOUND, "Request for unknown model: 'x' version 1 is not found"),
        ("adder", "9", NOT_FOUND, "Request for unknown model: 'adder' version 9 is not found"),
        ("adder", "new", INVALID, "failed to get model version from specified version string"),
        ("adder", "0", INVALID, "failed to get model version from specified version string"),
        ("adder", "-1", INVALID, "failed to get model version from specified version string"),
        ("adder", "9" * 40, INVALID, "failed to get model version from specified version string"),
    ],
)
async def test_unknown_models_and_versions(
    stub, tensor_request, model, version, code, words
) -> None:
    request = tensor_request()
    request.model_name, request.model_version = model, version
    error = await refused(stub.ModelInfer(request, timeout=10))
    assert error.code() == code
    assert words in error.details()
    error = await refused(
        stub.ModelMetadata(pb.ModelMetadataRequest(name=model, version=version), timeout=10)
    )
    assert error.code() == code


async def test_an_unknown_alias_is_not_found(stub, tensor_request) -> None:
    error = await refused(
        stub.ModelInfer(tensor_request(), metadata=[("pollard-alias", "canary")], timeout=10)
    )
    assert error.code() == NOT_FOUND
    assert "has no alias 'canary'" in error.details()
    response = await stub.ModelInfer(
        tensor_request(), metadata=[("pollard-alias", "production")], timeout=10
    )
    assert response.model_version == "1"


def _change(request: pb.ModelInferRequest, what: str) -> None:
    tensor = request.inputs[0]
    if what == "datatype":
        tensor.datatype = "INT32"
    elif what == "no datatype":
        tensor.datatype = ""
    elif what == "width":
        tensor.shape[:] = [1, 5]
        request.raw_input_contents[0] = bytes(20)
    elif what == "rank":
        tensor.shape[:] = [4]
    elif what == "negative":
        tensor.shape[:] = [-1, 4]
    elif what == "empty batch":
        tensor.shape[:] = [0, 4]
        request.raw_input_contents[0] = b""
    elif what == "huge":
        tensor.shape[:] = [2**62, 4]
    elif what == "batch":
        tensor.shape[:] = [9, 4]
        request.raw_input_contents[0] = bytes(9 * 16)
    elif what == "bytes":
        request.raw_input_contents[0] = bytes(15)
    elif what == "both":
        tensor.contents.fp32_contents.extend([0] * 4)
    elif what == "no data":
        del request.raw_input_contents[:]
    elif what == "wrong contents":
        del request.raw_input_contents[:]
        tensor.contents.int_contents.extend([0] * 4)
    elif what == "few contents":
        del request.raw_input_contents[:]
        tensor.contents.fp32_contents.extend([0] * 3)
    elif what == "name":
        tensor.name = "z"
    elif what == "twice":
        request.inputs.append(tensor)
        request.raw_input_contents.append(bytes(16))
    elif what == "no input":
        del request.inputs[:]
        del request.raw_input_contents[:]
    elif what == "too many raw":
        request.raw_input_contents.append(bytes(16))
    elif what == "reserved":
        request.parameters["triton_new"].bool_param = True
    elif what == "timeout type":
        request.parameters["timeout"].string_param = "1"


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("datatype", "inference input 'x' data-type is 'INT32', but model 'adder' expects 'FP32'"),
        ("no datatype", "data-type is ''"),
        ("width", "unexpected shape for input 'x' for model 'adder'. Expected [-1,4], got [1,5]"),
        ("rank", "Expected [-1,4], got [4]"),
        ("negative", "got [-1,4]"),
        ("empty batch", "got [0,4]"),
        ("huge", "batch-size must be <= 8"),
        ("batch", "inference request batch-size must be <= 8 for 'adder'"),
        ("bytes", "Expected 16, got 15"),
        (
            "both",
            "contents field must not be specified when using raw_input_contents for 'x' for model "
            "'adder'",
        ),
        ("no data", "unable to find data for input tensor 'x' for model 'adder'"),
        ("wrong contents", "Expected 4 in fp32_contents, got 4 in int_contents"),
        ("few contents", "Expected 4 in fp32_contents, got 3 in fp32_contents"),
        ("name", "unexpected inference input 'z' for model 'adder'"),
        ("twice", "input 'x' already exists in request"),
        ("no input", "expected 1 inputs but got 0 inputs for model 'adder'"),
        ("too many raw", "expected 1 raw input contents"),
        ("reserved", "unexpected key 'triton_new'"),
        ("timeout type", "invalid value type for 'timeout' parameter"),
    ],
)
async def test_what_does_not_fit_the_model_is_invalid(stub, tensor_request, what, words) -> None:
    request = tensor_request()
    _change(request, what)
    error = await refused(stub.ModelInfer(request, timeout=10))
    assert error.code() == INVALID, error.details()
    assert words in error.details()
    # The server goes on.
    assert (await stub.ModelInfer(tensor_request(), timeout=10)).model_version == "1"


async def test_bytes_that_are_no_request_are_invalid(server) -> None:
    async with grpc.aio.insecure_channel(server.address) as channel:
        call = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        error = await refused(call(b"\xff\xff\xff", timeout=10))
    assert error.code() == INVALID


async def test_shared_memory_is_refused_with_words(stub, tensor_request) -> None:
    request = tensor_request()
    request.inputs[0].parameters["shared_memory_region"].string_param = "r"
    request.inputs[0].parameters["shared_memory_byte_size"].int64_param = 16
    del request.raw_input_contents[:]
    error = await refused(stub.ModelInfer(request, timeout=10))
    assert error.code() == grpc.StatusCode.UNIMPLEMENTED
    assert "raw contents" in error.details()


async def test_models_are_not_loaded_by_request_where_a_manager_says_what_runs(stub) -> None:
    load = pb.RepositoryModelLoadRequest(model_name="adder")
    error = await refused(stub.RepositoryModelLoad(load, timeout=10))
    assert error.code() == grpc.StatusCode.UNAVAILABLE
    assert "explicit model load / unload is not allowed" in error.details()
    unload = pb.RepositoryModelUnloadRequest(model_name="adder")
    error = await refused(stub.RepositoryModelUnload(unload, timeout=10))
    assert error.code() == grpc.StatusCode.UNAVAILABLE


async def test_health_metadata_and_index(stub) -> None:
    assert (await stub.ServerLive(pb.ServerLiveRequest(), timeout=10)).live
    assert (await stub.ServerReady(pb.ServerReadyRequest(), timeout=10)).ready
    assert (await stub.ServerMetadata(pb.ServerMetadataRequest(), timeout=10)).name == "pollard"
    for name, version, ready in [("adder", "", True), ("adder", "1", True), ("adder", "2", False)]:
        answer = await stub.ModelReady(pb.ModelReadyRequest(name=name, version=version), timeout=10)
        assert answer.ready == ready
    assert not (await stub.ModelReady(pb.ModelReadyRequest(name="x"), timeout=10)).ready
    metadata = await stub.ModelMetadata(pb.ModelMetadataRequest(name="adder"), timeout=10)
    assert list(metadata.versions) == ["1"]
    assert metadata.platform == "onnxruntime_onnx"
    (x,) = metadata.inputs
    assert (x.name, x.datatype, list(x.shape)) == ("x", "FP32", [-1, 4])
    index = await stub.RepositoryIndex(pb.RepositoryIndexRequest(), timeout=10)
    assert [(m.name, m.version, m.state) for m in index.models] == [("adder", "1", "READY")]
    error = await refused(
        stub.RepositoryIndex(pb.RepositoryIndexRequest(repository_name="r"), timeout=10)
    )
    assert error.code() == grpc.StatusCode.UNIMPLEMENTED


async def test_configuration_statistics_and_streams_of_a_bundle(stub, tensor_request) -> None:
    answer = await stub.ModelConfig(pb.ModelConfigRequest(name="adder"), timeout=10)
    config = answer.config
    assert (config.name, config.backend, config.max_batch_size) == ("adder", "onnxruntime", 8)
    assert [(tensor.name, list(tensor.dims)) for tensor in config.input] == [("x", [4])]
    assert list(config.version_policy.specific.versions) == [1]
    assert config.instance_group[0].count >= 1
    requests = [tensor_request(id="1"), pb.ModelInferRequest(id="2"), tensor_request(id="3")]
    stream = stub.ModelStreamInfer(iter(requests), timeout=10)
    answers = [answer async for answer in stream]
    assert [answer.infer_response.id for answer in answers] == ["1", "2", "3"]
    assert [bool(answer.error_message) for answer in answers] == [False, True, False]
    statistics = await stub.ModelStatistics(pb.ModelStatisticsRequest(name="adder"), timeout=10)
    (stats,) = statistics.model_stats
    assert stats.inference_stats.success.count == 2
    assert stats.inference_count == 2


@pytest.mark.parametrize(
    ("expected", "shape"),
    [
        ((-1, 4), [2, 4]),
        ((-1, 4), [8, 4]),
        ((3, 4), [3, 4]),
        ((-1,), [5]),
        ((), []),
    ],
)
def test_the_usual_request_is_read_without_copying(expected, shape) -> None:
    values = np.arange(np.prod(shape, dtype=int), dtype=np.float32).reshape(shape)
    request = pb.ModelInferRequest(raw_input_contents=[values.tobytes()])
    request.inputs.add(name="x", datatype="FP32", shape=shape)
    read = decode_inputs(request, [TensorInfo("x", "FP32", expected)], 8)["x"]
    assert read.tolist() == values.tolist()
    assert (read.shape, read.dtype) == (values.shape, values.dtype)
    assert not read.flags.owndata
    assert not read.flags.writeable


@pytest.mark.parametrize(
    ("expected", "shape", "size"),
    [
        ((-1, 4), [-1, 4], 16),
        ((-1, 4), [0, 4], 0),
        ((-1, 4), [9, 4], 144),
        ((-1, 4), [1, 4], 12),
        ((-1, 4), [1, 4], 20),
        ((-1, 4), [4], 16),
        ((-1, 4), [], 4),
        ((-1,), [], 4),
        ((-1, -1), [-1, -1], 4),
        ((-1, -1), [1, -1], 4),
        ((-1, -1, -1), [1, -1, -1], 4),
        ((2, 2), [2, 3], 24),
        ((-1, 4), [1, 4, 1], 16),
        ((-1, 4), [2**62, 4], 16),
        ((-1, 4), [-(2**62), -4], 16),
    ],
)
def test_what_nearly_is_a_usual_request_is_refused_with_words(expected, shape, size) -> None:
    request = pb.ModelInferRequest(model_name="m", raw_input_contents=[bytes(size)])
    request.inputs.add(name="x", datatype="FP32", shape=shape)
    with pytest.raises(RequestInvalid):
        decode_inputs(request, [TensorInfo("x", "FP32", expected)], 8)
