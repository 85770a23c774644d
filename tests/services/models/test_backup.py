"""Backups: consistent while the manager works, restored into an empty place and nowhere else."""

from __future__ import annotations

import asyncio
import os
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration

from pollard.models.v1 import model_service_pb2 as pb
from pollard.services.common.errors import DataLoss, ResourceExhausted, StartupError
from pollard.services.models.backup import INFO, Progress, back_up, read_info, restore
from pollard.services.models.blobs_local import LocalBlobs
from pollard.services.models.database import make_database
from pollard.services.models.main import build_server
from pollard.services.models.schema import BundleFile
from pollard.services.models.settings import ModelsSettings
from pollard.services.models.store import DATABASE


def back_up_suite(suite: Any, directory: Path) -> Any:
    """As another process does it: with a connection of its own."""
    settings = suite.settings
    database = make_database(settings.database_url, settings.store, DATABASE)
    return back_up(database, LocalBlobs(settings.store / "blobs"), directory)


def restore_to(
    store: Path, directory: Path, progress: Progress | None = None, *, database_url: str = ""
) -> Any:
    return restore(
        directory,
        store,
        lambda made: make_database(database_url, made, DATABASE),
        lambda made: LocalBlobs(made / "blobs"),
        progress,
    )


async def content(client: Any) -> dict[str, Any]:
    """All that clients can see of what is kept."""
    models = (await client.models.ListModels(pb.ListModelsRequest(show_deleted=True))).models
    found: dict[str, Any] = {model.name: model for model in models}
    for model in models:
        revisions = await client.models.ListRevisions(
            pb.ListRevisionsRequest(parent=model.name, show_deleted=True)
        )
        for revision in revisions.revisions:
            found[revision.name] = revision
            if not revision.HasField("delete_time"):
                found[f"{revision.name}/files"] = await client.download(name=revision.name)
    found["events"] = list((await client.models.ListEvents(pb.ListEventsRequest())).events)
    return found


@pytest.fixture(params=["sqlite", "postgresql"])
def elsewhere(request: Any) -> Any:
    """URL of an empty database to restore to; empty for SQLite."""
    if request.param == "sqlite":
        yield ""
        return
    postgres = request.getfixturevalue("postgres")
    name = postgres.new_database()
    yield postgres.url(name)
    postgres.drop_database(name)


@pytest.mark.parametrize("backend", ["sqlite", "postgresql"], indirect=True)
async def test_what_is_restored_is_what_was_backed_up_in_either_database(
    suite_with: Any, elsewhere: str, bundles: Any, tmp_path: Path, helpers: Any
) -> None:
    async with suite_with(stocked=True) as suite:
        await suite.client.models.DeleteRevision(
            pb.DeleteRevisionRequest(name="models/m/revisions/3")
        )
        before = await content(suite.client)
        info = await asyncio.to_thread(back_up_suite, suite, tmp_path / "backup")
        assert (info.models, info.damaged) == (1, ())
        await suite.client.push(bundles.tar(9), "later")
    shutil.rmtree(suite.settings.store)
    await asyncio.to_thread(
        restore_to, tmp_path / "new", tmp_path / "backup", database_url=elsewhere
    )
    settings = suite.settings.model_copy(
        update={"store": tmp_path / "new", "database_url": elsewhere}
    )
    async with AsyncExitStack() as stack:
        other = type(suite)(settings, stack)
        await other.start()
        stack.push_async_callback(other.stop)
        after = await content(other.client)
        assert after == before
        # Servers find their revision again, and everything goes on.
        server = await other.join("i1")
        state = await server.state_when(lambda state: helpers.route_of(state) == 1)
        assert helpers.revisions_of(state) == [1]
        assert (await other.client.push(bundles.tar(9))).revision.revision == 4
        await other.client.set_alias(4)
        await other.client.alias_when(lambda alias: alias.revision == 4)


