from __future__ import annotations

import os
import re
from pathlib import Path
from typing import ClassVar

import pytest

from pollard.services.common.errors import StartupError
from pollard.services.common.settings import ServiceSettings
from pollard.services.common.settings_file import SECTIONS
from pollard.services.up.serve import settings_class


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
        ({"prot": 1}, "inference.prot.*is 'port' meant"),
        ({"http_port": "70000"}, r"inference\.http_port: .*'70000' is neither a port"),
        ({"http_port": "none"}, "nor auto nor off"),
    ],
)
def test_wrong_flags_are_named(flags, words):
    with pytest.raises(StartupError, match=words):
        Settings.load(flags)


@pytest.mark.parametrize("host", ["::1", "[::1]"])
def test_a_host_may_stand_in_brackets_as_it_does_in_addresses(host):
    assert Settings.load({"host": host}).host == "::1"


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


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[inference]\nprot = 1\n", r"inference\.prot: there is no such .*'port' meant"),
        (
            "[inference]\nx1 = 1\n",
            r"inference\.x1: .*\[inference\]\); settings of inference are acc",
        ),
        ("[inferense]\nport = 1\n", r"no table \[inferense\]; is 'inference' meant"),
        ("[up]\nport = 1\n", r"no table \[up\]; the tables are \[inference\], \[preprocess\], \[m"),
        ("port = 1\n", "'port' stands in no table"),
        ("inference = 1\n", "'inference' stands in no table"),
    ],
)
def test_what_a_file_has_that_is_no_setting_is_told_with_what_is_meant(tmp_path, text, words):
    path = tmp_path / "pollard.toml"
    path.write_text(text)
    with pytest.raises(StartupError, match=words):
        Settings.load({}, path)


def test_variables_that_nobody_reads_are_found(monkeypatch):
    for name in list(os.environ):
        if name.upper().startswith("POLLARD_"):
            monkeypatch.delenv(name)
    assert Settings.unknown_variables() == []
    for name in (
        "POLLARD_INFERENCE_PORT",
        "pollard_inference_workers",
        "POLLARD_TOKEN",
        "POLLARD_MODELS_PROT",  # The manager says that.
        "POLLARD_TESTS_COLLECT",
        "ANOTHER",
    ):
        monkeypatch.setenv(name, "1")
    assert Settings.unknown_variables() == []
    monkeypatch.setenv("POLLARD_INFERENCE_PROT", "1")
    monkeypatch.setenv("POLLARD_INFERENSE_HOST", "1")
    monkeypatch.setenv("POLLARD_QQ", "1")
    assert Settings.unknown_variables() == [
        "POLLARD_INFERENCE_PROT; is POLLARD_INFERENCE_PORT meant?",
        "POLLARD_INFERENSE_HOST; is POLLARD_INFERENCE_HOST meant?",
        "POLLARD_QQ",
    ]


def test_every_variable_that_pollard_reads_is_known(monkeypatch):
    root = Path(__file__).parents[3]
    sources = [
        path
        for folder in ("services", "clients/python", "runtime", "compression", "bench", ".ci")
        for path in (root / folder).rglob("*")
        if path.is_file() and path.suffix in (".py", ".sh", "")
    ]
    found = {
        name
        for path in [*sources, root / "Makefile", root / "clients/build.py"]
        for name in re.findall(r"POLLARD_[A-Z][A-Z_]*[A-Z]\b", path.read_text(errors="ignore"))
    }
    assert {"POLLARD_TOKEN", "POLLARD_CACHE", "POLLARD_REQUIRE_CLIENTS"} <= found
    for name in found:
        monkeypatch.setenv(name, "1")
    for section in SECTIONS:
        unknown = settings_class(section).unknown_variables()
        assert [words for words in unknown if words.partition(";")[0] in found] == []


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
