"""Versions side by side: older registries, and servers that know more or less than the manager."""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import create_engine

from pollard.models.v1 import fleet_service_pb2 as fleet_pb
from pollard.models.v1 import model_service_pb2 as pb
from pollard.services.models.store import DATABASE


def alembic_config() -> Config:
    config = Config()
    config.set_main_option("script_location", "pollard.services.models:migrations")
    config.set_main_option("path_separator", "os")
    return config


EARLIER = sorted(
    script.revision for script in ScriptDirectory.from_config(alembic_config()).walk_revisions()
)[:-1]

# A field of number 1000 with a text in it, as a later version might send one.
UNKNOWN = b"\xc2\x3e\x05later"


def make_older(store: Path, schema: str) -> None:
    """Turn the registry of a store into one of an earlier schema, with what that could hold."""
    path = store / DATABASE
    newest = path.with_suffix(".newest")
    path.rename(newest)
    engine = create_engine(f"sqlite:///{path}")
    with engine.connect() as connection:
        config = alembic_config()
        config.attributes["connection"] = connection
        command.upgrade(config, schema)
    engine.dispose()
    with contextlib.closing(sqlite3.connect(path)) as old:
        old.execute("PRAGMA foreign_keys=OFF")
        old.execute("ATTACH ? AS newest", (str(newest),))
        tables = old.execute(
            "SELECT name FROM main.sqlite_master WHERE type = 'table' "
            "AND name NOT LIKE 'sqlite_%' AND name <> 'alembic_version'"
        ).fetchall()
        for (table,) in tables:
            columns = [row[1] for row in old.execute(f"PRAGMA main.table_info({table})")]
            names = ", ".join(f'"{column}"' for column in columns)
            old.execute(f"DELETE FROM main.{table}")  # noqa: S608 - names out of the schema
            old.execute(
                f"INSERT INTO main.{table} ({names}) "  # noqa: S608 - likewise
                f"SELECT {names} FROM newest.{table}"
            )
        old.commit()
        assert old.execute("PRAGMA foreign_key_check").fetchall() == []
    newest.unlink()


@pytest.mark.parametrize("schema", EARLIER)
async def test_a_registry_of_an_earlier_schema_is_upgraded_without_loss(
    suite_with: Any, stock: Path, tmp_path: Path, schema: str
) -> None:
    store = tmp_path / "old"
    shutil.copytree(stock, store)
    for leftover in store.glob(f"{DATABASE}-*"):
        # The write-ahead log was folded in when the last manager stopped.
        assert leftover.stat().st_size == 0
        leftover.unlink()
    make_older(store, schema)
    async with suite_with(store=store, database_url="") as suite:
        client = suite.client
        listed = await client.models.ListRevisions(pb.ListRevisionsRequest(parent="models/m"))
        assert [revision.revision for revision in listed.revisions] == [3, 2, 1]
        assert not any(revision.HasField("signature") for revision in listed.revisions)
        alias = await client.alias()
        assert (alias.revision, alias.state) == (1, pb.Alias.STATE_ACTIVE)
        for number in (1, 2, 3):
            files = await client.download(name=f"models/m/revisions/{number}")
            assert "cpu-fp32/model.onnx" in files
        events = await client.models.ListEvents(pb.ListEventsRequest())
        assert "REVISION_UPLOADED" in {event.action for event in events.events}
        await client.set_alias(2)
        await client.alias_when(
            lambda found: found.state == pb.Alias.STATE_ACTIVE and found.revision == 2
        )


async def test_a_server_of_a_later_version_is_understood_as_far_as_it_goes(
    suite: Any, bundles: Any, helpers: Any
) -> None:
    server = await suite.join("later")
    await suite.client.push(bundles.tar(1))
    await suite.client.set_alias(1)
    await suite.client.alias_when(lambda alias: alias.state == pb.Alias.STATE_ACTIVE)
    # A message of a kind, a field and a state that this manager does not know.
    for raw in (b"", UNKNOWN):
        server._outbox.put_nowait(fleet_pb.SyncRequest.FromString(raw))
    report = fleet_pb.Report.FromString(UNKNOWN)
    report.revisions.add(model="m", revision=1, state=fleet_pb.REVISION_STATE_READY)
    report.revisions.add(model="m", revision=7, state=99)  # type: ignore[arg-type]
    report.revisions.add(model="gone", revision=1, state=99)  # type: ignore[arg-type]
    server.say(report=report)
    found = await helpers.eventually(
        lambda: suite.client.server("later"), lambda s: len(s.report.revisions) == 3
    )
    assert found.connected
    assert found.report.revisions[1].state == 99
    # It is still followed: a switch goes through it.
    await suite.client.push(bundles.tar(2))
    await suite.client.set_alias(2)
    alias = await suite.client.alias_when(
        lambda found: found.state == pb.Alias.STATE_ACTIVE and found.revision == 2
    )
    assert not alias.failures


async def test_a_state_that_is_not_known_is_neither_ready_nor_failed(
    suite: Any, bundles: Any, helpers: Any
) -> None:
    server = await suite.join("later", automatic=False)
    await suite.client.push(bundles.tar(1))
    await suite.client.set_alias(1)
    await server.state_when(lambda state: helpers.revisions_of(state) == [1])
    server.report(("m", 1, 99))
    await helpers.eventually(
        lambda: suite.client.server("later"), lambda s: len(s.report.revisions) == 1
    )
    assert (await suite.client.alias()).state == pb.Alias.STATE_LOADING
    server.automatic = True
    server.report(("m", 1, fleet_pb.REVISION_STATE_READY))
    server.ack(server.states[-1])
    await suite.client.alias_when(lambda alias: alias.state == pb.Alias.STATE_ACTIVE)