async def test_a_backup_beside_uploads_switches_and_collecting_is_of_one_moment(
    suite: Any, bundles: Any, tmp_path: Path
) -> None:
    """Whatever was acknowledged before it began is in it, and all that is in it is whole."""
    server = await suite.join("i1")
    acknowledged = 0
    working = True

    async def work() -> None:
        nonlocal acknowledged
        seed = 0
        while working:
            seed += 1
            answer = await suite.client.push(bundles.tar(seed, **{"ballast.bin": b"b" * 50_000}))
            acknowledged = answer.revision.revision
            await suite.client.set_alias(acknowledged)
            await asyncio.to_thread(suite.service.collector.collect)

    task = asyncio.create_task(work())
    for _ in range(4):
        known = acknowledged
        info = await asyncio.to_thread(back_up_suite, suite, tmp_path / "backup")
        assert info.damaged == ()
        rows = sqlite3.connect(tmp_path / "backup" / info.registry)
        numbers = [number for (number,) in rows.execute("SELECT number FROM revisions")]
        referred = {sha256 for (sha256,) in rows.execute("SELECT sha256 FROM bundle_files")}
        rows.close()
        assert sorted(numbers) == list(range(1, len(numbers) + 1))
        assert len(numbers) >= known
        kept = LocalBlobs(tmp_path / "backup" / "blobs")
        assert set(kept) == referred
        assert all(kept.rehash(digest) == digest for digest in kept)
    working = False
    await task
    await server.close()
    await asyncio.to_thread(restore_to, tmp_path / "new", tmp_path / "backup")
    service = build_server(ModelsSettings(store=tmp_path / "new", port=0))
    await service.start()
    await service.stop(0)


async def test_a_rollout_goes_on_at_the_step_of_the_backup(
    suite_with: Any, tmp_path: Path, helpers: Any
) -> None:
    async def rollout(client: Any) -> pb.Rollout:
        request = pb.GetRolloutRequest(name="models/m/rollouts/1")
        return (await client.models.GetRollout(request)).rollout

    async with suite_with(stocked=True) as suite:
        server = await suite.join("i1")
        await suite.client.models.CreateRollout(
            pb.CreateRolloutRequest(
                parent="models/m",
                rollout=pb.Rollout(
                    revision=2,
                    steps=[25, 100],
                    hold=Duration(seconds=3600),
                    gates=pb.RolloutGates(min_requests=1000),
                ),
            )
        )
        canary = pb.Rollout.STATE_CANARY
        before = await helpers.eventually(
            lambda: rollout(suite.client), lambda r: r.state == canary
        )
        await asyncio.to_thread(back_up_suite, suite, tmp_path / "backup")
        await suite.client.models.AbortRollout(pb.AbortRolloutRequest(name=before.name))
        await server.close()
    await asyncio.to_thread(restore_to, tmp_path / "new", tmp_path / "backup")
    settings = suite.settings.model_copy(update={"store": tmp_path / "new"})
    async with AsyncExitStack() as stack:
        other = type(suite)(settings, stack)
        await other.start()
        stack.push_async_callback(other.stop)
        after = await rollout(other.client)
        assert (after.state, after.step, after.revision) == (canary, before.step, 2)
        # The server, which has gone further meanwhile, is told to run both again.
        server = await other.join("i1", applied_version=server.states[-1].version)
        await server.state_when(lambda state: helpers.revisions_of(state) == [1, 2])


async def test_a_damaged_blob_is_named_and_the_rest_is_kept(
    suite: Any, tmp_path: Path, bundles: Any
) -> None:
    await suite.client.push(bundles.tar(1))
    bad = suite.service.store.read_now(
        lambda session: session.query(BundleFile).filter_by(path="cpu-fp32/model.onnx").one().sha256
    )
    path = suite.service.blobs.path(bad)
    path.chmod(0o644)
    path.write_bytes(b"flipped")
    info = await asyncio.to_thread(back_up_suite, suite, tmp_path / "backup")
    assert info.damaged == (bad,)
    assert bad not in list(LocalBlobs(tmp_path / "backup" / "blobs"))
    # Pushed again it is whole, and then so is the backup.
    await suite.client.push(bundles.tar(1))
    info = await asyncio.to_thread(back_up_suite, suite, tmp_path / "backup")
    assert info.damaged == ()


@pytest.fixture
def backup(stock: Path, tmp_path: Path) -> Path:
    """A backup of the stock."""
    store = tmp_path / "store"
    shutil.copytree(stock, store)
    database = make_database("", store, DATABASE)
    back_up(database, LocalBlobs(store / "blobs"), tmp_path / "backup")
    return tmp_path / "backup"


