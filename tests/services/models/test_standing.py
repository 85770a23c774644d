"""What a step of the fleet costs the database."""

from __future__ import annotations

from pathlib import Path

import pytest
from sqlalchemy import event, insert
from sqlalchemy.engine import Engine
from sqlalchemy.orm import Session

from pollard.models.v1 import fleet_service_pb2 as fleet_pb
from pollard.models.v1 import model_service_pb2 as pb
from pollard.services.models import standing
from pollard.services.models.fleet_view import FleetView, RevisionReport, ServerView
from pollard.services.models.schema import Alias, Bundle, Draining, Model, Revision
from pollard.services.models.store import Store
from pollard.services.models.switch import StepResult, Switch

READY, UPLOADED = pb.Revision.STATE_READY, pb.Revision.STATE_UPLOADED


def fill(session: Session, models: int) -> None:
    """Add models with two revisions; `production` leads to the first, and no server has the other.

    The second is drained, so that servers should have it.
    """
    names = [f"m{index}" for index in range(models)]
    times = {"create_time": 1, "update_time": 1, "etag": 1}
    session.execute(insert(Model), [{"name": n, "latest_revision": 2, **times} for n in names])
    digests = [f"{index:064x}" for index in range(2 * models)]
    session.execute(
        insert(Bundle), [{"sha256": d, "size_bytes": 7, "signature": "[]"} for d in digests]
    )
    session.execute(
        insert(Revision),
        [
            {
                "model": name,
                "number": number,
                "bundle_sha256": digests[2 * index + number - 1],
                "state": READY if number == 1 else UPLOADED,
                "creator": "test",
                "create_time": 1,
                "etag": 1,
            }
            for index, name in enumerate(names)
            for number in (1, 2)
        ],
    )
    session.execute(
        insert(Alias),
        [
            {
                "model": name,
                "name": "production",
                "revision": 1,
                "state": pb.Alias.STATE_ACTIVE,
                "update_time": 1,
                "etag": 1,
            }
            for name in names
        ],
    )
    session.execute(insert(Draining), [{"model": name, "revision": 2} for name in names])


def view(models: int) -> FleetView:
    """An inference server that has loaded everything."""
    reports = {
        (f"m{index}", number): RevisionReport(fleet_pb.REVISION_STATE_READY)
        for index in range(models)
        for number in (1, 2)
    }
    return FleetView(
        [
            ServerView(
                "i",
                fleet_pb.SERVER_KIND_INFERENCE,
                "host:1",
                connected=True,
                serving=True,
                revisions=reports,
            )
        ]
    )


def steps(directory: Path, models: int) -> tuple[StepResult, int]:
    """Take steps; return what came of the last, and how many statements it took."""
    statements: list[str] = []

    def executed(connection: object, cursor: object, statement: str, *rest: object) -> None:
        statements.append(statement)

    store = Store(directory)
    store.open()
    store.write_now(lambda session: fill(session, models))
    switch = Switch(drain_seconds=3600, load_timeout_seconds=60)
    seen = view(models)
    event.listen(Engine, "before_cursor_execute", executed)
    try:
        for _ in range(3):
            statements.clear()
            result = store.write_now(lambda session: switch.step(session, seen))
    finally:
        event.remove(Engine, "before_cursor_execute", executed)
        store.close()
    return result, len(statements)


def test_a_step_asks_as_often_for_many_models_as_for_one(tmp_path: Path) -> None:
    _, few = steps(tmp_path / "one", 1)
    _, many = steps(tmp_path / "many", 40)
    assert many == few


def test_more_revisions_than_fit_into_a_query_are_asked_for_in_portions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(standing, "_KEYS_AT_ONCE", 7)
    result, _ = steps(tmp_path, 10)
    found = {(m.model, r.revision, r.size_bytes) for m in result.state.models for r in m.revisions}
    assert found == {(f"m{index}", number, 7) for index in range(10) for number in (1, 2)}


def test_what_a_server_has_loaded_is_written_down(tmp_path: Path) -> None:
    steps(tmp_path, 3)
    store = Store(tmp_path)
    store.open()
    states = store.read_now(
        lambda session: [
            session.get_one(Revision, (f"m{index}", number)).state
            for index in range(3)
            for number in (1, 2)
        ]
    )
    store.close()
    assert states == [READY] * 6
