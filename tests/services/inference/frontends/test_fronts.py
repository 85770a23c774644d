"""The other front ends carry what grpcio's server carries; the conformance tests run against them
with POLLARD_INFERENCE_FRONTEND=core or =envoy."""

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import grpc
import numpy as np
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)

from pollard.inference import grpc_service_pb2 as pb
from pollard.inference import grpc_service_pb2_grpc as pb_grpc


@pytest.mark.parametrize(
    "compression", [grpc.Compression.NoCompression, grpc.Compression.Gzip, grpc.Compression.Deflate]
)
def test_requests_plain_and_compressed(channel, compression, ask) -> None:
    stub = pb_grpc.GRPCInferenceServiceStub(channel)
    request = ask(value=2.0)
    request.id = "a" * 5000  # grpc compresses what becomes smaller
    response = stub.ModelInfer(request, timeout=20, compression=compression)
    assert np.frombuffer(response.raw_output_contents[0], np.float32) == [2.0]
    assert response.id == request.id


def test_errors_have_their_status_words_and_details(channel, ask) -> None:
    stub = pb_grpc.GRPCInferenceServiceStub(channel)
    with pytest.raises(grpc.RpcError) as raised:
        stub.ModelInfer(ask("näher %41"), timeout=20)
    assert raised.value.code() == grpc.StatusCode.NOT_FOUND
    assert "'näher %41'" in raised.value.details()
    details = dict(raised.value.trailing_metadata())["grpc-status-details-bin"]
    assert b"MODEL" in details
    with pytest.raises(grpc.RpcError) as raised:
        channel.unary_unary("/inference.GRPCInferenceService/Nothing")(b"", timeout=20)
    assert raised.value.code() == grpc.StatusCode.UNIMPLEMENTED


def test_a_command_that_meant_the_manager_says_that_this_is_another_service(server) -> None:
    command = [sys.executable, "-m", "pollard.client.cli", "models", "list", "--server", server]
    asked = subprocess.run(command, capture_output=True, text=True)
    assert asked.returncode == 1
    assert f"The server at {server} speaks another service" in asked.stderr


@pytest.mark.parametrize("compression", [grpc.Compression.NoCompression, grpc.Compression.Gzip])
def test_messages_that_are_too_large_are_refused(channel, compression, ask) -> None:
    stub = pb_grpc.GRPCInferenceServiceStub(channel)
    request = ask()
    request.id = "a" * (3 << 20)
    with pytest.raises(grpc.RpcError) as raised:
        stub.ModelInfer(request, timeout=20, compression=compression)
    assert raised.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert stub.ModelInfer(ask(), timeout=20).raw_output_contents


def test_health_and_reflection(channel) -> None:
    health = health_pb2_grpc.HealthStub(channel)
    name = "inference.GRPCInferenceService"
    for service in ("", name):
        answer = health.Check(health_pb2.HealthCheckRequest(service=service), timeout=20)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    with pytest.raises(grpc.RpcError) as raised:
        health.Check(health_pb2.HealthCheckRequest(service="x"), timeout=20)
    assert raised.value.code() == grpc.StatusCode.NOT_FOUND
    watching = health.Watch(health_pb2.HealthCheckRequest(service=name), timeout=20)
    assert next(watching).status == health_pb2.HealthCheckResponse.SERVING
    watching.cancel()
    reflected = ProtoReflectionDescriptorDatabase(channel)
    assert name in reflected.get_services()
    assert "inference" in reflected.FindFileContainingSymbol(name).package


def test_a_deadline_on_a_stream_ends_it(channel, ask) -> None:
    stub = pb_grpc.GRPCInferenceServiceStub(channel)
    hold = threading.Event()

    def requests():
        yield ask()
        hold.wait(20)

    answers = stub.ModelStreamInfer(requests(), timeout=3)
    assert not next(answers).error_message
    with pytest.raises(grpc.RpcError) as raised:
        next(answers)
    hold.set()
    assert raised.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED


def test_requests_in_flight_are_answered_when_it_stops(tmp_path, front, serve, ask) -> None:
    with serve(tmp_path, front) as (process, address), grpc.insecure_channel(address) as channel:
        stub = pb_grpc.GRPCInferenceServiceStub(channel)
        slow = [stub.ModelInfer.future(ask("slow", value), timeout=60) for value in (1, 2, 3)]
        while (
            not stub.ModelStatistics(pb.ModelStatisticsRequest(name="slow"))
            .model_stats[0]
            .inference_count
        ):
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        got = [np.frombuffer(each.result().raw_output_contents[0], np.float32) for each in slow]
        assert got == [1, 2, 3]
        assert process.wait(30) == 0


