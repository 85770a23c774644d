from __future__ import annotations

import math

from pollard.compress.pace import Pace
from pollard.compress.progress import Reporter


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_without_a_limit_everything_fits() -> None:
    pace = Pace(math.inf)
    assert pace.fitting(10**9) == 10**9


def test_what_fits_follows_from_how_fast_it_goes() -> None:
    clock = Clock()
    pace = Pace(100.0, clock)
    left = 1000
    for _ in range(8):
        clock.now += 0.5
        left = pace.fitting(left - 1)
    # 86 of the 90 seconds that work may take are left, two units take one.
    assert left == 172
    clock.now += 100
    assert pace.fitting(left - 1) == 0


def test_work_that_goes_fast_enough_is_not_shortened() -> None:
    clock = Clock()
    pace = Pace(100.0, clock)
    left = 150
    while left:
        clock.now += 0.5
        assert pace.fitting(left - 1) == left - 1
        left -= 1


def test_a_reporter_without_a_limit_has_time() -> None:
    reporter = Reporter()
    assert reporter.left == math.inf
    reporter.allow(1e-9)
    assert reporter.left == 0.0
    reporter.allow(None)
    assert reporter.left == math.inf
