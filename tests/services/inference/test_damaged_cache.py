"""What a server does whose cache was damaged while it was down."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
import structlog
from grpc_health.v1 import health_pb2, health_pb2_grpc

from pollard.inference import grpc_service_pb2_grpc as pb_grpc
from pollard.models.v1 import fleet_service_pb2 as fleet_pb
from pollard.models.v1 import token_service_pb2 as token_pb
from pollard.services.common.auth.tokens import id_of, make_token
from pollard.services.common.errors import StartupError

CODE = grpc.StatusCode
HEALTH = health_pb2.HealthCheckResponse


def flipped(data: bytes) -> bytes:
    """Return a state that leads to another revision, in place of 1."""
    assert data.count(b'"1"') > 0
    return data.replace(b'"1"', b'"3"')


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "flipped": flipped,
    "emptied": lambda _: b"",
    "list": lambda _: b"[]",
    "zeros": lambda data: bytes(len(data)),
}


@pytest.fixture
async def line(start_server: Any) -> AsyncIterator[Callable[[Any], grpc.aio.Channel]]:
    """Returns a function that opens a connection to a server."""
    channels = []

    def connect(server: Any) -> grpc.aio.Channel:
        channels.append(grpc.aio.insecure_channel(server.address))
        return channels[-1]

    yield connect
    for channel in channels:
        await channel.close()


async def serving(channel: grpc.aio.Channel) -> None:
    """Wait until health says so."""
    stub = health_pb2_grpc.HealthStub(channel)
    async with asyncio.timeout(20):
        async for state in stub.Watch(health_pb2.HealthCheckRequest()):
            if state.status == HEALTH.SERVING:
                return


@pytest.mark.parametrize("away", [True, False], ids=["manager away", "no manager"])
@pytest.mark.parametrize("damage", DAMAGES)
async def test_a_damaged_state_is_told_and_the_server_waits_for_the_manager(
    manager: Any,
    server: Any,
    start_server: Any,
    tensor_request: Any,
    line: Any,
    damage: str,
    away: bool,
) -> None:
    path: Path = server.agent.cache.root / "state.json"
    await server.stop(1.0)
    await manager.stop()
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    with structlog.testing.capture_logs() as lines:
        again = await start_server(manager.address if away else "")
    said = [entry for entry in lines if entry["log_level"] == "error"]
    assert [entry["path"] for entry in said] == [str(path)]
    assert "nothing is served until" in said[0]["event"]
    assert ("--manager" in said[0]["event"]) != away
    channel = line(again)
    state = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
    assert state.status == HEALTH.NOT_SERVING
    stub = pb_grpc.GRPCInferenceServiceStub(channel)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.ModelInfer(tensor_request(), timeout=10)
    assert caught.value.code() == CODE.UNAVAILABLE
    if not away:
        return
    await manager.start()
    assert (await manager.answer()).HasField("ack")
    await serving(channel)
    assert (await stub.ModelInfer(tensor_request(), timeout=10)).model_version == "1"
    assert again.agent.cache.load_state().version == manager.version


@pytest.mark.parametrize("damage", ["emptied", "zeros", "revoked", "role", "cut"])
async def test_damaged_tokens_are_told_let_nobody_in_and_come_back(
    manager: Any,
    start_server: Any,
    make_bundle: Any,
    tensor_request: Any,
    line: Any,
    damage: str,
) -> None:
    good, bad, watcher = make_token(), make_token(), make_token()
    access = fleet_pb.AccessList(version=1)
    for token, role in [
        (good, token_pb.ROLE_PREDICTOR),
        (bad, token_pb.ROLE_PREDICTOR),
        (watcher, token_pb.ROLE_VIEWER),
    ]:
        digest = hashlib.sha256(token.encode()).digest()
        access.tokens.add(
            token_id=id_of(token), sha256=digest, role=role, revoked=token == bad, display_name="x"
        )
    manager.access = access
    manager.want("adder", {1: make_bundle(1.0)}, {"production": {1: 1}})
    manager.send()
    server = await start_server(manager.address, tokens=True)
    assert (await manager.answer()).HasField("ack")

    async def code(channel: grpc.aio.Channel, token: str) -> grpc.StatusCode:
        try:
            await pb_grpc.GRPCInferenceServiceStub(channel).ModelInfer(
                tensor_request(), timeout=10, metadata=[("authorization", f"Bearer {token}")]
            )
        except grpc.aio.AioRpcError as error:
            return error.code()
        return CODE.OK

    channel = line(server)
    before = [await code(channel, token) for token in (good, bad, watcher)]
    assert before == [CODE.OK, CODE.UNAUTHENTICATED, CODE.PERMISSION_DENIED]
    path: Path = server.agent.cache.root / "access.bin"
    await server.stop(1.0)
    await manager.stop()
    whole = path.read_bytes()
    damaged = fleet_pb.AccessList.FromString(whole)
    if damage == "revoked":
        damaged.tokens[1].revoked = False
    elif damage == "role":
        damaged.tokens[2].role = token_pb.ROLE_ADMIN
    elif damage == "cut":
        del damaged.tokens[1:]
    content = damaged.SerializeToString()
    # Fields that the message lacks are written last: put where they were, before the others.
    rest = whole[whole.index(access.SerializeToString()) :]
    head = whole[: -len(rest)]
    content = head + content.removesuffix(head)
    path.write_bytes({"emptied": b"", "zeros": bytes(len(whole))}.get(damage, content))
    with structlog.testing.capture_logs() as lines:
        again = await start_server(manager.address, tokens=True)
    assert [e["path"] for e in lines if e["log_level"] == "error"] == [str(path)]
    channel = line(again)
    # To be tried again, also with another server: it is not known who that is.
    assert {await code(channel, token) for token in (good, bad, watcher)} == {CODE.UNAVAILABLE}
    await manager.start()
    assert (await manager.answer()).HasField("ack")
    assert [await code(channel, token) for token in (good, bad, watcher)] == before
    assert path.read_bytes() == whole


async def test_a_second_server_is_turned_away_though_the_lock_was_deleted(
    manager: Any, server: Any, start_server: Any
) -> None:
    (server.agent.cache.root / "lock").unlink()
    for _ in range(2):
        with pytest.raises(StartupError, match="in use by another server"):
            await start_server(manager.address)
    await server.stop(1.0)
    await start_server(manager.address)
    assert (await manager.answer()).HasField("ack")
