"""Following a rollout with the clients: every step once, whatever happens to the connection."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest

from pollard.client import AsyncModelsClient, ModelsClient, NotFound, Rollout
from pollard.client._async import events as async_events
from pollard.client._sync import events as sync_events
from pollard.models.v1 import model_service_pb2 as pb

NAME = "models/m/rollouts/1"
State = pb.Rollout.State


class Manager:
    """A manager whose rollout has gone one step further each time that it was asked for."""

    def __init__(self, *states: tuple[Any, int], broken: bool = False) -> None:
        self._states = list(states)
        self._asked = 0
        self._broken = broken
        self.open = 0
        self.closed = threading.Event()

    def on(self, scripted: Any) -> Manager:
        scripted.on("ListEvents", lambda *_: pb.ListEventsResponse(events=[pb.Event(sequence=7)]))
        scripted.on("GetRollout", self.get)
        scripted.on("WatchEvents", self.watch)
        return self

    def get(self, request: Any, context: grpc.ServicerContext) -> Any:
        state, step = self._states[min(self._asked, len(self._states) - 1)]
        self._asked += 1
        rollout = pb.Rollout(name=NAME, revision=2, state=state, step=step)
        if state in (State.STATE_PROMOTED, State.STATE_ROLLED_BACK):
            rollout.end_time.seconds = 1
        return pb.GetRolloutResponse(rollout=rollout)

    def watch(self, request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        assert request.start_sequence >= 8, "changes before the first look are in it already"
        context.add_callback(self.closed.set)
        position = request.start_sequence
        # Another rollout's change is between, which nobody wants to hear of.
        for name in ("models/m/rollouts/2", NAME):
            yield pb.WatchEventsResponse(
                event=pb.Event(sequence=position, action="ROLLOUT_STEP", resource=name),
                sequence=position,
            )
            position += 1
        if self._broken:
            context.abort(grpc.StatusCode.UNAVAILABLE, "restarting")
        while context.is_active():
            yield pb.WatchEventsResponse(
                event=pb.Event(sequence=position, action="ROLLOUT_STEP", resource=NAME),
                sequence=position,
            )
            position += 1
            threading.Event().wait(0.01)


@pytest.fixture(params=[False, True], ids=["sync", "asyncio"])
def follow(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., list[Rollout]]:
    """Take a rollout's states, all or so many."""
    for module in (sync_events, async_events):
        monkeypatch.setattr(module, "FIRST_PAUSE_SECONDS", 0.01)

    def sync(address: str, count: int = 10**9) -> list[Rollout]:
        seen = []
        with (
            ModelsClient(address) as client,
            contextlib.closing(client.watch_rollout("m", 1)) as watch,
        ):
            for state in watch:
                seen.append(state)
                if len(seen) == count:
                    break
        return seen

    async def asynchronous(address: str, count: int = 10**9) -> list[Rollout]:
        seen = []
        async with (
            AsyncModelsClient(address) as client,
            contextlib.aclosing(client.watch_rollout("m", 1)) as watch,
        ):
            async for state in watch:
                seen.append(state)
                if len(seen) == count:
                    break
        return seen

    if request.param:
        return lambda *args, **more: asyncio.run(asynchronous(*args, **more))
    return sync


STEPS = ((State.STATE_CANARY, 0), (State.STATE_CANARY, 1), (State.STATE_PROMOTED, 2))


@pytest.mark.parametrize("broken", [False, True])
def test_every_step_is_told_once_until_the_end(
    broken: bool, follow: Callable[..., list[Rollout]], scripted: Any, address: str
) -> None:
    states = [state for state in STEPS for _ in range(2)]  # each is seen twice and told once
    Manager(*states, broken=broken).on(scripted)
    seen = follow(address)
    assert [(rollout.state, rollout.step) for rollout in seen] == [
        ("CANARY", 0),
        ("CANARY", 1),
        ("PROMOTED", 2),
    ]


def test_one_that_has_ended_is_told_once(
    follow: Callable[..., list[Rollout]], scripted: Any, address: str
) -> None:
    Manager((State.STATE_ROLLED_BACK, 1)).on(scripted)
    assert [rollout.state for rollout in follow(address)] == ["ROLLED_BACK"]
    assert "WatchEvents" not in scripted.calls


def test_leaving_the_loop_ends_the_call(
    follow: Callable[..., list[Rollout]], scripted: Any, address: str
) -> None:
    manager = Manager(*STEPS).on(scripted)
    assert len(follow(address, 2)) == 2
    assert manager.closed.wait(30)


def test_a_state_of_a_newer_manager_is_no_error(
    follow: Callable[..., list[Rollout]], scripted: Any, address: str
) -> None:
    Manager((99, 0), (State.STATE_PROMOTED, 0)).on(scripted)
    assert [rollout.state for rollout in follow(address)] == ["UNSPECIFIED", "PROMOTED"]


def test_an_unknown_rollout_is_not_found(
    follow: Callable[..., list[Rollout]], scripted: Any, address: str, abort_with: Any
) -> None:
    Manager(*STEPS).on(scripted)
    scripted.on(
        "GetRollout",
        lambda _, context: abort_with(context, grpc.StatusCode.NOT_FOUND, "none", "ROLLOUT_X"),
    )
    with pytest.raises(NotFound) as caught:
        follow(address)
    assert caught.value.reason == "ROLLOUT_X"
