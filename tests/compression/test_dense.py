from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pollard.compress.budget import parse_budgets
from pollard.compress.candidates import build
from pollard.compress.channel_map import load_pruned, save_pruned
from pollard.compress.data import Dataset, Part
from pollard.compress.dense import (
    FactorizedLinear,
    decompose,
    factorize_by_energy,
    find_dense,
    put_factors,
)
from pollard.compress.errors import UsageInvalid, WeightsInvalid
from pollard.compress.export import probe_images
from pollard.compress.kernels import Kernel
from pollard.compress.latency import LatencyTable
from pollard.compress.macs import count_parameters, total_macs
from pollard.compress.prune import prune
from pollard.compress.quantize import QuantizeConfig
from pollard.compress.recipe import Recipe
from pollard.compress.shrink import ShrinkConfig, plan_shrink, shrink
from pollard.compress.spec import InputSpec
from pollard.compress.training import FitConfig

SPEC = InputSpec(16, 16, 3, (0.5,) * 3, (0.25,) * 3)


def head_of_vgg() -> nn.Sequential:
    """A convolution and three dense layers of which the first two have nearly low rank."""
    torch.manual_seed(0)
    made = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(4), nn.Flatten(),
        nn.Linear(512, 256), nn.ReLU(), nn.Dropout(), nn.Linear(256, 128), nn.ReLU(),
        nn.Linear(128, 3),
    )  # fmt: skip
    with torch.no_grad():
        for index, rank in (("4", 24), ("7", 40)):
            weight = made.get_submodule(index).weight
            assert isinstance(weight, Tensor)
            outs, ins = weight.shape
            noise = 0.02 * weight
            weight.copy_(torch.randn(outs, rank) @ torch.randn(rank, ins) / (rank * ins) ** 0.5)
            weight += noise
    return made.eval()


def outputs(module: nn.Module, count: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        found: Tensor = module.eval()(torch.randn(count, 3, 16, 16, generator=generator))
    return found


class FormulaTable(LatencyTable):
    """A table whose latencies come from a formula instead of a clock."""

    def __init__(self, formula: Callable[[Kernel], float]) -> None:
        self.rows = {"per run": 0.0, "per node": 0.0}
        self.formula = formula

    def measure(self, kernels: Iterable[Kernel], **_: Any) -> int:
        self.rows |= {kernel.key: self.formula(kernel) for kernel in kernels}
        return 0


@pytest.fixture(scope="module")
def data() -> Dataset:
    generator = np.random.default_rng(0)

    def part(name: str, count: int) -> Part:
        labels = np.arange(count) % 3
        images = generator.integers(0, 90, (count, *SPEC.shape))
        images[np.arange(count), :, :, labels] += 120
        return Part(name, images.astype(np.uint8), labels.astype(np.int64))

    parts = (part("t/train", 96), part("t/choose", 48), part("t/held-out", 48))
    return Dataset("t", ["0", "1", "2"], *parts, digest="")


@pytest.mark.parametrize(("ins", "outs"), [(96, 64), (64, 96), (1200, 1100)])
def test_the_product_is_the_best_of_its_rank(ins: int, outs: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(outs, ins, generator=generator) @ torch.diag(
        torch.linspace(2, 0.01, ins) ** 2
    )
    layer = decompose("x", weight)
    first, second = layer.factors(weight, 16)
    values = torch.linalg.svdvals(weight.double())
    lost = float((weight - second @ first).double().square().sum())
    assert lost == pytest.approx(float(values[16:].square().sum()), rel=1e-4)
    kept = float(values[:16].square().sum() / values.square().sum())
    assert layer.energy(16) == pytest.approx(kept, abs=1e-5)
    assert torch.allclose(first.norm(dim=1), torch.ones(16), atol=1e-3)


def test_energy_chooses_the_rank_and_layers_that_would_not_gain_stay() -> None:
    parent = head_of_vgg()
    module = head_of_vgg()
    plans = {p.name: p for p in factorize_by_energy(module, SPEC, 0.99)}
    assert (plans["4"].rank, plans["7"].rank) == (32, 48)
    assert all(plans[name].energy >= 0.99 for name in ("4", "7"))
    assert plans["9"].rank == 0
    assert "small" in plans["9"].why
    assert isinstance(module.get_submodule("4"), FactorizedLinear)
    assert count_parameters(module) < 0.35 * count_parameters(parent)
    assert torch.allclose(outputs(parent), outputs(module), atol=0.05)
    strict = factorize_by_energy(head_of_vgg(), SPEC, 0.99999)
    assert all(p.rank == 0 for p in strict)
    assert any("saves nothing" in p.why for p in strict)


def test_a_layer_that_would_be_slower_stays_whole() -> None:
    def flat(_: Kernel) -> float:
        return 10.0

    def by_macs(kernel: Kernel) -> float:
        return kernel.in_channels * kernel.out_channels / 100

    plans = factorize_by_energy(head_of_vgg(), SPEC, 0.99, tables=[FormulaTable(flat)])
    assert [p.rank for p in plans] == [0, 0, 0]
    assert sum("not faster: 20.0 instead of 10.0" in p.why for p in plans) == 2
    both = [FormulaTable(flat), FormulaTable(by_macs)]
    assert sum(p.rank > 0 for p in factorize_by_energy(head_of_vgg(), SPEC, 0.99, tables=both)) == 2


def test_layers_that_run_twice_are_shared_or_named_stay_whole() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 64, 16), nn.Flatten())
            self.twice, self.bare, self.tied, self.named = (nn.Linear(64, 64) for _ in range(4))
            self.plain = nn.Linear(64, 64)
            self.other = nn.Linear(64, 64)
            self.other.weight = self.tied.weight

        def forward(self, x: Tensor) -> Tensor:
            x = self.twice(self.twice(self.body(x)))
            x = nn.functional.linear(x, self.bare.weight)
            found: Tensor = self.plain(self.named(self.other(self.tied(x))))
            return found

    layers, whole = find_dense(Twice().eval(), SPEC, ("named",))
    assert [layer.name for layer in layers] == ["plain"]
    assert {p.name for p in whole} == {"twice", "bare", "tied", "other", "named"}


