"""Requests that are sent again by the client itself, and a connection that is no good."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator

import pytest

from pollard.client import AsyncModelsClient, ModelsClient, Unavailable

SETTINGS = bytes.fromhex("000000 04 00 00000000")
GOAWAY = bytes.fromhex("000008 07 00 00000000 7fffffff 00000000")
"""No further calls: that of a server that stops in good order."""


@contextlib.contextmanager
def giving_up() -> Iterator[str]:
    """Give the address of a server that takes no call on any connection, and closes none."""
    opened = []

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                opened.append(connection)
                connection.sendall(SETTINGS + GOAWAY)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"127.0.0.1:{listener.getsockname()[1]}"
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()
            for connection in opened:
                connection.close()


# By gRPC's own retries these calls would end by their deadline, after a gigabyte each second.


def test_a_connection_that_is_given_up_as_soon_as_it_stands_is_unavailable() -> None:
    with (
        giving_up() as address,
        ModelsClient(address, timeout=3) as models,
        pytest.raises(Unavailable, match="GOAWAY"),
    ):
        models.models()


async def test_the_same_with_asyncio() -> None:
    with giving_up() as address:
        async with AsyncModelsClient(address, timeout=3) as models:
            with pytest.raises(Unavailable, match="GOAWAY"):
                await models.models()
