from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
from torch import nn

from pollard.compress.budget import parse_budgets
from pollard.compress.errors import PruneFailed
from pollard.compress.kernels import Kernel
from pollard.compress.knapsack import Choice, CostModel, choose, options
from pollard.compress.latency import LatencyTable, Overheads
from pollard.compress.operations import list_operations
from pollard.compress.spec import InputSpec

SPEC = InputSpec(8, 8, 3, (0.5,) * 3, (0.25,) * 3)


class FormulaTable(LatencyTable):
    """A table whose latencies come from a formula instead of a clock."""

    def __init__(self, formula: Callable[[Kernel], float]) -> None:
        self.rows = {"per run": 0.0, "per node": 0.0}
        self.formula = formula

    def measure(self, kernels: Iterable[Kernel], **_: Any) -> int:
        self.rows |= {kernel.key: self.formula(kernel) for kernel in kernels}
        return 0

    @property
    def overheads(self) -> Overheads:
        return Overheads(0.0, 0.0)


def chain() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1), nn.Conv2d(64, 64, 3, padding=1), nn.Conv2d(64, 8, 1)
    )


def model(formula: Callable[[Kernel], float], worth: tuple[float, float]) -> CostModel:
    choices = [
        Choice(name, (name,), 64, 1, {w: each * (1 - w / 64) for w in options(64)})
        for name, each in zip("01", worth, strict=True)
    ]
    made = CostModel(list_operations(chain(), SPEC), choices, FormulaTable(formula))
    made.prepare()
    return made


def macs(kernel: Kernel) -> float:
    return kernel.in_channels * kernel.out_channels * kernel.kernel[0] ** 2 / 100


def blocks_of_16(kernel: Kernel) -> float:
    """Kernels that work in sixteens: what lies between costs as much as the next, and more."""
    sides = [-(-n // 16) * 16 for n in (kernel.in_channels, kernel.out_channels)]
    odd = sum(n % 16 != 0 for n in (kernel.in_channels, kernel.out_channels))
    return sides[0] * sides[1] * kernel.kernel[0] ** 2 / 100 + 5 * odd


@pytest.mark.parametrize("share", [0.8, 0.5, 0.2])
def test_the_budget_is_met_and_not_overshot_where_there_is_a_choice(share: float) -> None:
    found = model(macs, (1.0, 1.0))
    whole = found.costs(found.whole())
    picked = choose(found, {}, parse_budgets([f"latency={share}"]), whole)
    assert picked.after["latency"] <= share * whole["latency"] + 1e-6
    assert picked.after["latency"] >= (share - 0.15) * whole["latency"]
    assert all(0 < width <= 64 for width in picked.state.widths.values())


def test_what_matters_least_goes_first() -> None:
    found = model(macs, (100.0, 1.0))
    whole = found.costs(found.whole())
    picked = choose(found, {}, parse_budgets(["latency=0.6"]), whole)
    assert picked.state.widths["0"] == 64
    assert picked.state.widths["1"] < 64


def test_widths_that_bring_no_time_are_not_taken() -> None:
    found = model(blocks_of_16, (1.0, 1.0))
    whole = found.costs(found.whole())
    picked = choose(found, {}, parse_budgets(["latency=0.5"]), whole)
    assert all(width % 16 == 0 for width in picked.state.widths.values())
    # The same network by MACs does not know.
    by_macs = choose(found, {}, parse_budgets(["macs=0.57"]), whole)
    assert by_macs.after["macs"] <= 0.57 * whole["macs"]


def test_a_block_goes_where_it_saves_more_than_channels_do() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(64, 64, 3, padding=1), nn.Conv2d(64, 64, 3, padding=1)

        def forward(self, x: Any) -> Any:
            return (self.b(self.a(x)) + x).relu()

    net = nn.Sequential(nn.Conv2d(3, 64, 1), Block(), Block(), nn.Conv2d(64, 8, 1))
    operations = list_operations(net, SPEC)
    choices = [
        Choice(f"{i}.a", (f"{i}.a",), 64, 1, {w: 1 - w / 64 for w in options(64)}) for i in (1, 2)
    ]
    found = CostModel(operations, choices, FormulaTable(macs))
    found.prepare()
    whole = found.costs(found.whole())
    budgets = parse_budgets(["latency=0.55"])
    cheap = choose(found, {"1": 0.2, "2": 5.0}, budgets, whole)
    assert cheap.state.removed == {"1"}
    dear = choose(found, {"1": 5.0, "2": 5.0}, budgets, whole)
    assert dear.state.removed == frozenset()
    assert cheap.loss < dear.loss


def test_several_budgets_hold_at_once_and_steps_go_part_of_the_way() -> None:
    found = model(macs, (1.0, 1.0))
    whole = found.costs(found.whole())
    budgets = parse_budgets(["latency=0.5", "params=0.3"])
    picked = choose(found, {}, budgets, whole)
    assert picked.after["params"] <= 0.3 * whole["params"]
    assert picked.after["latency"] <= 0.5 * whole["latency"]
    half = choose(found, {}, budgets, whole, toward=0.5)
    assert picked.after["latency"] < half.after["latency"] < whole["latency"]


def test_what_cannot_be_met_says_how_far_it_goes() -> None:
    found = model(macs, (1.0, 1.0))
    whole = found.costs(found.whole())
    with pytest.raises(PruneFailed, match=r"the least is latency [\d.]+ µs instead of at most"):
        choose(found, {}, parse_budgets(["latency=0.001"]), whole)
    with pytest.raises(PruneFailed, match=r"the least is macs 54\.\d+ k instead of at most 20 k"):
        choose(found, {}, parse_budgets(["macs=20k"]), whole)


def test_widths_on_offer_are_steps_and_never_nothing() -> None:
    assert options(64) == [8, 16, 24, 32, 40, 48, 56]
    assert options(12) == [8]
    assert options(8) == [2, 4, 6]
    assert options(512)[:2] == [32, 64]
    assert options(32, unit=2) == [4, 8, 12, 16, 20, 24, 28]
    assert all(min(options(width)) > 0 for width in range(2, 600) if options(width))
