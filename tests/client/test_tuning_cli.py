"""`pollard models show`: how servers run a model, and what it says where nobody knows."""

from __future__ import annotations

import json
from typing import Any

import grpc
import pytest

from pollard.client.cli import _main
from pollard.models.v1 import fleet_service_pb2 as fleet_pb
from pollard.models.v1 import model_service_pb2 as models_pb


@pytest.fixture
def registry(scripted: Any) -> Any:
    """A manager with two revisions of `digits` and no servers."""
    model = models_pb.GetModelResponse()
    model.model.name = "models/digits"
    scripted.on("GetModel", lambda r, c: model)
    revision = models_pb.GetRevisionResponse()
    revision.revision.name = "models/digits/revisions/2"
    scripted.on("GetRevision", lambda r, c: revision)
    scripted.on(
        "ListRevisions",
        lambda r, c: models_pb.ListRevisionsResponse(
            revisions=[models_pb.Revision(name=f"models/digits/revisions/{n}") for n in (2, 1)]
        ),
    )
    scripted.on("ListServers", lambda r, c: fleet_pb.ListServersResponse())
    return scripted


def servers(*names: str) -> fleet_pb.ListServersResponse:
    """Servers that run revision 2 of `digits`, measured, and others of an older kind."""
    found = fleet_pb.ListServersResponse()
    for name in names:
        server = found.servers.add(name=f"servers/{name}", connected=True)
        server.hello.server_id = name
        status = server.report.revisions.add(model="digits", revision=2)
        server.report.revisions.add(model="digits", revision=1)  # of a server that tells nothing
        other = server.report.revisions.add(model="faces", revision=2)
        for each, rate in ((status, 800.0), (other, 5.0)):
            each.tuning.CopyFrom(
                fleet_pb.Tuning(
                    workers=2,
                    threads=1,
                    joined_batch=16,
                    set_by_hand=["workers"],
                    aim="throughput",
                    processor="some processor",
                    cores=2,
                    onnxruntime="1.31.1",
                )
            )
            each.tuning.measured_time.GetCurrentTime()
            for callers, rows, speed in ((1, 1, rate / 4), (2, 16, rate)):
                each.tuning.points.add(
                    threads=1,
                    callers=callers,
                    batch_size=rows,
                    rows_per_second=speed,
                    latency_us=1e6 * callers * rows / speed,
                )
    return found


def test_a_model_is_shown_with_how_each_server_runs_it(
    registry: Any, address: str, capsys: Any
) -> None:
    registry.on("ListServers", lambda r, c: servers("a", "b"))
    assert _main.run(["models", "show", "digits", "--server", address]) == 0
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines() if line.strip().startswith(("a ", "b "))]
    assert [row[:2] for row in rows] == [["a", "2"], ["b", "2"]]
    assert rows[0][2:6] == ["2", "*", "1", "16"]
    assert "5,000 µs" in out
    assert "800/s" in out
    assert "* set by hand" in out
    assert "some processor, 2 cores, onnxruntime 1.31.1" in out


def test_a_revision_is_shown_with_what_was_measured_of_it(
    registry: Any, address: str, capsys: Any
) -> None:
    registry.on("ListServers", lambda r, c: servers("a"))
    command = ["models", "show", "digits", "--revision", "2", "--server", address]
    assert _main.run(command) == 0
    out = capsys.readouterr().out
    assert "a measured, for throughput" in out
    assert ["1", "2", "16", "800", "40.0", "ms"] in [line.split() for line in out.splitlines()]
    assert _main.run([*command, "--json"]) == 0
    (run,) = json.loads(capsys.readouterr().out)["servers"]
    assert run["server_id"] == "a"
    assert run["run"]["tuning"]["joined_batch"] == 16
    assert len(run["run"]["tuning"]["points"]) == 2


@pytest.mark.parametrize("arguments", [[], ["--revision", "2"]])
def test_a_model_that_no_server_runs_is_shown_without(
    registry: Any, address: str, capsys: Any, arguments: list[str]
) -> None:
    assert _main.run(["models", "show", "digits", *arguments, "--server", address]) == 0
    shown = capsys.readouterr()
    assert "WORKERS" not in shown.out
    assert shown.err == ""


@pytest.mark.parametrize("arguments", [[], ["--revision", "2"], ["--json"]])
@pytest.mark.parametrize(
    "status", [grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.PERMISSION_DENIED]
)
def test_a_manager_that_cannot_name_the_servers_shows_the_rest(
    registry: Any, address: str, capsys: Any, arguments: list[str], status: grpc.StatusCode
) -> None:
    registry.on("ListServers", lambda r, c: c.abort(status, "not for you"))
    assert _main.run(["models", "show", "digits", *arguments, "--server", address]) == 0
    shown = capsys.readouterr()
    assert "digits" in shown.out
    assert "how servers run it is not known" in shown.err
    assert "not for you" in shown.err
