"""How much of a piece of work fits into a given time, from how fast it goes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

# Units that are timed before anything is foretold, and again between two looks.
_FIRST, _BETWEEN = 8, 64

# What is left for what ends an epoch: judging it, and saving where it stands.
_RESERVE = 0.1


class Pace:
    """Foretells how many units of work fit.

    Args:
        seconds: Given from now on; infinite for no limit.
        clock: Monotonic seconds.
    """

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._start = clock()
        self._seconds = seconds
        self._units = 0

    def fitting(self, left: int) -> int:
        """Count a unit that is done, and return how many of the ``left`` ones still fit."""
        self._units += 1
        if math.isinf(self._seconds):
            return left
        gone = self._clock() - self._start
        if gone >= self._seconds:
            return 0
        if self._units != _FIRST and self._units % _BETWEEN:
            return left
        each = gone / self._units
        fit = int(((1 - _RESERVE) * self._seconds - gone) / each) if each > 0 else left
        return min(left, max(0, fit))
