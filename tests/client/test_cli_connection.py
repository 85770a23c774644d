"""What commands say where they cannot connect as the environment tells them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import pytest

from pollard.client.cli import _main
from pollard.client.environment import CA, CERTIFICATE, KEY, TOKEN


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (CA, CERTIFICATE, KEY, TOKEN):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def error_of(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Runs `pollard fleet`, which fails, and returns what it says."""

    def run(server: str, **environment: Path | str) -> str:
        for name, value in environment.items():
            monkeypatch.setenv(name, str(value))
        capsys.readouterr()
        assert _main.run(["fleet", "--server", server, "--timeout", "20"]) == 1
        return capsys.readouterr().err

    return run


@contextlib.contextmanager
def serving(pair: tuple[Path, Path] | None, client_ca: Path | None = None) -> Iterator[str]:
    """A gRPC server without methods, with TLS by a pair of files, on a free port."""
    server = grpc.server(futures.ThreadPoolExecutor(1))
    if pair is None:
        port = server.add_insecure_port("127.0.0.1:0")
    else:
        certificate, key = pair
        credentials = grpc.ssl_server_credentials(
            [(key.read_bytes(), certificate.read_bytes())],
            root_certificates=client_ca.read_bytes() if client_ca else None,
            require_client_auth=client_ca is not None,
        )
        port = server.add_secure_port("127.0.0.1:0", credentials)
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None).wait()


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({CERTIFICATE: "mine.pem"}, f"{CERTIFICATE} is set, and {CA} is not"),
        ({CA: "system", CERTIFICATE: "mine.pem"}, f"{CERTIFICATE} is set, and {KEY} is not"),
        ({CA: "system", KEY: "mine.key"}, f"{KEY} is set, and {CERTIFICATE} is not"),
        ({CA: "/nowhere/ca.pem"}, f"{CA}=/nowhere/ca.pem: No such file"),
        ({TOKEN: "two words"}, "token must be printable ASCII"),
        ({TOKEN: "open-sesame"}, f"over TLS only; give tls=Tls(…) too, or, to a command, {CA}"),
    ],
)
def test_what_does_not_fit_together_is_one_line(
    environment: dict[str, str], words: str, error_of: Callable[..., str]
) -> None:
    error = error_of("10.0.0.1:1", **environment)
    assert error.startswith("error: ")
    assert words in error
    assert len(error.strip().splitlines()) == 1
    assert "sesame" not in error


def test_several_addresses_with_tls_are_one_line_too(error_of: Callable[..., str]) -> None:
    error = error_of("127.0.0.1:1,127.0.0.2:1", **{CA: "system"})
    assert error.startswith("error: with tls give one name for all servers")
    assert len(error.strip().splitlines()) == 1


def test_a_certificate_that_cannot_be_trusted_says_why(
    make_authority: Callable[[str], Any], error_of: Callable[..., str]
) -> None:
    ours, others = make_authority("ours"), make_authority("others")
    for pair, authority, words in (
        (ours.issue("good"), others.ca, f"signed by none of the authorities in {CA}"),
        (ours.issue("old", days=-1), ours.ca, "Its certificate has ended"),
        (ours.issue("elsewhere", "192.0.2.1"), ours.ca, "is for another name"),
    ):
        with serving(pair) as address:
            error = error_of(address, **{CA: authority})
        assert words in error, error
        assert "Is it running?" not in error


def test_tls_on_one_side_only_says_which_side_lacks_it(
    make_authority: Callable[[str], Any], error_of: Callable[..., str]
) -> None:
    ours = make_authority("ours")
    with serving(ours.issue("services")) as address:
        assert f"name its authority in {CA}" in error_of(address)
    with serving(None) as address:
        assert f"It speaks no TLS, which {CA} asks for" in error_of(address, **{CA: ours.ca})


def test_a_certificate_that_is_asked_for_and_not_shown_is_spoken_of(
    make_authority: Callable[[str], Any], error_of: Callable[..., str]
) -> None:
    ours = make_authority("ours")
    with serving(ours.issue("services"), client_ca=ours.ca) as address:
        error = error_of(address, **{CA: ours.ca})
    assert f"if it asks for a certificate, name one that it trusts in {CERTIFICATE}" in error


def test_a_key_of_another_certificate_is_spoken_of(
    make_authority: Callable[[str], Any], error_of: Callable[..., str]
) -> None:
    ours = make_authority("ours")
    mine, _ = ours.issue("mine")
    _, another = ours.issue("another")
    with serving(ours.issue("services")) as address:
        error = error_of(address, **{CA: ours.ca, CERTIFICATE: mine, KEY: another})
    assert "certificate and key do not belong together" in error
