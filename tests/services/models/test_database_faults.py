"""What happens to the database and the clock, and what is left of it afterwards."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import signal
import sqlite3
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from pollard.models.v1 import model_service_pb2 as pb
from pollard.services.common.errors import DataLoss, StartupError
from pollard.services.models import registry
from pollard.services.models.store import DATABASE, Store

CODE = grpc.StatusCode
HOUR_NS = 3600 * 10**9


@pytest.mark.parametrize("backend", ["postgresql"], indirect=True)
async def test_nothing_acknowledged_is_lost_when_postgresql_crashes_in_the_middle_of_writes(
    suite_with: Callable[..., Any], postgres: Any, bundles: Any
) -> None:
    async with suite_with() as suite:
        await suite.client.push(bundles.tar(1))
        done = asyncio.Event()
        acknowledged: dict[int, str] = {}
        refused: set[grpc.StatusCode] = set()

        async def write(worker: int) -> None:
            number = worker
            while not done.is_set():
                number += 4
                request = pb.UpdateModelRequest(
                    model=pb.Model(name="models/m", description=f"{number}"),
                    request_id=str(uuid.uuid4()),
                )
                try:
                    answer = await suite.client.models.UpdateModel(request)
                except grpc.aio.AioRpcError as error:
                    refused.add(error.code())
                else:
                    acknowledged[number] = answer.model.etag

        writers = [asyncio.create_task(write(worker)) for worker in range(4)]
        for number in (signal.SIGQUIT, signal.SIGINT):
            await asyncio.sleep(0.5)
            await asyncio.to_thread(postgres.stop, number)
            await asyncio.to_thread(postgres.start)
        seen = len(acknowledged)
        async with asyncio.timeout(60):
            while len(acknowledged) < seen + 20:
                await asyncio.sleep(0.05)
        done.set()
        await asyncio.gather(*writers)
        assert refused <= {CODE.UNAVAILABLE}
        written: set[str] = set()
        token = ""
        while True:
            page = await suite.client.models.ListEvents(
                pb.ListEventsRequest(page_size=1000, page_token=token)
            )
            written.update(f"{event.sequence:x}" for event in page.events)
            token = page.next_page_token
            if not token:
                break
        # Each acknowledged change has its event, which was written with it.
        assert set(acknowledged.values()) <= written
        assert len(set(acknowledged.values())) == len(acknowledged)


def damage(path: Path) -> None:
    """Make rubbish of every page of a database but the first."""
    content = bytearray(path.read_bytes())
    page = int.from_bytes(content[16:18], "big")
    for start in range(page, len(content), page):
        content[start : start + 64] = b"\xa5" * 64
    path.write_bytes(content)


def test_a_page_that_is_damaged_while_the_manager_runs_is_named_and_not_served(
    tmp_path: Path, stock: Path
) -> None:
    shutil.copytree(stock, tmp_path / "store")
    path = tmp_path / "store" / DATABASE
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    store = Store(tmp_path / "store")
    store.open()
    damage(path)
    # A new connection has nothing in memory.
    store.database.engine.dispose()
    with pytest.raises(DataLoss, match=r"registry\.sqlite is damaged.*backup"):
        store.read_now(lambda session: registry.find_model(session, "m"))
    store.close()
    with pytest.raises(StartupError, match="backup"):
        Store(tmp_path / "store").open()


@pytest.fixture
def read_only_disk(tmp_path: Path, stock: Path) -> Iterator[Path]:
    """A disk with a store that cannot be written any more."""
    path = tmp_path / "disk"
    path.mkdir()
    mounting = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", str(path)],
        capture_output=True,
        check=False,
    )
    if mounting.returncode:
        pytest.skip(f"a disk cannot be mounted here: {mounting.stderr.decode().strip()}")
    shutil.copytree(stock, path / "store")
    subprocess.run(["mount", "-o", "remount,ro", str(path)], check=True)
    yield path / "store"
    subprocess.run(["umount", "-l", str(path)], check=True)


def test_a_store_on_a_read_only_disk_is_refused_with_the_reason(read_only_disk: Path) -> None:
    with pytest.raises(StartupError, match="Read-only file system"):
        Store(read_only_disk).open()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Sets the clock of the process so many hours off."""
    real = time.time_ns

    def set_off(hours: float) -> None:
        monkeypatch.setattr(time, "time_ns", lambda: real() + int(hours * HOUR_NS))

    return set_off


