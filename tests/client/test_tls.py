"""What the clients refuse about TLS and tokens before anything is sent."""

from __future__ import annotations

from pathlib import Path

import pytest

from pollard.client import Tls, VisionClient


def test_a_token_without_tls_is_refused() -> None:
    with pytest.raises(ValueError, match="over TLS only"):
        VisionClient("127.0.0.1:1", token="open-sesame")


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
