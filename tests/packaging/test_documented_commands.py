"""The commands in the documentation are there, with the options that are shown."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

from pollard.client.cli._main import build_app
from pollard.services.up.serve import service_app

ROOT = Path(__file__).parents[2]
PAGES = [
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    if re.search(r"^(\$ )?pollard ", path.read_text(), re.M)
]


def commands_of(page: str) -> list[list[str]]:
    """The `pollard` commands in a page's blocks, split as a shell would."""
    found = []
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", (ROOT / page).read_text(), re.M | re.S)
    for block in (text for language, text in blocks if language in ("", "sh")):
        for line in block.replace("\\\n", " ").splitlines():
            line = line.removeprefix("$ ")
            if line.startswith("pollard "):
                found.append(shlex.split(line, comments=True)[1:])
    return found


@pytest.fixture(scope="module")
def pollard() -> Any:
    """The `pollard` command with all of its own, and the services' options in place."""
    command: Any = typer.main.get_command(build_app())
    for service in command.commands["serve"].commands:
        command.commands["serve"].commands[service] = typer.main.get_command(service_app(service))
    return command


@pytest.mark.parametrize("page", PAGES)
def test_every_command_and_option_of_a_page_exists(page: str, pollard: Any) -> None:
    commands = commands_of(page)
    assert commands
    for words in commands:
        command, rest = pollard, list(words)
        while hasattr(command, "commands") and rest and not rest[0].startswith("-"):
            assert rest[0] in command.commands, words
            command = command.commands[rest.pop(0)]
        known = {"--help"}.union(*([*p.opts, *p.secondary_opts] for p in command.params))
        used = {word.partition("=")[0] for word in rest if word.startswith("--")}
        assert used <= known, words