async def test_a_clock_that_goes_back_an_hour_changes_nothing(
    suite_with: Callable[..., Any], clock: Callable[[float], None]
) -> None:
    async with suite_with(stocked=True, server_lease_seconds=3600) as suite:
        server = await suite.join("i")
        request = pb.SetAliasRequest(
            name="models/m/aliases/canary", revision=2, request_id=str(uuid.uuid4())
        )
        first = await suite.client.models.SetAlias(request)
        page = await suite.client.models.ListEvents(pb.ListEventsRequest(page_size=2))
        clock(-1)
        # The same request is not carried out twice, pages go on, and a switch reaches its end.
        assert await suite.client.models.SetAlias(request) == first
        rest = await suite.client.models.ListEvents(
            pb.ListEventsRequest(page_size=2, page_token=page.next_page_token)
        )
        assert rest.events[0].sequence == page.events[-1].sequence - 1
        await suite.client.set_alias(3)
        await suite.client.alias_when(
            lambda a: a.state == pb.Alias.STATE_ACTIVE and a.revision == 3
        )
        assert (await suite.client.server("i")).connected
        versions = [state.version for state in server.states]
        assert versions == sorted(versions)
        # A restart does not forget the server, for which the switch has to wait.
        await suite.restart()
        await suite.client.set_alias(1)
        await asyncio.sleep(0.3)
        assert (await suite.client.alias()).state == pb.Alias.STATE_LOADING


async def test_what_was_deleted_is_purged_after_30_days_and_not_before(
    suite_with: Callable[..., Any], bundles: Any, clock: Callable[[float], None]
) -> None:
    async with suite_with() as suite:
        models = suite.client.models
        kept = bundles.make(1)
        for seed in (1, 2):
            await suite.client.push(bundles.tar(seed))
        await suite.client.push(bundles.tar(3), "gone")
        await models.DeleteRevision(pb.DeleteRevisionRequest(name="models/m/revisions/2"))
        await models.DeleteModel(pb.DeleteModelRequest(name="models/gone"))
        clock(29 * 24)
        await asyncio.to_thread(suite.service.uploads.clean)
        everything = pb.ListModelsRequest(show_deleted=True)
        assert len((await models.ListModels(everything)).models) == 2
        await models.UndeleteModel(pb.UndeleteModelRequest(name="models/gone"))
        await models.DeleteModel(pb.DeleteModelRequest(name="models/gone"))
        clock((29 + 31) * 24)
        await asyncio.to_thread(suite.service.uploads.clean)
        assert [m.name for m in (await models.ListModels(everything)).models] == ["models/m"]
        listing = pb.ListRevisionsRequest(parent="models/m", show_deleted=True)
        assert [r.revision for r in (await models.ListRevisions(listing)).revisions] == [1]
        actions = [e.action for e in (await models.ListEvents(pb.ListEventsRequest())).events]
        assert actions.count("REVISION_PURGED") == 2
        assert "MODEL_PURGED" in actions
        assert await suite.client.download(bundle_sha256=kept.digest)


async def test_every_change_that_can_be_asked_for_writes_an_event(
    suite_with: Callable[..., Any], bundles: Any
) -> None:
    """A method that is added to the contract is either listed here or only reads."""
    reading = ("Get", "List", "Watch", "Download", "Verify")
    service = pb.DESCRIPTOR.services_by_name["ModelService"]
    changing = {m.name for m in service.methods if not m.name.startswith(reading)}
    r1, r2 = "models/m/revisions/1", "models/m/revisions/2"
    alias, rollout = "models/m/aliases/production", "models/m/rollouts/{}"
    plan = pb.CreateRolloutRequest(
        parent="models/m", rollout=pb.Rollout(revision=2, steps=[50, 100])
    )
    async with suite_with() as suite:
        models = suite.client.models

        async def newest() -> Any:
            page = await models.ListEvents(pb.ListEventsRequest(page_size=1))
            return page.events[0].sequence if page.events else 0

        done: set[str] = set()

        async def change(method: str, request: Any) -> None:
            before = await newest()
            await getattr(models, method)(request)
            assert await newest() > before, method
            done.add(method)

        for seed in (1, 2):
            before = await newest()
            await suite.client.push(bundles.tar(seed))
            assert await newest() > before
        done.add("UploadBundle")
        await change(
            "UpdateModel",
            pb.UpdateModelRequest(model=pb.Model(name="models/m", description="d")),
        )
        await change(
            "UpdateRevision",
            pb.UpdateRevisionRequest(revision=pb.Revision(name=r1, notes="n")),
        )
        await change("DeleteRevision", pb.DeleteRevisionRequest(name=r2))
        await change("UndeleteRevision", pb.UndeleteRevisionRequest(name=r2))
        await change("SetAlias", pb.SetAliasRequest(name=alias, revision=1))
        await suite.client.alias_when(lambda a: a.state == pb.Alias.STATE_ACTIVE)
        await change("CreateRollout", plan)
        for method in ("PauseRollout", "ResumeRollout", "AbortRollout"):
            await change(method, getattr(pb, f"{method}Request")(name=rollout.format(1)))
        await models.CreateRollout(plan)
        await change("PromoteRollout", pb.PromoteRolloutRequest(name=rollout.format(2)))
        await suite.client.alias_when(
            lambda a: a.state == pb.Alias.STATE_ACTIVE and a.revision == 2
        )
        await change("RollbackAlias", pb.RollbackAliasRequest(name=alias))
        await change("DeleteAlias", pb.DeleteAliasRequest(name=alias))
        await change("DeleteModel", pb.DeleteModelRequest(name="models/m"))
        await change("UndeleteModel", pb.UndeleteModelRequest(name="models/m"))
    assert done == changing
