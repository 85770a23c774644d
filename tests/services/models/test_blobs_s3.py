"""Blobs in S3: moto's server over HTTP, which fails, is slow and refuses when it is told to."""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import pytest

from pollard.models.v1 import model_service_pb2 as pb
from pollard.services.common.errors import FailedPrecondition, StartupError, Unavailable
from pollard.services.models.backup import back_up, restore
from pollard.services.models.blobs import open_blobs
from pollard.services.models.blobs_s3 import S3Blobs
from pollard.services.models.database import make_database
from pollard.services.models.main import build_server
from pollard.services.models.settings import ModelsSettings
from pollard.services.models.store import DATABASE

CODE = grpc.StatusCode
LARGE = random.Random(8).randbytes(20_000_000)


@pytest.fixture
def blobs(s3: Any) -> S3Blobs:
    return S3Blobs("s3://bucket/some/prefix", s3.url)


@pytest.fixture
def file(tmp_path: Path) -> Callable[[bytes], tuple[Path, str]]:
    def make(content: bytes) -> tuple[Path, str]:
        path = tmp_path / f"file-{len(list(tmp_path.iterdir()))}"
        path.write_bytes(content)
        return path, hashlib.sha256(content).hexdigest()

    return make


@pytest.mark.parametrize("content", [b"", b"small", LARGE], ids=["empty", "small", "large"])
def test_what_is_kept_comes_back_and_is_sent_once(
    s3: Any, blobs: S3Blobs, file: Any, content: bytes
) -> None:
    blobs.check()
    path, sha256 = file(content)
    blobs.adopt(path, sha256)
    assert b"".join(blobs.pieces(sha256)) == content
    assert list(blobs) == [sha256]
    key = f"some/prefix/sha256/{sha256[:2]}/{sha256}"
    assert s3.client.head_object(Bucket="bucket", Key=key)["ContentLength"] == len(content)
    s3.requests.clear()
    blobs.adopt(path, sha256)
    assert {method for method, _ in s3.requests} <= {"HEAD", "GET"}
    # Damaged where it is kept, it is found and replaced.
    s3.client.put_object(Bucket="bucket", Key=key, Body=b"x" * len(content) or b"x")
    assert blobs.rehash(sha256) != sha256
    blobs.adopt(path, sha256)
    assert blobs.rehash(sha256) == sha256
    blobs.delete(sha256)
    assert list(blobs) == []
    blobs.delete(sha256)
    with pytest.raises(FileNotFoundError):
        next(blobs.pieces(sha256))


def test_an_upload_that_broke_goes_on_from_the_parts_that_s3_has(
    s3: Any, blobs: S3Blobs, file: Any
) -> None:
    path, sha256 = file(LARGE)
    s3.fault = lambda method, where: 500 if "partNumber=3" in where else None
    blobs._retry_seconds = 0.3
    with pytest.raises(Unavailable, match="Try again later"):
        blobs.adopt(path, sha256)
    assert list(blobs) == []
    s3.fault = lambda method, where: None
    s3.requests.clear()
    # Another manager goes on with it as well.
    other = S3Blobs("s3://bucket/some/prefix", s3.url)
    other.adopt(path, sha256)
    sent = [where for method, where in s3.requests if method == "PUT"]
    assert len(sent) == 1
    assert "partNumber=3" in sent[0]
    assert other.rehash(sha256) == sha256


def test_what_nobody_completes_is_given_up_after_its_time(
    s3: Any, blobs: S3Blobs, file: Any
) -> None:
    path, sha256 = file(LARGE)
    s3.fault = lambda method, where: 403 if "partNumber=2" in where else None
    with pytest.raises(FailedPrecondition):
        blobs.adopt(path, sha256)
    # moto says of each that it was begun in 2010.
    blobs.remove_leftovers(datetime(2010, 1, 1, tzinfo=UTC).timestamp())
    assert len(s3.client.list_multipart_uploads(Bucket="bucket")["Uploads"]) == 1
    blobs.remove_leftovers(time.time())
    assert "Uploads" not in s3.client.list_multipart_uploads(Bucket="bucket")


