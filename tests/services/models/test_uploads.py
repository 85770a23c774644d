"""Uploads: resumed, checked, refused; downloads: filtered and verified."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import io
import os
import random
import sys
import tarfile
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from pollard.bundle.v1 import bundle_pb2
from pollard.models.v1 import model_service_pb2 as pb
from pollard.services.models import uploads
from pollard.services.models.blobs import OWNER
from pollard.services.models.part import Part

CODE = grpc.StatusCode


@pytest.fixture
def refused(helpers: Any) -> Any:
    """Awaits a call that must fail; gives the error's reason and words."""

    async def check(call: Any, code: grpc.StatusCode) -> tuple[str, str]:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        assert caught.value.code() == code, caught.value.details()
        return helpers.info_of(caught.value).reason, caught.value.details() or ""

    return check


def tar_of(*members: tuple[str, bytes] | tarfile.TarInfo, mode: str = "w") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:  # type: ignore[call-overload]
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                tar.addfile(info, io.BytesIO(member[1]))
    return buffer.getvalue()


def files_below(directory: Path) -> list[str]:
    return sorted(str(p.relative_to(directory)) for p in directory.rglob("*") if p.is_file())


def open_below(directory: Path) -> list[str]:
    """Files below a directory that this process has open."""
    found = []
    for descriptor in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            found.append(os.readlink(descriptor))
    return [name for name in found if name.startswith(f"{directory}/")]


async def nothing_was_stored(suite: Any) -> None:
    """The registry knows no model, and no byte of the upload is left."""
    request = pb.ListModelsRequest(show_deleted=True)
    assert not (await suite.client.models.ListModels(request)).models
    store = suite.settings.store
    assert files_below(store / "blobs") == [OWNER]
    assert list((store / "uploads").iterdir()) == []
    assert list((store / "blobs" / "new").iterdir()) == []


async def test_an_upload_goes_on_where_it_broke_also_after_a_restart(
    suite: Any, bundles: Any, refused: Any
) -> None:
    tar = bundles.tar(1)
    header = suite.client.header(tar)
    asking = pb.GetUploadRequest(parent="models/m", upload_id=header.upload_id)
    models = suite.client.models
    assert (await refused(models.GetUpload(asking), CODE.NOT_FOUND))[0] == "UPLOAD_NOT_FOUND"

    sent = asyncio.Event()

    async def breaking() -> AsyncIterator[pb.UploadBundleRequest]:
        yield pb.UploadBundleRequest(header=header)
        yield pb.UploadBundleRequest(data=tar[:1500])
        sent.set()
        await asyncio.Event().wait()

    call = models.UploadBundle(breaking())
    await sent.wait()
    await asyncio.sleep(0.1)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call

    async def committed() -> int:
        try:
            answer = await suite.client.models.GetUpload(asking)
        except grpc.aio.AioRpcError:
            return -1
        return int(answer.committed_bytes)

    for _ in range(200):
        if await committed() == 1500:
            break
        await asyncio.sleep(0.02)
    await suite.restart()
    assert await committed() == 1500
    other = pb.GetUploadRequest(parent="models/other", upload_id=header.upload_id)
    assert await refused(suite.client.models.GetUpload(other), CODE.NOT_FOUND)

    for wrong in (0, 1499, 1501):
        header.write_offset = wrong
        reason, words = await refused(suite.client.send(header, tar), CODE.OUT_OF_RANGE)
        assert reason == "OFFSET_MISMATCH"
        assert "1500" in words
    header.write_offset = 1500
    assert (await suite.client.send(header, tar)).revision.revision == 1
    # The answer may have been lost: asking again gives it again, without the bytes.
    assert await committed() == len(tar)
    header.write_offset = len(tar)
    again = await suite.client.send(header, tar)
    assert (again.revision.revision, again.existed) == (1, False)


