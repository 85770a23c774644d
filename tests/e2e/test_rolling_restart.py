"""A rolling restart under load: manager, inference and preprocess servers, one after another."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from pollard.client import (
    AsyncModelsClient,
    AsyncVisionClient,
    Cancelled,
    PollardError,
    Unavailable,
)
from pollard.runtime.bundle import Bundle
from pollard.runtime.sessions import open_session

BundleMaker = Callable[..., Bundle]
PIXELS = (np.arange(64, dtype=np.uint8) * 3).reshape(8, 8)


class Service:
    """One `pollard serve` that keeps its port and its directory."""

    def __init__(self, directory: Path, port: int, name: str, kind: str, *arguments: str) -> None:
        self.name = name
        self.address = f"127.0.0.1:{port}"
        keep = "--store" if kind == "models" else "--cache-dir"
        self._log = directory / f"{name}.log"
        self._command = [
            *(sys.executable, "-m", "pollard.client.cli", "serve", kind),
            *("--port", self.address.rpartition(":")[2], keep, str(directory / name)),
            *arguments,
        ]
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(self._command, stdout=log, stderr=log)

    def log(self) -> str:
        """What the process has written."""
        return self._log.read_text()

    def stop(self) -> int:
        if self.process is None or self.process.poll() is not None:
            return 0
        self.process.terminate()
        return self.process.wait(timeout=60)


@pytest.fixture
def suite(tmp_path: Path, keep_port: Callable[[], int]) -> Iterator[dict[str, Service]]:
    manager = Service(tmp_path, keep_port(), "models", "models")
    made = {"models": manager}
    for number in (1, 2):
        for kind in ("inference", "preprocess"):
            name = f"{kind}-{number}"
            follow = ("--manager", manager.address, "--server-id", name)
            made[name] = Service(tmp_path, keep_port(), name, kind, *follow)
    try:
        for service in made.values():
            service.start()
        yield made
    finally:
        codes = {service.name: service.stop() for service in made.values()}
        # A process that had to be ended has written why.
        logs = {name: made[name].log() for name, code in codes.items() if code}
        assert logs == {}


async def until_all_run(models: AsyncModelsClient, revision: int | None) -> None:
    """Wait until all four servers are connected, and run the revision."""
    found = None
    try:
        async with asyncio.timeout(60):
            while True:
                try:
                    found = await models.servers()
                except PollardError as error:
                    found = error
                else:
                    ready = [
                        server
                        for server in found
                        if server.connected
                        and (
                            revision is None
                            or any(
                                item.revision == revision and item.state == "READY"
                                for item in server.revisions
                            )
                        )
                    ]
                    if len(ready) == 4:
                        return
                await asyncio.sleep(0.1)
    except TimeoutError:
        raise AssertionError(f"not all servers run it: {found}") from None


@pytest.mark.long
async def test_no_request_is_lost_while_everything_is_restarted_in_turn(
    suite: dict[str, Service], make_bundle: BundleMaker
) -> None:
    bundle = make_bundle(seed=81)
    session = open_session(bundle.model_path("cpu-fp32"))
    best = int(session.run({"image": PIXELS[None, :, :, None]})["scores"].argmax())
    stopping = asyncio.Event()
    answered: dict[str, int] = {"preprocess-1": 0, "preprocess-2": 0}
    wrong: list[object] = []

    async def client(first: int) -> None:
        """Ask one server, and the other when it goes, as a load balancer does."""
        names = ["preprocess-1", "preprocess-2"]
        clients = {name: AsyncVisionClient(suite[name].address, timeout=20) for name in names}
        turn = first
        while not stopping.is_set():
            for attempt in range(2):
                name = names[(turn + attempt) % 2]
                try:
                    answer = await clients[name].predict(PIXELS, "m")
                except (Unavailable, Cancelled) as error:
                    # gRPC cancels what arrives while a server stops; none of it has begun.
                    if attempt:
                        wrong.append(error)
                    continue
                except PollardError as error:
                    wrong.append(error)
                else:
                    answered[name] += 1
                    if (answer.revision, answer.labels[0].index) != (1, best):
                        wrong.append(answer)
                break
            turn += 1
            # Without rest they would take the processors from what is being started.
            await asyncio.sleep(0.02)
        for item in clients.values():
            await item.close()

    async with AsyncModelsClient(suite["models"].address) as models:
        await until_all_run(models, None)
        await models.push(bundle.path, "m", alias="production")
        await until_all_run(models, 1)
        clients = [asyncio.create_task(client(number)) for number in range(4)]
        try:
            for name, service in suite.items():
                before = sum(answered.values())
                assert await asyncio.to_thread(service.stop) == 0, name
                service.start()
                await until_all_run(models, 1)
                assert sum(answered.values()) > before, name
        finally:
            stopping.set()
            await asyncio.gather(*clients)
        assert wrong == []
        assert all(answered.values())
        assert (await models.alias("m")).state == "ACTIVE"
