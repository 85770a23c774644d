"""Disks that are full, read-only or damaged: what is stored stays, and the words say what to do."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import resource
import secrets
import shutil
import sqlite3
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import structlog
from sqlalchemy import select
from sqlalchemy.orm import Session

from pollard.models.v1 import fleet_service_pb2 as fleet_pb
from pollard.models.v1 import model_service_pb2 as pb
from pollard.services.common.errors import StartupError, Unavailable
from pollard.services.models.main import build_server
from pollard.services.models.schema import Meta
from pollard.services.models.settings import ModelsSettings
from pollard.services.models.store import DATABASE, Store

CODE = grpc.StatusCode


def test_a_damaged_registry_is_found_and_left_as_it_is(tmp_path: Path, stock: Path) -> None:
    shutil.copytree(stock, tmp_path / "store")
    path = tmp_path / "store" / DATABASE
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    content = bytearray(path.read_bytes())
    page = int.from_bytes(content[16:18], "big")
    # The root page of a table: everything after the first three pages is rubbish.
    for start in range(3 * page, len(content), page):
        content[start : start + 64] = b"\xa5" * 64
    path.write_bytes(content)
    with pytest.raises(StartupError, match="backup"):
        Store(tmp_path / "store").open()
    assert path.read_bytes() == bytes(content)
    path.write_bytes(b"this is no database, but quite long" * 1000)
    with pytest.raises(StartupError, match="backup"):
        Store(tmp_path / "store").open()


@pytest.mark.parametrize("what", ["missing", "empty"])
def test_bundles_whose_registry_is_lost_are_kept(tmp_path: Path, stock: Path, what: str) -> None:
    store = tmp_path / "store"
    shutil.copytree(stock, store)
    registry = store / DATABASE
    if what == "missing":
        registry.unlink()
    else:
        os.truncate(registry, 0)
    before = sorted(store.rglob("*"))
    # An empty registry refers to none of them: they would be deleted at once.
    with pytest.raises(StartupError, match=rf"holds bundles, .*{DATABASE} is {what}.*restore"):
        Store(store).open()
    assert sorted(store.rglob("*")) == before


async def test_bundles_are_kept_from_a_registry_that_does_not_know_them(
    tmp_path: Path, stock: Path, empty_registry: Path
) -> None:
    store = tmp_path / "store"
    shutil.copytree(stock, store)
    known = store / DATABASE
    kept, lost = known.read_bytes(), sorted((store / "blobs" / "sha256").rglob("*"))
    shutil.copy(empty_registry, known)
    with pytest.raises(StartupError, match=r"belong to another registry than .*restore a backup"):
        await build_server(ModelsSettings(store=store, port=0, http_port="off")).start()
    assert sorted((store / "blobs" / "sha256").rglob("*")) == lost
    known.write_bytes(kept)
    service = build_server(ModelsSettings(store=store, port=0, http_port="off"))
    await service.start()
    await service.stop(0)


async def test_a_store_without_bundles_may_have_another_registry(
    tmp_path: Path, empty_registry: Path
) -> None:
    for _ in range(2):
        service = build_server(ModelsSettings(store=tmp_path / "store", port=0, http_port="off"))
        await service.start()
        await service.stop(0)
        shutil.copy(empty_registry, tmp_path / "store" / DATABASE)


@pytest.mark.parametrize("left", [b"", b"\xff\xfe\x00", b"\x00" * 21])
def test_a_managers_name_that_is_damaged_is_made_anew(tmp_path: Path, left: bytes) -> None:
    (tmp_path / "manager-id").write_bytes(left)
    store = Store(tmp_path)
    store.open()
    store.close()
    assert store.manager_id.startswith("manager-")
    assert (tmp_path / "manager-id").read_text("ascii").strip() == store.manager_id


def test_a_registry_of_a_newer_version_is_refused(tmp_path: Path, stock: Path) -> None:
    shutil.copytree(stock, tmp_path / "store")
    with contextlib.closing(sqlite3.connect(tmp_path / "store" / DATABASE)) as database:
        database.execute("UPDATE alembic_version SET version_num = '9999'")
        database.commit()
    with pytest.raises(StartupError, match="newer version"):
        Store(tmp_path / "store").open()


def test_a_store_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StartupError, match="cannot be used"):
        Store(tmp_path / "file" / "store").open()


def test_a_registry_that_is_a_folder_is_said(tmp_path: Path) -> None:
    (tmp_path / "store" / DATABASE).mkdir(parents=True)
    with pytest.raises(StartupError, match=f"cannot be opened: .*{DATABASE} is a folder"):
        Store(tmp_path / "store").open()


@pytest.fixture
def store(tmp_path: Path, stock: Path) -> Iterator[Store]:
    """An open store."""
    shutil.copytree(stock, tmp_path / "store")
    made = Store(tmp_path / "store")
    made.open()
    yield made
    made.close()


def note(session: Session) -> None:
    session.add(Meta(key=f"noted {secrets.token_hex(4)}", number=1, content=b""))


def metas(session: Session) -> int:
    return len(list(session.scalars(select(Meta))))


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("store", "there is no folder .*store"),
        ("registry", f"there is no file {DATABASE} in .*store"),
        ("another", "another file has taken its place"),
    ],
)
def test_a_registry_removed_beneath_a_manager_takes_no_change(
    store: Store, what: str, words: str
) -> None:
    store.write_now(note)
    path = store.directory / DATABASE
    if what == "store":
        shutil.rmtree(store.directory)
    elif what == "registry":
        path.unlink()
    else:
        shutil.copy(path, path.with_suffix(".copy"))
        path.with_suffix(".copy").replace(path)
    # A change that SQLite would write to a file that nobody will ever find.
    with pytest.raises(Unavailable, match=words) as caught:
        store.write_now(note)
    assert caught.value.reason == "DATABASE_UNAVAILABLE"
    assert str(path) in caught.value.message
    # No connection is left that has the old one open: none is made to an empty one.
    store.database.engine.dispose()
    with pytest.raises(Unavailable, match=words):
        store.read_now(metas)
    assert path.exists() == (what == "another")


def test_a_second_manager_is_turned_away_though_the_lock_was_deleted(store: Store) -> None:
    (store.directory / "lock").unlink()
    for _ in range(2):
        with pytest.raises(StartupError, match="another manager"):
            Store(store.directory).open()
    store.close()
    again = Store(store.directory)
    again.open()
    again.close()


def test_too_many_open_files_are_said(store: Store) -> None:
    before = store.read_now(metas)
    store.database.engine.dispose()
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(0)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, limit[1]))
    try:
        with pytest.raises(Unavailable, match=r"may have \d+ files open .*LimitNOFILE"):
            store.write_now(note)
        with pytest.raises(Unavailable, match=r"may have \d+ files open .*LimitNOFILE"):
            store.read_now(metas)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)
    store.write_now(note)
    assert store.read_now(metas) == before + 1


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A directory with room for 12 MB."""
    path = tmp_path / "small"
    path.mkdir()
    mounting = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(path)],
        capture_output=True,
        check=False,
    )
    if mounting.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {mounting.stderr.decode().strip()}")
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)


