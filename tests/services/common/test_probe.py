"""`pollard health`: what health checks of containers run."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from pollard.client.cli._main import run
from pollard.services.common.lifecycle import GrpcServer, Listen
from pollard.services.common.tls_files import TlsFiles

HEALTH = "grpc.health.v1.Health"


async def health(*arguments: str) -> int:
    return await asyncio.to_thread(run, ["health", *arguments])


async def test_the_exit_code_says_whether_requests_are_taken(
    capsys: pytest.CaptureFixture[str],
) -> None:
    server = GrpcServer(Listen(), [])
    await server.start()
    try:
        assert await health(server.address) == 1
        assert "NOT_SERVING" in capsys.readouterr().out
        assert await health(server.address, "--service", HEALTH) == 0
        await server.set_serving(True)
        assert await health(server.address) == 0
        assert await health(server.address, "--service", "no.such.Service") == 1
        assert "knows no service 'no.such.Service'" in capsys.readouterr().out
    finally:
        await server.stop(0)
    assert await health(server.address, "--timeout", "20") == 1
    assert "UNAVAILABLE" in capsys.readouterr().out


async def test_tls_comes_from_the_environment(
    make_authority: Callable[[str], Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    authority = make_authority("ours")
    certificate, key = authority.issue("server")
    server = GrpcServer(Listen(tls=TlsFiles(certificate, key, authority.ca, authority.ca)), [])
    await server.start()
    await server.set_serving(True)
    try:
        assert await health(server.address) == 1
        monkeypatch.setenv("POLLARD_TLS_CA", str(authority.ca))
        monkeypatch.setenv("POLLARD_TLS_CERTIFICATE", str(certificate))
        monkeypatch.setenv("POLLARD_TLS_KEY", str(key))
        assert await health(server.address) == 0
    finally:
        await server.stop(0)
    capsys.readouterr()


def test_a_bad_address_is_told_apart_from_a_server_that_is_down(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(["health", "http://127.0.0.1:8001"]) == 2
    assert "without a scheme" in capsys.readouterr().err
