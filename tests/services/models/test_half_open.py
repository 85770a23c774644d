"""A connection that goes silent: nothing arrives any more, and nothing is closed."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from pollard.models.v1 import fleet_service_pb2 as fleet_pb
from pollard.models.v1 import model_service_pb2 as pb
from pollard.services.common.fleet_agent import AgentOptions, FleetAgent


class Line:
    """Hands bytes on in both directions, until it falls silent and holds its connections open."""

    def __init__(self) -> None:
        self.port = 0
        self._writers: list[asyncio.StreamWriter] = []
        self._silent: list[asyncio.Event] = []
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def connections(self) -> int:
        return len(self._silent)

    def fall_silent(self) -> None:
        """Hand on nothing more of what is connected now; new connections work."""
        for silent in self._silent:
            silent.set()

    @contextlib.asynccontextmanager
    async def open(self, port: int) -> AsyncIterator[Line]:
        async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", port)
            silent = asyncio.Event()
            self._silent.append(silent)
            self._writers += [writer, far_writer]
            for source, sink in ((reader, far_writer), (far_reader, writer)):
                task = asyncio.create_task(self._hand_on(source, sink, silent))
                self._tasks.add(task)

        server = await asyncio.start_server(connected, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            server.close()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            for writer in self._writers:
                writer.close()
            await asyncio.gather(
                *(writer.wait_closed() for writer in self._writers), return_exceptions=True
            )

    @staticmethod
    async def _hand_on(
        source: asyncio.StreamReader, sink: asyncio.StreamWriter, silent: asyncio.Event
    ) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await source.read(65536):
                if silent.is_set():
                    continue  # taken, as by a machine whose power is gone: into nothing
                sink.write(data)
                await sink.drain()
        if not silent.is_set():
            sink.close()


@pytest.mark.long
async def test_both_sides_notice_and_the_server_comes_back_to_what_is_wanted_now(
    suite_with: Any, helpers: Any, tmp_path: Path
) -> None:
    async with (
        suite_with(stocked=True, server_lease_seconds=2.0) as suite,
        Line().open(int(suite.client.address.rpartition(":")[2])) as line,
    ):
        member = helpers.Member()
        agent = FleetAgent(
            member,
            AgentOptions(
                kind=fleet_pb.SERVER_KIND_INFERENCE,
                manager=f"127.0.0.1:{line.port}",
                cache_dir=tmp_path / "cache",
                address="far:1",
                server_id="far",
            ),
        )
        await agent.start()
        try:
            await helpers.eventually(
                lambda: suite.client.server("far"),
                lambda server: server.connected and server.acked_version > 0,
            )
            assert line.connections == 1
            line.fall_silent()
            # The switch waits for the server only until it is noticed that it is gone, and its
            # lease is over; or the server is back before.
            await suite.client.set_alias(2)
            await suite.client.alias_when(
                lambda alias: alias.state == pb.Alias.STATE_ACTIVE and alias.revision == 2
            )
            await helpers.eventually(
                lambda: asyncio.sleep(0, member.states[-1]),
                lambda state: helpers.route_of(state) == 2,
            )
            assert line.connections == 2
            server = await suite.client.server("far")
            assert server.connected
        finally:
            await agent.stop()
