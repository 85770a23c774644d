from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pollard.compress.blocks import find_blocks
from pollard.compress.budget import parse_budgets
from pollard.compress.channel_map import load_pruned, save_pruned
from pollard.compress.data import Dataset, Part
from pollard.compress.errors import PruneFailed
from pollard.compress.groups import analyse
from pollard.compress.latency import LatencyTable
from pollard.compress.macs import total_macs
from pollard.compress.progress import Reporter
from pollard.compress.sensitivity import guessed_sensitivities, measure_sensitivities
from pollard.compress.shrink import (
    ShrinkConfig,
    cost_model,
    loss_gradients,
    parent_costs,
    plan_shrink,
    shrink,
)
from pollard.compress.spec import InputSpec
from pollard.compress.training import FitConfig, recalibrate_batch_norm

SPEC = InputSpec(12, 12, 3, (0.5,) * 3, (0.25,) * 3)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.a = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm_a = nn.BatchNorm2d(width)
        self.b = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm_b = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm_b(self.b(torch.relu(self.norm_a(self.a(x))))) + x)


def build() -> nn.Sequential:
    torch.manual_seed(0)
    stem = [nn.Conv2d(3, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU()]
    head = [nn.AvgPool2d(12), nn.Flatten(), nn.Linear(24, 3)]
    return nn.Sequential(*stem, *(Block(24) for _ in range(3)), *head).eval()


@pytest.fixture(scope="module")
def data() -> Dataset:
    generator = np.random.default_rng(0)

    def part(name: str, count: int) -> Part:
        labels = np.arange(count) % 3
        images = generator.integers(0, 90, (count, *SPEC.shape))
        images[np.arange(count), :, :, labels] += 120
        return Part(name, images.astype(np.uint8), labels.astype(np.int64))

    parts = (part("t/train", 192), part("t/choose", 96), part("t/held-out", 96))
    return Dataset("t", ["0", "1", "2"], *parts, digest="")


def config(*budgets: str, **changes: Any) -> ShrinkConfig:
    return replace(ShrinkConfig(parse_budgets(budgets), ("cpu-fp32",), steps=1), **changes)


FIT = FitConfig(epochs=2, batch_size=32, learning_rate=1e-3, distill_weight=0.5)


def test_a_budget_of_latency_is_met_in_the_table_and_reloads(data: Dataset, tmp_path: Path) -> None:
    parent = build()
    before = {key: value.clone() for key, value in parent.state_dict().items()}
    cut, history = shrink(parent, data, SPEC, config("latency=0.5", steps=2), FIT)
    assert cut is not None
    assert history is not None
    assert cut.search is not None
    last = cut.search["steps"][-1]
    assert last["after"]["latency"] <= 0.5 * cut.search["parent"]["latency"] + 1e-6
    assert [step["step"] for step in cut.search["steps"]] == [1, 2]
    assert cut.macs_after == total_macs(cut.module, SPEC) < cut.macs_before
    for key, value in before.items():
        assert torch.equal(parent.state_dict()[key], value)
    save_pruned(cut.module, tmp_path, cut.channels)
    inputs = torch.randn(2, 3, 12, 12)
    with torch.no_grad():
        assert torch.equal(load_pruned(build(), tmp_path)(inputs), cut.module.eval()(inputs))
    for name, kept in cut.channels.items():
        if name in dict(cut.module.named_modules()) and not name.startswith(tuple(cut.blocks)):
            rows = next(cut.module.get_submodule(name).parameters()).shape[0]
            assert rows == len(kept)
            assert max(kept) < next(parent.get_submodule(name).parameters()).shape[0]


def test_channels_that_were_kept_are_the_parents(data: Dataset) -> None:
    parent = build()
    cut, _ = shrink(
        parent, data, SPEC, config("macs=0.4", steps=3, remove_blocks=False),
        replace(FIT, epochs=0),
    )  # fmt: skip
    assert cut is not None
    assert cut.removed >= 0.6
    assert cut.blocks == []
    assert cut.channels
    stem = cut.channels.get("0", list(range(24)))
    for name, ins in (("0", [0, 1, 2]), ("3.a", stem), ("4.a", stem), ("5.a", stem)):
        weight, original = (m.get_submodule(name).weight for m in (cut.module, parent))
        assert isinstance(weight, Tensor)
        assert isinstance(original, Tensor)
        kept = cut.channels.get(name, list(range(24)))
        assert torch.equal(weight, original[kept][:, ins])


def test_what_the_parent_takes_already_needs_no_cut(data: Dataset) -> None:
    assert shrink(build(), data, SPEC, config("macs=1G"), FIT) == (None, None)
    assert plan_shrink(build(), SPEC, config("latency=10s")) is None


def test_a_budget_out_of_reach_is_refused_before_any_training(data: Dataset) -> None:
    with pytest.raises(PruneFailed, match="cannot be met"):
        shrink(build(), data, SPEC, config("latency=0.0001"), FIT)
    with pytest.raises(PruneFailed, match="the least is params"):
        plan_shrink(build(), SPEC, config("params=0.001"))
    # Not what one of several steps was to come to.
    with pytest.raises(PruneFailed, match="instead of at most 1 B"):
        shrink(build(), data, SPEC, config("size=1B", steps=2), FIT)


def test_a_block_that_does_nothing_is_the_least_sensitive_and_goes(data: Dataset) -> None:
    parent = build()
    with torch.no_grad():
        for name in ("3", "5"):
            parent.get_submodule(name).norm_b.weight.fill_(3)  # type: ignore[union-attr, operator]
        parent.get_submodule("4").norm_b.weight.zero_()  # type: ignore[union-attr, operator]
        parent.get_submodule("8").weight.mul_(10)  # type: ignore[union-attr, operator]
    recalibrate_batch_norm(parent, data.train, SPEC)
    prunable = analyse(parent, SPEC)
    state = {key: value.clone() for key, value in prunable.module.state_dict().items()}
    blocks = find_blocks(prunable.module, SPEC)
    found = measure_sensitivities(prunable, blocks, data, SPEC, parent, images=96)
    assert min(found.blocks, key=lambda name: found.blocks[name]) == "4"
    assert found.blocks["4"] < 0.1 * min(found.blocks["3"], found.blocks["5"])
    for losses in found.groups.values():
        ordered = [losses[width] for width in sorted(losses)]
        assert ordered == sorted(ordered, reverse=True)
    for key, value in state.items():
        assert torch.equal(prunable.module.state_dict()[key], value)
    cut, _ = shrink(parent, data, SPEC, config("latency=0.8"), replace(FIT, epochs=0))
    assert cut is not None
    assert "4" in cut.blocks


@pytest.mark.parametrize("importance", ["l1", "l2", "bn", "taylor"])
def test_every_importance_ranks_the_silent_channels_last(importance: Any, data: Dataset) -> None:
    parent = build()
    silent = [1, 5, 20]
    with torch.no_grad():
        block = parent.get_submodule("3")
        block.a.weight[silent] = 0  # type: ignore[union-attr, operator, index]
        block.norm_a.weight[silent] = 0  # type: ignore[union-attr, operator, index]
        block.norm_a.bias[silent] = 0  # type: ignore[union-attr, operator, index]
        block.b.weight[:, silent] = 0  # type: ignore[union-attr, operator, index]
    gradients = loss_gradients(data, SPEC, 64)
    found = analyse(parent, SPEC, importance=importance, gradients=gradients)
    (group,) = [group for group in found.groups if group.name == "3.a"]
    assert sorted(torch.argsort(group.importance)[:3].tolist()) == silent
    assert all(parameter.grad is None for parameter in found.module.parameters())


def test_the_table_of_the_final_target_decides(data: Dataset) -> None:
    parent, reporter = build(), Reporter()
    prunable = analyse(parent, SPEC)
    model = cost_model(prunable, guessed_sensitivities(prunable, []), SPEC, "cpu-int8", reporter)
    whole = model.costs(model.whole())["latency"]
    # How much 8 bits save by themselves is the processor's affair.
    share = 0.8 * whole / parent_costs(parent, SPEC, reporter)["latency"]
    how = config(f"latency={share:.6f}", targets=("cpu-int8",))
    cut, _ = shrink(parent, data, SPEC, how, replace(FIT, epochs=0))
    assert cut is not None
    assert cut.search is not None
    assert {step["target"] for step in cut.search["steps"]} == {"cpu-int8"}
    assert len(LatencyTable("cpu-int8").rows) > 10
