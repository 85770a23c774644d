from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from pollard.models.v1 import fleet_service_pb2, fleet_service_pb2_grpc
from pollard.services.common.errors import FailedPrecondition, StartupError
from pollard.services.common.lifecycle import GrpcServer, Listen, is_loopback, together
from pollard.services.common.status import ErrorInterceptor

FLEET = "pollard.models.v1.FleetService"


class Fleet(fleet_service_pb2_grpc.FleetServiceServicer):
    """Fails in every way, unary and streaming."""

    def __init__(self) -> None:
        self.entered = asyncio.Event()
        self.release = asyncio.Event()

    async def ListServers(self, request, context):
        if request.page_token == "slow":
            self.entered.set()
            await self.release.wait()
            return fleet_service_pb2.ListServersResponse(next_page_token="done")
        if request.page_token == "abort":
            await context.abort(grpc.StatusCode.DATA_LOSS, "aborted by hand")
        if request.page_token == "bug":
            raise ZeroDivisionError
        raise FailedPrecondition("not now", reason="NOT_NOW")

    async def Sync(self, request_iterator, context):
        yield fleet_service_pb2.SyncResponse()
        raise FailedPrecondition("not now", reason="NOT_NOW")


@pytest.fixture
async def server():
    fleet = Fleet()
    server = GrpcServer(Listen(), [FLEET], [ErrorInterceptor()])
    fleet_service_pb2_grpc.add_FleetServiceServicer_to_server(fleet, server.server)
    await server.start()
    await server.set_serving(True)
    async with grpc.aio.insecure_channel(server.address) as channel:
        server.fleet, server.channel = fleet, channel
        yield server
    await server.stop(0)


@pytest.mark.parametrize(
    ("token", "code"),
    [
        ("", grpc.StatusCode.FAILED_PRECONDITION),
        ("abort", grpc.StatusCode.DATA_LOSS),
        ("bug", grpc.StatusCode.INTERNAL),
    ],
)
async def test_errors_of_unary_methods_become_statuses(server, token, code):
    stub = fleet_service_pb2_grpc.FleetServiceStub(server.channel)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.ListServers(fleet_service_pb2.ListServersRequest(page_token=token), timeout=5)
    assert caught.value.code() is code


async def test_errors_of_streams_come_after_what_was_sent(server):
    stub = fleet_service_pb2_grpc.FleetServiceStub(server.channel)
    call = stub.Sync(timeout=5)
    assert await call.read() == fleet_service_pb2.SyncResponse()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call.read()
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION


@pytest.mark.long
async def test_a_client_that_pings_every_second_is_not_sent_away(server):
    pinging = [
        ("grpc.keepalive_time_ms", 500),
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.use_local_subchannel_pool", 1),
    ]
    async with grpc.aio.insecure_channel(server.address, options=pinging) as channel:
        stub = fleet_service_pb2_grpc.FleetServiceStub(channel)
        call = stub.ListServers(fleet_service_pb2.ListServersRequest(page_token="slow"))
        await server.fleet.entered.wait()
        # Nothing but a ping a second goes over the connection; the third too early would end it.
        await asyncio.sleep(5)
        server.fleet.release.set()
        assert (await call).next_page_token == "done"


async def test_health_follows_the_server(server):
    stub = health_pb2_grpc.HealthStub(server.channel)
    for name in ("", FLEET):
        answer = await stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=5)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    await server.set_serving(False)
    answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=5)
    assert answer.status == health_pb2.HealthCheckResponse.NOT_SERVING


async def test_a_server_that_takes_no_requests_still_shows_that_it_lives(server):
    await server.set_serving(False)
    lives = health_pb2.HealthCheckRequest(service="grpc.health.v1.Health")
    answer = await health_pb2_grpc.HealthStub(server.channel).Check(lives, timeout=5)
    assert answer.status == health_pb2.HealthCheckResponse.SERVING


async def test_a_request_in_flight_is_finished_when_stopping(server):
    stub = fleet_service_pb2_grpc.FleetServiceStub(server.channel)
    call = stub.ListServers(fleet_service_pb2.ListServersRequest(page_token="slow"), timeout=20)
    await asyncio.wait_for(server.fleet.entered.wait(), 10)
    stopping = asyncio.create_task(server.stop(10))
    await asyncio.sleep(0.05)
    assert not stopping.done()
    server.fleet.release.set()
    assert (await call).next_page_token == "done"
    await stopping


