"""Watching events: each once and in order, also across breaks, for as many as want to."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import pytest
from sqlalchemy import event as sa_event
from sqlalchemy import insert, select, update

from pollard.client import AsyncModelsClient, ModelsClient
from pollard.models.v1 import model_service_pb2 as pb
from pollard.services.models import watch as watch_module
from pollard.services.models.events import DAY_US
from pollard.services.models.schema import Event

ACTIVE = pb.Alias.STATE_ACTIVE


@pytest.fixture
async def loaded(suite_with: Callable[..., Any]) -> AsyncIterator[Any]:
    """A manager with three revisions of `m`, the first of them in production, and no server."""
    async with suite_with(stocked=True) as suite:
        yield suite


def begin(suite: Any, start_sequence: int = 0, model: str = "") -> Any:
    request = pb.WatchEventsRequest(start_sequence=start_sequence, model=model)
    return suite.client.models.WatchEvents(request)


async def next_of(call: Any) -> pb.WatchEventsResponse:
    async with asyncio.timeout(30):
        message = await call.read()
    assert message is not grpc.aio.EOF
    return message  # type: ignore[no-any-return]  # of a stub without types


async def take(call: Any, count: int) -> list[pb.Event]:
    """The next `count` events; signs of life are passed over."""
    found: list[pb.Event] = []
    while len(found) < count:
        message = await next_of(call)
        if message.HasField("event"):
            assert message.sequence == message.event.sequence
            found.append(message.event)
    return found


async def listed(suite: Any, model: str = "") -> list[pb.Event]:
    """The whole audit log, oldest first."""
    request = pb.ListEventsRequest(page_size=1000, model=model)
    return list(reversed((await suite.client.models.ListEvents(request)).events))


async def write_events(suite: Any, count: int, detail: str = "") -> None:
    row = {"time": 1, "actor": "a", "action": "A", "model": "other", "resource": "r"}
    row["detail"] = detail
    await suite.service.store.write(lambda session: session.execute(insert(Event), [row] * count))


async def fails(call: Any) -> grpc.aio.AioRpcError:
    async def read() -> None:
        while True:
            await next_of(call)

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await read()
    return caught.value


async def test_a_watch_says_where_it_stands_and_then_tells_what_happens(loaded: Any) -> None:
    before = await listed(loaded)
    call = begin(loaded)
    first = await next_of(call)
    assert not first.HasField("event")
    assert first.sequence == before[-1].sequence
    await loaded.client.set_alias(2)
    await loaded.client.alias_when(lambda alias: alias.state == ACTIVE)
    new = (await listed(loaded))[len(before) :]
    assert [event.action for event in new] == ["ALIAS_SET", "ALIAS_SWITCHED", "ALIAS_ACTIVE"]
    assert await take(call, 3) == new


async def test_a_watch_that_is_begun_again_loses_nothing_and_repeats_nothing(
    suite_with: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch_module, "PAGE", 4)
    monkeypatch.setattr(watch_module, "RECENT", 6)
    async with suite_with(stocked=True) as suite:
        seen: list[pb.Event] = []
        for revision in (2, 3, 1, 2, 3):
            call = begin(suite, seen[-1].sequence + 1 if seen else 1)
            moved = asyncio.create_task(suite.client.set_alias(revision))
            # Broken off somewhere, also in the middle of a page.
            seen += await take(call, 3)
            call.cancel()
            await moved
            await suite.client.alias_when(lambda alias: alias.state == ACTIVE)
            await suite.restart()
        everything = await listed(suite)
        call = begin(suite, seen[-1].sequence + 1)
        seen += await take(call, len(everything) - len(seen))
        assert seen == everything


async def test_the_clients_watch_through_restarts_of_the_manager(
    suite_with: Callable[..., Any],
) -> None:
    async with suite_with(stocked=True) as suite:
        port = int(suite.service.address.rpartition(":")[2])
        suite.settings = suite.settings.model_copy(update={"port": port})
        seen: dict[str, list[int]] = {"sync": [], "asyncio": []}
        done = asyncio.Event()

        def watch() -> None:
            with ModelsClient(suite.service.address) as client:
                for event in client.watch_events(start=1):
                    seen["sync"].append(event.sequence)
                    if event.detail == "the end":
                        return

        async def watch_too() -> None:
            async with AsyncModelsClient(suite.service.address) as client:
                async for event in client.watch_events("m", start=1):
                    seen["asyncio"].append(event.sequence)
                    if event.detail == "the end of m":
                        return

        async def change() -> None:
            while not done.is_set():
                await write_events(suite, 3)
                await asyncio.sleep(0.002)

        watches = [asyncio.create_task(asyncio.to_thread(watch)), asyncio.create_task(watch_too())]
        for revision in (2, 3, 1):
            await suite.client.set_alias(revision)
            changing = asyncio.create_task(change())
            await asyncio.sleep(0.2)
            done.set()
            await changing
            done.clear()
            await suite.restart()
        row = {"time": 1, "actor": "a", "action": "A", "resource": "r"}
        rows = [row | {"model": "m", "detail": "the end of m"}]
        rows.append(row | {"model": "", "detail": "the end"})
        await suite.service.store.write(lambda session: session.execute(insert(Event), rows))
        async with asyncio.timeout(60):
            await asyncio.gather(*watches)
        numbers = select(Event.sequence).order_by(Event.sequence)
        reading = suite.service.store.read
        assert seen["sync"] == list(await reading(lambda s: s.scalars(numbers).all()))
        of_m = numbers.where(Event.model == "m")
        assert seen["asyncio"] == list(await reading(lambda s: s.scalars(of_m).all()))


async def test_a_watch_of_one_model_hears_only_of_it_and_moves_on_all_the_same(
    loaded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch_module, "SIGN_OF_LIFE_SECONDS", 0.1)
    call = begin(loaded, 1, "models/m")
    of_m = await listed(loaded, "models/m")
    assert await take(call, len(of_m)) == of_m
    await write_events(loaded, 5)
    newest = (await listed(loaded))[-1].sequence
    while (message := await next_of(call)).sequence < newest:
        assert not message.HasField("event")
    assert not message.HasField("event")
    await loaded.client.set_alias(2)
    assert (await take(call, 1))[0].action == "ALIAS_SET"


async def test_a_watch_from_a_forgotten_event_is_refused_in_words(
    suite_with: Callable[..., Any], helpers: Any
) -> None:
    async with suite_with(stocked=True, event_retention_days=1) as suite:
        events = await listed(suite)

        def make_old(session: Any) -> None:
            old = update(Event).where(Event.sequence <= 3)
            session.execute(old.values(time=Event.time - 2 * DAY_US))

        await suite.service.store.write(make_old)
        await suite.service.forget_events()
        assert await listed(suite) == events[3:]
        error = await fails(begin(suite, 3))
        assert error.code() == grpc.StatusCode.OUT_OF_RANGE
        newest = events[-1].sequence
        assert "events up to 3 are no longer kept" in error.details()
        assert f"watch from {newest + 1}" in error.details()
        assert helpers.info_of(error).reason == "EVENTS_FORGOTTEN"
        assert helpers.info_of(error).metadata["newest"] == str(newest)
        # The first one that is kept, and from now on.
        assert await take(begin(suite, 4), newest - 3) == events[3:]
        assert (await next_of(begin(suite))).sequence == newest


async def test_forgotten_are_the_oldest_without_gaps_and_numbers_are_never_used_again(
    suite_with: Callable[..., Any],
) -> None:
    async with suite_with(stocked=True, event_retention_days=1) as suite:
        events = await listed(suite)

        def make_old(session: Any) -> None:
            # The clock went back: older events lie after younger ones.
            session.execute(
                update(Event).where(Event.sequence > 4).values(time=Event.time - 2 * DAY_US)
            )

        await suite.service.store.write(make_old)
        await suite.service.forget_events()
        assert [event.sequence for event in await listed(suite)] == [e.sequence for e in events]
        everything = update(Event).values(time=1)
        await suite.service.store.write(lambda session: session.execute(everything))
        await suite.service.forget_events()
        assert await listed(suite) == []
        newest = events[-1].sequence
        assert (await next_of(begin(suite))).sequence == newest
        call = begin(suite, newest + 1)
        await suite.client.set_alias(2)
        assert (await take(call, 1))[0].sequence == newest + 1


async def test_events_are_kept_for_ever_when_asked_to(suite_with: Callable[..., Any]) -> None:
    async with suite_with(stocked=True, event_retention_days=0) as suite:
        everything = update(Event).values(time=1)
        await suite.service.store.write(lambda session: session.execute(everything))
        before = await listed(suite)
        await suite.service.forget_events()
        assert await listed(suite) == before


@pytest.mark.parametrize(
    ("start", "code", "words"),
    [
        (10_000, grpc.StatusCode.OUT_OF_RANGE, "lies in the future: the newest event is"),
        (-1, grpc.StatusCode.INVALID_ARGUMENT, "start_sequence -1 is negative"),
    ],
)
async def test_a_watch_from_nowhere_is_refused(
    loaded: Any, start: int, code: grpc.StatusCode, words: str
) -> None:
    error = await fails(begin(loaded, start))
    assert error.code() == code
    assert words in error.details()


async def test_what_another_process_writes_into_the_database_is_told_too(
    loaded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch_module, "POLL_SECONDS", 0.05)
    call = begin(loaded)
    await next_of(call)
    program = (
        "import sqlite3, sys; c = sqlite3.connect(sys.argv[1], timeout=30); "
        'c.execute("insert into events (time, actor, action, model, resource, detail) values '
        "(1, 'somebody', 'ALIAS_SET', 'm', 'models/m', 'from elsewhere')\"); c.commit()"
    )
    database = loaded.settings.store / "registry.sqlite"
    await asyncio.to_thread(
        subprocess.run, [sys.executable, "-c", program, str(database)], check=True
    )
    (event,) = await take(call, 1)
    assert (event.actor, event.detail) == ("somebody", "from elsewhere")


async def test_a_watcher_that_does_not_read_holds_up_nobody_and_misses_nothing(
    loaded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch_module, "RECENT", 100)
    before = len(await listed(loaded))
    slow, quick = begin(loaded), begin(loaded)
    for call in (slow, quick):
        await next_of(call)
    count = 0
    for _ in range(4):
        await write_events(loaded, 400, detail="x" * 1000)  # more than the transport takes unread
        count += 400
        await take(quick, 400)
        assert len(loaded.service.events._recent) <= 100
    sequences = [event.sequence for event in await take(slow, count)]
    assert sequences == list(range(before + 1, before + 1 + count))


async def test_many_watchers_cost_one_look_at_the_table(loaded: Any) -> None:
    calls = [begin(loaded) for _ in range(60)]
    for call in calls:
        await next_of(call)
    # Everybody is up to date from here on.
    await write_events(loaded, 1)
    for call in calls:
        await take(call, 1)
    statements: list[str] = []

    @sa_event.listens_for(loaded.service.store.database.engine, "before_cursor_execute")
    def note(_c: Any, _cursor: Any, statement: str, *_rest: Any) -> None:
        if "FROM events" in statement:
            statements.append(statement)

    for _ in range(5):
        await write_events(loaded, 1)
        for call in calls:
            await take(call, 1)
    assert len(statements) <= 20


async def test_a_manager_that_stops_says_so_to_its_watchers(loaded: Any) -> None:
    call = begin(loaded)
    await next_of(call)
    failing = asyncio.create_task(fails(call))
    service, loaded.service = loaded.service, None
    await service.stop(30)
    error = await failing
    assert error.code() == grpc.StatusCode.UNAVAILABLE
    assert "stopping" in error.details()


async def test_watchers_that_have_left_are_forgotten(loaded: Any, helpers: Any) -> None:
    feed = loaded.service.events
    idle, unread = begin(loaded), begin(loaded, 1)
    await next_of(idle)
    await next_of(unread)
    await write_events(loaded, 1000, detail="x" * 1000)
    assert feed.watchers == 2
    idle.cancel()
    unread.cancel()

    async def watchers() -> int:
        return int(feed.watchers)

    await helpers.eventually(watchers, lambda count: count == 0)
