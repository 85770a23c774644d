"""Two managers on one PostgreSQL: the one that leads is killed, and the database crashes, while a
revision is rolled out under load."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from pollard.client import AsyncModelsClient, PollardError
from pollard.client.load import Load
from pollard.client.types import Rollout
from pollard.runtime.bundle import Bundle
from pollard.runtime.reference import Reference
from pollard.services.inference import main as inference_main
from pollard.services.inference.settings import InferenceSettings
from pollard.services.preprocess import main as preprocess_main
from pollard.services.preprocess.settings import PreprocessSettings

PROGRAM = """
import json, sys
from pollard.services.models.main import run
from pollard.services.models.settings import ModelsSettings
sys.exit(run(ModelsSettings.load(json.loads(sys.argv[1]))))
"""


class Manager:
    """A manager in a process of its own."""

    def __init__(self, process: asyncio.subprocess.Process, address: str) -> None:
        self.process, self.address = process, address
        self._reading = asyncio.create_task(self._read())

    async def _read(self) -> None:
        assert self.process.stderr is not None
        async for _ in self.process.stderr:
            pass

    async def kill(self) -> None:
        if self.process.returncode is None:
            self.process.kill()
        await self.process.wait()
        await self._reading


async def start_manager(folder: Path, name: str, url: str) -> Manager:
    settings = {
        "store": str(folder / name),
        "blobs": str(folder / "blobs"),
        "database_url": url,
        "port": 0,
        "log_format": "json",
        "drain_seconds": 0.5,
        "server_lease_seconds": 20.0,
    }
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", PROGRAM, json.dumps(settings), stderr=subprocess.PIPE
    )
    assert process.stderr is not None
    async with asyncio.timeout(60):
        async for line in process.stderr:
            if (entry := json.loads(line))["event"] == "serving":
                return Manager(process, entry["address"])
    raise AssertionError("the manager did not start")


@asynccontextmanager
async def servers(folder: Path, managers: list[Manager]) -> AsyncIterator[tuple[Any, Any]]:
    """An inference and a preprocess server that know both managers."""
    addresses = [manager.address for manager in managers]
    common = {"port": 0}
    inference = inference_main.build_server(
        InferenceSettings.load(
            common
            | {
                "manager": ",".join(addresses),
                "server_id": "inference",
                "cache_dir": folder / "inference",
                "memory_headroom_bytes": 0,
                "measure": False,
            }
        )
    )
    preprocess = preprocess_main.build_server(
        PreprocessSettings.load(
            common
            | {
                "manager": ",".join(reversed(addresses)),
                "server_id": "preprocess",
                "cache_dir": folder / "preprocess",
                "decode_workers": 1,
            }
        )
    )
    async with AsyncExitStack() as stack:
        for server in (inference, preprocess):
            await server.start()
            stack.push_async_callback(server.stop, 1.0)
        yield inference, preprocess


class Watched:
    """A rollout, looked at again and again."""

    def __init__(self, models: AsyncModelsClient, number: int) -> None:
        self._models, self._number = models, number
        self.steps: list[int] = []

    async def until(self, condition: Callable[[Rollout], bool]) -> Rollout:
        async with asyncio.timeout(120):
            while True:
                try:
                    found = await self._models.rollout("m", self._number)
                except PollardError:
                    pass  # neither the dead manager nor the database is there to ask
                else:
                    self.steps.append(found.step)
                    if condition(found):
                        return found
                await asyncio.sleep(0.05)


@pytest.fixture
def database(postgres: Any) -> Any:
    name = postgres.new_database()
    yield postgres.url(name)
    postgres.drop_database(name)


@pytest.mark.long
async def test_rollouts_outlive_their_leader_and_a_crash_of_the_database(
    tmp_path: Path,
    postgres: Any,
    database: str,
    make_bundle: Callable[..., Bundle],
    make_samples: Callable[[int], Any],
) -> None:
    samples = make_samples(8)
    bundles = [make_bundle(seed=70 + number) for number in range(3)]
    references = {number: Reference(bundle, samples) for number, bundle in enumerate(bundles, 1)}
    # Generous about latency: what is tested is not how busy the machine is.
    how: dict[str, Any] = {"steps": [20, 50, 100], "min_requests": 30, "max_p99_ratio": 1000}
    async with AsyncExitStack() as stack:
        managers = []
        for name in ("one", "two"):
            managers.append(await start_manager(tmp_path, name, database))
            stack.push_async_callback(managers[-1].kill)
        inference, preprocess = await stack.enter_async_context(servers(tmp_path, managers))
        leader, other = [
            await stack.enter_async_context(AsyncModelsClient(manager.address))
            for manager in managers
        ]
        async with asyncio.timeout(60):
            while sum(server.connected for server in await other.servers()) < 2:
                await asyncio.sleep(0.05)
        await leader.push(bundles[0].path, "m", alias="production")
        for bundle in bundles[1:]:
            await other.push(bundle.path, "m")
        load = Load(
            model="m",
            vision=preprocess.address,
            inference=inference.address,
            samples=samples,
            references=references,
            clients=2,
            pause=0.01,
        )
        traffic = load.traffic
        clients = asyncio.create_task(load.run())
        try:
            began = await leader.start_rollout("m", 2, hold=0.4, **how)
            watched = Watched(other, began.number)
            await watched.until(lambda found: found.state == "CANARY" and found.step == 0)
            await managers[0].kill()
            ended = await watched.until(lambda found: found.end_time is not None)
            assert (ended.state, ended.error) == ("PROMOTED", "")
            assert watched.steps == sorted(watched.steps)

            began = await other.start_rollout("m", 3, hold=0.4, **how)
            watched = Watched(other, began.number)
            await watched.until(lambda found: found.state == "CANARY" and found.step == 0)
            await asyncio.to_thread(postgres.stop, signal.SIGQUIT)
            answered = traffic.total
            async with asyncio.timeout(60):
                while traffic.total < answered + 50:
                    await asyncio.sleep(0.05)
            await asyncio.to_thread(postgres.start)
            ended = await watched.until(lambda found: found.end_time is not None)
            assert (ended.state, ended.error) == ("PROMOTED", "")
            assert watched.steps == sorted(watched.steps)
            await other.wait_alias("m", "production", 3)
            traffic.serving = 3
            answered = traffic.total
            async with asyncio.timeout(60):
                while traffic.total < answered + 20:
                    await asyncio.sleep(0.05)
        finally:
            load.finish()
            await clients
        assert traffic.bad == 0, traffic.problems
        assert set(traffic.answered.revisions) == {1, 2, 3}
        found = {server.server_id: server for server in await other.servers()}
        assert found["inference"].connected
        assert found["preprocess"].connected
