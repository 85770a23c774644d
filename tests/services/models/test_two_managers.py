"""Two managers in processes of their own on one PostgreSQL, one of which dies."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from pollard.models.v1 import fleet_service_pb2 as fleet_pb
from pollard.models.v1 import model_service_pb2 as pb
from pollard.services.common.fleet_agent import AgentOptions, FleetAgent

PROGRAM = """
import json, sys, time
real, off = time.time_ns, int(sys.argv[2]) * 10**9
time.time_ns = lambda: real() + off
time.time = lambda: time.time_ns() / 1e9
from pollard.services.models.main import run
from pollard.services.models.settings import ModelsSettings
sys.exit(run(ModelsSettings.load(json.loads(sys.argv[1]))))
"""


class Manager:
    """One manager; its store is a copy of the stock."""

    def __init__(self, store: Path, url: str, helpers: Any, off_seconds: int = 0) -> None:
        self.store, self.url, self._helpers = store, url, helpers
        self._off = off_seconds
        self.process: asyncio.subprocess.Process
        self.client: Any = None
        self.address = ""

    async def start(self) -> Manager:
        settings = {
            "store": str(self.store),
            "database_url": self.url,
            "port": 0,
            "log_format": "json",
            "drain_seconds": 0.1,
            "server_lease_seconds": 10.0,
        }
        self.process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", PROGRAM, json.dumps(settings), str(self._off)),
            stderr=subprocess.PIPE,
        )
        log = self.process.stderr
        assert log is not None
        async with asyncio.timeout(60):
            async for line in log:
                entry = json.loads(line)
                if entry["event"] == "serving":
                    self.address = entry["address"]
                    self.client = self._helpers.Client(self.address)
                    self._reading = asyncio.create_task(_drain(log))
                    return self
        raise AssertionError("the manager did not start")

    async def kill(self) -> None:
        if self.process.returncode is None:
            self.process.kill()
        await self.process.wait()
        await self._reading
        await self.client.close()


async def _drain(log: asyncio.StreamReader) -> None:
    async for _ in log:
        pass


@pytest.fixture
def off_seconds() -> int:
    """How far the second manager's clock is off."""
    return 0


@pytest.fixture
async def managers(
    tmp_path: Path,
    postgres: Any,
    postgres_stock: tuple[Path, str],
    helpers: Any,
    off_seconds: int,
) -> AsyncIterator[list[Manager]]:
    """Two managers; the first leads."""
    source, template = postgres_stock
    name = postgres.new_database(template)
    made = []
    for number in range(2):
        store = tmp_path / f"manager{number}"
        shutil.copytree(source, store)
        (store / "manager-id").unlink(missing_ok=True)
        off = number * off_seconds
        made.append(await Manager(store, postgres.url(name), helpers, off).start())
    yield made
    for manager in made:
        await manager.kill()
    postgres.drop_database(name)


@contextlib.asynccontextmanager
async def following(helpers: Any, cache: Path, addresses: list[str]) -> AsyncIterator[Any]:
    """A server's own agent, with the addresses of several managers."""
    member = helpers.Member()
    options = AgentOptions(
        kind=fleet_pb.SERVER_KIND_INFERENCE,
        manager=",".join(addresses),
        cache_dir=cache,
        address="i:1",
        server_id=cache.name,
    )
    agent = FleetAgent(member, options)
    await agent.start()
    try:
        yield member
    finally:
        await agent.stop()


@pytest.mark.long
@pytest.mark.parametrize("off_seconds", [0, -3600], ids=["in step", "an hour behind"])
async def test_the_other_goes_on_when_the_leader_is_killed_in_the_middle_of_a_switch(
    managers: list[Manager], tmp_path: Path, helpers: Any
) -> None:
    first, second = managers
    forward = [first.address, second.address]
    async with (
        following(helpers, tmp_path / "one", forward) as one,
        following(helpers, tmp_path / "two", forward[::-1]) as two,
    ):
        # Both managers see both servers, whichever they are connected to.
        for manager in managers:
            for name in ("one", "two"):
                await helpers.eventually(
                    lambda manager=manager, name=name: manager.client.server(name),
                    lambda server: server.connected and server.acked_version > 0,
                )
        # What is written through the one that does not lead is carried out, too.
        await second.client.set_alias(2)
        await second.client.alias_when(
            lambda a: a.state == pb.Alias.STATE_ACTIVE and a.revision == 2
        )
        await second.client.set_alias(3)
        await first.kill()
        alias = await second.client.alias()
        assert 3 in (alias.revision, alias.pending_revision)
        await second.client.alias_when(
            lambda a: a.state == pb.Alias.STATE_ACTIVE and a.revision == 3
        )
        for member in (one, two):
            state = await helpers.eventually(
                lambda member=member: asyncio.sleep(0, member.states[-1]),
                lambda state: helpers.revisions_of(state) == [3],
            )
            assert helpers.route_of(state) == 3
            versions = [state.version for state in member.states]
            assert versions == sorted(versions)
            for state in member.states:
                assert helpers.route_of(state) in helpers.revisions_of(state)


async def test_a_leader_that_stops_in_good_order_is_followed_at_once(
    managers: list[Manager], helpers: Any
) -> None:
    first, second = managers
    first.process.terminate()
    assert await first.process.wait() == 0
    await second.client.set_alias(2)
    await second.client.alias_when(lambda a: a.state == pb.Alias.STATE_ACTIVE and a.revision == 2)


async def test_of_writers_on_both_managers_one_wins(managers: list[Manager], helpers: Any) -> None:
    found = await managers[0].client.models.GetModel(pb.GetModelRequest(name="models/m"))

    async def write(number: int) -> Any:
        request = pb.UpdateModelRequest(
            model=pb.Model(name="models/m", description=f"{number}", etag=found.model.etag)
        )
        return await managers[number % 2].client.models.UpdateModel(request)

    outcomes = await asyncio.gather(*map(write, range(32)), return_exceptions=True)
    errors = [outcome for outcome in outcomes if isinstance(outcome, grpc.aio.AioRpcError)]
    assert len(errors) == 31
    assert {error.code() for error in errors} == {grpc.StatusCode.ABORTED}
