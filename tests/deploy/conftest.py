"""What the files in `deploy/` tell the services is tried on the services' own settings."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from pollard.services.common.lifecycle import Listen
from pollard.services.up.serve import serve_command, settings_class

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
SERVICES = ("models", "inference", "preprocess")
COMMANDS_READ = {"POLLARD_TLS_CA", "POLLARD_TLS_CERTIFICATE", "POLLARD_TLS_KEY", "POLLARD_TOKEN"}
"""Of the environment, by `pollard health` and every other command."""

Check = Callable[..., dict[str, Any]]


@pytest.fixture
def settings_of(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Check:
    """Runs `pollard serve …` with an environment as far as its settings, and returns them."""

    def check(arguments: Sequence[str], environment: Mapping[str, str]) -> dict[str, Any]:
        assert arguments[0] == "serve", arguments
        service = arguments[1]
        fields = settings_class(service).model_fields
        prefix = f"POLLARD_{service.upper()}_"
        for name, value in environment.items():
            if name.startswith("POLLARD_") and name not in COMMANDS_READ:
                assert name.startswith(prefix), f"{name} is not for {service}"
                # pydantic-settings passes over variables that name no setting.
                assert name.removeprefix(prefix).lower() in fields, f"{name} is no setting"
            monkeypatch.setenv(name, value)
        capsys.readouterr()  # what was said before
        assert serve_command(service, [*arguments[2:], "--print-config"]) == 0
        printed = capsys.readouterr().out
        for name in environment:
            monkeypatch.delenv(name)
        found: dict[str, Any] = tomllib.loads(printed)[service]
        return found

    return check


def listens(found: Mapping[str, Any]) -> None:
    """Raise StartupError if a service of these settings would refuse to listen."""
    from pollard.services.common.tls_files import TlsFiles

    files = {
        name: Path(found[f"tls_{name}"]) if f"tls_{name}" in found else None
        for name in ("certificate", "key", "client_ca", "ca")
    }
    Listen(host=found["host"], insecure=found["insecure"], tls=TlsFiles(**files)).check()


@pytest.fixture
def would_listen() -> Callable[[Mapping[str, Any]], None]:
    """:func:`listens`."""
    return listens


def expanded(environment: Mapping[str, str], more: Mapping[str, str]) -> dict[str, str]:
    """Put `more` and what came before in the place of each $(NAME), as Kubernetes does."""
    known = dict(more)
    for name, value in environment.items():
        known[name] = re.sub(r"\$\(([A-Z_]+)\)", lambda match: known.get(match[1], match[0]), value)
        assert "$(" not in known[name], f"{name}: {known[name]} is defined too late or never"
    return {name: known[name] for name in environment}


@pytest.fixture
def expand() -> Callable[..., dict[str, str]]:
    """:func:`expanded`."""
    return expanded
