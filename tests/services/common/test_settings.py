from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import pytest

from pollard.services.common.errors import StartupError
from pollard.services.common.settings import ServiceSettings


class Settings(ServiceSettings):
    section: ClassVar[str] = "inference"
    workers: int = 2


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "pollard.toml"
    path.write_text("[inference]\nworkers = 5\nport = 5\nhost = '127.0.0.5'\n[models]\nport = 9\n")
    return path


def test_flag_before_environment_before_file_before_default(file, monkeypatch):
    monkeypatch.setenv("POLLARD_INFERENCE_PORT", "6")
    monkeypatch.setenv("POLLARD_INFERENCE_WORKERS", "6")
    settings = Settings.load({"workers": 7, "host": None}, file)
    assert (settings.workers, settings.port, settings.host) == (7, 6, "127.0.0.5")
    assert settings.grace_seconds == 10.0
    assert isinstance(settings, Settings)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"port": 70000}, r"inference\.port"),
        ({"prot": 1}, "inference.prot.*settings of inference"),
        ({"http_port": "70000"}, r"inference\.http_port: .*'70000' is neither a port"),
        ({"http_port": "none"}, "nor auto nor off"),
    ],
)
def test_wrong_flags_are_named(flags, words):
    with pytest.raises(StartupError, match=words):
        Settings.load(flags)


def test_a_wrong_value_says_where_it_was_given(tmp_path, monkeypatch):
    file = tmp_path / "pollard.toml"
    file.write_text("[inference]\nport = 70000\n")
    with pytest.raises(
        StartupError, match=r"inference\.port: .*pollard\.toml, table \[inference\]"
    ):
        Settings.load({}, file)
    monkeypatch.setenv("POLLARD_INFERENCE_PORT", "70001")
    with pytest.raises(StartupError, match="given by POLLARD_INFERENCE_PORT in the environment"):
        Settings.load({}, file)
    with pytest.raises(StartupError, match="given by --port"):
        Settings.load({"port": 70002}, file)


def test_a_list_in_the_environment_that_is_no_json_is_told_as_that(monkeypatch):
    monkeypatch.setenv("POLLARD_INFERENCE_CERTIFICATE_ROLE", "a=viewer")
    with pytest.raises(StartupError, match=r"POLLARD_INFERENCE_.*JSON.*certificate_role"):
        Settings.load()


@pytest.mark.parametrize("text", ["[inference]\nprot = 1\n", "[inference\n", "\x00"])
def test_wrong_files_are_refused_with_words(tmp_path, text):
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(StartupError):
        Settings.load({}, path)


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(StartupError, match="no settings file"):
        Settings.load({}, tmp_path / "absent.toml")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"tls_certificate": "a.pem"}, "together"),
        ({"tls_key": "a.key"}, "together"),
        ({"tls_client_ca": "ca.pem"}, "needs tls_certificate"),
    ],
)
def test_half_of_what_tls_needs_is_refused(flags, words):
    with pytest.raises(StartupError, match=words):
        Settings.load(flags)


@pytest.mark.parametrize(
    ("given", "port"), [("8002", 8002), (0, 0), ("Off", "off"), (None, "auto")]
)
def test_the_http_port_is_a_number_or_a_word(given, port):
    settings = Settings.load({"http_port": given, "port": 8001})
    assert (settings.http.port, settings.http.beside) == (port, 8001)
