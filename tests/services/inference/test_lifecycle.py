"""Cancellation, deadlines, stopping, and a disk that is full, seen from outside."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from onnx import TensorProto, helper

from pollard.inference import grpc_service_pb2 as pb
from pollard.inference import grpc_service_pb2_grpc as pb_grpc


def slow_model(steps: int) -> bytes:
    """An ONNX model that multiplies a 256 × 256 matrix `steps` times by itself, and adds x."""
    body = helper.make_graph(
        [
            helper.make_node("MatMul", ["m_in", "eye"], ["m_out"]),
            helper.make_node("Identity", ["go_in"], ["go_out"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("go_in", TensorProto.BOOL, []),
            helper.make_tensor_value_info("m_in", TensorProto.FLOAT, [256, 256]),
        ],
        [
            helper.make_tensor_value_info("go_out", TensorProto.BOOL, []),
            helper.make_tensor_value_info("m_out", TensorProto.FLOAT, [256, 256]),
        ],
    )
    from onnx import numpy_helper

    graph = helper.make_graph(
        [
            helper.make_node("Loop", ["count", "go", "eye"], ["m"], body=body),
            helper.make_node("Slice", ["m", "start", "end"], ["corner"]),
            helper.make_node("Add", ["x", "corner"], ["y"]),
        ],
        "slow",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4])],
        [
            numpy_helper.from_array(np.eye(256, dtype=np.float32), "eye"),
            numpy_helper.from_array(np.int64(steps), "count"),
            numpy_helper.from_array(np.bool_(True), "go"),
            numpy_helper.from_array(np.int64([0, 0]), "start"),
            numpy_helper.from_array(np.int64([1, 1]), "end"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return model.SerializeToString()


@pytest.fixture
async def slow_stub(manager, start_server, make_bundle):
    """A stub of a server whose only worker takes a while for "adder"; and the server."""
    bundle = make_bundle(model=slow_model(400), max_batch_size=1)
    manager.want("adder", {1: bundle}, {"production": {1: 1}})
    manager.send()
    server = await start_server(manager.address, workers=1)
    assert (await manager.answer()).HasField("ack")
    async with grpc.aio.insecure_channel(server.address) as channel:
        yield pb_grpc.GRPCInferenceServiceStub(channel), server


async def test_cancelled_and_expired_requests_are_not_run(slow_stub, tensor_request) -> None:
    stub, server = slow_stub
    started = time.monotonic()
    await stub.ModelInfer(tensor_request(), timeout=60)
    once = time.monotonic() - started
    busy = asyncio.ensure_future(stub.ModelInfer(tensor_request(), timeout=60))
    await asyncio.sleep(once / 4)
    gone = [asyncio.ensure_future(stub.ModelInfer(tensor_request(), timeout=60)) for _ in range(20)]
    late = [stub.ModelInfer(tensor_request(), timeout=once / 4) for _ in range(20)]
    await asyncio.sleep(once / 10)
    for call in gone:
        call.cancel()
    for outcome in await asyncio.gather(*late, return_exceptions=True):
        # Refused at once, or expired while it waited.
        assert outcome.code() in (
            grpc.StatusCode.DEADLINE_EXCEEDED,
            grpc.StatusCode.UNAVAILABLE,
        )
    await busy
    started = time.monotonic()
    await stub.ModelInfer(tensor_request(), timeout=60)
    # Had the 40 been run, this one would have waited for them.
    assert time.monotonic() - started < 10 * once
    counters = server.engine.counters("adder", 1)
    assert counters.succeeded == 3
    # Some were gone before they had reached the server.
    assert 0 < counters.rejected <= 40


async def test_the_request_may_bring_its_own_timeout(slow_stub, tensor_request) -> None:
    stub, _ = slow_stub
    busy = [asyncio.ensure_future(stub.ModelInfer(tensor_request(), timeout=60)) for _ in range(3)]
    await asyncio.sleep(0.01)
    request = tensor_request()
    request.parameters["timeout"].int64_param = 1000
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.ModelInfer(request, timeout=60)
    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
    assert "Request timeout expired" in caught.value.details()
    await asyncio.gather(*busy)


async def test_stopping_finishes_what_is_in_flight(slow_stub, tensor_request) -> None:
    stub, server = slow_stub
    under_way = [
        asyncio.ensure_future(stub.ModelInfer(tensor_request(), timeout=60)) for _ in range(3)
    ]
    while server.engine.resolve("adder").in_flight < 3:
        await asyncio.sleep(0.001)
    await server.stop(30.0)
    assert [response.model_version for response in await asyncio.gather(*under_way)] == ["1"] * 3
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.ModelInfer(tensor_request(), timeout=2)
    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE


async def test_health_says_serving_only_once_there_is_something_to_serve(
    manager, start_server, make_bundle
) -> None:
    server = await start_server(manager.address)  # Nothing in the cache, nothing from the manager.
    async with grpc.aio.insecure_channel(server.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        inference = pb_grpc.GRPCInferenceServiceStub(channel)

        async def serving() -> bool:
            request = health_pb2.HealthCheckRequest(service="inference.GRPCInferenceService")
            answer = await health.Check(request, timeout=10)
            return answer.status == health_pb2.HealthCheckResponse.SERVING

        assert not await serving()
        assert not (await inference.ServerReady(pb.ServerReadyRequest(), timeout=10)).ready
        manager.want("adder", {1: make_bundle()}, {"production": {1: 1}})
        assert (await manager.apply()).HasField("ack")
        while not await serving():
            await asyncio.sleep(0.01)
        assert (await inference.ServerReady(pb.ServerReadyRequest(), timeout=10)).ready

        reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
        asked = reflection_pb2.ServerReflectionRequest(
            file_containing_symbol="inference.GRPCInferenceService"
        )
        async for answer in reflection.ServerReflectionInfo(iter([asked]), timeout=10):
            assert answer.file_descriptor_response.file_descriptor_proto


PROGRAM = """
import sys
from pollard.services.inference.main import run
from pollard.services.inference.settings import InferenceSettings
port, cache = int(sys.argv[1]), sys.argv[2]
code = run(InferenceSettings.load({"port": port, "manager": "", "cache_dir": cache}))
assert "torch" not in sys.modules
sys.exit(code)
"""


def test_the_process_stops_on_sigterm_and_says_when_its_port_is_taken(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    first = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, "0", str(tmp_path / "one")],
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    try:
        assert first.stderr is not None
        line = next(line for line in first.stderr if "listening" in line)
        port = line.split("address=127.0.0.1:")[1].split()[0]
        second = subprocess.run(
            [sys.executable, "-c", PROGRAM, port, str(tmp_path / "two")],
            capture_output=True,
            text=True,
            env=environment,
            timeout=60,
            check=False,
        )
        assert second.returncode == 1
        assert f"cannot listen on 127.0.0.1:{port}: the port is in use" in second.stderr
        assert "Traceback" not in second.stderr
        resident = int(Path(f"/proc/{first.pid}/statm").read_text().split()[1])
        assert resident * os.sysconf("SC_PAGESIZE") < 300e6
        first.send_signal(signal.SIGTERM)
        assert first.wait(20) == 0
    finally:
        first.kill()
        first.communicate()


async def test_a_full_disk_is_refused_and_what_runs_goes_on(
    manager, server, stub, make_bundle, tensor_request, monkeypatch
) -> None:
    # A file size limit makes the kernel refuse the write, as a full disk does.
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    large = make_bundle(2.0, weights=200_000)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        manager.want("adder", {2: large}, {"production": {2: 1}})
        answer = await manager.apply()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, previous)
    assert "the disk is full" in answer.nack.status.message
    assert (await stub.ModelInfer(tensor_request(), timeout=10)).model_version == "1"
    assert not list((server.agent.cache.root / "tmp").iterdir())
    # With space again, the same order is carried out.
    assert (await manager.apply()).HasField("ack")
    assert (await stub.ModelInfer(tensor_request(), timeout=10)).model_version == "2"
