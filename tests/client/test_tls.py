"""What the clients refuse about TLS and tokens before anything is sent."""

from __future__ import annotations

from pathlib import Path

import pytest

from pollard.client import Tls, VisionClient


@pytest.mark.parametrize("address", ["example.org:1", "10.0.0.1:1", "dns:///[2001:db8::1]:1"])
def test_a_token_does_not_leave_the_machine_without_tls(address: str) -> None:
    with pytest.raises(ValueError, match="over TLS only") as caught:
        VisionClient(address, token="open-sesame")
    assert "open-sesame" not in str(caught.value)


@pytest.mark.parametrize("address", ["127.0.0.1:1", "[::1]:1", "localhost:1", "unix:/tmp/x"])
def test_a_token_stays_on_the_machine_without_tls(address: str) -> None:
    VisionClient(address, token="open-sesame").close()


@pytest.mark.parametrize("token", ["", "two words", "two\nlines", "clé"])
def test_a_token_that_metadata_cannot_carry_is_refused(token: str) -> None:
    with pytest.raises(ValueError, match="printable ASCII"):
        VisionClient("127.0.0.1:1", tls=Tls(), token=token)


def test_a_certificate_without_its_key_is_refused() -> None:
    with pytest.raises(ValueError, match="together"):
        Tls(certificate_file="mine.pem")


def test_an_authority_that_cannot_be_read_is_an_error_at_once(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        VisionClient("127.0.0.1:1", tls=Tls(ca_file=tmp_path / "none.pem"))