async def test_a_port_in_use_is_refused_with_words(server):
    second = GrpcServer(Listen(port=server.port), [FLEET])
    with pytest.raises(StartupError, match=f"{server.port}.*in use"):
        await second.start()
    await second.stop(0)


async def test_an_open_address_is_refused_unless_insecure_is_given():
    with pytest.raises(StartupError, match="--insecure"):
        GrpcServer(Listen(host="0.0.0.0"), [FLEET])
    server = GrpcServer(Listen(host="0.0.0.0", insecure=True), [FLEET])
    await server.stop(0)


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("10.0.0.1", False),
        ("example.org", False),
    ],
)
def test_loopback(host, expected):
    assert is_loopback(host) is expected


async def test_the_first_that_fails_ends_what_runs_beside_it() -> None:
    ended: list[str] = []

    async def waits() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("waits")

    async def fails() -> None:
        await asyncio.sleep(0)
        raise StartupError("the port is in use")

    with pytest.raises(StartupError, match="in use"):
        await together(waits(), fails())
    assert ended == ["waits"]


_STUCK = """
import asyncio, sys, threading
from pollard.services.common import lifecycle
from pollard.services.common.errors import StartupError

lifecycle._CLOSING_SECONDS = 0.5


class Stuck:
    async def start(self):
        print("ready", flush=True)
        if sys.argv[1] == "starting":
            try:
                await asyncio.Event().wait()
            finally:
                await asyncio.to_thread(a_store_that_never_closes)
        if sys.argv[1] == "failing":
            raise StartupError("the port is in use")

    async def stop(self, grace_seconds):
        if sys.argv[1] in ("stopping", "failing"):
            await asyncio.to_thread(a_store_that_never_closes)
        elif sys.argv[1] == "ended":
            threading.Thread(target=a_store_that_never_closes).start()


def a_store_that_never_closes():
    threading.Event().wait()


sys.exit(lifecycle.run_service(Stuck, grace_seconds=0.1))
"""


@pytest.mark.parametrize("where", ["starting", "failing", "stopping", "ended"])
def test_a_process_that_cannot_stop_says_where_and_ends(where):
    with subprocess.Popen(
        [sys.executable, "-c", _STUCK, where], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.terminate()
        _, said = process.communicate(timeout=60)
        assert process.returncode == 1
        assert b"a_store_that_never_closes" in said


def test_a_process_that_cannot_stop_ends_though_nobody_reads_what_it_says():
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with contextlib.suppress(BlockingIOError):
        while os.write(writing, b"x"):
            pass
    os.set_blocking(writing, True)
    with subprocess.Popen(
        [sys.executable, "-c", _STUCK, "stopping"], stdout=subprocess.PIPE, stderr=writing
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.terminate()
        assert process.wait(60) == -signal.SIGALRM
    os.close(reading)
    os.close(writing)


def test_a_process_that_stops_says_nothing_more():
    with subprocess.Popen(
        [sys.executable, "-c", _STUCK, "well"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.terminate()
        _, said = process.communicate(timeout=60)
        assert process.returncode == 0
        assert b"a_store_that_never_closes" not in said


_FEW_FILES = """
import resource, sys
from pollard.services.common import lifecycle, open_files

open_files._EVERY_SECONDS = 0.05


class Serving:
    async def start(self):
        self.server = lifecycle.GrpcServer(lifecycle.Listen(), [])
        await self.server.start()
        resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))
        print(self.server.port, flush=True)

    async def stop(self, grace_seconds):
        await self.server.stop(grace_seconds)


sys.exit(lifecycle.run_service(Serving, grace_seconds=0.1))
"""


def test_a_process_that_has_as_many_files_open_as_it_may_says_so():
    """It takes no connection then, and gRPC says nothing of that."""
    with subprocess.Popen(
        [sys.executable, "-c", _FEW_FILES],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        port = int(process.stdout.readline())
        said = iter(process.stdout.readline, "")
        with contextlib.ExitStack() as stack:
            for _ in range(60):
                stack.enter_context(socket.create_connection(("127.0.0.1", port)))
            told = next(line for line in said if "no connection is taken" in line)
            assert "may have 40 files open" in told
            assert "LimitNOFILE" in told
        assert any("connections are taken" in line for line in said)
        process.terminate()
        process.communicate(timeout=60)
        assert process.returncode == 0
