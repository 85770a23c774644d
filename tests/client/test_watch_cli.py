"""`pollard models watch` and `pollard fleet`: what they show, also at 80 columns and in a pipe."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc
import pytest
from rich.console import Console

from pollard.client import Alias, Event, Model, Server
from pollard.client.cli import _main, event_view, fleet, fleet_view, watch_view
from pollard.client.types import ServerRevision
from pollard.models.v1 import fleet_service_pb2 as fleet_pb
from pollard.models.v1 import model_service_pb2 as pb

THEN = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def at_80_columns(picture: Any, height: int = 24) -> list[str]:
    """What a terminal shows, line by line."""
    console = Console(file=io.StringIO(), width=80, height=height, highlight=False)
    console.print(picture(console) if callable(picture) else picture)
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]  # of a StringIO


def event(sequence: int, **more: Any) -> Event:
    how: dict[str, Any] = {
        "time": THEN,
        "actor": "manager",
        "action": "ALIAS_ACTIVE",
        "resource": "models/flowers/aliases/production",
        "detail": "every server sends requests to revision 3",
    }
    return Event(sequence=sequence, **(how | more))


def alias(**more: Any) -> Alias:
    how: dict[str, Any] = {
        "model": "flowers",
        "name": "production",
        "revision": 2,
        "pending_revision": 0,
        "previous_revision": 1,
        "state": "ACTIVE",
        "error": "",
        "failures": (),
        "update_time": THEN,
        "etag": "1",
    }
    return Alias(**(how | more))


def model(name: str = "flowers", changed: int = 0, **more: Any) -> Model:
    how: dict[str, Any] = {
        "description": "",
        "labels": {},
        "latest_revision": 3,
        "aliases": (alias(model=name),),
        "create_time": THEN,
        "update_time": THEN + timedelta(seconds=changed),
        "etag": "1",
    }
    return Model(name=name, **(how | more))


def server(server_id: str, kind: str = "INFERENCE", **more: Any) -> Server:
    how: dict[str, Any] = {
        "address": "10.0.0.1:8001",
        "connected": True,
        "last_seen_time": THEN,
        "acked_version": 3,
        "last_refusal": "",
        "software_version": "0.1.0",
        "targets": ("cpu-fp32",),
        "revisions": (),
    }
    return Server(server_id=server_id, kind=kind, **(how | more))


def runs(state: str = "READY", revision: int = 2, error: str = "") -> ServerRevision:
    variant = "cpu-fp32" if state == "READY" else ""
    return ServerRevision("flowers", revision, state, variant, error, 0, 0)


def watched(events: int) -> Any:
    def watch(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        first = request.start_sequence or 1
        yield pb.WatchEventsResponse(sequence=first - 1)
        for sequence in range(first, events + 1):
            item = pb.Event(
                sequence=sequence,
                actor="ipv4:127.0.0.1",
                action="ALIAS_SET",
                resource="models/m/aliases/production",
                detail="to revision 2 from 1",
            )
            item.time.FromDatetime(THEN)
            yield pb.WatchEventsResponse(event=item, sequence=sequence)
        context.abort(grpc.StatusCode.FAILED_PRECONDITION, "that was all")

    return watch


def test_a_pipe_gets_one_line_for_each_event(
    scripted: Any, address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    scripted.on("ListModels", lambda request, context: pb.ListModelsResponse())
    scripted.on("WatchEvents", watched(3))
    assert _main.run(["models", "watch", "--start", "2", "--server", address]) == 1
    told = capsys.readouterr()
    line = (
        "2026-01-02T03:04:05Z ALIAS_SET models/m/aliases/production to revision 2 from 1 "
        "(ipv4:127.0.0.1)"
    )
    assert told.out.splitlines() == [line, line]
    assert f"Watching {address}; Ctrl-C ends it." in told.err
    assert "error: that was all" in told.err


def test_a_program_gets_one_object_for_each_event(
    scripted: Any, address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    scripted.on("ListModels", lambda request, context: pb.ListModelsResponse())
    scripted.on("WatchEvents", watched(2))
    assert _main.run(["models", "watch", "--start", "1", "--json", "--server", address]) == 1
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [item["sequence"] for item in told] == [1, 2]
    assert told[0]["time"] == "2026-01-02T03:04:05+00:00"
    assert told[0]["resource"] == "models/m/aliases/production"


def test_a_model_that_is_not_there_is_an_error_with_the_nearest_name(
    scripted: Any, address: str, abort_with: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(request: Any, context: grpc.ServicerContext) -> None:
        abort_with(
            context, grpc.StatusCode.NOT_FOUND, "no 'flower'", "MODEL_NOT_FOUND", model="flower"
        )

    names = pb.ListModelsResponse(
        models=[pb.Model(name="models/flowers"), pb.Model(name="models/x")]
    )
    scripted.on("GetModel", missing)
    scripted.on("ListModels", lambda request, context: names)
    assert _main.run(["models", "watch", "flower", "--server", address]) == 1
    assert "Did you mean 'flowers'?" in capsys.readouterr().err


def test_another_service_is_named_as_such(
    scripted: Any, address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    scripted.on(
        "ListModels",
        lambda request, context: context.abort(grpc.StatusCode.UNIMPLEMENTED, "Method not found!"),
    )
    assert _main.run(["models", "list", "--server", address]) == 1
    told = capsys.readouterr().err
    assert f"The server at {address} speaks another service" in told
    assert "by default models is on port 8021" in told


def test_the_view_fits_the_terminal_and_keeps_the_newest_events_in_sight() -> None:
    models = [model(f"model-{number:03}", number) for number in range(30)]
    events = [event(number, detail=f"number {number} " + "word " * 20) for number in range(100)]
    seen = watch_view.Seen("127.0.0.1:8021", "", models, {}, events)
    lines = at_80_columns(lambda console: watch_view.picture(seen, console))
    assert len(lines) < 24
    assert all(len(line) <= 80 for line in lines)
    text = "\n".join(lines)
    assert "30 models" in text
    assert "model-029" in text
    assert "and 22 others" in text
    assert "number 99" in text


def test_the_view_says_what_moves_and_why_it_stands_still() -> None:
    moving = model(aliases=(alias(pending_revision=3, state="LOADING"),))
    seen = watch_view.Seen("127.0.0.1:8021", "connection refused", [moving], {}, [event(1)])
    text = "\n".join(at_80_columns(lambda console: watch_view.picture(seen, console)))
    assert "waiting for it: connection refused" in text
    assert "2 → 3" in text
    assert "loading" in text
    nothing = watch_view.Seen("127.0.0.1:8021", "", [], {}, [])
    text = "\n".join(at_80_columns(lambda console: watch_view.picture(nothing, console)))
    assert "there are no models yet" in text
    assert "Nothing has happened since." in text


def test_names_are_shortened_for_people() -> None:
    assert event_view.place("models/flowers/revisions/3") == "flowers/3"
    assert event_view.place("models/flowers/aliases/production") == "flowers production"
    assert event_view.place("models/flowers/rollouts/7") == "flowers rollout 7"
    assert event_view.place("something/else") == "something/else"


def test_the_fleet_is_readable_at_80_columns_with_many_revisions() -> None:
    held = tuple(runs(revision=number) for number in range(1, 13))
    servers = [server(f"inference-{number:012x}", revisions=held) for number in range(3)]
    servers.append(server("preprocess-1", "PREPROCESS", revisions=held, connected=False))
    broken = (*held[:-1], runs("FAILED", 12, "the graph needs AVX-512 VNNI"))
    servers[1] = server("inference-000000000001", revisions=broken)
    lines = at_80_columns(fleet_view.picture(servers), height=100)
    assert all(len(line) <= 80 for line in lines)
    text = "\n".join(lines)
    assert "flowers/11  3 ready (cpu-fp32)" in text
    assert "1 failed, 2 ready (cpu-fp32)" in text
    assert "inference-000000000001 does not run flowers/12: the graph needs AVX-512" in text
    assert "when last seen" in text


def test_a_fleet_in_a_pipe_is_followed_by_a_line_for_each_change(
    scripted: Any,
    address: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fleet, "_LOOK_SECONDS", 0.0)
    looks = 0

    def answer(request: Any, context: grpc.ServicerContext) -> fleet_pb.ListServersResponse:
        nonlocal looks
        looks += 1
        if looks in (3, 4, 5, 6):  # with the client's own attempts
            context.abort(grpc.StatusCode.UNAVAILABLE, "restarting")
        if looks > 8:
            context.abort(grpc.StatusCode.PERMISSION_DENIED, "enough")
        hello = fleet_pb.Hello(
            server_id="inference-1", kind=fleet_pb.SERVER_KIND_INFERENCE, address="10.0.0.1:8001"
        )
        found = fleet_pb.Server(name="servers/inference-1", hello=hello, connected=looks != 7)
        state = fleet_pb.REVISION_STATE_LOADING if looks == 1 else fleet_pb.REVISION_STATE_READY
        found.report.revisions.add(model="flowers", revision=3, state=state)
        return fleet_pb.ListServersResponse(servers=[found])

    scripted.on("ListServers", answer)
    assert _main.run(["fleet", "--watch", "--server", address]) == 1
    told = capsys.readouterr()
    assert told.out.splitlines() == [
        "inference-1 (inference, 10.0.0.1:8001): connected",
        "inference-1: flowers/3 loading",
        "inference-1: flowers/3 ready",
        "inference-1 (inference, 10.0.0.1:8001): not connected",
        "inference-1 (inference, 10.0.0.1:8001): connected",
    ]
    assert f"Waiting for the manager at {address}: restarting" in told.err
    assert "The manager answers again." in told.err


def test_what_left_and_what_was_refused_is_told() -> None:
    before = [server("a", revisions=(runs(),)), server("b")]
    now = [server("a", last_refusal="no memory")]
    assert list(fleet_view.changes(before, now)) == [
        "a: flowers/2 is gone",
        "a refused: no memory",
        "b is forgotten",
    ]


def test_what_was_deleted_can_be_brought_back(
    scripted: Any, address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[Any] = []

    def undelete(request: Any, context: grpc.ServicerContext) -> Any:
        asked.append(request)
        kind = type(request).__name__.replace("Request", "Response")
        return getattr(pb, kind)()

    scripted.on("UndeleteModel", undelete)
    scripted.on("UndeleteRevision", undelete)
    assert _main.run(["models", "undelete", "m", "--server", address]) == 0
    assert _main.run(["models", "undelete", "m", "--revision", "3", "--server", address]) == 0
    assert [item.name for item in asked] == ["models/m", "models/m/revisions/3"]
    assert all(item.request_id for item in asked)
    assert "pollard models alias m production 3" in capsys.readouterr().out


def test_no_command_shows_the_help_and_no_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert _main.run(["models"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("Usage: pollard models")
    assert "..." not in told.partition("Commands:")[2]
