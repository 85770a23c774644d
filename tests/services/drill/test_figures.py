"""What is counted as a request during a swap, and how long a swap took."""

from __future__ import annotations

import pytest

from pollard.client.load import IMAGE, TENSOR, Answers
from pollard.services.drill.figures import (
    Record,
    Swap,
    answering_seconds,
    during,
    figures,
    swap_windows,
)


def answers(*items: tuple[str, float, float, int]) -> Answers:
    made = Answers()
    for item in items:
        made.add(*item)
    return made


def test_a_request_counts_as_during_a_swap_when_any_part_of_it_is_near_one() -> None:
    swaps = [Swap(2, 10.0, 10.2), Swap(1, 20.0, 20.2)]
    seen = answers(
        (IMAGE, 9.0, 9.7, 1),
        (IMAGE, 9.0, 9.8, 1),
        (IMAGE, 10.4, 10.5, 2),
        (IMAGE, 10.5, 10.6, 2),
        (IMAGE, 11.0, 19.9, 2),
        (IMAGE, 9.0, 30.0, 2),
        (IMAGE, 20.5, 20.6, 1),
    )
    found = during(seen, swap_windows(swaps)).tolist()
    assert found == [False, True, True, False, True, True, False]
    assert not during(seen, swap_windows([])).any()


def test_a_swap_lasts_until_every_server_answers_by_the_new_revision() -> None:
    swaps = [Swap(2, 10.0, 10.1), Swap(1, 11.0, 11.1)]
    seen = answers(
        (TENSOR, 10.05, 10.06, 2),  # the inference server has switched
        (IMAGE, 10.20, 10.21, 1),  # the vision service has not
        (IMAGE, 10.30, 10.32, 2),
        (TENSOR, 11.00, 11.01, 1),
        (IMAGE, 11.02, 11.03, 1),
        (TENSOR, 11.40, 11.41, 2),  # sent long after, and still the revision before
        (TENSOR, 50.00, 50.01, 2),
    )
    assert answering_seconds(seen, swaps, 12.0) == pytest.approx([0.32, 0.40])


def test_a_drill_passes_only_if_everything_was_done_and_nothing_went_wrong() -> None:
    record = Record()
    assert not figures(record)["passed"], "nothing was answered"
    record.traffic.answered.add(IMAGE, 1.0, 1.1, 1)
    record.began, record.ended = 0.0, 2.0
    assert figures(record)["passed"]
    assert figures(record)["latency_out_of_swaps_ms"]["p50"] == pytest.approx(100.0)
    for spoil in ("failed", "wrong", "stale"):
        setattr(record.traffic, spoil, 1)
        assert not figures(record)["passed"]
        setattr(record.traffic, spoil, 0)
    record.problems.append("a revision is lost")
    assert not figures(record)["passed"]
    record.problems.clear()
    record.stopped = "in the middle"
    assert not figures(record)["passed"]
