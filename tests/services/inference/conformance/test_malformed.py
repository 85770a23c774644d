"""Requests that no decent client sends: each gets a status, and the next request is served."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pollard.inference import grpc_service_pb2 as pb
from pollard.inference import grpc_service_pb2_grpc as pb_grpc

EXPECTED = {
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.ALREADY_EXISTS,
}

SETTINGS = settings(
    max_examples=200,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)

names = st.sampled_from(["x", "a", "b", "y", "sum", "", "z", "x\0", "ü" * 300]) | st.text(
    st.characters(exclude_categories=["Cs"]), max_size=20
)
MODELS = ["adder", "pair", "flat", "free", "broken", "echo_bytes", "echo_bool", "echo_bf16"]
models = st.sampled_from([*MODELS, "nobody"])
datatypes = st.sampled_from(
    ["FP32", "INT32", "BYTES", "BOOL", "BF16", "FP16", "UINT64", "", "fp32", "FP128"]
)
dims = st.sampled_from([0, 1, 2, 4, -1, 2**31, 2**32, 2**62, 2**63 - 1, -(2**63), 3, 8, 9])
shapes = st.lists(dims, max_size=6) | st.sampled_from([[1, 4], [1, 2], [3], [2, 4]])
sizes = st.sampled_from([0, 1, 8, 15, 16, 17, 32, 64, 2**31, 2**62, 2**63 - 1, -1, -(2**63)])
texts = st.sampled_from(["region", "gone", "", "x" * 300]) | st.text(
    st.characters(exclude_categories=["Cs"]), max_size=9
)
lengths = st.sampled_from([0, 1, 4, 2**31, 2**32 - 1]).map(lambda n: n.to_bytes(4, "little"))
raws = st.one_of(
    st.binary(max_size=64),
    st.sampled_from([bytes(16), bytes(8), bytes(12), bytes(4)]),
    st.lists(lengths | st.binary(max_size=5), max_size=4).map(b"".join),
)


@st.composite
def parameters(draw: st.DrawFn, known: tuple[str, ...]) -> dict[str, pb.InferParameter]:
    made = {}
    for name in draw(st.lists(st.sampled_from([*known, "triton_x", "other"]), max_size=3)):
        kind = draw(
            st.sampled_from(
                ["bool_param", "int64_param", "uint64_param", "string_param", "double_param", ""]
            )
        )
        value = pb.InferParameter()
        if kind == "bool_param":
            value.bool_param = draw(st.booleans())
        elif kind == "int64_param":
            value.int64_param = draw(sizes)
        elif kind == "uint64_param":
            value.uint64_param = draw(st.integers(0, 2**64 - 1))
        elif kind == "string_param":
            value.string_param = draw(texts)
        elif kind == "double_param":
            value.double_param = draw(st.floats())
        made[name] = value
    return made


SHARED = ("shared_memory_region", "shared_memory_byte_size", "shared_memory_offset")


@st.composite
def requests(draw: st.DrawFn) -> pb.ModelInferRequest:
    request = pb.ModelInferRequest(
        model_name=draw(models),
        model_version=draw(st.sampled_from(["", "1", "2", "0", "-1", "9" * 30, "x"])),
        id=draw(texts),
    )
    for _ in range(draw(st.integers(0, 3))):
        tensor = request.inputs.add(name=draw(names), datatype=draw(datatypes), shape=draw(shapes))
        for name, value in draw(parameters(SHARED)).items():
            tensor.parameters[name].CopyFrom(value)
        if draw(st.booleans()):
            tensor.contents.fp32_contents.extend(draw(st.lists(st.just(0.0), max_size=5)))
        if draw(st.integers(0, 9)) == 0:
            tensor.contents.int_contents.extend(draw(st.lists(st.integers(-9, 9), max_size=5)))
        if draw(st.integers(0, 9)) == 0:
            tensor.contents.bytes_contents.extend(draw(st.lists(raws, max_size=3)))
    for _ in range(draw(st.integers(0, 2))):
        output = request.outputs.add(name=draw(names))
        for name, value in draw(parameters((*SHARED, "classification"))).items():
            output.parameters[name].CopyFrom(value)
    for name, value in draw(parameters(("timeout", "priority", "sequence_id"))).items():
        request.parameters[name].CopyFrom(value)
    request.raw_input_contents.extend(draw(st.lists(raws, max_size=4)))
    return request


@pytest.fixture(scope="module", params=["default", "grpcio", "envoy"])
def address(request, address, repository, serve) -> Iterator[str]:
    """Address of a server; besides the front end of all these tests, by each of the others."""
    if request.param == "default":
        yield address
        return
    if request.param == "envoy":
        pytest.importorskip("pyvoy", reason="the extra [envoy] is not installed")
    # Not the slow ones, whose warm-up takes long.
    settings = {"model_control": "explicit", "load_model": MODELS, "shared_memory": True}
    with serve(repository, frontend=request.param, **settings) as other:
        yield other


@pytest.fixture(scope="module")
def stub(address) -> Iterator[pb_grpc.GRPCInferenceServiceStub]:
    """A stub, and a region "region" of 64 bytes, with which the object that it lies in ends."""
    path = Path("/dev/shm") / f"pollard-test-{uuid.uuid4().hex}"  # noqa: S108 - they are there
    path.write_bytes(bytes(64))
    with grpc.insecure_channel(address) as channel:
        stub = pb_grpc.GRPCInferenceServiceStub(channel)
        stub.SystemSharedMemoryRegister(
            pb.SystemSharedMemoryRegisterRequest(name="region", key=path.name, byte_size=64)
        )
        stub.SystemSharedMemoryRegister(
            pb.SystemSharedMemoryRegisterRequest(name="gone", key=path.name, byte_size=64)
        )
        stub.SystemSharedMemoryUnregister(pb.SystemSharedMemoryUnregisterRequest(name="gone"))
        yield stub
        stub.SystemSharedMemoryUnregister(pb.SystemSharedMemoryUnregisterRequest())
        assert path.stat().st_size == 64
        path.unlink()


def still_served(stub) -> None:
    request = pb.ModelInferRequest(model_name="adder", raw_input_contents=[bytes(16)])
    request.inputs.add(name="x", datatype="FP32", shape=[1, 4])
    assert stub.ModelInfer(request, timeout=30).model_version == "2"


def answered(call, request, internal: str = "shared memory") -> None:
    """Send a request, and check its status if it fails.

    `internal` are the words of the one INTERNAL that the protocol wants.
    """
    status, words = grpc.StatusCode.OK, ""
    try:
        call(request, timeout=30)
    except grpc.RpcError as error:
        status, words = error.code(), error.details()
    if status == grpc.StatusCode.INTERNAL:
        assert internal in words
    elif status != grpc.StatusCode.OK:
        assert status in EXPECTED, words


@SETTINGS
@given(request=requests())
def test_any_request(stub, request) -> None:
    answered(stub.ModelInfer, request)
    still_served(stub)


@pytest.mark.long
@SETTINGS
@given(batch=st.lists(requests(), min_size=1, max_size=5))
def test_any_requests_on_one_stream(stub, batch) -> None:
    answers = list(stub.ModelStreamInfer(iter(batch), timeout=60))
    assert len(answers) == len(batch)
    for request, answer in zip(batch, answers, strict=True):
        assert answer.infer_response.id == request.id
        assert "internal error" not in answer.error_message
    still_served(stub)


@SETTINGS
@given(data=st.binary(max_size=200) | requests().map(lambda r: r.SerializeToString()[:-1]))
def test_bytes_that_may_be_no_request(address, stub, data) -> None:
    with grpc.insecure_channel(address) as channel:
        for method in ("ModelInfer", "ModelMetadata", "SystemSharedMemoryRegister"):
            call = channel.unary_unary(f"/inference.GRPCInferenceService/{method}")
            answered(call, data)
    still_served(stub)


@SETTINGS
@given(
    name=texts,
    key=st.sampled_from(["/", "..", "/dev/null", "a\0b", "../etc/passwd", ""]) | texts,
    offset=st.integers(0, 2**64 - 1),
    byte_size=st.integers(0, 2**64 - 1),
)
def test_any_region(stub, name, key, offset, byte_size) -> None:
    answered(
        stub.SystemSharedMemoryRegister,
        pb.SystemSharedMemoryRegisterRequest(
            name=name, key=key, offset=offset, byte_size=byte_size
        ),
    )
    still_served(stub)


@SETTINGS
@given(
    name=texts | st.sampled_from(["adder", "../adder", "."]),
    values=st.dictionaries(
        st.sampled_from(["config", "file:1/model.onnx", "file:../x", "file:", "other"]),
        st.binary(max_size=20) | st.text(max_size=20) | st.booleans(),
        max_size=3,
    ),
)
def test_any_load(stub, name, values) -> None:
    request = pb.RepositoryModelLoadRequest(model_name=name)
    for key, value in values.items():
        if isinstance(value, bytes):
            request.parameters[key].bytes_param = value
        elif isinstance(value, bool):
            request.parameters[key].bool_param = value
        else:
            request.parameters[key].string_param = value
    answered(stub.RepositoryModelLoad, request, "failed to poll")
    still_served(stub)
