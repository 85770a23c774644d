"""`pollard models`: what is said of models and revisions, and guards against other operators."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from pollard.client.cli import _main
from pollard.models.v1 import model_service_pb2 as pb

Command = Callable[..., Awaitable[int]]


@pytest.fixture
async def stocked(suite_with: Callable[..., Any]) -> Any:
    """A manager with three revisions of `m`, the first in production; no server follows it."""
    async with suite_with(stocked=True) as suite:
        yield suite


@pytest.fixture
def command(stocked: Any) -> Command:
    """Runs `pollard models …` in a thread; gives the exit code."""

    async def run(*arguments: str) -> int:
        words = ["models", *arguments, "--server", stocked.client.address]
        return await asyncio.to_thread(_main.run, words)

    return run


async def model_of(suite: Any) -> pb.Model:
    return (await suite.client.models.GetModel(pb.GetModelRequest(name="models/m"))).model


async def test_description_notes_and_labels_are_changed_and_shown(
    stocked: Any, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    assert await command("edit", "m", "--description", "finds moles", "--label", "team=eyes") == 0
    assert await command("edit", "m", "--label", "reviewed", "--label", "odd=ü =🦊\n") == 0
    found = await model_of(stocked)
    assert found.description == "finds moles"
    assert dict(found.labels) == {"team": "eyes", "reviewed": "", "odd": "ü =🦊\n"}
    assert await command("edit", "m", "--remove-label", "odd") == 0
    assert (
        await command("edit", "m", "--revision", "2", "--notes", "by night", "--label", "v=2") == 0
    )
    capsys.readouterr()
    assert await command("show", "m", "--revision", "2") == 0
    said = capsys.readouterr().out
    assert "by night" in said
    assert "v=2" in said
    assert await command("show", "m", "--filter", 'labels.v = "2"', "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert [item["revision"] for item in shown["revisions"]] == [2]
    assert shown["model"]["labels"] == {"team": "eyes", "reviewed": ""}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "nothing is to change"),
        (["--notes", "x"], "say which with --revision"),
        (["--revision", "1", "--description", "x"], "leave --revision out"),
        (["--label", "=x"], "has no key"),
        (["--label", "a=1", "--remove-label", "a"], "both set and taken away"),
        (["--label", "a", "--request-id", str(uuid.UUID(int=1))], "give the --etag"),
        (["--description", "x", "--request-id", "7"], "is no UUID"),
    ],
)
def test_what_makes_no_sense_is_refused_in_words(
    options: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _main.run(["models", "edit", "m", *options]) == 2
    assert words in " ".join(capsys.readouterr().err.split())


async def test_labels_that_others_set_at_the_same_time_stay(stocked: Any) -> None:
    async def set_label(label: str) -> None:
        # A process for each: typer sets environment variables while it reads a command line.
        words = ["models", "edit", "m", "--label", label, "--server", stocked.client.address]
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "pollard.client.cli",
            *words,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        said, _ = await process.communicate()
        assert process.returncode == 0, said.decode()

    labels = [f"by-{number}" for number in range(6)]
    await asyncio.gather(*(set_label(label) for label in labels))
    assert set((await model_of(stocked)).labels) == set(labels)


async def test_a_change_that_others_were_quicker_with_is_refused(
    stocked: Any, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (await stocked.client.alias()).etag
    assert await command("alias", "m", "production", "2", "--etag", before) == 0
    assert await command("alias", "m", "production", "3", "--etag", before) == 1
    assert "was changed in between" in capsys.readouterr().err
    for words in (
        ["rollback", "m"],
        ["alias", "m", "production", "--delete"],
        ["edit", "m", "--label", "x"],
        ["edit", "m", "--revision", "1", "--notes", "x"],
        ["delete", "m", "--revision", "3", "--yes"],
        ["delete", "m", "--force", "--yes"],
    ):
        assert await command(*words, "--etag", "0") == 1, words
        assert "was changed in between" in capsys.readouterr().err
    assert (await stocked.client.alias()).revision == 2
    assert await command("rollout", "m", "3", "--hold", "1h") == 0
    for order in ("--pause", "--resume", "--promote", "--abort"):
        assert await command("rollout", "m", order, "--etag", "0") == 1
        assert "was changed in between" in capsys.readouterr().err
    assert await command("rollout", "m", "--etag", "0") == 2


async def test_the_same_request_again_is_carried_out_once(stocked: Any, command: Command) -> None:
    async def count(action: str) -> int:
        page = await stocked.client.models.ListEvents(pb.ListEventsRequest(page_size=1000))
        return sum(event.action == action for event in page.events)

    etag = (await model_of(stocked)).etag
    for action, words in (
        ("ALIAS_SET", ["alias", "m", "canary", "2"]),
        ("MODEL_UPDATED", ["edit", "m", "--label", "a=1", "--etag", etag]),
        ("REVISION_UPDATED", ["edit", "m", "--revision", "1", "--notes", "x"]),
        ("REVISION_DELETED", ["delete", "m", "--revision", "3", "--yes"]),
        ("REVISION_UNDELETED", ["undelete", "m", "--revision", "3"]),
        ("ALIAS_DELETED", ["alias", "m", "canary", "--delete"]),
    ):
        before, request_id = await count(action), str(uuid.uuid4())
        for _ in range(2):
            assert await command(*words, "--request-id", request_id) == 0, words
        assert await count(action) == before + 1, words


async def test_models_are_listed_by_what_is_asked_for(
    stocked: Any, command: Command, bundles: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("b", "gone"):
        await stocked.client.push(bundles.tar(7), name)
    assert await command("edit", "b", "--label", "team=eyes") == 0
    assert await command("delete", "gone", "--yes") == 0

    async def listed(*options: str) -> list[str]:
        capsys.readouterr()
        assert await command("list", "--json", *options) == 0
        return [item["name"] for item in json.loads(capsys.readouterr().out)]

    assert await listed() == ["b", "m"]
    assert await listed("--order-by", "name desc") == ["m", "b"]
    assert await listed("--filter", "labels.team = eyes") == ["b"]
    assert await listed("--deleted") == ["b", "gone", "m"]
    assert await command("list", "--deleted") == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("gone"))
    assert "deleted " in line
    assert await command("list", "--filter", "name = c") == 0
    assert "No model is such that name = c" in capsys.readouterr().out
    assert await command("list", "--filter", "name != c") == 1
    assert await command("list", "--order-by", "size") == 1
