from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pollard.compress.data import Part
from pollard.compress.evaluate import confusion, paired_drop, right_answers, wilson


def test_the_wilson_interval_is_that_of_the_textbook() -> None:
    found = wilson(10, 20)
    assert (found.lower, found.upper) == pytest.approx((0.2993, 0.7007), abs=1e-4)


@given(st.integers(1, 5000), st.data())
def test_an_interval_holds_its_estimate(samples: int, data: st.DataObject) -> None:
    found = wilson(data.draw(st.integers(0, samples)), samples)
    assert 0 <= found.lower <= found.value <= found.upper <= 1
    assert found.upper - found.lower > 0


def test_a_drop_counts_only_where_the_answers_differ() -> None:
    parent = np.array([True] * 90 + [False] * 10)
    candidate = parent.copy()
    candidate[:3] = False
    candidate[95] = True
    drop = paired_drop(parent, candidate)
    assert drop.points == pytest.approx(2.0)
    assert drop.lower < 2.0 < drop.upper


def test_equal_answers_still_leave_some_doubt() -> None:
    same = np.ones(100, bool)
    drop = paired_drop(same, same)
    assert drop.points == 0
    assert drop.lower < 0 < drop.upper


def test_answers_that_are_not_finite_are_wrong() -> None:
    part = Part("p", np.zeros((2, 1, 1, 1), np.uint8), np.array([0, 0]))
    logits = np.array([[1.0, 0.0], [np.nan, 0.0]], np.float32)
    assert right_answers(logits, part).tolist() == [True, False]


def test_confusion_counts_every_image() -> None:
    logits = np.eye(3, dtype=np.float32)[[0, 1, 1, 2]]
    matrix = confusion(logits, np.array([0, 1, 2, 2]), 3)
    assert matrix.tolist() == [[1, 0, 0], [0, 1, 0], [0, 1, 1]]
