"""Requests in the engine: joined, dropped, refused, drained."""

import asyncio
import threading
import time

import numpy as np
import pytest

from pollard.bundle.v1 import bundle_pb2
from pollard.runtime.machine import Machine
from pollard.services.inference.engine import Engine, ServedModel
from pollard.services.inference.errors import (
    ExecutionFailed,
    QueueFull,
    RequestExpired,
    ServerStopping,
)
from pollard.services.inference.loader import EngineOptions, Loader, best_joined_batch
from pollard.services.inference.revision import LoadedRevision
from pollard.services.inference.scheduling import Backlog


@pytest.fixture
async def watched(make_bundle, watch):
    """Returns a revision with one worker that joins up to 8, and its session."""
    bundle = make_bundle(1.0)
    loader = Loader(Machine.detect(), EngineOptions(memory_headroom_bytes=0))
    loaded = await loader.load("adder", 1, bundle.digest, bundle.size_bytes, bundle.path)
    inner = loaded._workers._session
    await loaded.retire()
    loader.close()
    session = watch(inner)
    revision = LoadedRevision(loaded.info, session, workers=1, joined_batch=8, max_queue=16)
    yield revision, session
    session.gate.set()
    await revision.retire()


async def ask(revision, value: float, rows: int = 1, seconds: float = 10.0) -> np.ndarray:
    feeds = {"x": np.full((rows, 4), value, np.float32)}
    outputs = await revision.infer(feeds, revision.info.outputs, time.monotonic() + seconds)
    return outputs["y"]


async def held_up(session, revision) -> asyncio.Task:
    """Keep the only worker busy until the gate opens."""
    session.gate.clear()
    first = asyncio.create_task(ask(revision, 0))
    while not session.batches:
        await asyncio.sleep(0.005)
    return first


async def test_what_waits_is_joined_and_split_again(watched) -> None:
    revision, session = watched
    first = await held_up(session, revision)
    waiting = [asyncio.create_task(ask(revision, value, rows=1 + value % 3)) for value in range(6)]
    await asyncio.sleep(0.05)
    session.gate.set()
    await first
    for value, answer in enumerate(await asyncio.gather(*waiting)):
        assert answer.shape == (1 + value % 3, 4)
        assert (answer == value + 1).all()
    assert session.batches[0] == 1
    assert max(session.batches) <= 8
    assert len(session.batches) < 7


async def test_one_bad_request_does_not_fail_those_it_was_joined_with(watched) -> None:
    revision, session = watched
    first = await held_up(session, revision)
    waiting = [asyncio.create_task(ask(revision, value)) for value in (1, -1, 2)]
    await asyncio.sleep(0.05)
    session.gate.set()
    await first
    good, bad, other = await asyncio.gather(*waiting, return_exceptions=True)
    assert good[0, 0] == 2
    assert other[0, 0] == 3
    assert isinstance(bad, ExecutionFailed)
    assert bad.message.endswith("negative")


async def test_work_of_callers_that_have_gone_is_not_run(watched) -> None:
    revision, session = watched
    first = await held_up(session, revision)
    gone = asyncio.create_task(ask(revision, 5))
    await asyncio.sleep(0.02)
    gone.cancel()
    late = asyncio.create_task(ask(revision, 6, seconds=0.05))
    await asyncio.sleep(0.1)
    session.gate.set()
    await first
    with pytest.raises(RequestExpired):
        await late
    assert session.batches == [1]
    assert revision.in_flight == 0
    assert revision.counters.rejected == 2


async def test_requests_of_few_rows_may_run_where_they_are(watched) -> None:
    worked, session = watched
    revision = LoadedRevision(
        worked.info, session, workers=1, joined_batch=1, max_queue=1, inline_rows=2
    )
    started: list[int] = []
    run = session.run

    def noting(feeds, outputs=None):
        started.append(threading.get_ident())
        return run(feeds, outputs)

    session.run = noting
    for rows in (1, 2, 3):
        assert (await ask(revision, 1, rows=rows) == 2).all()
    here = threading.get_ident()
    assert [thread == here for thread in started] == [True, True, False]
    with pytest.raises(ExecutionFailed, match="negative"):
        await ask(revision, -1)
    assert (revision.counters.succeeded, revision.counters.failed) == (3, 1)
    await revision.retire()


