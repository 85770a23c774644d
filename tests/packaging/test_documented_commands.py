"""The commands in the documentation are there, with the options that are shown."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer

from pollard.client.cli._main import build_app, run

ROOT = Path(__file__).parents[2]
PAGES = ["docs/operations.md", "docs/rollouts.md"]


def commands_of(page: str) -> list[list[str]]:
    """The `pollard` commands in a page's blocks, split as a shell would."""
    found = []
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", (ROOT / page).read_text(), re.M | re.S)
    for block in (text for language, text in blocks if language in ("", "sh")):
        for line in block.replace("\\\n", " ").splitlines():
            if line.startswith("pollard "):
                found.append(shlex.split(line, comments=True)[1:])
    return found


@pytest.mark.parametrize("page", PAGES)
def test_every_command_and_option_of_a_page_exists(
    page: str, capsys: pytest.CaptureFixture[str]
) -> None:
    commands = commands_of(page)
    assert commands
    for words in commands:
        command = typer.main.get_command(build_app())
        path: list[str] = []
        while hasattr(command, "commands"):
            name = words[len(path)]
            assert name in command.commands, words
            command = command.commands[name]
            path.append(name)
        assert run([*path, "--help"]) == 0
        known = set(re.findall(r"--[a-z][a-z0-9-]*", capsys.readouterr().out))
        used = {word.partition("=")[0] for word in words if word.startswith("--")}
        assert used <= known, words