def test_only_an_empty_place_is_restored_to(backup: Path, tmp_path: Path, postgres: Any) -> None:
    with pytest.raises(StartupError, match="is not empty"):
        restore_to(tmp_path / "store", backup)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StartupError, match="is not empty"):
        restore_to(tmp_path / "file", backup)
    (tmp_path / "empty").mkdir()
    restore_to(tmp_path / "empty", backup)
    name = postgres.new_database()
    restore_to(tmp_path / "first", backup, database_url=postgres.url(name))
    with pytest.raises(StartupError, match="holds a registry already"):
        restore_to(tmp_path / "second", backup, database_url=postgres.url(name))
    assert not (tmp_path / "second").exists()
    postgres.drop_database(name)


def test_a_backup_that_is_damaged_or_was_not_finished_is_refused(
    backup: Path, tmp_path: Path
) -> None:
    new = tmp_path / "new"
    blob = next(path for path in (backup / "blobs" / "sha256").rglob("*") if path.is_file())
    whole = blob.read_bytes()
    blob.chmod(0o644)
    blob.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(DataLoss, match=blob.name):
        restore_to(new, backup)
    blob.write_bytes(whole)
    registry = backup / read_info(backup).registry
    rows = registry.read_bytes()
    registry.write_bytes(rows[:5000] + b"x" + rows[5001:])
    with pytest.raises(StartupError, match="is damaged"):
        restore_to(new, backup)
    registry.write_bytes(rows)
    said = (backup / INFO).read_text()
    (backup / INFO).write_text(said.replace('"format": 1', '"format": 9'))
    with pytest.raises(StartupError, match="newer version"):
        restore_to(new, backup)
    (backup / INFO).unlink()
    with pytest.raises(StartupError, match=r"backup\.json is missing"):
        restore_to(new, backup)
    with pytest.raises(StartupError, match="no whole backup"):
        restore_to(new, tmp_path / "nowhere")
    assert not new.exists()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".new")] == []


def copy_of(store: Path) -> tuple[Any, LocalBlobs]:
    """What a backup is made of, not open."""
    return make_database("", store, DATABASE), LocalBlobs(store / "blobs")


def test_a_backup_is_written_by_one_at_a_time_and_not_while_it_is_restored(
    backup: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    refused: list[StartupError] = []

    def meanwhile(work: Callable[[], Any]) -> Callable[[int, int], None]:
        def progress(done: int, total: int) -> None:
            with pytest.raises(StartupError, match="is being written") as caught:
                work()
            refused.append(caught.value)

        return progress

    # Each would remove the rows that the other has written.
    back_up(*copy_of(store), backup, meanwhile(lambda: back_up(*copy_of(store), backup)))
    back_up(*copy_of(store), backup, meanwhile(lambda: restore_to(tmp_path / "new", backup)))
    restore_to(tmp_path / "new", backup, meanwhile(lambda: back_up(*copy_of(store), backup)))
    assert len(refused) == 3 * read_info(backup).blobs
    assert (tmp_path / "new" / DATABASE).is_file()


KILLED = """
import os, signal, sys
from pathlib import Path
from pollard.services.models import backup
from pollard.services.models.blobs_local import LocalBlobs
from pollard.services.models.database import make_database
from pollard.services.models.store import DATABASE

def database(store): return make_database("", store, DATABASE)
def blobs(store): return LocalBlobs(store / "blobs")
def die(done, total): os.kill(os.getpid(), signal.SIGKILL)

what, directory, store = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
if what == "backup":
    backup.back_up(database(store), blobs(store), directory, die)
else:
    backup.restore(directory, store, database, blobs, die)
"""


def test_what_killed_commands_have_left_goes_with_the_next(backup: Path, tmp_path: Path) -> None:
    def kill(what: str, directory: Path, store: Path) -> None:
        done = subprocess.run([sys.executable, "-c", KILLED, what, directory, store], check=False)
        assert done.returncode == -signal.SIGKILL

    first = tmp_path / "first"
    kill("backup", first, tmp_path / "store")
    assert list((first / "blobs").glob("pollard-blobs-*"))
    # As one that was killed while it wrote its last file has it.
    (first / f".{INFO}.1.tmp").write_bytes(b"{")
    back_up(*copy_of(tmp_path / "store"), first)
    assert sorted(path.name for path in (first / "blobs").iterdir()) == ["new", "sha256"]
    assert {path.name for path in first.iterdir() if not path.name.startswith("registry-")} == {
        *("blobs", "lock", INFO)
    }
    kill("restore", backup, tmp_path / "new")
    (left,) = tmp_path.glob(".new-*")
    assert (left / "store" / "blobs").is_dir()
    assert not (tmp_path / "new").exists()
    restore_to(tmp_path / "new", first)
    assert list(tmp_path.glob(".new-*")) == []


def test_a_full_disk_is_named_with_what_became_of_what_was_there(
    backup: Path, tmp_path: Path
) -> None:
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limit[1]))
    try:
        with pytest.raises(
            ResourceExhausted, match=rf"the disk of {tmp_path} is full; nothing was"
        ):
            restore_to(tmp_path / "new", backup)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    restore_to(tmp_path / "new", backup)


