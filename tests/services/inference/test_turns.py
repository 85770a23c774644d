"""Callers take turns where requests wait."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import numpy as np
import pytest

from pollard.runtime.machine import Machine
from pollard.services.common.auth.callers import Caller, Role, calling
from pollard.services.inference.errors import QueueFull
from pollard.services.inference.loader import EngineOptions, Loader
from pollard.services.inference.revision import LoadedRevision
from pollard.services.inference.scheduling import Backlog, PriorityQueue, QueuePolicy, Scheduling
from pollard.services.inference.settings import InferenceSettings
from pollard.services.inference.turns import Turns
from pollard.services.inference.workers import Work


class Settled:
    """A caller that keeps what it gets."""

    gone = False

    def __init__(self) -> None:
        self.outcomes: list[Any] = []

    def settle(self, work: Work, outcome: Any) -> None:
        raise AssertionError("not used here")

    def hand_over(self, settled: Any) -> None:
        self.outcomes += [outcome for _, outcome in settled]


def work(who: str, rows: int = 1, caller: Any = None) -> Work:
    made = Work({}, (), rows, float("inf"), caller or Settled())
    made.who = who
    return made


def order(turns: Turns) -> str:
    return "".join(turns.popleft().who for _ in range(len(turns)))


def test_who_asks_for_little_is_next() -> None:
    turns = Turns()
    turns.extend(work("g") for _ in range(6))
    turns.append(work("m"))
    turns.append(work("n"))
    turns.append(work("m"))
    assert len(turns) == 9
    assert order(turns) == "gmngmgggg"
    with pytest.raises(IndexError):
        turns.popleft()


def test_one_caller_alone_is_served_as_it_came() -> None:
    turns = Turns()
    works = [work("g", rows) for rows in (3, 1, 2)]
    turns.extend(works)
    assert [turns.popleft() for _ in works] == works


def test_rows_count_and_not_requests() -> None:
    turns = Turns()
    turns.extend(work("b", 4) for _ in range(2))
    turns.extend(work("s") for _ in range(6))
    assert order(turns) == "bssssbss"


def test_nothing_is_saved_up_by_asking_for_nothing() -> None:
    turns = Turns()
    turns.extend(work("g") for _ in range(100))
    for _ in range(50):
        assert turns.popleft().who == "g"
    # Who comes late has one turn in two, and not the fifty before it.
    turns.extend(work("m") for _ in range(10))
    assert order(turns)[:8].count("m") == 4


def test_callers_who_have_gone_are_forgotten() -> None:
    turns = Turns()
    turns.extend(work("g") for _ in range(2000))
    for number in range(3000):
        turns.append(work(f"caller {number}"))
        while turns.popleft().who == "g":
            pass
    assert len(turns._ends) < 1100


def test_a_full_queue_takes_from_who_has_most() -> None:
    queue = PriorityQueue(Scheduling(fair=True), 4)
    greedy = Settled()
    for _ in range(4):
        queue.put(work("g", caller=greedy))
    with pytest.raises(QueueFull):
        queue.put(work("g"))
    queue.put(work("m"))
    queue.put(work("m"))
    assert [type(outcome) for outcome in greedy.outcomes] == [QueueFull, QueueFull]
    with pytest.raises(QueueFull):
        queue.put(work("m"))
    assert queue.qsize() == 4
    taken = [queue.get_nowait() for _ in range(4)]
    assert [each.who for each in taken if each is not None] == ["g", "m", "g", "m"]
    queue.put(None)
    assert queue.get_nowait() is None


def test_callers_keep_their_order_when_those_who_have_gone_make_room() -> None:
    queue = PriorityQueue(Scheduling(fair=True, policy=QueuePolicy(max_size=7)))
    waiting = Settled()
    gone = Settled()
    gone.gone = True
    # The greedy caller's come first, the modest one's then move them in the heap.
    put = [work("g", caller=gone if number == 4 else waiting) for number in range(5)]
    put += [work("m", caller=waiting) for _ in range(2)]
    for each in put:
        queue.put(each)
    last = work("m", caller=waiting)
    queue.put(last)
    taken = [queue.get_nowait() for _ in range(7)]
    for who in "gm":
        came = [each for each in [*put, last] if each.who == who and not each.caller.gone]
        assert [each for each in taken if each is not None and each.who == who] == came
    assert waiting.outcomes == []


def test_what_waits_is_listed_as_it_is_taken() -> None:
    turns = Turns()
    turns.extend(work("g") for _ in range(4))
    turns.extend(work("m") for _ in range(3))
    assert turns.give_way("m") is None
    turns.extend(work("g") for _ in range(3))
    assert turns.give_way("n") is not None
    listed = list(turns)
    assert [turns.popleft() for _ in listed] == listed


def test_only_what_is_before_a_request_makes_it_too_late() -> None:
    backlog = Backlog(workers=1)
    backlog.learn(0.1, 1)
    for _ in range(50):
        backlog.enter(1, "g", fair=True)
    with pytest.raises(QueueFull, match="50 requests are before it"):
        backlog.check(1, 1.0, "g")
    backlog.check(1, 1.0, "m")
    for _ in range(50):
        backlog.leave(1, "g")
    assert (backlog.rows, backlog.rows_of) == (0, {})


def test_turns_are_taken_where_callers_are_known() -> None:
    assert InferenceSettings.load({"tokens": True}).engine_options.fair
    assert not InferenceSettings.load({}).engine_options.fair


async def test_a_modest_caller_does_not_wait_behind_a_greedy_one(
    make_bundle: Any, watch: Any
) -> None:
    bundle = make_bundle(1.0)
    loader = Loader(Machine.detect(), EngineOptions(memory_headroom_bytes=0))
    loaded = await loader.load("adder", 1, bundle.digest, bundle.size_bytes, bundle.path)
    inner = loaded._workers._session
    await loaded.retire()
    loader.close()
    session = watch(inner)
    revision = LoadedRevision(
        loaded.info,
        session,
        workers=1,
        joined_batch=1,
        max_queue=64,
        scheduling=Scheduling(fair=True),
    )
    answered: list[str] = []

    async def ask(who: str) -> None:
        with calling(Caller(who, Role.PREDICTOR, "token", who)):
            feeds = {"x": np.ones((1, 4), np.float32)}
            await revision.infer(feeds, revision.info.outputs, time.monotonic() + 30)
        answered.append(who)

    session.gate.clear()
    asked = [asyncio.create_task(ask("greedy")) for _ in range(20)]
    while revision.waiting < 19:
        await asyncio.sleep(0.005)
    asked.append(asyncio.create_task(ask("modest")))
    while revision.waiting < 20:
        await asyncio.sleep(0.005)
    session.gate.set()
    await asyncio.gather(*asked)
    await revision.retire()
    assert answered.index("modest") <= 3
    assert len(answered) == 21
