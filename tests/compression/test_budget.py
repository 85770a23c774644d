from __future__ import annotations

import pytest

from pollard.compress.budget import amount, parse_budgets
from pollard.compress.errors import UsageInvalid


@pytest.mark.parametrize(
    ("text", "parent", "limit"),
    [
        ("latency=0.4", 1000.0, 400.0),
        ("latency=1.5ms", 1000.0, 1500.0),
        ("latency = 250 us", 1000.0, 250.0),
        ("macs=20M", 4e7, 2e7),
        ("params=1e-1", 500.0, 50.0),
        ("size=300kB", 1e6, 3e5),
        ("size=1MiB", 1e6, 2.0**20),
    ],
)
def test_shares_are_of_the_parent_and_amounts_are_not(
    text: str, parent: float, limit: float
) -> None:
    (budget,) = parse_budgets([text])
    assert budget.limit(parent) == pytest.approx(limit)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["speed=2"], "latency, macs, params, size"),
        (["latency"], "RESOURCE=AMOUNT"),
        (["latency=1.0"], "between 0 and 1"),
        (["latency=0"], "between 0 and 1"),
        (["latency=-2ms"], "must be positive"),
        (["latency=1e999ms"], "must be positive"),
        (["latency=1-2ms"], "must be positive"),
        (["size=3ms"], "the unit 'ms' is not one of B, kB"),
        (["macs=0.5", "macs=20M"], "two budgets for macs"),
    ],
)
def test_what_is_no_budget_is_refused_with_what_would_be(texts: list[str], message: str) -> None:
    with pytest.raises(UsageInvalid, match=message):
        parse_budgets(texts)


@pytest.mark.parametrize(
    ("resource", "value", "told"),
    [
        ("size", 22_920.0, "22.92 kB"),
        ("size", 1_048_576.0, "1.049 MB"),
        ("size", 512.0, "512 B"),
        ("params", 37.5, "37.5"),
        ("macs", 4_039_808.0, "4.04 M"),
        ("latency", 0.0125, "0.0125 µs"),
        ("latency", 1500.0, "1.5 ms"),
    ],
)
def test_amounts_are_told_in_the_unit_that_fits(resource: str, value: float, told: str) -> None:
    assert amount(resource, value) == told