def test_a_store_that_is_made_meanwhile_stays_as_it_is(backup: Path, tmp_path: Path) -> None:
    new = tmp_path / "new"

    def another(done: int, total: int) -> None:
        if done == total:
            restore_to(new, backup)
            (new / "mine").write_bytes(b"")

    with pytest.raises(StartupError, match="is not empty any more"):
        restore_to(new, backup, another)
    assert (new / "mine").exists()
    assert list(tmp_path.glob(".new-*")) == []


async def test_what_is_whole_of_a_damaged_backup_can_be_restored(
    backup: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from pollard.client.cli._main import run

    kept = LocalBlobs(backup / "blobs")
    blob = max(map(kept.path, kept), key=lambda path: path.stat().st_size)
    blob.chmod(0o644)
    os.truncate(blob, 1)
    command = ["store", "restore", str(backup), "--store", str(tmp_path / "new")]
    assert await asyncio.to_thread(run, command) == 1
    assert "--skip-damaged" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
    assert await asyncio.to_thread(run, [*command, "--skip-damaged"]) == 1
    said = capsys.readouterr().out
    assert "1 model, 5 files" in said
    assert "1 files are damaged or missing in the backup" in said
    assert blob.name in said
    assert len(list(LocalBlobs(tmp_path / "new" / "blobs"))) == 5
    service = build_server(ModelsSettings(store=tmp_path / "new", port=0, http_port="off"))
    await service.start()
    await service.stop(0)


def test_a_backup_is_not_written_over_something_else(stock: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"x")
    database = make_database("", stock, DATABASE)
    blobs = LocalBlobs(stock / "blobs")
    with pytest.raises(StartupError, match="holds something that is no backup"):
        back_up(database, blobs, tmp_path / "photos")
    with pytest.raises(StartupError, match="is not the store of a manager"):
        back_up(make_database("", tmp_path, DATABASE), blobs, tmp_path / "backup")
    assert not (tmp_path / DATABASE).exists()


def test_the_commands_say_what_they_did(
    stock: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from pollard.client.cli._main import run

    store, backup, new = tmp_path / "store", tmp_path / "backup", tmp_path / "new"
    shutil.copytree(stock, store)
    assert run(["store", "backup", str(backup), "--store", str(store)]) == 0
    assert "1 model, 6 files" in capsys.readouterr().out
    assert run(["store", "restore", str(backup), "--store", str(new)]) == 0
    assert f"Restored: {new}" in capsys.readouterr().out
    assert run(["store", "restore", str(backup), "--store", str(new)]) == 1
    assert "is not empty" in capsys.readouterr().err
    blob = next(path for path in (store / "blobs" / "sha256").rglob("*") if path.is_file())
    blob.unlink()
    # The backup has it still; another one cannot have it.
    assert run(["store", "backup", str(backup), "--store", str(store)]) == 0
    capsys.readouterr()
    assert run(["store", "backup", str(tmp_path / "other"), "--store", str(store)]) == 1
    assert blob.name in capsys.readouterr().out
    assert run(["store", "restore", str(backup), "--store", str(tmp_path / "third")]) == 0