def test_s3_that_fails_now_and_then_is_asked_again(s3: Any, blobs: S3Blobs, file: Any) -> None:
    path, sha256 = file(LARGE)
    chance = random.Random(2)
    failed = []

    def sometimes(method: str, where: str) -> int | None:
        if chance.random() < 0.4:
            failed.append(method)
            return chance.choice((500, 503))
        return None

    s3.fault = sometimes
    blobs.adopt(path, sha256)
    assert b"".join(blobs.pieces(sha256)) == LARGE
    assert failed


def test_s3_that_hangs_is_asked_again_and_then_given_up(s3: Any, blobs: S3Blobs, file: Any) -> None:
    path, sha256 = file(b"slow")
    blobs.adopt(path, sha256)
    hung = []
    ending = threading.Event()

    def hang_once(method: str, where: str) -> None:
        if not hung:
            hung.append(method)
            ending.wait(10)

    s3.fault = hang_once
    blobs._request_seconds = 2.0
    assert b"".join(blobs.pieces(sha256)) == b"slow"
    assert hung

    def hang(method: str, where: str) -> None:
        ending.wait(10)

    s3.fault = hang
    blobs._retry_seconds = 1.0
    with pytest.raises(Unavailable) as caught:
        next(blobs.pieces(sha256))
    assert caught.value.reason == "BLOB_STORE_UNAVAILABLE"
    ending.set()


def test_a_bucket_that_is_missing_or_was_deleted_is_said(
    s3: Any, blobs: S3Blobs, file: Any
) -> None:
    with pytest.raises(StartupError, match="there is no bucket 'elsewhere'"):
        S3Blobs("s3://elsewhere/x", s3.url).check()
    with pytest.raises(StartupError, match="names no bucket"):
        S3Blobs("s3://", s3.url)
    path, sha256 = file(b"x")
    s3.client.delete_bucket(Bucket="bucket")
    for call in (
        lambda: blobs.adopt(path, sha256),
        lambda: next(blobs.pieces(sha256)),
        lambda: list(blobs),
        lambda: blobs.delete(sha256),
    ):
        with pytest.raises(Unavailable, match="restore it if it was deleted") as caught:
            call()
        assert caught.value.reason == "BLOB_STORE_MISSING"


def test_a_bucket_that_can_only_be_read_is_read(s3: Any, blobs: S3Blobs, file: Any) -> None:
    path, sha256 = file(b"read me")
    blobs.adopt(path, sha256)
    s3.fault = lambda method, where: None if method in ("GET", "HEAD") else 403
    blobs.check()
    assert blobs.read(sha256) == b"read me"
    other, digest = file(b"other")
    with pytest.raises(FailedPrecondition, match="policy of the bucket") as caught:
        blobs.adopt(other, digest)
    assert caught.value.reason == "BLOB_STORE_FORBIDDEN"


def test_without_keys_or_an_answer_it_is_said_what_is_missing(
    s3: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, helpers: Any
) -> None:
    with pytest.raises(StartupError, match="does not answer"):
        S3Blobs("s3://bucket", "http://127.0.0.1:9", retry_seconds=0.2).check()
    for key in helpers.S3_KEYS:
        monkeypatch.delenv(key)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(StartupError, match="AWS_ACCESS_KEY_ID"):
        S3Blobs("s3://bucket", s3.url).check()


def test_what_is_no_place_for_blobs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="neither s3://"):
        open_blobs("gs://bucket/x", "", tmp_path)
    with pytest.raises(StartupError, match="--blobs-endpoint is for"):
        open_blobs("", "http://127.0.0.1:1", tmp_path)


# Managers


@pytest.fixture
def how(s3: Any) -> dict[str, Any]:
    return {"blobs": "s3://bucket/pollard", "blobs_endpoint": s3.url}


