"""How commands connect, by what the environment says."""

from __future__ import annotations

from pathlib import Path

import pytest

from pollard.client.environment import CA, CERTIFICATE, KEY, TOKEN, connection


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (CA, CERTIFICATE, KEY, TOKEN):
        monkeypatch.delenv(name, raising=False)


def test_without_anything_it_is_plain() -> None:
    assert connection() == {"tls": None, "token": None}


def test_empty_variables_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (CA, CERTIFICATE, KEY, TOKEN):
        monkeypatch.setenv(name, "")
    assert connection() == {"tls": None, "token": None}


def test_everything_is_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in (CA, CERTIFICATE, KEY):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv(TOKEN, "secret")
    found = connection()
    assert found["tls"] is not None
    assert found["tls"].ca_file == str(tmp_path / CA)
    assert found["tls"].certificate_file == str(tmp_path / CERTIFICATE)
    assert found["tls"].key_file == str(tmp_path / KEY)
    assert found["token"] == "secret"


def test_the_systems_authorities_have_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CA, "system")
    tls = connection()["tls"]
    assert tls is not None
    assert tls.ca_file is None


def test_a_token_alone_is_for_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN, "secret")
    assert connection() == {"tls": None, "token": "secret"}


@pytest.mark.parametrize("name", [CERTIFICATE, KEY])
def test_what_needs_tls_is_refused_without_it(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "secret")
    with pytest.raises(ValueError, match=CA) as caught:
        connection()
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("name", [CERTIFICATE, KEY])
def test_half_of_a_certificate_is_refused(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(CA, "system")
    monkeypatch.setenv(name, "file.pem")
    with pytest.raises(ValueError, match="together"):
        connection()
