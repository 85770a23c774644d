"""The proxy of `pollard drill chaos`."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest

from pollard.services.drill.proxy import TcpProxy


@contextlib.asynccontextmanager
async def echoing() -> AsyncIterator[TcpProxy]:
    """A proxy before a server that says again what it hears."""

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(1 << 16):
                writer.write(data)
                await writer.drain()
        writer.close()

    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    proxy = TcpProxy("127.0.0.1", "127.0.0.1", server.sockets[0].getsockname()[1])
    await proxy.start()
    try:
        yield proxy
    finally:
        await proxy.close()
        server.close()


async def opened(proxy: TcpProxy) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, _, port = proxy.address.rpartition(":")
    return await asyncio.open_connection(host, int(port))


async def test_what_is_sent_arrives_whole_and_its_end_too() -> None:
    content = bytes(range(256)) * 4096
    async with echoing() as proxy:
        reader, writer = await opened(proxy)
        writer.write(content)
        assert await reader.readexactly(len(content)) == content
        assert proxy.connections == 1
        writer.write_eof()
        assert await reader.read() == b""
        writer.close()


async def test_a_delay_holds_up_and_loses_nothing() -> None:
    async with echoing() as proxy:
        reader, writer = await opened(proxy)
        proxy.delay_seconds = 0.1
        began = asyncio.get_running_loop().time()
        writer.write(b"slow")
        assert await reader.readexactly(4) == b"slow"
        # At least: how much longer it takes is the machine's affair.
        assert asyncio.get_running_loop().time() - began >= 0.2
        writer.close()


async def test_a_reset_reaches_the_client_and_the_next_connection_works() -> None:
    async with echoing() as proxy:
        reader, writer = await opened(proxy)
        writer.write(b"a")
        assert await reader.readexactly(1) == b"a"
        assert proxy.reset() == 1
        with pytest.raises(ConnectionResetError):
            await reader.readexactly(1)
        writer.close()
        reader, writer = await opened(proxy)
        writer.write(b"b")
        assert await reader.readexactly(1) == b"b"
        writer.close()


async def test_where_nobody_listens_behind_it_the_client_is_reset() -> None:
    unused = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
    port = unused.sockets[0].getsockname()[1]
    unused.close()
    await unused.wait_closed()
    proxy = TcpProxy("127.0.0.1", "127.0.0.1", port)
    await proxy.start()
    reader, writer = await opened(proxy)
    with pytest.raises(ConnectionResetError):
        await reader.readexactly(1)
    writer.close()
    await proxy.close()
