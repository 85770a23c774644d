"""Rollouts go on without a minority that refuses the revision, where a quorum allows it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration

from pollard.models.v1 import fleet_service_pb2 as fleet_pb
from pollard.models.v1 import model_service_pb2 as pb

NAME = "models/m/rollouts/1"
CANARY = pb.Rollout.STATE_CANARY
ROLLED_BACK = pb.Rollout.STATE_ROLLED_BACK
TWO_THIRDS = pb.Quorum(share=2 / 3)


@pytest.fixture
async def loaded(suite_with: Callable[..., Any]) -> AsyncIterator[Any]:
    """A manager with three revisions of `m`, the first of them in production, and no server."""
    async with suite_with(stocked=True) as suite:
        yield suite


async def fleet_of(suite: Any) -> dict[str, Any]:
    """Three inference servers, of which `bad` refuses revision 2, and a preprocess server."""
    return {
        "a": await suite.join("a"),
        "b": await suite.join("b"),
        "bad": await suite.join("bad", refuses={("m", 2)}),
        "pre": await suite.join("pre", kind=fleet_pb.SERVER_KIND_PREPROCESS),
    }


async def create(suite: Any, **more: Any) -> pb.Rollout:
    how: dict[str, Any] = {"steps": [50, 100], "hold": Duration(seconds=3600)}
    request = pb.CreateRolloutRequest(
        parent="models/m", rollout=pb.Rollout(revision=2, **(how | more))
    )
    return (await suite.client.models.CreateRollout(request, timeout=30)).rollout


async def rollout_when(suite: Any, condition: Callable[[pb.Rollout], bool]) -> pb.Rollout:
    async with asyncio.timeout(30):
        while True:
            request = pb.GetRolloutRequest(name=NAME)
            found = (await suite.client.models.GetRollout(request, timeout=30)).rollout
            if condition(found):
                return found
            await asyncio.sleep(0.02)


def splits(state: fleet_pb.DesiredState) -> bool:
    """Whether requests go to both revisions."""
    return any(len(route.targets) == 2 for model in state.models for route in model.routes)


def refused_by(state: fleet_pb.DesiredState) -> set[str]:
    return {endpoint.server_id for endpoint in state.inference_endpoints if endpoint.refused}


async def test_a_minority_that_refuses_gets_no_request_of_the_canary(
    loaded: Any, helpers: Any
) -> None:
    servers = await fleet_of(loaded)
    created = await create(loaded, quorum=TWO_THIRDS)
    assert created.quorum.share == pytest.approx(2 / 3)
    state = await servers["pre"].state_when(splits)
    # From the first state on that splits: preprocess servers pass it over.
    assert refused_by(state) == {"bad"}
    found = await rollout_when(loaded, lambda r: bool(r.failures))
    assert (found.state, found.step) == (CANARY, 0)
    assert [(item.server_id, item.status.message) for item in found.failures] == [
        ("bad", "bad cannot")
    ]
    await loaded.client.models.PromoteRollout(pb.PromoteRolloutRequest(name=NAME))
    alias = await loaded.client.alias_when(
        lambda a: a.state == pb.Alias.STATE_ACTIVE and a.revision == 2
    )
    assert [failure.server_id for failure in alias.failures] == ["bad"]
    assert alias.quorum.share == pytest.approx(2 / 3)
    for server in servers.values():
        await server.state_when(lambda s: helpers.revisions_of(s) == [2])


async def test_what_is_excused_survives_a_restart_of_the_manager(loaded: Any) -> None:
    servers = await fleet_of(loaded)
    await create(loaded, quorum=pb.Quorum(servers=2))
    await servers["pre"].state_when(splits)
    await rollout_when(loaded, lambda r: bool(r.failures))
    await loaded.restart()
    # `bad` is not back yet, so nobody but the registry can know of it.
    watching = await loaded.join("pre", kind=fleet_pb.SERVER_KIND_PREPROCESS)
    assert splits(watching.states[0])
    for server_id in ("a", "b"):
        await loaded.join(server_id)
    bad = await loaded.join("bad", refuses={("m", 2)})
    await watching.state_when(lambda s: refused_by(s) == {"bad"} and splits(s))
    assert (await rollout_when(loaded, lambda r: bool(r.failures))).state == CANARY
    assert bad.status is None


async def test_without_a_quorum_one_that_refuses_ends_it(loaded: Any) -> None:
    servers = await fleet_of(loaded)
    await create(loaded)
    ended = await rollout_when(loaded, lambda r: r.HasField("end_time"))
    assert ended.state == ROLLED_BACK
    assert "revision 2 was refused by bad: bad cannot" in ended.error.message
    assert not any(splits(state) for state in servers["pre"].states)


async def test_it_is_taken_back_when_too_many_refuse_in_the_middle(loaded: Any) -> None:
    servers = await fleet_of(loaded)
    await create(loaded, quorum=TWO_THIRDS)
    await servers["pre"].state_when(splits)
    servers["b"].report(
        ("m", 1, fleet_pb.REVISION_STATE_READY), ("m", 2, fleet_pb.REVISION_STATE_FAILED)
    )
    servers["b"].nack(servers["b"].states[-1])
    await loaded.join("c", refuses={("m", 2)})
    ended = await rollout_when(loaded, lambda r: r.HasField("end_time"))
    assert ended.state == ROLLED_BACK
    assert "inference servers can run it, and the quorum of 66.67 % asks for" in ended.error.message


@pytest.mark.parametrize("quorum", [pb.Quorum(servers=-1), pb.Quorum(share=1.5), pb.Quorum()])
async def test_a_quorum_that_makes_no_sense_is_refused(
    loaded: Any, helpers: Any, quorum: pb.Quorum
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await create(loaded, quorum=quorum)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert helpers.info_of(caught.value).reason == "QUORUM_INVALID"