async def test_a_newer_stream_of_an_upload_takes_over(
    suite: Any, bundles: Any, refused: Any, helpers: Any
) -> None:
    tar = bundles.tar(1)
    header = suite.client.header(tar)

    async def hanging() -> AsyncIterator[pb.UploadBundleRequest]:
        yield pb.UploadBundleRequest(header=header)
        await asyncio.Event().wait()

    older = suite.client.models.UploadBundle(hanging())
    running = suite.service.uploads._running

    async def begun() -> bool:
        return bool(running)

    await helpers.eventually(begun, bool)
    assert (await suite.client.send(header, tar)).revision.revision == 1
    assert (await refused(older, CODE.ABORTED))[0] == "UPLOAD_TAKEN_OVER"


async def test_the_same_bundle_twice_at_once_is_one_revision(suite: Any, bundles: Any) -> None:
    tar = bundles.tar(1)
    answers = await asyncio.gather(*(suite.client.push(tar) for _ in range(3)))
    assert {answer.revision.revision for answer in answers} == {1}
    assert sorted(answer.existed for answer in answers) == [False, True, True]


async def test_damaged_bytes_are_data_loss_and_leave_nothing(
    suite: Any, bundles: Any, refused: Any
) -> None:
    tar = bytearray(bundles.tar(1))
    header = suite.client.header(bytes(tar))
    tar[700] ^= 1
    reason, _ = await refused(suite.client.send(header, bytes(tar)), CODE.DATA_LOSS)
    assert reason == "DIGEST_MISMATCH"
    await nothing_was_stored(suite)
    asking = pb.GetUploadRequest(parent="models/m", upload_id=header.upload_id)
    await refused(suite.client.models.GetUpload(asking), CODE.NOT_FOUND)


async def test_lying_headers_are_refused(suite: Any, bundles: Any, refused: Any) -> None:
    tar = bundles.tar(1)
    client, bad = suite.client, CODE.INVALID_ARGUMENT
    header = client.header(tar, total_bytes=len(tar) - 1)
    assert (await refused(client.send(header, tar), bad))[0] == "UPLOAD_TOO_LONG"
    header = client.header(tar, total_bytes=len(tar) + 1)
    assert (await refused(client.send(header, tar), bad))[0] == "UPLOAD_INCOMPLETE"
    for how in (
        {"total_bytes": 0},
        {"total_bytes": -1},
        {"total_bytes": 1 << 60},
        {"sha256": "abc"},
        {"sha256": hashlib.sha256(tar).hexdigest().upper()},
        {"upload_id": "../../x"},
        {"write_offset": -1},
        {"alias": "../x"},
    ):
        await refused(client.send(client.header(tar, **how), tar), bad)
    header = client.header(tar)
    await client.send(header, tar)
    other = client.header(tar, "other", upload_id=header.upload_id)
    assert (await refused(client.send(other, tar), bad))[0] == "UPLOAD_ID_REUSED"


async def test_messages_out_of_order_are_refused(suite: Any, bundles: Any, refused: Any) -> None:
    tar = bundles.tar(1)
    header = pb.UploadBundleRequest(header=suite.client.header(tar))
    data = pb.UploadBundleRequest(data=tar)
    for messages, expected in (
        ([], "HEADER_MISSING"),
        ([data], "HEADER_MISSING"),
        ([header, header], "DATA_EXPECTED"),
        ([header, pb.UploadBundleRequest()], "DATA_EXPECTED"),
        ([pb.UploadBundleRequest(data=b"x" * (4 << 20) + b"x")], "HEADER_MISSING"),
    ):
        call = suite.client.models.UploadBundle(iter(messages))
        assert (await refused(call, CODE.INVALID_ARGUMENT))[0] == expected
    big = pb.UploadBundleRequest(header=suite.client.header(b"x" * (5 << 20)))
    call = suite.client.models.UploadBundle(
        iter([big, pb.UploadBundleRequest(data=b"x" * (5 << 20))])
    )
    assert (await refused(call, CODE.INVALID_ARGUMENT))[0] == "CHUNK_TOO_LARGE"


