"""How a figure moves over time: the slope of Theil and Sen, which a few outliers do not move."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_Z_95 = 1.959964


@dataclass(frozen=True)
class Trend:
    """The slope of a figure, in its own unit a second, with a 95 % interval."""

    slope: float
    low: float
    high: float
    middle: float
    """Median of the figure itself."""

    def percent_per(self, seconds: float) -> tuple[float, float, float]:
        """Return slope and interval in percent of the median for so many seconds."""
        if not self.middle:
            return 0.0, 0.0, 0.0
        factor = 100 * seconds / self.middle
        return self.slope * factor, self.low * factor, self.high * factor


def theil_sen(times: Sequence[float], values: Sequence[float]) -> Trend:
    """Return the median of the slopes of all pairs of points.

    The interval is Sen's (1968), from the variance of Kendall's statistic. It takes the points for
    independent; figures that hang together from one sample to the next move more than it says.

    Args:
        times: In seconds, growing.
        values: As many.

    Raises:
        ValueError: there are fewer than two points.
    """
    x, y = np.asarray(times, np.float64), np.asarray(values, np.float64)
    count = len(x)
    if count < 2:
        raise ValueError(f"a slope takes two points, and there are {count}")
    first, second = np.triu_indices(count, 1)
    slopes = np.sort((y[second] - y[first]) / (x[second] - x[first]))
    pairs = len(slopes)
    spread = _Z_95 * math.sqrt(count * (count - 1) * (2 * count + 5) / 18)
    low = max(0, math.floor((pairs - spread) / 2))
    high = min(pairs - 1, math.ceil((pairs + spread) / 2))
    return Trend(
        float(np.median(slopes)), float(slopes[low]), float(slopes[high]), float(np.median(y))
    )
