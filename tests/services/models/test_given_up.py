"""Whether servers try again what they refuse is said where it is so, and nowhere else."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from google.rpc import code_pb2, error_details_pb2, status_pb2

from pollard.models.v1 import fleet_service_pb2 as fleet_pb
from pollard.models.v1 import model_service_pb2 as pb
from pollard.services.common import retries

PREPROCESS = fleet_pb.SERVER_KIND_PREPROCESS
READY = fleet_pb.REVISION_STATE_READY
FAILED = fleet_pb.REVISION_STATE_FAILED


@pytest.fixture
async def loaded(suite_with: Callable[..., Any]) -> AsyncIterator[Any]:
    """A manager with three revisions of `m`, the first of them in production, and no server."""
    async with suite_with(stocked=True) as suite:
        yield suite


def settle(server: Any) -> None:
    """Answer the newest state by hand: everything in it is ready."""
    state = server.states[-1]
    server.report(*((m.model, r.revision, READY) for m in state.models for r in m.revisions))
    server.ack(state)


def passing(message: str) -> status_pb2.Status:
    """What a server says of a revision that it tries again."""
    status = status_pb2.Status(code=code_pb2.FAILED_PRECONDITION, message=message)
    status.details.add().Pack(error_details_pb2.ErrorInfo(reason="DISK_FULL"))
    retries.promise(status, 2.4)
    return status


def refuse(server: Any, state: fleet_pb.DesiredState, why: status_pb2.Status) -> None:
    """Say of the second revision that it does not run, for now."""
    entries = [
        fleet_pb.RevisionStatus(model="m", revision=1, state=READY),
        fleet_pb.RevisionStatus(model="m", revision=2, state=FAILED, error=why),
    ]
    server.say(report=fleet_pb.Report(revisions=entries))
    server.nack(state, f"m/2: {why.message}")


async def test_a_switch_that_is_dropped_does_not_say_that_it_is_tried_again(
    loaded: Any, helpers: Any
) -> None:
    server = await loaded.join("i", automatic=False)
    pre = await loaded.join("pre", kind=PREPROCESS, automatic=False)
    settle(server)
    pre.ack(pre.states[-1])
    await loaded.client.set_alias(2)
    state = await server.state_when(lambda s: helpers.revisions_of(s) == [1, 2])
    refuse(server, state, passing("no space is left"))
    alias = await loaded.client.alias_when(lambda a: a.state == pb.Alias.STATE_FAILED)
    words = "revision 2 was refused by i: no space is left; that may pass: try again"
    assert alias.error.message == words
    (failure,) = alias.failures
    assert failure.status.message == "no space is left"
    # Why is kept, when is not.
    assert [each.Is(error_details_pb2.ErrorInfo.DESCRIPTOR) for each in failure.status.details] == [
        True
    ]
    found = await loaded.client.models.GetRevision(
        pb.GetRevisionRequest(name="models/m/revisions/2"), timeout=30
    )
    assert found.revision.error.message == "no space is left"
    # A preprocess server says it in its answer alone.
    settle(server)
    pre.ack(pre.states[-1])
    await loaded.client.set_alias(3)
    state = await pre.state_when(lambda s: helpers.revisions_of(s) == [1, 3])
    pre.nack(state, f"{passing('m/3: no manifest').message}; something else")
    alias = await loaded.client.alias_when(lambda a: a.state == pb.Alias.STATE_FAILED)
    assert alias.failures[0].status.message == "m/3: no manifest; something else"
    assert "tried again" not in alias.error.message


async def test_a_server_that_is_excused_says_when_it_tries_again(loaded: Any, helpers: Any) -> None:
    """It does, for requests go to the revision; once the rollout has ended that is over."""
    good, bad = await loaded.join("good"), await loaded.join("bad", automatic=False)
    settle(bad)
    rollout = pb.Rollout(revision=2, steps=[50, 100], quorum=pb.Quorum(servers=1))
    rollout.hold.FromSeconds(3600)
    request = pb.CreateRolloutRequest(parent="models/m", rollout=rollout)
    made = (await loaded.client.models.CreateRollout(request, timeout=30)).rollout
    state = await bad.state_when(lambda s: helpers.revisions_of(s) == [1, 2])
    refuse(bad, state, passing("no space is left"))

    async def shown() -> pb.Rollout:
        request = pb.GetRolloutRequest(name=made.name)
        return (await loaded.client.models.GetRollout(request, timeout=30)).rollout

    found = await helpers.eventually(shown, lambda r: bool(r.failures))
    assert found.failures[0].status.message == "no space is left; it is tried again in 2 s"
    abort = pb.AbortRolloutRequest(name=made.name)
    await loaded.client.models.AbortRollout(abort, timeout=30)
    found = await shown()
    assert [failure.status.message for failure in found.failures] == ["no space is left"]
    assert good.status is None
