"""Killed at any moment, a server comes back with the old state or the new one."""

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import numpy as np
import pytest

from pollard.inference import grpc_service_pb2_grpc as pb_grpc

PROGRAM = """
import sys
from pollard.services.inference.settings import InferenceSettings
told = {"port": 0, "manager": sys.argv[1], "cache_dir": sys.argv[2]}
settings = InferenceSettings.load({**told, "memory_headroom_bytes": 0})
settings.prepare_process()
from pollard.services.inference.main import run
sys.exit(run(settings))
"""


@asynccontextmanager
async def process(
    manager: str, cache: Path, frontend: str
) -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    """Run a server as a process of its own; give it and its address, and kill it at the end."""
    running = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        PROGRAM,
        manager,
        str(cache),
        stderr=asyncio.subprocess.PIPE,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(sys.path),
            "POLLARD_INFERENCE_FRONTEND": frontend,
        },
    )
    assert running.stderr is not None
    address = ""
    async with asyncio.timeout(30):
        while not address:
            line = (await running.stderr.readline()).decode()
            assert line, "the server ended"
            if "listening" in line:
                address = line.split("address=")[1].split()[0]
    draining = asyncio.create_task(running.stderr.read())
    try:
        yield running, address
    finally:
        if running.returncode is None:
            running.kill()
        await running.wait()
        await draining


async def answer(address: str, request) -> tuple[str, float]:
    async with grpc.aio.insecure_channel(address) as channel:
        stub = pb_grpc.GRPCInferenceServiceStub(channel)
        response = await stub.ModelInfer(request, timeout=10)
    return response.model_version, float(np.frombuffer(response.raw_output_contents[0], "f4")[0])


@pytest.mark.parametrize(
    ("moment", "frontend"),
    [
        ("fetching", "grpcio"),
        ("loading", "grpcio"),
        ("acknowledged", "grpcio"),
        ("acknowledged", "core"),
        ("acknowledged", "envoy"),
    ],
)
async def test_killed_in_the_middle_of_a_swap(
    manager, make_bundle, tensor_request, tmp_path, moment, frontend
) -> None:
    if frontend == "envoy":
        pytest.importorskip("pyvoy", reason="the extra [envoy] is not installed")
    cache = tmp_path / "cache"
    manager.want("adder", {1: make_bundle(1.0)}, {"production": {1: 1}})
    manager.send()
    async with process(manager.address, cache, frontend) as (running, address):
        assert (await manager.answer()).HasField("ack")
        assert await answer(address, tensor_request()) == ("1", 1.0)
        if moment == "fetching":
            manager.gate.clear()
        manager.want("adder", {2: make_bundle(2.0)}, {"production": {2: 1}})
        version = manager.send()
        async with asyncio.timeout(20):
            if moment == "acknowledged":
                assert (await manager.answer()).ack.version == version
            elif moment == "fetching":
                while len(manager.downloads) < 2:
                    await asyncio.sleep(0.001)
            else:
                while len(list((cache / "bundles").iterdir())) < 2:
                    await asyncio.sleep(0)
        running.kill()
        await running.wait()
    await manager.stop()

    async with process(manager.address, cache, frontend) as (_, address):
        # Without the manager: what was acknowledged is not lost, else either state will do.
        expected = {"fetching": ["1"], "loading": ["1", "2"], "acknowledged": ["2"]}[moment]
        name, value = await answer(address, tensor_request())
        assert name in expected
        assert value == float(name)
        assert not list((cache / "tmp").iterdir())
        # With the manager: the new state.
        manager.gate.set()
        while not manager.answers.empty():
            manager.answers.get_nowait()
        await manager.start()
        assert (await manager.answer()).ack.version == version
        assert await answer(address, tensor_request()) == ("2", 2.0)
