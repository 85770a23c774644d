"""The HTTP port beside gRPC's, over real connections."""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from pollard.services.common import http_server
from pollard.services.common.errors import StartupError
from pollard.services.common.http_server import HttpListen, HttpServer
from pollard.services.common.metrics import Metrics
from pollard.services.common.tls_files import TlsFiles

Serve = Callable[..., Any]


@pytest.fixture
async def serve() -> AsyncIterator[Serve]:
    """Returns a function that opens a port."""
    started: list[HttpServer] = []

    async def start(
        *parts: http_server.Part, ready: Callable[[], bool] = lambda: True, **listen: Any
    ) -> HttpServer:
        server = HttpServer(HttpListen(**listen), ready=ready)
        for part in parts:
            server.add(part)
        await server.start()
        started.append(server)
        return server

    yield start
    for server in started:
        await server.stop()


async def get(
    server: HttpServer, path: str, context: ssl.SSLContext | bool = True, **options: Any
) -> tuple[int, str]:
    async with (
        aiohttp.ClientSession() as session,
        session.get(server.url + path, ssl=context, **options) as answer,
    ):
        return answer.status, await answer.text()


def trusting(authority: Any, *pair: Any) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=authority.ca)
    if pair:
        context.load_cert_chain(*pair)
    return context


async def test_health_says_that_it_lives_and_whether_it_is_ready(serve: Serve) -> None:
    state = [False]
    server = await serve(ready=lambda: state[0])
    assert await get(server, "/health/live") == (200, "live\n")
    assert await get(server, "/health/ready") == (503, "not ready\n")
    state[0] = True
    assert await get(server, "/health/ready") == (200, "ready\n")
    assert (await get(server, "/no/such/path"))[0] == 404


async def test_metrics_are_written_as_the_scraper_asks(serve: Serve) -> None:
    server = await serve(Metrics("models").add_to)
    status, text = await get(server, "/metrics")
    assert status == 200
    assert 'pollard_build_info{service="models",version="' in text
    assert "process_open_fds" in text
    _, text = await get(server, "/metrics", headers={"Accept": "application/openmetrics-text"})
    assert text.endswith("# EOF\n")


async def test_a_part_that_breaks_tells_nobody_why(serve: Serve, capsys: Any) -> None:
    async def broken(_: web.Request) -> web.Response:
        raise ZeroDivisionError("a secret")

    server = await serve(lambda application: application.router.add_get("/broken", broken))
    status, text = await get(server, "/broken")
    assert status == 500
    assert "secret" not in text
    request_id = text.split()[-1]
    assert request_id in capsys.readouterr().out
    assert (await get(server, "/health/live"))[0] == 200


async def test_the_guard_is_asked_for_all_but_health(serve: Serve) -> None:
    asked = []

    async def guard(request: web.Request) -> None:
        asked.append(request.path)
        raise web.HTTPUnauthorized(text="who are you?\n")

    server = await serve(Metrics("models").add_to)
    server.guard = guard
    assert await get(server, "/metrics") == (401, "who are you?\n")
    assert (await get(server, "/health/ready"))[0] == 200
    assert asked == ["/metrics"]


async def test_the_port_is_the_one_after_grpcs_or_a_free_one(serve: Serve, capsys: Any) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        server = await serve(beside=port - 1)
        assert server.port not in (0, port)
        assert "is in use" in capsys.readouterr().out
        with pytest.raises(StartupError, match=rf"{port}.*--http-port"):
            await HttpServer(HttpListen(port=port), ready=lambda: True).start()
    server = await serve(beside=port - 1)
    assert server.port == port


async def test_off_opens_no_port(serve: Serve) -> None:
    server = await serve(port="off", beside=8001)
    assert (server.port, server.url) == (0, "")


async def test_a_stopped_port_can_be_had_again(serve: Serve) -> None:
    first = await serve(port=0)
    assert (await get(first, "/health/live"))[0] == 200
    await first.stop()
    second = await serve(port=first.port)
    assert (await get(second, "/health/live"))[0] == 200


async def test_a_renewed_certificate_is_shown_to_new_connections(
    serve: Serve, make_authority: Any, capsys: Any
) -> None:
    first, second = make_authority("first"), make_authority("second")
    certificate, key = first.issue("server")
    server = await serve(tls=TlsFiles(certificate, key))
    assert server.url.startswith("https://")
    assert (await get(server, "/health/live", trusting(first)))[0] == 200
    new_certificate, new_key = second.issue("server")
    os.replace(new_certificate, certificate)
    assert (await get(server, "/health/live", trusting(first)))[0] == 200
    assert "the key does not belong to the certificate" in capsys.readouterr().out
    os.replace(new_key, key)
    assert (await get(server, "/health/live", trusting(second)))[0] == 200
    with pytest.raises(aiohttp.ClientConnectorCertificateError):
        await get(server, "/health/live", trusting(first))


async def test_where_clients_are_known_only_health_is_for_everybody(
    serve: Serve, make_authority: Any
) -> None:
    ours, clients, other = (make_authority(name) for name in ("ours", "clients", "other"))
    server = await serve(
        Metrics("models").add_to, tls=TlsFiles(*ours.issue("server"), client_ca=clients.ca)
    )
    assert (await get(server, "/health/ready", trusting(ours)))[0] == 200
    assert (await get(server, "/metrics", trusting(ours)))[0] == 403
    known = trusting(ours, *clients.issue("client"))
    assert (await get(server, "/metrics", known))[0] == 200
    with pytest.raises(aiohttp.ClientError):
        await get(server, "/metrics", trusting(ours, *other.issue("client")))


async def test_connections_beyond_the_most_are_closed_and_silent_ones_end(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_server, "_MOST_CONNECTIONS", 3)
    monkeypatch.setattr(http_server, "_QUIET_SECONDS", 0.5)
    server = await serve(port=0)
    silent = [await asyncio.open_connection("127.0.0.1", server.port) for _ in range(3)]
    # One that says only half of what it wants.
    silent[0][1].write(b"GET /health/live HTTP/1.1\r\nHost: a\r\n")
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    assert await reader.read() == b""
    writer.close()
    for reader, writer in silent:
        await reader.read()
        writer.close()
    assert (await get(server, "/health/live"))[0] == 200
