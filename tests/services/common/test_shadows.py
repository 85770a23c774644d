"""How the answers of two revisions are compared, and counted."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pollard.services.common.counters import RequestCounters
from pollard.services.common.shadows import ShadowRule, compare_answers


def test_items_agree_by_their_first_answer_and_differ_by_their_distance() -> None:
    base = np.float32([[3, 4, 0], [1, 0, 0], [0, 2, 0]])
    scores = np.float32([[3, 4, 0], [0.5, 0, 0], [2, 0, 0]])
    agreed, distances = compare_answers(scores, base)
    assert agreed == 2
    assert distances == pytest.approx([0, 0.5, math.sqrt(2)])


def test_what_is_no_number_is_no_answer() -> None:
    base = np.float32([[1, 0], [1, 0], [np.nan, 0]])
    scores = np.float32([[np.nan, 0], [np.inf, 0], [np.nan, 0]])
    agreed, distances = compare_answers(scores, base)
    assert agreed == 1  # the base revision gave none either
    assert all(math.isinf(distance) for distance in distances)


@pytest.mark.parametrize("shape", [(2, 4), (3,), (2, 0), (3, 3)])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="cannot be compared"):
        compare_answers(np.zeros(shape), np.zeros((2, 3)))


def test_counters_of_copies_are_reported_with_the_requests() -> None:
    counters = RequestCounters()
    assert not counters.to_proto().HasField("shadow")
    shadows = counters.shadows()
    shadows.compare(1, [0.0, 0.25])
    shadows.compare(1, [math.inf])
    shadows.drop()
    shadows.fail()
    found = counters.to_proto().shadow
    assert (found.compared, found.items, found.agreed, found.dropped, found.failed) == (
        2,
        3,
        2,
        1,
        1,
    )
    histogram = found.distance
    assert sum(histogram.counts) == 3
    assert (histogram.offset, histogram.counts[0], histogram.counts[-1]) == (0, 1, 1)
    quarter = int(math.log2(250_000) * histogram.scale)
    assert histogram.counts[quarter] == 1


def test_a_rule_travels_as_it_is() -> None:
    rule = ShadowRule(7, 6, 0.1, "scores", True)
    assert ShadowRule.of(rule.to_proto()) == rule