def fill(path: Path) -> Path:
    """Leave no byte free."""
    filler = path / "filler"
    with contextlib.suppress(OSError), filler.open("ab", buffering=0) as file:
        for size in (1 << 20, 1 << 12, 1):
            with contextlib.suppress(OSError):
                while True:
                    file.write(b"x" * size)
    return filler


async def test_a_limit_on_files_refuses_like_a_full_disk(
    suite_with: Callable[..., Any], bundles: Any, helpers: Any
) -> None:
    """As `ulimit -f`, systemd's LimitFSIZE, and some network file systems give it."""
    large = bundles.tar(2, **{"ballast.bin": random.Random(1).randbytes(3_000_000)})
    async with suite_with() as suite:
        await suite.client.push(bundles.tar(1))
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, before[1]))
        try:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await suite.client.push(large)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert caught.value.code() == CODE.RESOURCE_EXHAUSTED, caught.value.details()
        assert helpers.info_of(caught.value).reason == "DISK_FULL"
        await suite.client.push(large)


async def test_a_full_disk_refuses_and_leaves_everything_as_it_was(
    suite_with: Callable[..., Any], small_disk: Path, bundles: Any, helpers: Any
) -> None:
    async def reason_of(call: Any) -> str:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        assert caught.value.code() == CODE.RESOURCE_EXHAUSTED, caught.value.details()
        return str(helpers.info_of(caught.value).reason)

    async with suite_with(store=small_disk / "store") as suite:
        store = suite.settings.store
        await suite.client.push(bundles.tar(1), alias="production")
        await suite.client.alias_when(lambda a: a.state == pb.Alias.STATE_ACTIVE)

        def files() -> set[Path]:
            return {p for p in store.rglob("*") if p.is_file() and DATABASE not in p.name}

        before = files()
        large = bundles.tar(2, **{"ballast.bin": random.Random(1).randbytes(3_000_000)})
        # It says so before any byte is taken.
        huge = suite.client.header(b"", total_bytes=13_000_000, sha256="0" * 64)
        assert await reason_of(suite.client.send(huge, b"")) == "DISK_FULL"

        # The disk fills up while the bytes arrive.
        header = suite.client.header(large)
        half, go_on = asyncio.Event(), asyncio.Event()

        async def messages() -> AsyncIterator[pb.UploadBundleRequest]:
            yield pb.UploadBundleRequest(header=header)
            yield pb.UploadBundleRequest(data=large[:1_000_000])
            half.set()
            await go_on.wait()
            for start in range(1_000_000, len(large), 1_000_000):
                yield pb.UploadBundleRequest(data=large[start : start + 1_000_000])

        call = suite.client.models.UploadBundle(messages())
        await half.wait()
        await helpers.eventually(
            lambda: asyncio.sleep(0, list((store / "uploads").iterdir())), bool
        )
        filler = await asyncio.to_thread(fill, small_disk)
        go_on.set()
        assert await reason_of(call) == "DISK_FULL"
        assert files() == before

        # It fills up late: the first look is passed with nothing to spare.
        filler.unlink()
        spare = small_disk / "spare"
        free = shutil.disk_usage(small_disk).free
        spare.write_bytes(b"x" * (free - len(large) - 100_000))
        half.clear()
        go_on.clear()
        header = suite.client.header(large)
        call = suite.client.models.UploadBundle(messages())
        await half.wait()
        await helpers.eventually(
            lambda: asyncio.sleep(0, list((store / "uploads").iterdir())), bool
        )
        (small_disk / "more").write_bytes(b"x" * 1_000_000)
        go_on.set()
        assert await reason_of(call) == "DISK_FULL"
        assert files() == before
        spare.unlink()

        # With no byte left, changes are refused, and everything can be read.
        await asyncio.to_thread(fill, small_disk)
        update = pb.UpdateModelRequest(model=pb.Model(name="models/m", description="d" * 60_000))
        assert await reason_of(suite.client.models.UpdateModel(update)) == "DISK_FULL"
        model = await suite.client.models.GetModel(pb.GetModelRequest(name="models/m"))
        assert model.model.description == ""
        assert (await suite.client.alias()).revision == 1
        assert await suite.client.download(name="models/m/revisions/1")

        filler.unlink()
        (small_disk / "more").unlink()
        await suite.client.models.UpdateModel(update)
        assert (await suite.client.push(large)).revision.revision == 2


