"""The slope of Theil and Sen, held against lines that are known."""

from __future__ import annotations

import numpy as np
import pytest

from pollard.services.drill.trends import theil_sen


def test_a_line_has_its_slope_whatever_a_few_points_do() -> None:
    times = np.arange(0.0, 600.0, 10.0)
    values = 200.0 + 0.05 * times + np.random.default_rng(1).normal(0, 0.2, len(times))
    values[::9] += 500.0
    found = theil_sen(times, values)
    assert found.slope == pytest.approx(0.05, abs=0.002)
    assert found.low < 0.05 < found.high
    assert found.percent_per(600.0)[0] == pytest.approx(100 * 30 / found.middle, rel=0.05)


def test_noise_around_a_level_has_zero_in_its_interval() -> None:
    times = np.arange(0.0, 1200.0, 10.0)
    values = np.random.default_rng(2).normal(100.0, 3.0, len(times))
    low, high = theil_sen(times, values).low, theil_sen(times, values).high
    assert low < 0 < high


def test_one_point_has_no_slope() -> None:
    with pytest.raises(ValueError, match="two points, and there are 1"):
        theil_sen([1.0], [1.0])