async def test_a_model_that_takes_far_longer_than_expected_goes_back_to_its_workers(
    watched,
) -> None:
    worked, session = watched
    revision = LoadedRevision(
        worked.info,
        session,
        workers=1,
        joined_batch=1,
        max_queue=1,
        inline_rows=2,
        inline_seconds=2e-3,
    )
    started: list[int] = []
    run = session.run

    def busy(feeds, outputs=None):
        started.append(threading.get_ident())
        # Much to do for some values, which a warm-up with zeros does not show.
        until = time.thread_time() + (0.1 if feeds["x"].max() > 5 else 0.0)
        while time.thread_time() < until:
            pass
        return run(feeds, outputs)

    session.run = busy
    for value in (1, 9, 1, 9):
        assert (await ask(revision, value) == value + 1).all()
    here = threading.get_ident()
    assert [thread == here for thread in started] == [True, True, False, False]
    await revision.retire()


async def test_requests_that_came_together_are_joined_where_they_are(watched) -> None:
    worked, session = watched
    revision = LoadedRevision(
        worked.info, session, workers=1, joined_batch=4, max_queue=1, inline_rows=2
    )
    answers = await asyncio.gather(
        *(ask(revision, value) for value in (0, 1, -1, 2, 3, 4)), return_exceptions=True
    )
    assert isinstance(answers[2], ExecutionFailed)
    assert [answer[0, 0] for answer in answers if not isinstance(answer, Exception)] == [
        *(1, 2, 3, 4, 5)
    ]
    # The first batch holds the bad request and is run again one by one, the second is good.
    assert session.batches == [4, 1, 1, 1, 1, 2]
    assert (revision.statistics.inferences, revision.statistics.executions) == (5, 4)
    await revision.retire()


async def test_requests_that_come_one_by_one_do_not_wait_for_others(watched) -> None:
    worked, session = watched
    revision = LoadedRevision(
        worked.info, session, workers=1, joined_batch=4, max_queue=1, inline_rows=2
    )
    for value in range(3):
        assert (await ask(revision, value) == value + 1).all()
        await asyncio.sleep(0.01)
    # The first of them is run before the others have come, the next turn knows better.
    for batches in ([1, 4], [4, 1]):
        session.batches.clear()
        await asyncio.gather(*(ask(revision, value) for value in range(5)))
        assert session.batches == batches
    await revision.retire()


async def test_a_caller_that_has_gone_costs_those_that_came_with_it_nothing(watched) -> None:
    worked, session = watched
    revision = LoadedRevision(
        worked.info, session, workers=1, joined_batch=4, max_queue=1, inline_rows=2
    )
    gone = asyncio.create_task(ask(revision, 1))
    stayed = asyncio.create_task(ask(revision, 2))
    await asyncio.sleep(0)
    gone.cancel()
    assert (await stayed == 3).all()
    with pytest.raises(asyncio.CancelledError):
        await gone
    assert (revision.counters.succeeded, revision.counters.rejected) == (1, 1)
    assert revision.in_flight == 0
    await revision.retire()


async def test_a_full_queue_refuses(watched) -> None:
    revision, session = watched
    first = await held_up(session, revision)
    waiting = [asyncio.create_task(ask(revision, 1)) for _ in range(16)]
    await asyncio.sleep(0.02)
    with pytest.raises(QueueFull, match="Exceeds maximum queue size"):
        await ask(revision, 1)
    session.gate.set()
    await asyncio.gather(first, *waiting)


async def test_a_revision_is_freed_only_after_its_last_request(watched) -> None:
    revision, session = watched
    engine = Engine()
    engine.switch(ServedModel("adder", {1: revision}, {"production": ((1, 1),)}))
    first = await held_up(session, revision)
    second = asyncio.create_task(ask(revision, 3))
    await asyncio.sleep(0.02)
    engine.switch(ServedModel("adder", {}, {}))
    await asyncio.sleep(0.05)
    assert not revision.freed.is_set()
    session.gate.set()
    assert (await first)[0, 0] == 1
    assert (await second)[0, 0] == 4
    async with asyncio.timeout(5):
        await revision.freed.wait()
    assert revision._workers._session is None


async def test_a_closed_engine_refuses_and_drains(watched) -> None:
    revision, session = watched
    engine = Engine()
    engine.switch(ServedModel("adder", {1: revision}, {"production": ((1, 1),)}))
    first = await held_up(session, revision)
    closing = asyncio.create_task(engine.close())
    await asyncio.sleep(0.02)
    with pytest.raises(ServerStopping):
        engine.resolve("adder")
    assert not closing.done()
    session.gate.set()
    await closing
    assert (await first)[0, 0] == 1


