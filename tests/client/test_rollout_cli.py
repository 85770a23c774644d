"""`pollard models rollout`: what it sends, and what it says."""

from __future__ import annotations

import json
from typing import Any

import grpc
import pytest

from pollard.client.cli import _main, rollout_view
from pollard.client.cli.rollout import rate, seconds, shares
from pollard.models.v1 import model_service_pb2 as pb


def running(**more: Any) -> pb.Rollout:
    how: dict[str, Any] = {
        "name": "models/m/rollouts/3",
        "alias": "production",
        "revision": 7,
        "base_revision": 6,
        "steps": [5, 100],
        "state": pb.Rollout.STATE_CANARY,
        "etag": "a",
    }
    return pb.Rollout(**(how | more))


def with_evidence(**more: Any) -> pb.Rollout:
    seen = pb.RolloutEvidence(
        revision=pb.RevisionEvidence(requests=1234, failed=3, p50_ms=4.2, p99_ms=9.1, images=7),
        base=pb.RevisionEvidence(requests=20_000, failed=1, p50_ms=4.1, p99_ms=9.0),
        shadow=pb.ShadowEvidence(compared=50, items=100, agreed=98, dropped=17, failed=2),
        gates=[
            pb.GateEvidence(
                gate="max_error_rate",
                state=pb.GateEvidence.STATE_HOLDS,
                words="3 of 1234 (0.24%) requests failed",
            )
        ],
        waiting_for=["12 s more (of 60 s)"],
    )
    return running(evidence=seen, **more)


def ended() -> pb.Rollout:
    old = running(name="models/m/rollouts/2", state=pb.Rollout.STATE_ROLLED_BACK)
    old.end_time.GetCurrentTime()
    old.error.message = "gate max_error_rate: 4 of 20"
    return old


def test_it_begins_with_what_the_options_say(
    scripted: Any, address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[pb.CreateRolloutRequest] = []

    def create(request: Any, context: grpc.ServicerContext) -> pb.CreateRolloutResponse:
        asked.append(request)
        return pb.CreateRolloutResponse(rollout=running())

    scripted.on("CreateRollout", create)
    options = ["--steps", "5%,100", "--hold", "1.5min", "--min-requests", "50"]
    options += ["--max-error-rate", "2%", "--max-p99-ratio", "1.5", "--shadow", "10%"]
    options += ["--min-agreement", "95%", "--server", address]
    assert _main.run(["models", "rollout", "m", "7", *options]) == 0
    sent = asked[0].rollout
    assert (asked[0].parent, sent.alias, sent.revision) == ("models/m", "production", 7)
    assert list(sent.steps) == [5, 100]
    assert sent.hold.seconds == 90
    assert sent.shadow_percent == 10
    gates = sent.gates
    assert (gates.min_requests, gates.max_error_rate, gates.max_p99_ratio) == (50, 0.02, 1.5)
    assert gates.min_agreement == 0.95
    assert _main.run(["models", "rollout", "m", "7", "--server", address]) == 0
    assert not asked[1].rollout.gates.HasField("min_agreement")
    said = capsys.readouterr().out
    assert "m: rollout 3 of production: canary, step 1 of 2 (5 %)" in said


def test_it_lists_and_gives_orders_to_the_one_that_runs(
    scripted: Any, address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    scripted.on("ListRollouts", lambda r, c: pb.ListRolloutsResponse(rollouts=[running(), ended()]))
    scripted.on("GetRollout", lambda r, c: pb.GetRolloutResponse(rollout=with_evidence()))
    paused: list[str] = []

    def pause(request: Any, context: grpc.ServicerContext) -> pb.PauseRolloutResponse:
        paused.append(request.name)
        return pb.PauseRolloutResponse(rollout=running(state=pb.Rollout.STATE_PAUSED))

    scripted.on("PauseRollout", pause)
    assert _main.run(["models", "rollout", "m", "--server", address]) == 0
    said = capsys.readouterr().out
    assert "canary, step 1 of 2 (5 %)" in said
    assert "gate max_error_rate: 4 of 20" in said
    for words in ("1,234", "17 dropped", "98.00% of 100 items", "holds", "12 s more (of 60 s)"):
        assert words in said
    assert _main.run(["models", "rollout", "m", "--pause", "--json", "--server", address]) == 0
    assert json.loads(capsys.readouterr().out)["state"] == "PAUSED"
    assert paused == ["models/m/rollouts/3"]


def test_it_is_followed_until_it_ends(
    scripted: Any, address: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rollout_view, "_LOOK_SECONDS", 0.0)
    back = with_evidence(state=pb.Rollout.STATE_ROLLED_BACK)
    back.end_time.GetCurrentTime()
    back.error.message = "gate min_agreement: 80 of 100"
    states = [
        running(state=pb.Rollout.STATE_SHADOW, step=-1, shadow_percent=10),
        with_evidence(),
        back,
    ]
    scripted.on("ListRollouts", lambda r, c: pb.ListRolloutsResponse(rollouts=states[:1]))
    coming = iter(states)
    asked = 0

    def get(request: Any, context: grpc.ServicerContext) -> pb.GetRolloutResponse:
        nonlocal asked
        asked += 1
        if asked in (3, 4):  # the manager is restarted
            context.abort(grpc.StatusCode.UNAVAILABLE, "no manager")
        return pb.GetRolloutResponse(rollout=next(coming))

    scripted.on("GetRollout", get)
    assert _main.run(["models", "rollout", "m", "--watch", "--server", address]) == 1
    said = capsys.readouterr().out
    assert said.index("only shadows (10 %)") < said.index("step 1 of 2") < said.index("rolled back")
    assert "gate min_agreement: 80 of 100" in said


def test_orders_need_one_that_runs(
    scripted: Any, address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    scripted.on("ListRollouts", lambda r, c: pb.ListRolloutsResponse(rollouts=[ended()]))
    assert _main.run(["models", "rollout", "m", "--abort", "--server", address]) == 1
    assert "no rollout of m runs" in capsys.readouterr().err
    two = [running(), running(name="models/m/rollouts/4", alias="staging")]
    scripted.on("ListRollouts", lambda r, c: pb.ListRolloutsResponse(rollouts=two))
    assert _main.run(["models", "rollout", "m", "--abort", "--server", address]) == 1
    assert "choose by --alias: production, staging" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["7", "--abort"],
        ["--pause", "--resume"],
        ["7", "--steps", "a,b"],
        ["7", "--hold", "soon"],
        ["7", "--max-error-rate", "few"],
    ],
)
def test_wrong_usage_is_said_before_anything_is_sent(
    arguments: list[str], scripted: Any, address: str
) -> None:
    assert _main.run(["models", "rollout", "m", *arguments, "--server", address]) == 2
    assert scripted.calls == []


@pytest.mark.parametrize(
    "option", ["--shadow", "--steps", "--hold", "--max-error-rate", "--min-agreement"]
)
def test_an_option_that_cannot_be_read_is_named(
    option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _main.run(["models", "rollout", "m", "7", option, "few"]) == 2
    assert f"Invalid value for '{option}': 'few' is no " in capsys.readouterr().err


def test_numbers_are_read_as_people_write_them() -> None:
    assert shares("5, 25%,100") == [5, 25, 100]
    assert (rate("0.5%"), rate("0.005")) == (0.005, 0.005)
    assert [seconds(text) for text in ("90", "90s", "500ms", "2min", "1h")] == [
        90,
        90,
        0.5,
        120,
        3600,
    ]
