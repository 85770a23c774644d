from __future__ import annotations

import time

import numpy as np

from pollard.runtime.measure import interleaved, ratio, time_calls


def test_interleaved_rounds_pair_the_calls():
    order: list[str] = []
    a, b = interleaved(
        [lambda: order.append("a"), lambda: order.append("b")],
        rounds=4,
        calls_per_round=1,
        warmup=0,
    )
    assert a.shape == b.shape == (4,)
    assert order[2:] == ["a", "b", "b", "a", "a", "b", "b", "a"]


def test_a_slower_call_measures_slower():
    fast, slow = interleaved(
        [lambda: time.sleep(0.0005), lambda: time.sleep(0.005)], rounds=5, warmup=1
    )
    found = ratio(slow, fast)
    assert found.lower <= found.estimate <= found.upper
    assert found.lower > 1.5


def test_equal_calls_give_a_ratio_around_one():
    generator = np.random.default_rng(0)
    a, b = generator.normal(100, 1, 200), generator.normal(100, 1, 200)
    found = ratio(a, b)
    assert found.lower < 1 < found.upper


def test_durations_are_microseconds():
    assert 1000 < float(np.median(time_calls(lambda: time.sleep(0.002), 3))) < 1_000_000
