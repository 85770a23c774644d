"""Watching events with the clients: once each and in order, whatever happens to the connection."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest

from pollard.client import (
    AsyncModelsClient,
    InvalidArgument,
    ModelsClient,
    OutOfRange,
    RequestFailed,
    Unavailable,
)
from pollard.client._async import events as async_events
from pollard.client._sync import events as sync_events
from pollard.models.v1 import model_service_pb2 as pb

BREAKS = ["UNAVAILABLE", "CANCELLED", "INTERNAL", "UNKNOWN", "end"]


class Log:
    """A manager's audit log that breaks its watches after some events."""

    def __init__(self, events: int, broken_after: int = 10**9, how: str = "UNAVAILABLE") -> None:
        self.events = events
        self.broken_after = broken_after
        self.how = how
        self.asked: list[int] = []

    def watch(self, request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        self.asked.append(request.start_sequence)
        position = request.start_sequence or 1
        yield pb.WatchEventsResponse(sequence=position - 1)
        for sent in range(self.broken_after):
            if position + sent > self.events:
                while context.is_active():
                    threading.Event().wait(0.02)
                return
            event = pb.Event(sequence=position + sent, action="A", resource="models/m")
            yield pb.WatchEventsResponse(event=event, sequence=event.sequence)
        if self.how != "end":
            context.abort(grpc.StatusCode[self.how], "broken off")


@pytest.fixture(params=[False, True], ids=["sync", "asyncio"])
def take(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., list[int]]:
    """Take so many events off a watch, with the sync client, then with the asyncio one."""
    for module in (sync_events, async_events):
        monkeypatch.setattr(module, "FIRST_PAUSE_SECONDS", 0.01)

    def sync(address: str, count: int, timeout: float = 30, **options: Any) -> list[int]:
        with (
            ModelsClient(address, timeout=timeout) as client,
            contextlib.closing(client.watch_events(**options)) as watch,
        ):
            return [next(watch).sequence for _ in range(count)]

    async def asynchronous(
        address: str, count: int, timeout: float = 30, **options: Any
    ) -> list[int]:
        async with (
            AsyncModelsClient(address, timeout=timeout) as client,
            contextlib.aclosing(client.watch_events(**options)) as watch,
        ):
            return [(await anext(watch)).sequence for _ in range(count)]

    if request.param:
        return lambda *args, **more: asyncio.run(asynchronous(*args, **more))
    return sync


@pytest.mark.parametrize("how", BREAKS)
def test_a_watch_that_breaks_goes_on_where_it_stood(
    how: str, take: Callable[..., list[int]], scripted: Any, address: str
) -> None:
    log = Log(events=10, broken_after=3, how=how)
    scripted.on("WatchEvents", log.watch)
    told: list[RequestFailed | None] = []
    assert take(address, 10, start=1, on_connection=told.append) == list(range(1, 11))
    assert log.asked == [1, 4, 7, 10]
    assert [item is None for item in told] == [True, False, True, False, True, False, True]


def test_a_watch_from_now_on_keeps_the_position_that_it_was_given(
    take: Callable[..., list[int]], scripted: Any, address: str
) -> None:
    log = Log(events=12)

    def watch(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        if not log.asked:
            # It breaks before anything has happened; the two events come while it is away.
            log.asked.append(request.start_sequence)
            yield pb.WatchEventsResponse(sequence=10)
            context.abort(grpc.StatusCode.UNAVAILABLE, "broken off")
        yield from log.watch(request, context)

    scripted.on("WatchEvents", watch)
    assert take(address, 2) == [11, 12]
    assert log.asked == [0, 11]


def test_a_watch_that_only_grew_old_goes_on_without_a_word(
    take: Callable[..., list[int]], scripted: Any, address: str
) -> None:
    log = Log(events=2)

    def watch(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        log.events += len(log.asked)  # one more with the second call
        yield from log.watch(request, context)

    scripted.on("WatchEvents", watch)
    told: list[RequestFailed | None] = []
    assert take(address, 3, timeout=0.5, start=1, on_connection=told.append) == [1, 2, 3]
    assert log.asked == [1, 3]
    assert told == [None]


def test_an_event_that_comes_twice_is_told_once(
    take: Callable[..., list[int]], scripted: Any, address: str
) -> None:
    def watch(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        for sequence in (5, 6, 6, 5, 7):
            event = pb.Event(sequence=sequence)
            yield pb.WatchEventsResponse(event=event, sequence=sequence)

    scripted.on("WatchEvents", watch)
    assert take(address, 3, start=5) == [5, 6, 7]


def test_a_manager_that_is_not_there_is_an_error_at_once(take: Callable[..., list[int]]) -> None:
    with pytest.raises(Unavailable):
        take("127.0.0.1:1", 1)


def test_a_manager_that_stays_away_is_an_error_when_patience_ends(
    take: Callable[..., list[int]], scripted: Any, address: str
) -> None:
    log = Log(events=3, broken_after=3)

    def watch(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        if log.asked:
            context.abort(grpc.StatusCode.UNAVAILABLE, "still away")
        yield from log.watch(request, context)

    scripted.on("WatchEvents", watch)
    with pytest.raises(Unavailable, match="still away"):
        take(address, 4, start=1, patience=0.3)


def test_events_that_are_no_longer_kept_are_an_error(
    take: Callable[..., list[int]], scripted: Any, address: str, abort_with: Callable[..., None]
) -> None:
    log = Log(events=3, broken_after=3)

    def watch(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        if log.asked:
            abort_with(context, grpc.StatusCode.OUT_OF_RANGE, "gone", "EVENTS_FORGOTTEN")
        yield from log.watch(request, context)

    scripted.on("WatchEvents", watch)
    with pytest.raises(OutOfRange) as caught:
        take(address, 4, start=1)
    assert caught.value.reason == "EVENTS_FORGOTTEN"


def test_what_can_be_seen_to_be_wrong_is_said_before_anything_is_sent(
    take: Callable[..., list[int]], scripted: Any, address: str
) -> None:
    for wrong in ({"start": 0}, {"start": -1}, {"model": "No Model"}, {"patience": 0}):
        with pytest.raises(ValueError, match=r"start|model name|timeout"):
            take(address, 1, **wrong)
    assert scripted.calls == []


def test_what_will_never_work_is_not_tried_again(
    take: Callable[..., list[int]], scripted: Any, address: str, abort_with: Callable[..., None]
) -> None:
    log = Log(events=3, broken_after=3)

    def watch(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        if log.asked:
            abort_with(context, grpc.StatusCode.INVALID_ARGUMENT, "no", "SOMETHING")
        yield from log.watch(request, context)

    scripted.on("WatchEvents", watch)
    with pytest.raises(InvalidArgument):
        take(address, 4, start=1)
    assert scripted.calls == ["WatchEvents", "WatchEvents"]