def link(name: str, kind: bytes, target: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize(
    "tar",
    [
        b"not a tar at all" * 100,
        b"\0" * 10240,
        tar_of(("../escaped", b"x")),
        tar_of(("/tmp/escaped", b"x")),  # noqa: S108 - refused, never written
        tar_of(("a/../../escaped", b"x")),
        tar_of(link("manifest.json", tarfile.SYMTYPE, "/etc/passwd")),
        tar_of(link("manifest.json", tarfile.LNKTYPE, "/etc/passwd")),
        tar_of(link("fifo", tarfile.FIFOTYPE, "")),
        tar_of(link("device", tarfile.CHRTYPE, "")),
        tar_of(("manifest.json", b"{}"), mode="w:gz"),
        tar_of(("manifest.json", b"{}")),
        tar_of(("manifest.json", b"{" * 100_000)),
        tar_of(("manifest.json", b"\xff\xfe")),
        tar_of(("manifest.json", b" " * (5 << 20))),
        tar_of(("manifest.json", b"{}"), ("manifest.json", b"{}")),
    ],
    ids=[
        "no tar",
        "zeros",
        "parent path",
        "absolute path",
        "path that climbs",
        "symbolic link",
        "hard link",
        "fifo",
        "device",
        "compressed",
        "empty manifest",
        "deep manifest",
        "not utf-8",
        "long manifest",
        "two manifests",
    ],
)
async def test_hostile_tars_are_refused_and_leave_nothing(
    suite: Any, refused: Any, tar: bytes
) -> None:
    await refused(suite.client.push(tar), CODE.INVALID_ARGUMENT)
    await nothing_was_stored(suite)
    assert not Path("/tmp/escaped").exists()  # noqa: S108 - looked for, not used
    assert not (suite.settings.store.parent / "escaped").exists()


async def test_a_manifest_of_50_mb_is_refused_before_it_has_come(suite: Any, refused: Any) -> None:
    tar = tar_of(("manifest.json", b" " * (50 << 20)))
    header = suite.client.header(tar)

    async def messages() -> AsyncIterator[pb.UploadBundleRequest]:
        yield pb.UploadBundleRequest(header=header)
        for start in range(0, 8 << 20, 1 << 20):
            yield pb.UploadBundleRequest(data=tar[start : start + (1 << 20)])
        await asyncio.Event().wait()

    reason, words = await refused(
        suite.client.models.UploadBundle(messages()), CODE.INVALID_ARGUMENT
    )
    assert reason == "ARCHIVE_INVALID"
    assert "52428800 bytes" in words
    await nothing_was_stored(suite)


async def test_bundles_that_lie_are_refused_with_the_reason(
    suite: Any, bundles: Any, refused: Any, helpers: Any
) -> None:
    bad = CODE.INVALID_ARGUMENT

    async def why(tar: bytes) -> tuple[str, str]:
        answer = await refused(suite.client.push(tar), bad)
        await nothing_was_stored(suite)
        return answer  # type: ignore[no-any-return]  # a fixture without a type

    bundle = bundles.make(1)
    weights = bundle.path / "cpu-fp32/model.onnx"
    flipped = bytearray(weights.read_bytes())
    flipped[len(flipped) // 2] ^= 1
    weights.write_bytes(flipped)
    assert (await why(helpers.packed(bundle)))[0] == "BUNDLE_CORRUPT"

    reason, words = await why(bundles.tar(model=b"this is no graph"))
    assert reason == "MODEL_LOAD_FAILED"
    assert "cpu-fp32" in words

    lying = helpers.manifest()
    lying.inputs[0].shape[1] = 5
    reason, words = await why(bundles.tar(1, says=lying))
    assert reason == "SIGNATURE_MISMATCH"
    assert "image" in words

    lying = helpers.manifest()
    lying.outputs[0].name = "other"
    assert (await why(bundles.tar(1, says=lying)))[0] == "SIGNATURE_MISMATCH"

    lying = helpers.manifest()
    lying.inputs[0].data_type = bundle_pb2.DATA_TYPE_FP32
    assert (await why(bundles.tar(1, says=lying)))[0] == "SIGNATURE_MISMATCH"


async def test_a_check_beyond_its_limits_is_refused_and_the_manager_lives(
    suite_with: Callable[..., Any], bundles: Any, refused: Any
) -> None:
    async with suite_with(check_memory_bytes=64 << 20) as suite:
        await refused(suite.client.push(bundles.tar(1)), CODE.INVALID_ARGUMENT)
        await nothing_was_stored(suite)
    async with suite_with(check_timeout_seconds=0.05) as suite:
        reason, _ = await refused(suite.client.push(bundles.tar(1)), CODE.INVALID_ARGUMENT)
        assert reason == "CHECK_TIMEOUT"


@pytest.fixture
def large(bundles: Any) -> Any:
    """A bundle whose check starts while it arrives."""
    return bundles.make(1, **{"ballast.bin": bytes(range(256)) * 80_000, "z/empty": b""})


async def test_the_files_of_an_upload_are_written_while_it_arrives(
    suite: Any, large: Any, helpers: Any
) -> None:
    tar = helpers.packed(large)
    header = suite.client.header(tar)
    rest = asyncio.Event()

    async def messages() -> AsyncIterator[pb.UploadBundleRequest]:
        yield pb.UploadBundleRequest(header=header)
        # Blocks of 4 MiB are written one behind, so the first two must have come.
        for start in range(0, len(tar), 1 << 20):
            if start == 12 << 20:
                await rest.wait()
            yield pb.UploadBundleRequest(data=tar[start : start + (1 << 20)])

    call = suite.client.models.UploadBundle(messages())
    store = suite.settings.store

    async def arrived() -> int:
        return sum(path.stat().st_size for path in (store / "uploads").rglob("ballast.bin"))

    await helpers.eventually(arrived, lambda size: size > 4 << 20)
    rest.set()
    assert (await call).revision.revision == 1
    got = await suite.client.download(name="models/m/revisions/1")
    assert got == {p: (large.path / p).read_bytes() for p in files_below(large.path)}
    assert list((store / "uploads").iterdir()) == []


async def test_a_large_upload_that_breaks_leaves_only_what_it_goes_on_from(
    suite: Any, large: Any, helpers: Any
) -> None:
    tar = helpers.packed(large)
    header = suite.client.header(tar)
    store = suite.settings.store

    async def breaking() -> AsyncIterator[pb.UploadBundleRequest]:
        yield pb.UploadBundleRequest(header=header)
        for start in range(0, 12 << 20, 1 << 20):
            yield pb.UploadBundleRequest(data=tar[start : start + (1 << 20)])
        await asyncio.Event().wait()

    call = suite.client.models.UploadBundle(breaking())

    async def arrived() -> int:
        kept = (path for path in (store / "uploads").rglob("*") if path.is_file())
        return sum(path.stat().st_size for path in kept)

    # It is written in larger pieces than it comes in.
    seen = await helpers.eventually(arrived, lambda size: size >= 4 << 20)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call

    async def running() -> bool:
        return bool(suite.service.uploads._running)

    await helpers.eventually(running, lambda found: not found)
    asking = pb.GetUploadRequest(parent="models/m", upload_id=header.upload_id)
    header.write_offset = (await suite.client.models.GetUpload(asking)).committed_bytes
    assert seen <= header.write_offset <= 12 << 20
    sent = await suite.client.send(header, tar, chunk=1 << 20)
    assert sent.revision.revision == 1


PUSHING = """
import sys, time
from pollard.client import ModelsClient
with ModelsClient(sys.argv[1]) as models:
    models.push(sys.argv[2], "m", upload_id=sys.argv[3], progress=lambda _: time.sleep(0.02))
"""


async def test_an_upload_survives_kills_of_the_client(suite: Any, large: Any, helpers: Any) -> None:
    """Each new client begins where the last one died."""
    chance = random.Random(17)
    upload_id = str(uuid.uuid4())
    told = (suite.service.address, str(large.path), upload_id)
    asking = pb.GetUploadRequest(parent="models/m", upload_id=upload_id)
    seen = 0

    def arrived() -> int:
        return sum(path.stat().st_size for path in (suite.settings.store / "uploads").rglob("bal*"))

    for most in sorted(chance.randrange(1, 18_000_000) for _ in range(3)):
        client = await asyncio.create_subprocess_exec(sys.executable, "-c", PUSHING, *told)
        while arrived() < most:
            assert client.returncode is None
            await asyncio.sleep(0.002)
        client.kill()
        await client.wait()

        async def running() -> bool:
            return bool(suite.service.uploads._running)

        await helpers.eventually(running, lambda found: not found)
        committed = (await suite.client.models.GetUpload(asking)).committed_bytes
        assert committed >= max(seen, most)
        seen = committed
    client = await asyncio.create_subprocess_exec(sys.executable, "-c", PUSHING, *told)
    assert await client.wait() == 0
    got = await suite.client.download(name="models/m/revisions/1")
    assert got == {p: (large.path / p).read_bytes() for p in files_below(large.path)}
    assert list((suite.settings.store / "uploads").iterdir()) == []


async def test_a_large_bundle_that_is_refused_leaves_nothing(
    suite: Any, large: Any, helpers: Any, refused: Any
) -> None:
    ballast = large.path / "ballast.bin"
    content = bytearray(ballast.read_bytes())
    content[-1] ^= 1
    ballast.write_bytes(content)
    tar = helpers.packed(large)
    sending = suite.client.send(suite.client.header(tar), tar, chunk=1 << 20)
    reason, words = await refused(sending, CODE.INVALID_ARGUMENT)
    assert reason == "BUNDLE_CORRUPT"
    assert "ballast.bin" in words
    await nothing_was_stored(suite)
    # What is sent is not what was announced: found before any graph is loaded.
    header = suite.client.header(tar, sha256="0" * 64)
    sending = suite.client.send(header, tar, chunk=1 << 20)
    assert (await refused(sending, CODE.DATA_LOSS))[0] == "DIGEST_MISMATCH"
    await nothing_was_stored(suite)


async def test_files_are_downloaded_by_name_alias_and_digest(
    suite: Any, bundles: Any, helpers: Any
) -> None:
    extra = {"a.txt": b"A" * 3_000_000, "z/empty": b""}
    bundle = bundles.make(1, **extra)
    content = {p: (bundle.path / p).read_bytes() for p in files_below(bundle.path)}
    await suite.client.push(helpers.packed(bundle), alias="production")
    await suite.client.alias_when(lambda a: a.revision == 1)
    for source in (
        {"name": "models/m/revisions/1"},
        {"name": "models/m/aliases/production"},
        {"bundle_sha256": bundle.digest},
    ):
        got = await suite.client.download(**source)
        assert got == content
        assert next(iter(got)) == "manifest.json"
    some = await suite.client.download(bundle_sha256=bundle.digest, paths=["a.txt"])
    assert list(some) == ["manifest.json", "a.txt"]


async def test_a_blob_that_is_there_and_cannot_be_read_is_named(
    suite: Any, bundles: Any, refused: Any
) -> None:
    revision = (await suite.client.push(bundles.tar(1))).revision
    model = next(f.sha256 for f in revision.manifest.files if f.path.endswith(".onnx"))
    for sha256, call in (
        (model, lambda: suite.client.download(name=revision.name)),
        (
            revision.bundle_sha256,
            lambda: suite.client.models.GetRevision(pb.GetRevisionRequest(name=revision.name)),
        ),
    ):
        # As with a sector that is gone, the name is there and reading fails.
        path = suite.service.blobs.path(sha256)
        path.unlink()
        path.mkdir()
        reason, words = await refused(call(), CODE.DATA_LOSS)
        assert reason == "BLOB_DAMAGED"
        assert f"{sha256} cannot be read: Is a directory" in words
        path.rmdir()


async def test_a_damaged_blob_is_named_and_never_sent_whole(
    suite: Any, bundles: Any, refused: Any
) -> None:
    tar = bundles.tar(1)
    revision = (await suite.client.push(tar)).revision
    sha256 = next(f.sha256 for f in revision.manifest.files if f.path.endswith(".onnx"))
    path = suite.service.blobs.path(sha256)
    good = path.read_bytes()
    path.chmod(0o644)
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    call = suite.client.download(name="models/m/revisions/1")
    reason, words = await refused(call, CODE.DATA_LOSS)
    assert reason == "BLOB_DAMAGED"
    assert sha256 in words
    path.unlink()
    call = suite.client.download(name="models/m/revisions/1")
    assert (await refused(call, CODE.DATA_LOSS))[0] == "BLOB_MISSING"
    # Pushing it again heals it.
    assert (await suite.client.push(tar)).existed
    got = await suite.client.download(name="models/m/revisions/1")
    assert got["cpu-fp32/model.onnx"] == good


async def test_equal_files_are_stored_once(suite: Any, bundles: Any, helpers: Any) -> None:
    one = bundles.make(1, **{"one.txt": b"same", "two.txt": b"same"})
    two = bundles.make(2, **{"one.txt": b"same"})
    for bundle in (one, two):
        await suite.client.push(helpers.packed(bundle))
    blobs = files_below(suite.settings.store / "blobs" / "sha256")
    assert len(blobs) == len(set(blobs)) == 5
    for number, bundle in enumerate((one, two), 1):
        got = await suite.client.download(name=f"models/m/revisions/{number}")
        assert got == {p: (bundle.path / p).read_bytes() for p in files_below(bundle.path)}


async def test_cleaning_takes_what_is_old_or_unneeded_and_nothing_else(
    suite: Any, bundles: Any
) -> None:
    await suite.client.push(bundles.tar(1))
    store, service = suite.settings.store, suite.service
    kept = files_below(store / "blobs")
    orphan = service.blobs.path("0" * 64)
    orphan.parent.mkdir(parents=True)
    orphan.write_bytes(b"nobody knows me")
    await service.collector.hold(["1" * 64])  # first: the manager also cleans when it starts
    held = service.blobs.path("1" * 64)
    held.parent.mkdir(parents=True)
    held.write_bytes(b"an upload is about to need me")
    old, young = (store / "uploads" / f"{name}.part" for name in (uuid.uuid4(), "young"))
    stale = store / "blobs" / "new" / "stale"
    for part in (old, young):
        (part / "bundle").mkdir(parents=True)
        (part / "bundle" / "manifest.json").write_bytes(b"x")
    stale.write_bytes(b"x")
    day_ago = time.time() - 25 * 3600
    for path in (stale, old / "bundle" / "manifest.json", old / "bundle", old):
        os.utime(path, (day_ago, day_ago))
    await asyncio.to_thread(service.uploads.clean)
    left = files_below(store / "blobs")
    assert sorted([*kept, str(held.relative_to(store / "blobs"))]) == left
    assert files_below(store / "uploads") == ["young.part/bundle/manifest.json"]


async def test_a_part_is_closed_though_its_receiver_is_cancelled_again_and_again(
    suite: Any, bundles: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client goes, and then the manager stops, before a thread is free to close the files."""
    parts: list[Part] = []

    class Watched(Part):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            parts.append(self)

    monkeypatch.setattr(uploads, "Part", Watched)
    tar = bundles.tar(1)
    received = asyncio.Event()

    async def chunks() -> AsyncIterator[bytes]:
        yield tar[:1500]
        received.set()
        await asyncio.Event().wait()

    request = uploads.UploadRequest("m", str(uuid.uuid4()), 0, len(tar), bundle_sha256="0" * 64)
    receiving = asyncio.create_task(suite.service.uploads.receive(request, chunks(), "me"))
    async with asyncio.timeout(10):
        await received.wait()
        while not open_below(suite.settings.store / "uploads"):
            await asyncio.sleep(0.01)
    free = threading.Event()
    loop = asyncio.get_running_loop()
    # As many as the loop's own executor has threads, whatever the machine.
    blocking = [loop.run_in_executor(None, free.wait) for _ in range(64)]
    try:
        async with asyncio.timeout(10):
            while not receiving.done():
                receiving.cancel()
                await asyncio.sleep(0.05)
    finally:
        free.set()
        await asyncio.gather(*blocking)
    async with asyncio.timeout(10):
        while open_below(suite.settings.store / "uploads"):
            await asyncio.sleep(0.01)
    assert len(parts) == 1