async def test_a_manager_with_its_blobs_in_s3_keeps_checks_and_collects_them(
    suite_with: Any, s3: Any, how: dict[str, Any], bundles: Any, helpers: Any
) -> None:
    async with suite_with(**how) as suite:
        shared = {"ballast.bin": b"the same in both" * 1000}
        first, second = (bundles.make(seed, **shared) for seed in (1, 2))
        await suite.client.push(helpers.packed(first), alias="production")
        before = len(list(suite.service.blobs))
        await suite.client.push(helpers.packed(second))
        # The manifest and the graph are new; the ballast is there already.
        assert len(list(suite.service.blobs)) == before + 2
        assert not list((suite.settings.store / "blobs").rglob("*.*"))
        await suite.restart()
        got = await suite.client.download(name="models/m/revisions/1")
        assert got["ballast.bin"] == shared["ballast.bin"]

        path = first.manifest.files[0].sha256
        key = f"pollard/sha256/{path[:2]}/{path}"
        s3.client.put_object(Bucket="bucket", Key=key, Body=b"flipped")
        damaged = [
            item
            async for answer in suite.client.models.VerifyStore(pb.VerifyStoreRequest())
            for item in answer.damaged
        ]
        assert [item.sha256 for item in damaged] == [path]
        call = suite.client.download(name="models/m/revisions/1")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        assert caught.value.code() == CODE.DATA_LOSS
        assert (await suite.client.push(helpers.packed(first))).existed
        await suite.client.download(name="models/m/revisions/1")

        s3.client.put_object(Bucket="bucket", Key=f"pollard/sha256/00/{'0' * 64}", Body=b"x")
        await asyncio.to_thread(suite.service.uploads.clean)
        assert "0" * 64 not in list(suite.service.blobs)
        assert len(list(suite.service.blobs)) == before + 2


async def test_a_backup_of_s3_is_restored_to_a_prefix_that_nobody_has(
    suite_with: Any, s3: Any, how: dict[str, Any], bundles: Any, tmp_path: Path
) -> None:
    async with suite_with(**how) as suite:
        await suite.client.push(bundles.tar(1))
        before = await suite.client.download(name="models/m/revisions/1")
        database = make_database("", suite.settings.store, DATABASE)
        blobs = S3Blobs(how["blobs"], s3.url)
        info = await asyncio.to_thread(back_up, database, blobs, tmp_path / "backup")
        assert info.blobs == 2

    def restored(where: str) -> None:
        restore(
            tmp_path / "backup",
            tmp_path / "new",
            lambda made: make_database("", made, DATABASE),
            lambda made: S3Blobs(where, s3.url),
        )

    with pytest.raises(StartupError, match="belong to an installation of Pollard already"):
        await asyncio.to_thread(restored, how["blobs"])
    await asyncio.to_thread(restored, "s3://bucket/again")
    more = {"store": tmp_path / "new", "blobs": "s3://bucket/again"}
    async with suite_with(**(how | more)) as suite:
        assert await suite.client.download(name="models/m/revisions/1") == before


async def test_s3_that_is_away_stops_uploads_and_nothing_is_lost(
    suite_with: Any, s3: Any, how: dict[str, Any], bundles: Any, helpers: Any
) -> None:
    async with suite_with(**how) as suite:
        suite.service.blobs._retry_seconds = 0.5
        tar = bundles.tar(1)
        header = suite.client.header(tar)
        s3.fault = lambda method, path: 503
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await suite.client.send(header, tar)
        assert caught.value.code() == CODE.UNAVAILABLE
        assert helpers.info_of(caught.value).reason == "BLOB_STORE_UNAVAILABLE"
        assert "bucket/pollard" in caught.value.details()
        s3.fault = lambda method, path: None
        # All bytes are here still: the same upload goes on from its end.
        header.write_offset = len(tar)
        assert (await suite.client.send(header, tar)).revision.revision == 1