@pytest.mark.parametrize(
    ("figures", "joined"),
    [
        ([], 1),
        ([(1, 100.0)], 1),
        ([(1, 100.0), (8, 790.0)], 1),  # 1 % faster an image: not worth the wait.
        ([(1, 100.0), (8, 600.0), (32, 2300.0)], 32),
        ([(1, 100.0), (8, 600.0), (32, 3100.0)], 8),
    ],
)
def test_requests_are_joined_only_where_the_figures_speak_for_it(figures, joined) -> None:
    variant = bundle_pb2.Variant()
    for batch, microseconds in figures:
        variant.measurement.latencies.add(batch_size=batch, intra_op_threads=1, p50_us=microseconds)
    assert best_joined_batch(variant) == joined


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (EngineOptions(), (4, 1)),
        (EngineOptions(intra_op_threads=2), (2, 2)),
        (EngineOptions(optimize="latency"), (1, 4)),
        (EngineOptions(workers=3), (3, 1)),
    ],
)
def test_workers_and_threads_fill_the_cores(options, expected) -> None:
    assert options.threads(4) == expected


async def test_requests_that_could_not_be_answered_in_time_are_refused_at_once(watched) -> None:
    revision, session = watched
    run = session.run

    def slowly(feeds, outputs=None):
        time.sleep(0.02)
        return run(feeds, outputs)

    session.run = slowly
    await ask(revision, 0)
    # Ten wait, 20 ms each: 0.2 s and more. The worker joins them, but has not shown it yet.
    session.gate.clear()
    waiting = [asyncio.create_task(ask(revision, value)) for value in range(10)]
    await asyncio.sleep(0)
    with pytest.raises(QueueFull, match="are before it"):
        await ask(revision, 1, seconds=0.05)
    session.gate.set()
    assert (await ask(revision, 1, seconds=10))[0, 0] == 2
    await asyncio.gather(*waiting)
    # With nothing before it, it is tried, however short its time.
    with pytest.raises(RequestExpired):
        await ask(revision, 1, seconds=0.0)


def test_the_backlog_tells_who_would_wait_in_vain() -> None:
    backlog = Backlog(workers=2)
    backlog.rows = 100
    backlog.check(1, 0.001)  # Nothing is known yet.
    backlog.learn(0.08, rows=8)  # 10 ms a row.
    backlog.rows = 22
    # 20 wait for two workers, and half a row of each is left: 105 ms, 10 more, and some caution.
    with pytest.raises(QueueFull):
        backlog.check(1, 0.120)
    backlog.check(1, 0.150)
    backlog.rows = 1
    backlog.check(8, 0.0)  # A worker is free.
    # A few slow runs count at once, a few quick ones do not.
    backlog.rows = 22
    for _ in range(5):
        backlog.learn(0.1, rows=1)
    with pytest.raises(QueueFull):
        backlog.check(1, 0.6)
    for _ in range(5):
        backlog.learn(0.001, rows=1)
    with pytest.raises(QueueFull):
        backlog.check(1, 0.1)


def threads_of(revision) -> int:
    name = f"{revision.info.model}-{revision.info.revision}-"
    return sum(thread.name.startswith(name) for thread in threading.enumerate())


async def test_workers_and_session_change_beside_requests(watched, watch) -> None:
    revision, session = watched
    workers = revision._workers
    first = await held_up(session, revision)
    waiting = [asyncio.create_task(ask(revision, value)) for value in range(12)]
    await asyncio.sleep(0.05)
    other = watch(session.session)
    assert workers.change(session=other, count=3) is session
    for value, answer in enumerate(await asyncio.gather(*waiting)):
        assert (answer == value + 1).all()
    # The run that had begun keeps its session.
    assert session.batches == [1]
    assert sum(other.batches) == 12
    session.gate.set()
    assert (await first == 1).all()
    assert threads_of(revision) == 3
    assert workers.change(count=1) is None
    answers = await asyncio.gather(*(ask(revision, value) for value in range(12)))
    assert [answer[0, 0] for answer in answers] == [value + 1 for value in range(12)]
    async with asyncio.timeout(10):
        while threads_of(revision) > 1:
            await asyncio.sleep(0.005)
    assert workers.session is other


async def test_closed_workers_take_no_session(watched, watch) -> None:
    worked, session = watched
    revision = LoadedRevision(worked.info, session, workers=2, joined_batch=1, max_queue=1)
    await revision.retire()
    other = watch(session.session)
    assert revision._workers.change(session=other, count=4) is other
    assert revision._workers.session is None
