"""Collecting blobs: what is needed stays, whoever needs it; what nobody needs goes."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pollard.services.common.errors import Unavailable
from pollard.services.models import collector as module
from pollard.services.models.blobs_local import LocalBlobs
from pollard.services.models.collector import Collector, release, release_dead
from pollard.services.models.schema import BlobHold, Bundle, BundleFile
from pollard.services.models.store import Store


class Manager:
    """The store of one manager and its collector; blobs in a directory that managers share."""

    def __init__(self, root: Path, name: str, database_url: str) -> None:
        self.store = Store(root / name, database_url)
        self.store.open()
        self.blobs = LocalBlobs(root / "blobs")
        self.blobs.check()
        self.collector = Collector(self.store, self.blobs)
        self._source = root / f"{name}-file"

    def add(self, content: bytes) -> str:
        sha256 = hashlib.sha256(content).hexdigest()
        # The one before may be a blob by now, which only root may write.
        self._source.unlink(missing_ok=True)
        self._source.write_bytes(content)
        self.blobs.adopt(self._source, sha256)
        return sha256

    def refer(self, sha256: str, holder: str) -> None:
        """What an upload's transaction does."""

        def work(session: Any) -> None:
            if session.get(Bundle, "b" * 64) is None:
                session.add(Bundle(sha256="b" * 64, size_bytes=1, signature=""))
                session.flush()
            session.add(
                BundleFile(
                    bundle_sha256="b" * 64, path=sha256, position=0, sha256=sha256, size_bytes=1
                )
            )
            release(session, holder)

        self.store.write_now(work)

    def holds(self) -> int:
        return self.store.read_now(lambda session: session.query(BlobHold).count())


@pytest.fixture(params=["sqlite", "postgresql"])
async def managers(request: Any, tmp_path: Path) -> AsyncIterator[list[Manager]]:
    """One manager on SQLite, or two on one PostgreSQL; each is given twice or once."""
    if request.param == "sqlite":
        one = Manager(tmp_path, "one", "")
        yield [one, one]
        one.store.close()
        return
    postgres = request.getfixturevalue("postgres")
    name = postgres.new_database()
    made = [Manager(tmp_path, each, postgres.url(name)) for each in ("one", "two")]
    yield made
    for each in made:
        each.store.close()
    postgres.drop_database(name)


async def test_only_what_nobody_refers_to_or_holds_is_deleted(managers: list[Manager]) -> None:
    one, two = managers
    referred, held, nobodys = (one.add(content) for content in (b"referred", b"held", b"nobody's"))
    one.refer(referred, await one.collector.hold([referred]))
    holder = await one.collector.hold([held, referred])
    assert two.collector.collect() == [nobodys]
    assert sorted(two.blobs) == sorted([referred, held])
    one.store.write_now(lambda session: release(session, holder))
    assert two.collector.collect([referred]) == []
    assert two.collector.collect() == [held]
    assert list(two.blobs) == [referred]
    assert one.holds() == 0


@contextmanager
def stopped_while_deleting(manager: Manager, monkeypatch: Any) -> Iterator[asyncio.Event]:
    """The manager's next deletion waits until the event is set."""
    go_on = asyncio.Event()
    loop = asyncio.get_running_loop()
    delete = manager.blobs.delete

    def wait(sha256: str) -> None:
        asyncio.run_coroutine_threadsafe(go_on.wait(), loop).result(30)
        delete(sha256)

    monkeypatch.setattr(manager.blobs, "delete", wait)
    yield go_on
    go_on.set()


async def test_an_upload_waits_while_its_blob_is_being_deleted(
    managers: list[Manager], monkeypatch: Any, helpers: Any
) -> None:
    one, two = managers
    sha256 = one.add(b"needed again")
    with stopped_while_deleting(one, monkeypatch) as go_on:
        collecting = asyncio.create_task(asyncio.to_thread(one.collector.collect))
        await helpers.eventually(lambda: asyncio.sleep(0, two.holds()), lambda count: count == 1)
        # Another collector leaves it to the first.
        assert two.collector.collect() == []
        holding = asyncio.create_task(two.collector.hold([sha256]))
        await asyncio.sleep(0.2)
        assert not holding.done()
        go_on.set()
        assert await collecting == [sha256]
        holder = await holding
    assert two.add(b"needed again") == sha256
    assert one.collector.collect() == []
    two.refer(sha256, holder)
    assert one.collector.collect() == []
    assert list(two.blobs) == [sha256]


async def test_what_is_deleted_for_too_long_is_said(
    managers: list[Manager], monkeypatch: Any, helpers: Any
) -> None:
    one, two = managers
    sha256 = one.add(b"stuck")
    monkeypatch.setattr(module, "_WAIT_SECONDS", 0.2)
    with stopped_while_deleting(one, monkeypatch) as go_on:
        collecting = asyncio.create_task(asyncio.to_thread(one.collector.collect))
        await helpers.eventually(lambda: asyncio.sleep(0, two.holds()), lambda count: count == 1)
        with pytest.raises(Unavailable, match="try again in a minute"):
            await two.collector.hold([sha256])
        go_on.set()
        await collecting
    await two.collector.hold([sha256])


async def test_what_a_manager_held_when_it_died_ends_when_it_starts_and_no_other_holds_end(
    managers: list[Manager],
) -> None:
    one, two = managers
    dead, alive = one.add(b"dead"), one.add(b"alive")
    await one.collector.hold([dead])
    if two is not one:
        await two.collector.hold([alive])
    one.store.write_now(lambda session: release_dead(session))
    assert one.collector.collect([dead]) == []
    one.store.write_now(lambda session: release_dead(session, one.store.manager_id))
    assert one.collector.collect([dead]) == [dead]
    if two is not one:
        assert one.collector.collect([alive]) == []
        assert list(two.blobs) == [alive]


async def test_a_blob_that_cannot_be_deleted_is_collected_the_next_time(
    managers: list[Manager], monkeypatch: Any
) -> None:
    one, two = managers
    sha256 = one.add(b"stubborn")

    def fail(_: str) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(one.blobs, "delete", fail)
        assert one.collector.collect() == []
    assert one.holds() == 0
    assert two.collector.collect() == [sha256]
