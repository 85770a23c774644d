"""TLS by each front end that speaks it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from typing import Any

import grpc
import pytest

from pollard.inference import grpc_service_pb2 as pb
from pollard.inference import grpc_service_pb2_grpc as pb_grpc
from pollard.services.common.tls import open_channel
from pollard.services.common.tls_files import PLAIN, TlsFiles

Start = Callable[..., Any]

NO_CLIENTS = (b"", b"\x16\x03\x01\x02", b"PRI * HTTP/2.0\r\n\r\n", b"\xff" * 999)
"""Nothing, the beginning of a handshake, HTTP/2 without TLS, nonsense."""


@pytest.fixture(params=["core", "grpcio"])
async def start(request, start_server) -> Start:
    """Returns a function that starts a server with TLS."""

    async def start_with(**settings: object) -> Any:
        return await start_server(frontend=request.param, **settings)

    return start_with


async def live(address: str, tls: TlsFiles) -> bool:
    """What the server says on a connection of its own."""
    options = [("grpc.use_local_subchannel_pool", 1)]
    async with open_channel(address, tls, options) as channel:
        stub = pb_grpc.GRPCInferenceServiceStub(channel)
        return bool((await stub.ServerLive(pb.ServerLiveRequest(), timeout=20)).live)


async def is_refused(address: str, tls: TlsFiles) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await live(address, tls)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_only_known_clients_get_in(start: Start, make_authority) -> None:
    ours, other = make_authority("ours"), make_authority("other")
    certificate, key = ours.issue("server")
    server = await start(tls_certificate=certificate, tls_key=key, tls_client_ca=ours.ca)
    mine = TlsFiles(*ours.issue("client"), ca=ours.ca)
    assert await live(server.address, mine)
    await is_refused(server.address, TlsFiles(*other.issue("client"), ca=ours.ca))
    await is_refused(server.address, TlsFiles(ca=ours.ca))
    await is_refused(server.address, PLAIN)
    assert await live(server.address, mine)


async def test_a_renewed_certificate_is_shown(start: Start, make_authority) -> None:
    first, second = make_authority("first"), make_authority("second")
    certificate, key = first.issue("server")
    server = await start(tls_certificate=certificate, tls_key=key)
    assert await live(server.address, TlsFiles(ca=first.ca))
    for new, old in zip(second.issue("server"), (certificate, key), strict=True):
        os.replace(new, old)
    assert await live(server.address, TlsFiles(ca=second.ca))
    await is_refused(server.address, TlsFiles(ca=first.ca))


@pytest.mark.long
async def test_a_certificate_that_ends_while_it_is_shown(
    start: Start, make_authority, capsys: Any
) -> None:
    ours = make_authority("ours")
    # A few seconds, for a busy machine: the certificate is not asked for before it has ended.
    certificate, key = ours.issue("server", days=4 / 86_400)
    server = await start(tls_certificate=certificate, tls_key=key)
    await asyncio.sleep(5)
    for _ in range(3):
        await is_refused(server.address, TlsFiles(ca=ours.ca))
    said = capsys.readouterr().out
    assert said.count("the certificate has expired") == 1
    assert said.count("the certificate expires soon") == 1
    for new, old in zip(ours.issue("new"), (certificate, key), strict=True):
        os.replace(new, old)
    assert await live(server.address, TlsFiles(ca=ours.ca))
    assert "certificate renewed" in capsys.readouterr().out


async def test_who_says_nothing_or_nonsense_holds_up_nobody(start: Start, make_authority) -> None:
    ours = make_authority("ours")
    certificate, key = ours.issue("server")
    server = await start(tls_certificate=certificate, tls_key=key)
    host, port = server.address.rsplit(":", 1)
    writers = []
    for number in range(40):
        _, writer = await asyncio.open_connection(host, int(port))
        # Nothing, the beginning of a handshake, HTTP/2 without TLS, nonsense.
        writer.write(
            (b"", b"\x16\x03\x01\x02", b"PRI * HTTP/2.0\r\n\r\n", b"\xff" * 999)[number % 4]
        )
        await writer.drain()
        writers.append(writer)
    for _ in range(5):
        assert await live(server.address, TlsFiles(ca=ours.ca))
    for writer in writers:
        writer.close()
    assert await live(server.address, TlsFiles(ca=ours.ca))
