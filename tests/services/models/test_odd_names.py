"""Names and texts with every odd character: what is kept comes back as it was, or is refused."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import grpc
import pytest

from pollard.client import AsyncModelsClient, InvalidBundle
from pollard.client.cli import _main
from pollard.models.v1 import model_service_pb2 as pb
from pollard.runtime.bundle import Bundle

TEXTS = [
    "two  spaces, \ttab",
    "lines\nand\r\nlines\n",
    "'quotes' \"and\" `ticks` \\back",
    "$(touch x); rm -rf * | & > < %s %00 {0}",
    "[red]markup[/] [/oops] [link=file:///x]",
    "\x1b[2J\x1b]0;title\x07 \x07 \x7f",
    "é e\u0301 ü 中文 \U0001f98a \u202eright to left\u202c \u200b\ufeff",
    "'; DROP TABLE models; --",
    "-rf",
    "\u0080\u009b31m",
]
"""Each is kept, as notes, as a description, as a label's value, and most as its key."""

FILES = [
    "a b",
    "new\nline",
    "tab\t",
    "'quotes\"",
    "$(x)`x`;&|",
    "-rf",
    "*?[a]",
    "%00",
    "C:nul",
    "\x1b[2J\x07\x7f",
    "é",
    "e\u0301",
    "\U0001f98a/中/\u202e",
    "..almost",
    "~",
    "ü" * 100,
]


async def test_files_of_any_name_come_back_as_they_were(
    suite: Any, bundles: Any, tmp_path: Path
) -> None:
    content = {name: f"content of {name!r}".encode() for name in FILES}
    bundle = bundles.make(**content)
    async with AsyncModelsClient(suite.client.address) as client:
        await client.push(bundle.path, "m")
        await client.pull("m", tmp_path / "back", revision=1)
        verified = await client.verify()
    back = Bundle.open(tmp_path / "back", expect=bundle.digest)
    assert {name: (back.path / name).read_bytes() for name in FILES} == content
    assert not verified.damaged


async def test_a_file_whose_name_is_no_text_is_refused_before_anything_is_sent(
    suite: Any, bundles: Any
) -> None:
    bundle = bundles.make()
    (bundle.path / os.fsdecode(b"\xff.txt")).write_bytes(b"x")
    async with AsyncModelsClient(suite.client.address) as client:
        with pytest.raises(InvalidBundle, match=r"manifest\.json"):
            await client.push(bundle.path, "m")


@pytest.mark.long
async def test_texts_come_back_as_they_were(suite: Any, bundles: Any) -> None:
    models = suite.client.models
    labels = {text: text for text in TEXTS}
    for number, text in enumerate(TEXTS, 1):
        pushed = await suite.client.push(bundles.tar(number), notes=text, labels=labels)
        assert (pushed.revision.notes, dict(pushed.revision.labels)) == (text, labels)
        request = pb.UpdateModelRequest(model=pb.Model(name="models/m", description=text))
        request.update_mask.paths.append("description")
        assert (await models.UpdateModel(request)).model.description == text
    await suite.restart()
    page = await suite.client.models.ListRevisions(pb.ListRevisionsRequest(parent="models/m"))
    assert [revision.notes for revision in page.revisions] == TEXTS[::-1]
    assert all(dict(revision.labels) == labels for revision in page.revisions)


@pytest.mark.parametrize(
    "alias",
    ["", "UPPER", "-dash", ".", "..", "a b", "a\n", "a\0b", "ü", "🦊", "a:b", "%2e", "a" * 64, "7"],
)
async def test_an_alias_of_an_odd_name_is_refused_everywhere(
    suite: Any, bundles: Any, helpers: Any, alias: str
) -> None:
    models, name = suite.client.models, f"models/m/aliases/{alias}"
    calls = [
        models.GetAlias(pb.GetAliasRequest(name=name)),
        models.SetAlias(pb.SetAliasRequest(name=name, revision=1)),
        models.RollbackAlias(pb.RollbackAliasRequest(name=name)),
        models.DeleteAlias(pb.DeleteAliasRequest(name=name)),
    ]
    if alias:
        calls.append(suite.client.push(bundles.tar(), alias=alias))
    for call in calls:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert helpers.info_of(caught.value).reason == "NAME_INVALID"


async def test_the_command_shows_odd_texts_and_lets_none_of_them_steer_the_terminal(
    suite: Any, bundles: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = "".join(TEXTS)
    await suite.client.push(bundles.tar(), notes=odd, labels={odd[:200]: odd[:200]})
    request = pb.UpdateModelRequest(model=pb.Model(name="models/m", description=odd))
    request.update_mask.paths.append("description")
    await suite.client.models.UpdateModel(request)
    for words in (["show", "m"], ["show", "m", "--revision", "1"], ["list"]):
        code = await asyncio.to_thread(
            _main.run, ["models", *words, "--server", suite.client.address]
        )
        said = capsys.readouterr().out
        assert code == 0
        assert "m" in said
        if words[0] == "show":
            assert "[/oops]" in said
        assert not {c for c in said if not c.isprintable()} - set("\n\u200b\ufeff"), words
