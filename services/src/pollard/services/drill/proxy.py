"""A TCP proxy between clients and a service: it can delay what passes, and reset connections."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct

_CHUNK_BYTES = 1 << 16
_RESET = struct.pack("ii", 1, 0)
"""SO_LINGER: what is unsent is thrown away, and the other side gets a reset."""


class TcpProxy:
    """Listens on a free port and passes on to one address."""

    def __init__(self, host: str, target_host: str, target_port: int) -> None:
        """Prepare; `start` listens.

        Args:
            host: Address to listen on.
            target_host: Where everything goes.
            target_port: Its port.
        """
        self.delay_seconds = 0.0
        """How long each piece is held back, in both directions."""
        self._host, self._port = host, 0
        self._target = (target_host, target_port)
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._connections: set[asyncio.Task[None]] = set()

    @property
    def address(self) -> str:
        """Where clients reach it."""
        return f"{self._host}:{self._port}"

    @property
    def connections(self) -> int:
        """Connections that pass through it now."""
        return len(self._connections)

    async def start(self) -> None:
        """Listen."""
        self._server = await asyncio.start_server(self._serve, self._host, 0)
        self._port = self._server.sockets[0].getsockname()[1]

    async def close(self) -> None:
        """Reset what is open, and listen no more."""
        if self._server is not None:
            self._server.close()
        self.reset()
        connections = list(self._connections)
        for connection in connections:
            connection.cancel()
        await asyncio.gather(*connections, return_exceptions=True)

    def reset(self) -> int:
        """Reset all connections, on both sides; return how many there were."""
        count = self.connections
        for writer in list(self._writers):
            _reset(writer)
        return count

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - streams are served by tasks
        self._connections.add(task)
        opened = [writer]
        self._writers.add(writer)
        try:
            far_reader, far_writer = await asyncio.open_connection(*self._target)
            opened.append(far_writer)
            self._writers.add(far_writer)
            async with asyncio.TaskGroup() as group:
                group.create_task(self._pass(reader, far_writer))
                group.create_task(self._pass(far_reader, writer))
        except* OSError:
            # One side is gone, or was never there: the other learns it as it would without us.
            for each in opened:
                _reset(each)
        finally:
            self._connections.discard(task)
            for each in opened:
                self._writers.discard(each)
                each.close()

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(_CHUNK_BYTES):
            if self.delay_seconds:
                await asyncio.sleep(self.delay_seconds)
            writer.write(data)
            await writer.drain()
        with contextlib.suppress(OSError, RuntimeError):
            writer.write_eof()


def _reset(writer: asyncio.StreamWriter) -> None:
    connection = writer.get_extra_info("socket")
    if connection is not None:  # it is open
        with contextlib.suppress(OSError):
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    writer.transport.abort()
