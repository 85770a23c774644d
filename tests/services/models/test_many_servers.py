"""Thousands of servers on one manager: what is done for all of them at once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import grpc
import pytest

from pollard.models.v1 import fleet_service_pb2 as fleet_pb
from pollard.models.v1 import model_service_pb2 as pb
from pollard.services.models import fleet

COUNT = 40


async def joined(suite: Any, **how: Any) -> list[Any]:
    return await asyncio.gather(
        *(suite.join(f"server-{number:02}", **how) for number in range(COUNT))
    )


async def test_all_that_come_at_once_are_known_after_a_restart_by_few_transactions(
    suite: Any,
) -> None:
    written = []
    store = suite.service.store
    store.after_write.append(lambda: written.append(1))
    # Another writer is at work while they come.
    writing = asyncio.create_task(store.write(lambda session: time.sleep(1.0)))
    await joined(suite, automatic=False)
    await writing
    # One each would be forty; a step takes in all that came while the one before was taken.
    assert len(written) < COUNT / 2
    await suite.restart()
    listed = await suite.client.fleet.ListServers(fleet_pb.ListServersRequest())
    assert [server.name for server in listed.servers] == [
        f"servers/server-{number:02}" for number in range(COUNT)
    ]


async def test_a_switch_reaches_each_of_many(suite_with: Callable[..., Any], helpers: Any) -> None:
    async with suite_with(stocked=True) as suite:
        servers = await joined(suite)
        await suite.client.set_alias(2)
        await suite.client.alias_when(
            lambda alias: alias.state == pb.Alias.STATE_ACTIVE and alias.revision == 2
        )
        for server in servers:
            assert any(helpers.route_of(state) == 2 for state in server.states)
            nonces = [state.nonce for state in server.states]
            assert len(set(nonces)) == len(nonces)


async def test_many_servers_report_less_often_each(
    suite_with: Callable[..., Any], helpers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet, "REPORTS_PER_SECOND", 10)
    async with suite_with(stocked=True, report_interval_seconds=0.5) as suite:
        servers = await joined(suite)
        await suite.client.set_alias(2)
        for server in servers:
            state = await server.state_when(lambda state: helpers.route_of(state) == 2)
            assert state.report_interval.ToMilliseconds() == 1000 * COUNT / 10


async def test_one_that_was_told_to_report_rarely_may_be_silent_for_longer(
    suite_with: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet, "REPORTS_PER_SECOND", 1)
    async with suite_with(report_interval_seconds=0.2, server_lease_seconds=1.0) as suite:
        # One server and one report a second: six of them pass before it is ended.
        server = await suite.join("one", automatic=False)
        assert server.states[0].report_interval.ToMilliseconds() == 1000
        await asyncio.sleep(2.0)  # longer than six of those that were set
        assert server.status is None


async def test_a_server_that_comes_while_the_manager_stops_is_told_so(suite: Any) -> None:
    # It waits to be written down, behind another writer.
    writing = asyncio.create_task(suite.service.store.write(lambda session: time.sleep(1.0)))
    await asyncio.sleep(0.1)
    call = suite.client.fleet.Sync()
    hello = fleet_pb.Hello(server_id="late", kind=fleet_pb.SERVER_KIND_PREPROCESS)
    await call.write(fleet_pb.SyncRequest(hello=hello))
    await asyncio.sleep(0.3)
    service, suite.service = suite.service, None
    await service.stop(5)
    await writing
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        # It may have been told a state before; gRPC hands out the status behind what is unread.
        async for _ in call:
            pass
    assert raised.value.code() == grpc.StatusCode.UNAVAILABLE
    assert "stopping" in (raised.value.details() or "")
