"""Channels between services: what becomes of a call whose connection is no good."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from pollard.services.common.tls import open_channel
from pollard.services.common.tls_files import PLAIN

READY = grpc.ChannelConnectivity.READY
SETTINGS = bytes.fromhex("000000 04 00 00000000")
GOAWAY = bytes.fromhex("000008 07 00 00000000 7fffffff 00000000")
"""No further calls: that of a server that stops in good order."""


@contextlib.asynccontextmanager
async def listening(first: bytes, host: str = "127.0.0.1", port: int = 0) -> AsyncIterator[str]:
    """Give the address of somebody who says `first` to whoever connects, and nothing more."""
    opened: list[asyncio.StreamWriter] = []

    async def connected(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        opened.append(writer)
        writer.write(first)

    server = await asyncio.start_server(connected, host, port)
    try:
        yield f"{host}:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        for writer in opened:
            writer.close()
        await asyncio.gather(*(w.wait_closed() for w in opened), return_exceptions=True)


async def test_a_connection_that_is_given_up_as_soon_as_it_stands_fails_the_call_at_once() -> None:
    async with (
        listening(SETTINGS + GOAWAY) as address,
        open_channel(address, PLAIN) as channel,
    ):
        # Sent again and again, it would end by its deadline, after a gigabyte each second.
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await channel.unary_unary("/a.service/Method")(b"", timeout=2)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_a_proxy_of_the_environment_does_not_come_between_services(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with listening(SETTINGS + GOAWAY) as address, listening(b"no proxy\r\n\r\n") as proxy:
        monkeypatch.setenv("http_proxy", f"http://{proxy}")
        monkeypatch.setenv("no_proxy", "")
        async with open_channel(address, PLAIN) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await channel.unary_unary("/a.service/Method")(b"", timeout=2)
            assert "GOAWAY" in str(caught.value.details())


async def test_a_service_that_came_back_under_another_address_is_found_soon(
    name_server: Any,
) -> None:
    async with listening(SETTINGS, "127.0.0.2") as address:
        name_server.address, port = "127.0.0.2", int(address.rpartition(":")[2])
        channel = open_channel(name_server.target(port), PLAIN)
        await asyncio.wait_for(channel.channel_ready(), 20)
    try:
        async with listening(SETTINGS, "127.0.0.3", port):
            name_server.address = "127.0.0.3"
            while (state := channel.get_state(try_to_connect=True)) is READY:
                await channel.wait_for_state_change(state)
            # By itself gRPC asks for a name again after half a minute.
            await asyncio.wait_for(channel.channel_ready(), 15)
    finally:
        await channel.close()
