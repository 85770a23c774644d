"""A log that cannot be written, or that nobody reads, costs no request and no swap."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest

from pollard.inference import grpc_service_pb2_grpc as pb_grpc

PROGRAM = """
import sys
from pollard.services.inference.settings import InferenceSettings
told = {
    "port": 0, "manager": sys.argv[1], "cache_dir": sys.argv[2], "frontend": sys.argv[3],
    "memory_headroom_bytes": 0, "measure": False, "log_level": "debug", "log_format": "json",
    "access_log": "all", "access_log_per_second": 1e6,
}
settings = InferenceSettings.load(told)
settings.prepare_process()
from pollard.services.common import logs
from pollard.services.inference.main import run
# Sooner full than at a megabyte.
made, logs.stream_of = logs.stream_of, lambda file: small(made(file))
def small(stream):
    stream.most_bytes = 20_000
    return stream
sys.exit(run(settings))
"""

Start = Callable[[str, int], subprocess.Popen[bytes]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[str, str, int], subprocess.Popen[bytes]]]:
    """Returns a function that starts a server with a standard error."""
    running: list[subprocess.Popen[bytes]] = []

    def begin(manager: str, frontend: str, stderr: int) -> subprocess.Popen[bytes]:
        running.append(
            subprocess.Popen(
                [sys.executable, "-c", PROGRAM, manager, str(tmp_path / "cache"), frontend],
                stderr=stderr,
            )
        )
        return running[-1]

    yield begin
    for process in running:
        process.kill()
        process.wait()


@pytest.fixture(params=["full", "closed", "unread"])
def log(request: pytest.FixtureRequest) -> Iterator[tuple[str, int, int]]:
    """What a log is like, what is written to, and what can be read."""
    if request.param == "full":
        writing = os.open("/dev/full", os.O_WRONLY)
        yield "full", writing, -1
        os.close(writing)
        return
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 4096)
    if request.param == "closed":
        os.close(reading)
        yield "closed", writing, -1
    else:
        yield "unread", writing, reading
        os.close(reading)
    os.close(writing)


@pytest.mark.parametrize("frontend", ["core", "grpcio"])
async def test_requests_and_swaps_go_on(
    manager, make_bundle, tensor_request, start, log, frontend
) -> None:
    kind, writing, reading = log
    first, second = make_bundle(1.0), make_bundle(2.0)
    manager.want("adder", {1: first}, {"production": {1: 1}})
    manager.send()
    process = start(manager.address, frontend, writing)
    assert (await manager.answer()).HasField("ack")
    async with grpc.aio.insecure_channel(manager.hellos[0].address) as channel:
        stub = pb_grpc.GRPCInferenceServiceStub(channel)

        async def ask(times: int) -> set[str]:
            said = set()
            for _ in range(times):
                response = await stub.ModelInfer(tensor_request(), timeout=10)
                value = np.frombuffer(response.raw_output_contents[0], np.float32)[0]
                assert response.model_version == str(int(value))
                said.add(response.model_version)
            return said

        assert await ask(200) == {"1"}
        # What a load logs comes from other threads.
        manager.want("adder", {1: first, 2: second}, {"production": {2: 1}})
        assert (await manager.apply()).HasField("ack")
        assert await ask(50) == {"2"}
        if kind == "unread":
            with open(reading, "rb", closefd=False) as file:
                told = await asyncio.to_thread(_until_lost, file)
                assert told["lines"] > 0
                assert (told["service"], told["level"]) == ("inference", "error")
                await ask(1)
                # What is written from now on is written.
                line = json.loads(await asyncio.to_thread(file.readline))
                assert line["event"] == "answered"
        assert await ask(1) == {"2"}
    process.terminate()
    assert await asyncio.to_thread(process.wait, 60) == 0


def _until_lost(file) -> dict[str, object]:
    while True:
        line = json.loads(file.readline())
        if line["event"] == "lines of this log were lost":
            return line
