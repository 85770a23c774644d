"""Channels between services: what becomes of a call whose connection is no good."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import grpc
import pytest

from pollard.services.common.tls import open_channel
from pollard.services.common.tls_files import PLAIN

SETTINGS = bytes.fromhex("000000 04 00 00000000")
GOAWAY = bytes.fromhex("000008 07 00 00000000 7fffffff 00000000")
"""No further calls: that of a server that stops in good order."""


@contextlib.asynccontextmanager
async def listening(first: bytes) -> AsyncIterator[str]:
    """Give the address of somebody who says `first` to whoever connects, and nothing more."""
    opened: list[asyncio.StreamWriter] = []

    async def connected(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        opened.append(writer)
        writer.write(first)

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    try:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
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
