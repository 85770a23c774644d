"""A revision goes from a staging to a production installation, with all that belongs to it."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest

from pollard.client import AsyncModelsClient, NotFound, Unavailable
from pollard.client.cli import _main
from pollard.models.v1 import model_service_pb2 as pb
from pollard.runtime.bundle import SIGNATURE
from pollard.runtime.keys import create_key_pair
from pollard.runtime.signing import sign_bundle


@dataclass
class Two:
    """Two installations, and a client of each."""

    staging: Any
    production: Any
    source: AsyncModelsClient
    target: AsyncModelsClient
    spool: Path

    async def copy(self, **how: Any) -> Any:
        how.setdefault("spool", self.spool)
        how.setdefault("revision", 1)
        return await self.source.copy("m", self.target, **how)


@pytest.fixture
def installations(suite_with: Any, tmp_path: Path) -> Any:
    @asynccontextmanager
    async def make(**production: Any) -> AsyncIterator[Two]:
        async with AsyncExitStack() as stack:
            staging = await stack.enter_async_context(suite_with(store=tmp_path / "staging"))
            there = await stack.enter_async_context(
                suite_with(store=tmp_path / "production", **production)
            )
            source = await stack.enter_async_context(AsyncModelsClient(staging.client.address))
            target = await stack.enter_async_context(AsyncModelsClient(there.client.address))
            yield Two(staging, there, source, target, tmp_path / "spool")

    return make


async def test_bundle_signature_notes_labels_and_origin_go_along(
    installations: Any, bundles: Any, helpers: Any, tmp_path: Path
) -> None:
    pair = create_key_pair(tmp_path / "team")
    (tmp_path / "trusted").mkdir()
    shutil.copy(pair.public, tmp_path / "trusted")
    bundle = bundles.make(1)
    sign_bundle(bundle.path, pair.private)
    async with installations(trusted_keys=tmp_path / "trusted", signatures="require") as two:
        stored = await two.staging.client.push(
            helpers.packed(bundle), notes="better at night", labels={"team": "eyes"}
        )
        moved = []
        copied = await two.copy(name="flowers", installation="staging", progress=moved.append)
        assert not copied.existed
        new = await two.target.revision("flowers", revision=1)
        assert new == copied.revision or new.etag == copied.revision.etag
        assert new.bundle_sha256 == bundle.digest
        assert (new.notes, dict(new.labels)) == ("better at night", {"team": "eyes"})
        assert new.signature is not None
        assert (new.signature.state, new.signature.key_sha256) == ("TRUSTED", pair.fingerprint)
        origin = new.origin
        assert origin is not None
        assert (origin.installation, origin.model, origin.revision) == ("staging", "m", 1)
        assert origin.creator == stored.revision.creator
        assert origin.create_time is not None
        assert (origin.notes, dict(origin.labels)) == ("better at night", {"team": "eyes"})
        files = await two.production.client.download(name="models/flowers/revisions/1")
        assert files == await two.staging.client.download(name="models/m/revisions/1")
        assert SIGNATURE in files
        # Nothing is switched, and nothing is left behind.
        assert not (await two.target.model("flowers")).aliases
        assert not list(two.spool.iterdir())
        done = [step.done_bytes for step in moved]
        assert done == sorted(done)
        assert moved[-1].done_bytes == moved[-1].total_bytes


async def test_a_second_copy_finds_the_first(
    installations: Any, bundles: Any, helpers: Any
) -> None:
    async with installations() as two:
        await two.staging.client.push(bundles.tar(1))
        first = await two.copy()
        second = await two.copy()
        assert (first.existed, second.existed) == (False, True)
        assert second.revision.revision == first.revision.revision == 1
        assert (await two.target.model("m")).latest_revision == 1


async def test_a_copy_that_was_deleted_there_can_be_made_again(
    installations: Any, bundles: Any
) -> None:
    async with installations() as two:
        await two.staging.client.push(bundles.tar(1))
        await two.copy()
        await two.target.delete("m", revision=1)
        again = await two.copy()
        assert [item.revision for item in await two.target.revisions("m")] == [1]
        assert again.revision.bundle_sha256 == again.source.bundle_sha256


async def test_a_signature_made_later_follows(
    installations: Any, bundles: Any, helpers: Any, tmp_path: Path
) -> None:
    pair = create_key_pair(tmp_path / "team")
    bundle = bundles.make(1)
    async with installations() as two:
        await two.staging.client.push(helpers.packed(bundle))
        await two.copy()
        sign_bundle(bundle.path, pair.private)
        await two.staging.client.push(helpers.packed(bundle))
        await two.copy()
        (found,) = await two.target.revisions("m")
        assert found.signature is not None
        assert found.signature.key_sha256 == pair.fingerprint
        assert (await two.copy()).existed


async def test_a_copy_of_a_copy_names_both_origins(
    installations: Any, bundles: Any, tmp_path: Path, suite_with: Any
) -> None:
    async with installations() as two, suite_with(store=tmp_path / "third") as third:
        await two.staging.client.push(bundles.tar(1))
        await two.copy(installation="dev")
        async with AsyncModelsClient(third.client.address) as last:
            await two.target.copy("m", last, revision=1, installation="staging", spool=two.spool)
            found = await last.revision("m", revision=1)
        assert found.origin is not None
        assert found.origin.installation == "staging"
        assert found.origin.origin is not None
        assert found.origin.origin.installation == "dev"


@pytest.mark.long
async def test_a_copy_that_broke_off_goes_on_from_what_arrived(
    installations: Any, bundles: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise = bytes(range(256)) * 80_000
    async with installations() as two:
        await two.staging.client.push(bundles.tar(1, **{"noise.bin": noise}))

        def stop(progress: Any) -> None:
            # In the middle of the way out.
            if progress.done_bytes > 0.95 * progress.total_bytes:
                copying.cancel()

        copying = asyncio.create_task(two.copy(progress=stop))
        with pytest.raises(asyncio.CancelledError):
            await copying
        offsets = []
        uploads = two.production.service.uploads
        receive = uploads.receive

        async def watched(request: Any, *rest: Any) -> Any:
            offsets.append(request.write_offset)
            return await receive(request, *rest)

        monkeypatch.setattr(uploads, "receive", watched)
        downloads = []
        pull = two.source.pull
        monkeypatch.setattr(
            two.source, "pull", lambda *a, **k: downloads.append(a) or pull(*a, **k)
        )
        copied = await two.copy()
        assert not copied.existed
        assert offsets[0] > 0
        # What was fetched already is not fetched again.
        assert not downloads


async def test_what_is_missing_or_away_is_told(
    installations: Any, bundles: Any, suite_with: Any
) -> None:
    async with installations() as two:
        with pytest.raises(NotFound):
            await two.copy()
        await two.staging.client.push(bundles.tar(1))
        await two.production.stop()
        with pytest.raises(Unavailable):
            await two.copy()


def nested(depth: int) -> pb.Origin:
    origin = pb.Origin(installation="x", revision="models/m/revisions/1")
    for _ in range(depth):
        origin = pb.Origin(installation="x", revision="models/m/revisions/1", origin=origin)
    return origin


@pytest.mark.parametrize(
    "origin",
    [
        pb.Origin(installation="", revision="models/m/revisions/1"),
        pb.Origin(installation="x" * 256, revision="models/m/revisions/1"),
        pb.Origin(installation="x", revision="models/m"),
        pb.Origin(installation="x", revision="models/m/revisions/1", labels={"": "y"}),
        nested(16),
    ],
    ids=["no installation", "long", "no revision", "label", "deep"],
)
async def test_an_impossible_origin_is_refused(
    suite: Any, bundles: Any, helpers: Any, origin: pb.Origin
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await suite.client.push(bundles.tar(1), origin=origin)
    assert raised.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "origin" in raised.value.details() or "label" in raised.value.details()


async def test_a_deep_origin_is_kept(suite: Any, bundles: Any) -> None:
    pushed = await suite.client.push(bundles.tar(1), origin=nested(15))
    assert pushed.revision.origin == nested(15)


async def test_the_command_says_what_it_did(
    installations: Any,
    bundles: Any,
    helpers: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    async with installations(signatures="warn") as two:
        await two.staging.client.push(bundles.tar(1), notes="ready")
        here, there = two.staging.client.address, two.production.client.address

        def run(*arguments: str) -> tuple[int, str, str]:
            code = _main.run([*arguments])
            captured = capsys.readouterr()
            return code, captured.out, captured.err

        copy = ("models", "copy", "m", "1", "--to", there, "--as", "flowers", "--server", here)
        code, out, error = await asyncio.to_thread(run, *copy)
        assert code == 0, error
        assert f"now flowers revision 1 at {there}" in out
        assert f"pollard models alias flowers production 1 --server {there}" in out
        assert "warning: the bundle is not signed" in error
        code, out, error = await asyncio.to_thread(run, *copy)
        assert "is there already" in out
        show = ("models", "show", "flowers", "--revision", "1", "--server", there)
        _, out, _ = await asyncio.to_thread(run, *show)
        assert f"origin   {here}: m revision 1" in out
        assert "signed   no" in out
