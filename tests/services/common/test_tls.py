"""TLS of servers and channels, over real connections."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from pollard.services.common.errors import StartupError
from pollard.services.common.lifecycle import GrpcServer, Listen
from pollard.services.common.tls import open_channel
from pollard.services.common.tls_files import TlsFiles

SERVING = health_pb2.HealthCheckResponse.SERVING


@pytest.fixture
async def serve() -> Any:
    """Returns a function that starts a server that speaks TLS."""
    started: list[GrpcServer] = []

    async def start(tls: TlsFiles, **listen: Any) -> GrpcServer:
        server = GrpcServer(Listen(tls=tls, **listen), [])
        await server.start()
        started.append(server)
        await server.set_serving(True)
        return server

    yield start
    for server in started:
        await server.stop(0)


async def ask(server: GrpcServer, tls: TlsFiles) -> Any:
    """What health says, on a connection of its own."""
    async with open_channel(
        server.address, tls, [("grpc.use_local_subchannel_pool", 1)]
    ) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        return (await stub.Check(health_pb2.HealthCheckRequest(), timeout=20)).status


async def refusal(server: GrpcServer, tls: TlsFiles) -> str:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await ask(server, tls)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    return str(caught.value.details())


async def test_who_trusts_the_authority_gets_in(serve, make_authority) -> None:
    ours, other = make_authority("ours"), make_authority("other")
    server = await serve(TlsFiles(*ours.issue("server")))
    assert await ask(server, TlsFiles(ca=ours.ca)) == SERVING
    assert "CERTIFICATE_VERIFY_FAILED" in await refusal(server, TlsFiles(ca=other.ca))
    await refusal(server, TlsFiles())


async def test_the_name_in_the_certificate_is_looked_at(serve, make_authority) -> None:
    ours = make_authority("ours")
    server = await serve(TlsFiles(*ours.issue("server", "models.example.com")))
    await refusal(server, TlsFiles(ca=ours.ca))
    assert await ask(server, TlsFiles(ca=ours.ca, name="models.example.com")) == SERVING


async def test_only_clients_of_an_authority_get_in_where_one_is_named(
    serve, make_authority
) -> None:
    ours, clients, other = (make_authority(name) for name in ("ours", "clients", "other"))
    server = await serve(TlsFiles(*ours.issue("server"), client_ca=clients.ca))
    certificate, key = clients.issue("client")
    assert await ask(server, TlsFiles(certificate, key, ca=ours.ca)) == SERVING
    await refusal(server, TlsFiles(ca=ours.ca))
    await refusal(server, TlsFiles(*other.issue("client"), ca=ours.ca))
    await refusal(server, TlsFiles(*clients.issue("late", days=-1), ca=ours.ca))


async def test_a_renewed_certificate_is_shown_to_new_connections(
    serve, make_authority, capsys
) -> None:
    first, second = make_authority("first"), make_authority("second")
    certificate, key = first.issue("server")
    server = await serve(TlsFiles(certificate, key))
    async with open_channel(server.address, TlsFiles(ca=first.ca)) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        await stub.Check(health_pb2.HealthCheckRequest(), timeout=20)
        new_certificate, new_key = second.issue("server")
        # Between the two the pair does not belong together: the old one is shown on.
        os.replace(new_certificate, certificate)
        assert await ask(server, TlsFiles(ca=first.ca)) == SERVING
        assert "the key does not belong to the certificate" in capsys.readouterr().out
        os.replace(new_key, key)
        assert await ask(server, TlsFiles(ca=second.ca)) == SERVING
        await refusal(server, TlsFiles(ca=first.ca))
        # The connection that was there goes on.
        answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=20)
        assert answer.status == SERVING


async def test_a_certificate_that_vanishes_is_shown_on(serve, make_authority, capsys) -> None:
    ours = make_authority("ours")
    certificate, key = ours.issue("server")
    server = await serve(TlsFiles(certificate, key))
    certificate.unlink()
    assert await ask(server, TlsFiles(ca=ours.ca)) == SERVING
    assert "No such file" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda certificate, _: certificate.unlink(), "No such file"),
        (lambda _, key: key.write_text("no key"), "no certificate chain and key"),
        (lambda certificate, _: certificate.write_text(""), "no certificate chain and key"),
    ],
)
def test_files_that_cannot_be_used_are_refused(make_authority, spoil, words: str) -> None:
    certificate, key = make_authority("ours").issue("server")
    spoil(certificate, key)
    with pytest.raises(StartupError, match=words):
        GrpcServer(Listen(tls=TlsFiles(certificate, key)), [])


def test_the_key_of_another_certificate_is_refused(make_authority) -> None:
    ours = make_authority("ours")
    certificate, _ = ours.issue("server")
    _, key = ours.issue("another")
    with pytest.raises(StartupError, match="does not belong"):
        GrpcServer(Listen(tls=TlsFiles(certificate, key)), [])


def test_authorities_that_are_none_are_refused(make_authority, tmp_path: Path) -> None:
    pair = make_authority("ours").issue("server")
    (tmp_path / "none.pem").write_text("nothing")
    with pytest.raises(StartupError, match="holds no certificates"):
        GrpcServer(Listen(tls=TlsFiles(*pair, client_ca=tmp_path / "none.pem")), [])
    with pytest.raises(StartupError, match="holds no certificates"):
        open_channel("127.0.0.1:1", TlsFiles(ca=tmp_path / "none.pem"))


async def test_other_addresses_are_for_known_clients(serve, make_authority) -> None:
    ours = make_authority("ours")
    pair = ours.issue("server")
    for files in (TlsFiles(), TlsFiles(*pair)):
        with pytest.raises(StartupError, match="--tls-client-ca"):
            GrpcServer(Listen(host="0.0.0.0", tls=files), [])
    server = await serve(TlsFiles(*pair, client_ca=ours.ca), host="0.0.0.0")
    assert await ask(server, TlsFiles(*ours.issue("client"), ca=ours.ca)) == SERVING