def test_watchers_of_health_hear_that_it_stops(tmp_path, serve) -> None:
    with serve(tmp_path, "core") as (process, address), grpc.insecure_channel(address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        watching = health.Watch(health_pb2.HealthCheckRequest(), timeout=30)
        assert next(watching).status == health_pb2.HealthCheckResponse.SERVING
        process.send_signal(signal.SIGTERM)
        assert next(watching).status == health_pb2.HealthCheckResponse.NOT_SERVING
        assert process.wait(30) == 0


def test_a_call_that_outlasts_the_grace_is_ended(tmp_path, serve, ask) -> None:
    with serve(tmp_path, "core") as (process, address), grpc.insecure_channel(address) as channel:
        stub = pb_grpc.GRPCInferenceServiceStub(channel)
        hold = threading.Event()

        def requests():
            yield ask()
            hold.wait(60)

        answers = stub.ModelStreamInfer(requests(), timeout=60)
        assert not next(answers).error_message
        process.send_signal(signal.SIGTERM)
        with pytest.raises(grpc.RpcError) as raised:
            next(answers)
        hold.set()
        assert raised.value.code() == grpc.StatusCode.UNAVAILABLE
        assert process.wait(30) == 0


def test_callers_of_several_models_at_once_each_get_their_own_answers(server, ask) -> None:
    failed: list[BaseException] = []

    def call(number: int) -> None:
        try:
            with grpc.insecure_channel(server, [("grpc.use_local_subchannel_pool", 1)]) as channel:
                stub = pb_grpc.GRPCInferenceServiceStub(channel)
                for step in range(60):
                    value = float(number * 1000 + step)
                    model = "slow" if step % 20 == 19 else "quick"
                    answer = stub.ModelInfer(ask(model, value), timeout=60)
                    assert np.frombuffer(answer.raw_output_contents[0], np.float32) == [value]
                    if step % 7 == 0:
                        stub.ModelInfer.future(ask("slow", value), timeout=60).cancel()
                    if step % 11 == 0:
                        with pytest.raises(grpc.RpcError):
                            stub.ModelInfer(ask("missing"), timeout=60)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=call, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not failed, failed
    with grpc.insecure_channel(server) as channel:
        stub = pb_grpc.GRPCInferenceServiceStub(channel)
        (stats,) = stub.ModelStatistics(pb.ModelStatisticsRequest(name="quick")).model_stats
        assert stats.inference_stats.fail.count == 0


def test_what_a_client_that_went_has_sent_is_not_run(channel, ask, runs_of, sent) -> None:
    # Each takes as much of the processor as sending all of them does, so that those that are run
    # before the server hears that the client has gone are a small part on any machine.
    stub = pb_grpc.GRPCInferenceServiceStub(channel)
    before = runs_of(stub, "steps")
    hold = threading.Event()
    # More than are worked on at a time, so that some are unread; then more than is read ahead.
    for count, size in ((60, 0), (2000, 5000)):
        taken: list[int] = []

        def requests(count: int = count, size: int = size, taken: list[int] = taken):
            for number in range(count):
                request = ask("steps", 1000)
                request.id = "a" * size
                taken.append(number)
                yield request
            hold.wait(60)

        answers = stub.ModelStreamInfer(requests(), timeout=60)
        sent(taken, count)
        answers.cancel()
    # A single request that goes, and one whose time is over.
    gone = stub.ModelInfer.future(ask("steps", 1000), timeout=60)
    gone.cancel()
    with pytest.raises(grpc.RpcError):
        stub.ModelInfer(ask("steps", 1000), timeout=0.001)
    stub.ModelInfer(ask("steps", 1), timeout=60)
    hold.set()
    assert runs_of(stub, "steps") - before < 200


def test_if_envoy_dies_so_does_the_server_and_no_shared_memory_stays(tmp_path, serve, ask) -> None:
    pytest.importorskip("pyvoy", reason="the extra [envoy] is not installed")
    with (
        serve(tmp_path, "envoy") as (process, address),
        grpc.insecure_channel(address) as channel,
    ):
        stub = pb_grpc.GRPCInferenceServiceStub(channel)
        stub.ModelInfer(ask(), timeout=20)
        for envoy in psutil.Process(process.pid).children(recursive=True):
            # Envoy never unlinks what it makes for a restart without a pause.
            assert "envoy_shared_memory" not in Path(f"/proc/{envoy.pid}/maps").read_text()
            envoy.kill()
        assert process.wait(30) == 1