@pytest.mark.long
async def test_managers_share_one_bucket_and_another_installation_is_turned_away(
    s3: Any, how: dict[str, Any], postgres: Any, tmp_path: Path, bundles: Any, helpers: Any
) -> None:
    name = postgres.new_database()
    settings = [
        ModelsSettings(
            store=tmp_path / each, port=0, database_url=postgres.url(name), drain_seconds=0.1, **how
        )
        for each in ("one", "two")
    ]
    one, two = (build_server(each) for each in settings)
    await one.start()
    await two.start()
    clients = [helpers.Client(each.address) for each in (one, two)]
    try:
        tars = [bundles.tar(seed, **{"ballast.bin": bytes([seed]) * 100_000}) for seed in range(4)]
        collecting = True

        async def collect() -> int:
            rounds = 0
            while collecting:
                await asyncio.to_thread(two.collector.collect)
                rounds += 1
            return rounds

        # Uploads through one and the other, the same bundles too, while both collect.
        task = asyncio.create_task(collect())
        answers = await asyncio.gather(
            *(clients[number % 2].push(tar) for number, tar in enumerate(tars)),
            *(clients[(number + 1) % 2].push(tar) for number, tar in enumerate(tars)),
        )
        collecting = False
        assert await task > 0
        numbers = {answer.revision.revision for answer in answers}
        assert numbers == set(range(1, 5))
        for number in numbers:
            for client in clients:
                assert await client.download(name=f"models/m/revisions/{number}")

        stranger = build_server(ModelsSettings(store=tmp_path / "stranger", port=0, **how))
        with pytest.raises(StartupError, match="belong to another installation"):
            await stranger.start()
    finally:
        for client in clients:
            await client.close()
        await two.stop(0)
        await one.stop(0)
        postgres.drop_database(name)


PROGRAM = """
import json, sys
from pollard.services.models.main import run
from pollard.services.models.settings import ModelsSettings
sys.exit(run(ModelsSettings.load(json.loads(sys.argv[1]))))
"""


async def start(told: dict[str, Any], helpers: Any) -> tuple[asyncio.subprocess.Process, Any]:
    """Start a manager in a process of its own, which can be killed."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", PROGRAM, json.dumps(told), stderr=subprocess.PIPE
    )
    assert process.stderr is not None
    async for line in process.stderr:
        entry = json.loads(line)
        if entry["event"] == "serving":
            return process, helpers.Client(entry["address"])
    raise AssertionError("the manager did not start")


@pytest.mark.long
async def test_kills_while_blobs_go_to_s3_lose_nothing(
    s3: Any, how: dict[str, Any], tmp_path: Path, bundles: Any, helpers: Any
) -> None:
    """Killed after the first, second… part that S3 got, the upload goes on where it was."""
    told = {"store": str(tmp_path / "store"), "port": 0, "log_format": "json"} | how
    tar = bundles.tar(3, **{"ballast.bin": LARGE})
    upload_id = str(uuid.uuid4())
    asking = pb.GetUploadRequest(parent="models/m", upload_id=upload_id)
    for most in (1, 2, 100):
        process, client = await start(told, helpers)
        sent: list[str] = []

        def count(
            method: str,
            path: str,
            process: Any = process,
            sent: list[str] = sent,
            most: int = most,
        ) -> None:
            if "partNumber" in path:
                sent.append(path)
                if len(sent) == most:
                    process.kill()

        s3.fault = count
        try:
            committed = (await client.models.GetUpload(asking)).committed_bytes
        except grpc.aio.AioRpcError:
            committed = 0
        header = client.header(tar, upload_id=upload_id, write_offset=committed)
        result = (
            await asyncio.gather(client.send(header, tar, chunk=1 << 20), return_exceptions=True)
        )[0]
        await client.close()
        if most == 100:
            process.kill()
        await process.wait()
        assert isinstance(result, grpc.aio.AioRpcError) == (most < 100), result
    assert result.revision.revision == 1
    s3.fault = lambda method, path: None
    blobs = S3Blobs("s3://bucket/pollard", s3.url)
    stored = list(blobs)
    assert len(stored) == 3
    assert all(blobs.rehash(digest) == digest for digest in stored)
    assert "Uploads" not in s3.client.list_multipart_uploads(Bucket="bucket")