def test_a_frozen_layer_stays_frozen_and_keeps_its_bias() -> None:
    module = head_of_vgg()
    dense = module.get_submodule("4")
    dense.requires_grad_(False)
    bias = dense.bias
    assert isinstance(bias, Tensor)
    found = {layer.name: layer for layer in find_dense(module, SPEC)[0]}
    put_factors(module, found["4"], 32)
    made = module.get_submodule("4")
    assert isinstance(made, FactorizedLinear)
    assert not any(p.requires_grad for p in made.parameters())
    assert made.bias is not None
    assert torch.equal(made.bias, bias)


def test_pruned_and_factorised_reloads_and_becomes_8_bits(tmp_path: Path) -> None:
    pruned = prune(head_of_vgg(), SPEC, 0.4, factorize=0.97)
    assert {p.name for p in pruned.dense if p.rank} == {"4", "7"}
    assert pruned.macs_after == total_macs(pruned.module, SPEC)
    save_pruned(pruned.module, tmp_path, pruned.channels)
    again = load_pruned(head_of_vgg(), tmp_path)
    assert torch.equal(outputs(again), outputs(pruned.module))
    images = probe_images(SPEC, 16)
    part = Part("x", images, np.zeros(16, np.int64))
    config = QuantizeConfig(16, reduce_range=True)
    small, eight = build("pruned", again, SPEC, tmp_path, part, config)
    assert small.parity is not None
    assert small.parity < 1e-3
    assert eight.size_bytes < 0.5 * small.size_bytes


def test_a_factorised_layer_where_the_parent_has_another_is_refused(tmp_path: Path) -> None:
    save_pruned(prune(head_of_vgg(), SPEC, 0, factorize=0.97).module, tmp_path)
    other = head_of_vgg()
    other[4] = nn.Identity()
    with pytest.raises(WeightsInvalid, match="4 is a FactorizedLinear in the file"):
        load_pruned(other, tmp_path)


@pytest.mark.long
def test_a_budget_of_size_is_met_by_ranks_where_they_cost_least(
    data: Dataset, tmp_path: Path
) -> None:
    parent = head_of_vgg()
    config = ShrinkConfig(parse_budgets(["size=0.25"]), ("cpu-fp32",), steps=2)
    fit = FitConfig(epochs=2, batch_size=32, learning_rate=1e-3, distill_weight=0.5)
    cut, _ = shrink(parent, data, SPEC, config, fit)
    assert cut is not None
    assert cut.search is not None
    ranks = {p.name: p.rank for p in cut.dense if p.rank}
    assert "4" in ranks
    for name, rank in ranks.items():
        layer = cut.module.get_submodule(name)
        assert isinstance(layer, FactorizedLinear)
        assert layer.rank == rank
    # Channels are told in the parent's layers, not in those within.
    assert set(cut.channels) <= {"0", "4", "7"}
    assert {layer for group in cut.groups for layer in group.layers} <= {"0", "4", "7"}
    assert cut.search["steps"][0]["dense"]["4"]
    (file,) = build("pruned", cut.module, SPEC, tmp_path)
    (whole,) = build("parent", parent, SPEC, tmp_path)
    assert file.size_bytes < 0.28 * whole.size_bytes
    save_pruned(cut.module, tmp_path, cut.channels)
    assert torch.equal(outputs(load_pruned(head_of_vgg(), tmp_path)), outputs(cut.module))


@pytest.mark.long
@pytest.mark.parametrize(("share", "some"), [(0.0, False), (0.99999, False), (None, True)])
def test_a_budget_factorises_only_as_far_as_it_may(share: float | None, some: bool) -> None:
    config = ShrinkConfig(parse_budgets(["params=0.3"]), ("cpu-fp32",), steps=1, factorize=share)
    cut = plan_shrink(head_of_vgg(), SPEC, config)
    assert cut is not None
    assert any(p.rank for p in cut.dense) == some


@pytest.mark.parametrize("share", [-0.1, 1.0, 2.0])
def test_a_share_of_energy_lies_between_0_and_1(share: float) -> None:
    with pytest.raises(UsageInvalid, match="factorize"):
        Recipe("zoo:vgg16", "d", "w", factorize=share)
