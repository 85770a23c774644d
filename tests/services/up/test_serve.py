"""`pollard serve`: flags before the environment, the environment before the file."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from pollard.client.cli._main import run

SERVICES = ["inference", "preprocess", "models"]


@pytest.mark.parametrize("service", SERVICES)
def test_the_help_names_every_setting(service: str, capsys: pytest.CaptureFixture[str]) -> None:
    from pollard.services.up.serve import settings_class

    assert run(["serve", service, "--help"]) == 0
    shown = capsys.readouterr().out
    for name in settings_class(service).model_fields:
        assert f"--{name.replace('_', '-')}" in shown


@pytest.mark.parametrize("service", SERVICES)
def test_printed_settings_are_a_file_that_gives_them_again(
    service: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run(["serve", service, "--print-config", "--port", "4321", "--log-level", "error"]) == 0
    printed = capsys.readouterr().out
    assert tomllib.loads(printed)[service]["port"] == 4321
    (tmp_path / "pollard.toml").write_text(printed)
    assert (
        run(["serve", service, "--print-config", "--config", str(tmp_path / "pollard.toml")]) == 0
    )
    assert capsys.readouterr().out == printed


def test_flags_go_before_the_environment_and_that_before_the_file(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "pollard.toml"
    file.write_text('[models]\nport = 1\ngrace_seconds = 1.0\nlog_level = "debug"\n')
    monkeypatch.setenv("POLLARD_MODELS_PORT", "2")
    monkeypatch.setenv("POLLARD_MODELS_GRACE_SECONDS", "2")
    arguments = ["serve", "models", "--config", str(file), "--port", "3", "--print-config"]
    assert run(arguments) == 0
    found = tomllib.loads(capsys.readouterr().out)["models"]
    assert (found["port"], found["grace_seconds"], found["log_level"]) == (3, 2.0, "debug")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--nonsense"], 2, "No such option"),
        (["--port", "many"], 2, "port"),
        (["--port", "99999"], 2, "models.port"),
        (["--log-level", "loud"], 2, "models.log_level"),
        (["--http-port", "loud"], 2, "'loud' is neither a port"),
        (["--tls-key", "a.key"], 2, "settings of models: tls_certificate and tls_key are given"),
        (["--config", "/no/such.toml"], 1, "no settings file"),
        (["--host", "0.0.0.0"], 1, ""),
    ],
)
def test_what_is_wrong_is_told(
    arguments: list[str],
    code: int,
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    import subprocess
    import sys

    done = subprocess.run(
        [
            *(sys.executable, "-m", "pollard.client.cli", "serve", "models"),
            *("--store", str(tmp_path / "store")),
            *arguments,
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == code
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_what_is_wrong_elsewhere_is_no_misuse_of_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "pollard.toml"
    file.write_text("[models]\nport = 99999\n")
    given = ["serve", "models", "--store", str(tmp_path / "store"), "--print-config"]
    assert run([*given, "--config", str(file)]) == 1
    assert "pollard.toml, table [models]" in capsys.readouterr().err
    monkeypatch.setenv("POLLARD_MODELS_TLS_KEY", "a.key")
    assert run(given) == 1
    assert "tls_certificate and tls_key are given together" in capsys.readouterr().err