async def test_servers_that_come_while_the_disk_is_full_do_not_fill_the_log(
    suite_with: Callable[..., Any], small_disk: Path
) -> None:
    async with suite_with(store=small_disk / "store") as suite:
        filler = await asyncio.to_thread(fill, small_disk)
        hello = fleet_pb.Hello(server_id="s", kind=fleet_pb.SERVER_KIND_PREPROCESS)
        with structlog.testing.capture_logs() as lines:
            for _ in range(3):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await suite.client.fleet.Sync(iter([fleet_pb.SyncRequest(hello=hello)])).read()
                assert caught.value.code() == CODE.RESOURCE_EXHAUSTED
                assert str(small_disk / "store") in (caught.value.details() or "")
            filler.unlink()
            await suite.join("s", kind=hello.kind)
        told = [line for line in lines if line["event"].startswith("the fleet ")]
        assert [line["event"] for line in told] == [
            "the fleet cannot move on",
            "the fleet moves on again",
        ]
        assert "is full" in told[0]["error"]


@pytest.mark.parametrize("folder", ["uploads", "blobs"])
async def test_a_disk_that_becomes_read_only_refuses_pushes_and_is_read(
    suite_with: Callable[..., Any],
    small_disk: Path,
    tmp_path: Path,
    bundles: Any,
    helpers: Any,
    folder: str,
) -> None:
    (tmp_path / "store").mkdir()
    (small_disk / folder).mkdir()
    (tmp_path / "store" / folder).symlink_to(small_disk / folder)
    async with suite_with() as suite:
        await suite.client.push(bundles.tar(1))
        tar = bundles.tar(2)
        header = suite.client.header(tar)
        subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
        try:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await suite.client.send(header, tar)
            assert caught.value.code() == CODE.FAILED_PRECONDITION, caught.value.details()
            assert helpers.info_of(caught.value).reason == "STORE_READ_ONLY"
            assert await suite.client.download(name="models/m/revisions/1")
        finally:
            subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
        # What had come before is here still.
        header.write_offset = len(tar) if folder == "blobs" else 0
        assert (await suite.client.send(header, tar)).revision.revision == 2
