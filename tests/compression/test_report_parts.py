from __future__ import annotations

import pytest

from pollard.compress.report_parts import faster, moment, small


@pytest.mark.parametrize(
    ("ratio", "told"), [(1.914, "1.91 × faster"), (1.0, "1.00 × faster"), (0.77, "1.30 × slower")]
)
def test_what_takes_longer_is_called_slower(ratio: float, told: str) -> None:
    assert faster(ratio) == told


@pytest.mark.parametrize(
    ("value", "told"),
    [(9.7e-05, "0.000097"), (0.0001, "0.0001"), (0.334, "0.33"), (0.0, "0"), (12.0, "12")],
)
def test_small_figures_in_a_column_are_written_alike(value: float, told: str) -> None:
    assert small(value) == told


def test_times_are_told_without_offsets() -> None:
    assert moment("2026-11-27T21:12:13+01:00") == "2026-11-27 20:12 UTC"
