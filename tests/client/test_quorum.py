"""A quorum, as it is written and as it is sent."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest

from pollard.client._quorum import quorum_of
from pollard.client.cli import _main
from pollard.models.v1 import model_service_pb2 as pb


@pytest.mark.parametrize(
    ("value", "servers", "share"),
    [
        (2, 2, 0),
        ("2", 2, 0),
        (" 12 ", 12, 0),
        (0.5, 0, 0.5),
        (1.0, 0, 1),
        (Fraction(2, 3), 0, 2 / 3),
        ("2/3", 0, 2 / 3),
        ("1 / 1", 0, 1),
        ("67%", 0, 0.67),
        ("66.5 %", 0, 0.665),
        ("100%", 0, 1),
    ],
)
def test_it_can_be_written_in_many_ways(value: Any, servers: int, share: float) -> None:
    found = quorum_of(value)
    assert found is not None
    assert (found.servers, found.share) == (servers, pytest.approx(share))
    assert quorum_of(None) is None


@pytest.mark.parametrize(
    "value",
    [
        0,
        -1,
        1.5,
        0.0,
        float("nan"),
        True,
        "",
        "0",
        "-1",
        "999999999",
        "1e3",
        "two",
        "0%",
        "3/2",
        "1/0",
    ],
)
def test_what_is_none_is_refused_in_words(value: Any) -> None:
    with pytest.raises(ValueError, match="is no quorum; write a number of servers such as 2"):
        quorum_of(value)


@pytest.mark.parametrize("command", [["alias", "m", "production", "2"], ["rollback", "m"]])
def test_the_commands_send_it_and_say_who_refused(
    command: list[str], scripted: Any, address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[Any] = []
    alias = pb.Alias(
        name="models/m/aliases/production", revision=2, state=pb.Alias.STATE_ACTIVE, etag="a"
    )
    alias.failures.add(server_id="i9").status.message = "no VNNI"

    def move(kind: Any) -> Any:
        def handler(request: Any, context: Any) -> Any:
            asked.append(request)
            return kind(alias=alias)

        return handler

    scripted.on("SetAlias", move(pb.SetAliasResponse))
    scripted.on("RollbackAlias", move(pb.RollbackAliasResponse))
    scripted.on("GetAlias", lambda r, c: pb.GetAliasResponse(alias=alias))
    assert _main.run(["models", *command, "--quorum", "2/3", "--server", address]) == 0
    assert asked[0].quorum.share == pytest.approx(2 / 3)
    said = capsys.readouterr().out
    assert "now serves revision 2" in said
    assert "not on i9, which refused it: no VNNI" in said
    assert _main.run(["models", *command, "--server", address]) == 0
    assert not asked[1].HasField("quorum")
    assert _main.run(["models", *command, "--quorum", "most", "--server", address]) == 2
    assert "'most' is no quorum" in capsys.readouterr().err
