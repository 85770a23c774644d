"""`pollard models` against a real manager."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from pollard.models.v1 import model_service_pb2 as pb

Command = Callable[..., Awaitable[tuple[int, str, str]]]


@pytest.fixture
def command(suite: Any) -> Command:
    """Runs `pollard models …`; gives exit code, output and errors."""

    async def run(*arguments: str | Path, **environment: str) -> tuple[int, str, str]:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-m", "pollard.client.cli", "models", *map(str, arguments)),
            *("--server", suite.client.address),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, **environment},
        )
        out, err = await process.communicate()
        assert process.returncode is not None
        return process.returncode, out.decode(), err.decode()

    return run


async def test_a_plain_onnx_file_is_pushed_and_its_manifest_shown(
    suite: Any, helpers: Any, command: Command, tmp_path: Path
) -> None:
    (tmp_path / "tiny.onnx").write_bytes(helpers.graph())
    (tmp_path / "labels").write_text("a\nb\nc\n")
    code, out, err = await command(
        "push",
        tmp_path / "tiny.onnx",
        "--model",
        "m",
        "--labels",
        tmp_path / "labels",
        "--no-wait",
        "--label",
        "team=eyes",
        "--label",
        "reviewed",
    )
    assert (code, err) == (0, "")
    assert '"task": "TASK_CLASSIFICATION"' in out
    assert "m revision 1" in out
    got = (
        await suite.client.models.GetRevision(pb.GetRevisionRequest(name="models/m/revisions/1"))
    ).revision
    assert got.manifest.provenance.derived
    assert dict(got.labels) == {"team": "eyes", "reviewed": ""}
    files = await suite.client.download(name="models/m/revisions/1")
    assert files["cpu-fp32/model.onnx"] == helpers.graph()
    _, out, _ = await command("show", "m", "--revision", "1", "--json")
    (variant,) = json.loads(out)["variants"]
    assert variant["size_bytes"] == len(helpers.graph())
    assert files["labels.txt"] == b"a\nb\nc\n"


async def test_what_is_no_model_is_not_pushed(command: Command, tmp_path: Path) -> None:
    (tmp_path / "x.onnx").write_bytes(b"this is no graph")
    code, _, err = await command("push", tmp_path / "x.onnx", "--model", "m")
    assert code == 1
    assert "x.onnx" in err
    assert "Traceback" not in err


@pytest.mark.long
async def test_verifying_names_what_is_damaged_and_changes_nothing(
    suite: Any, bundles: Any, helpers: Any, command: Command
) -> None:
    tar = bundles.tar(1, **{"a.txt": b"shared", "b.txt": b"shared"})
    revision = (await suite.client.push(tar)).revision
    await suite.client.push(bundles.tar(2, **{"a.txt": b"shared"}))
    code, out, _ = await command("verify")
    assert code == 0
    assert "5 files read" in out  # two manifests, two graphs, and what they share: once
    assert "all as they should be" in out

    by_path = {file.path: file.sha256 for file in revision.manifest.files}
    flipped, missing = (
        suite.service.blobs.path(by_path[p]) for p in ("cpu-fp32/model.onnx", "a.txt")
    )
    good = flipped.read_bytes()
    flipped.chmod(0o644)
    flipped.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    missing.unlink()
    code, out, err = await command("verify", "--json")
    assert (code, err) == (1, "")
    damaged = {file["sha256"]: file for file in json.loads(out)["damaged"]}
    assert damaged.keys() == {flipped.name, missing.name}
    assert damaged[flipped.name]["uses"] == ["models/m/revisions/1/cpu-fp32/model.onnx"]
    assert damaged[missing.name]["uses"] == [
        "models/m/revisions/1/a.txt",
        "models/m/revisions/1/b.txt",
        "models/m/revisions/2/a.txt",
    ]
    assert not missing.exists()
    code, out, _ = await command("verify", "m")
    assert code == 1
    assert flipped.name in out
    code, _, err = await command("verify", "unknown")
    assert code == 1
    assert "unknown" in err

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await suite.client.download(name="models/m/revisions/1")
    assert helpers.info_of(caught.value).reason in ("BLOB_DAMAGED", "BLOB_MISSING")
    await suite.client.push(tar)
    assert (await command("verify"))[0] == 0


async def test_a_locale_without_arrows_loses_them_and_nothing_else(
    helpers: Any, command: Command, tmp_path: Path
) -> None:
    (tmp_path / "tiny.onnx").write_bytes(helpers.graph())
    await command("push", tmp_path / "tiny.onnx", "--model", "m", "--no-wait", "--notes", "für uns")
    for encoding in ("ascii", "ascii:surrogateescape", "latin-1"):
        code, out, err = await command("list", PYTHONIOENCODING=encoding)
        assert (code, err) == (0, "")
        assert "production ?" in out
        code, out, err = await command(
            "show", "m", "--revision", "1", "--json", PYTHONIOENCODING=encoding
        )
        assert (code, err) == (0, "")
        assert json.loads(out)["notes"] == "für uns"
