"""Cancellation, deadlines, stopping, and a disk that is full, seen from outside."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from pollard.inference import grpc_service_pb2 as pb
from pollard.inference import grpc_service_pb2_grpc as pb_grpc


@pytest.fixture
async def held(manager, start_server, make_bundle, watch):
    """A stub of a server whose only worker for "adder" the test can hold up; the revision, its
    session and the server."""
    manager.want("adder", {1: make_bundle(1.0, max_batch_size=1)}, {"production": {1: 1}})
    manager.send()
    server = await start_server(manager.address, workers=1, inline_microseconds=0.0)
    assert (await manager.answer()).HasField("ack")
    revision = server.engine.resolve("adder")
    session = watch(revision._workers._session)
    revision._workers._session = session
    async with grpc.aio.insecure_channel(server.address) as channel:
        yield pb_grpc.GRPCInferenceServiceStub(channel), revision, session, server
    session.gate.set()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.002)


async def test_cancelled_and_expired_requests_are_not_run(held, tensor_request) -> None:
    stub, revision, session, _ = held
    session.gate.clear()
    busy = asyncio.ensure_future(stub.ModelInfer(tensor_request(), timeout=60))
    await until(lambda: session.batches == [1])
    gone = [stub.ModelInfer(tensor_request(), timeout=60) for _ in range(20)]
    await until(lambda: revision.in_flight == 21)
    for call in gone:
        call.cancel()
    await until(lambda: revision.in_flight == 1)
    late = [stub.ModelInfer(tensor_request(), timeout=0.2) for _ in range(20)]
    for outcome in await asyncio.gather(*late, return_exceptions=True):
        assert outcome.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    session.gate.set()
    await busy
    await stub.ModelInfer(tensor_request(), timeout=60)
    assert session.batches == [1, 1]
    assert revision.counters.succeeded == 2
    # Those that are late may have been so before they reached the server.
    assert 20 <= revision.counters.rejected <= 40


async def test_the_request_may_bring_its_own_timeout(held, tensor_request) -> None:
    stub, revision, session, _ = held
    session.gate.clear()
    busy = asyncio.ensure_future(stub.ModelInfer(tensor_request(), timeout=60))
    await until(lambda: session.batches == [1])
    request = tensor_request()
    request.parameters["timeout"].int64_param = 1000
    impatient = asyncio.ensure_future(stub.ModelInfer(request, timeout=60))
    await until(lambda: revision.in_flight == 2)
    await asyncio.sleep(0.01)
    session.gate.set()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await impatient
    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
    assert "Request timeout expired" in caught.value.details()
    await busy


async def test_stopping_finishes_what_is_in_flight(held, tensor_request) -> None:
    stub, revision, session, server = held
    session.gate.clear()
    under_way = [
        asyncio.ensure_future(stub.ModelInfer(tensor_request(), timeout=60)) for _ in range(3)
    ]
    await until(lambda: revision.in_flight == 3)
    stopping = asyncio.ensure_future(server.stop(60.0))
    await asyncio.sleep(0.05)
    assert not stopping.done()
    session.gate.set()
    await stopping
    assert [response.model_version for response in await asyncio.gather(*under_way)] == ["1"] * 3
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.ModelInfer(tensor_request(), timeout=20)
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
