from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pollard.compress.errors import PruneFailed
from pollard.compress.macs import layer_costs, total_macs
from pollard.compress.prune import prune
from pollard.compress.spec import InputSpec
from pollard.compress.zoo import find

SPEC = InputSpec(16, 16, 3, (0.0,) * 3, (1.0,) * 3)


class Branches(nn.Module):
    """Concatenation, depthwise convolution, residual and flattening in one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.left = nn.Conv2d(32, 24, 3, padding=1)
        self.right = nn.Conv2d(32, 40, 1)
        self.depthwise = nn.Conv2d(64, 64, 3, padding=1, groups=64)
        self.norm = nn.BatchNorm2d(64)
        self.mix = nn.Conv2d(64, 32, 1)
        self.pool = nn.MaxPool2d(4)
        self.head = nn.Linear(32 * 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        stem = torch.relu(self.stem(x))
        both = torch.cat([self.left(stem), self.right(stem)], 1)
        mixed = self.mix(torch.relu(self.norm(self.depthwise(both)))) + stem
        out: Tensor = self.head(torch.flatten(self.pool(mixed), 1))
        return out


class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 32, 3, padding=1)
        self.b = nn.Conv2d(32, 32, 3, padding=1, groups=4)
        self.c = nn.Conv2d(32, 32, 3, padding=1)
        self.d = nn.Conv2d(32, 32, 3, padding=1)
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        out = torch.relu(self.b(torch.relu(self.a(x))))
        out = torch.relu(self.d(torch.relu(self.c(out))))
        logits: Tensor = self.head(out.mean((2, 3)))
        return logits


@pytest.mark.parametrize("ratio", [0.2, 0.5, 0.8])
@pytest.mark.parametrize("name", ["small-cnn-28", "resnet20-cifar"])
def test_the_asked_share_of_macs_is_removed(name: str, ratio: float) -> None:
    entry = find(name)
    module = entry.build(10).eval()
    before = copy.deepcopy(module.state_dict())
    pruned = prune(module, entry.spec, ratio)
    assert ratio <= pruned.removed <= ratio + 0.07
    assert pruned.macs_after == total_macs(pruned.module, entry.spec)
    for key, value in before.items():
        assert torch.equal(module.state_dict()[key], value)


@pytest.mark.parametrize("make", [Branches, lambda: find("resnet20-cifar").build(5)])
def test_the_model_answers_with_all_classes(make: Any) -> None:
    module = make().eval()
    pruned = (
        prune(module, SPEC, 0.5)
        if isinstance(module, Branches)
        else prune(module, find("resnet20-cifar").spec, 0.5)
    )
    size = 16 if isinstance(module, Branches) else 32
    with torch.no_grad():
        assert pruned.module(torch.randn(4, 3, size, size)).shape == (4, 5)
    assert any("output hangs on it" in why for why in pruned.left_whole.values())


def test_widths_that_change_are_multiples_and_never_zero() -> None:
    entry = find("resnet56-cifar")
    pruned = prune(entry.build(10), entry.spec, 0.5)
    assert pruned.rounding == 16
    changed = [group for group in pruned.groups if group.kept != group.width]
    assert changed
    assert all(group.kept % 16 == 0 and group.kept > 0 for group in changed)


def test_odd_widths_come_down_to_the_grid() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 20, 3), nn.Conv2d(20, 12, 3)
            self.head = nn.Linear(12, 5)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.head(torch.relu(self.b(torch.relu(self.a(x)))).mean((2, 3)))
            return logits

    pruned = prune(Odd(), SPEC, 0.5, rounding=(8,))
    assert [g.kept for g in pruned.groups if g.kept != g.width]
    assert all(g.kept in (g.width, 8, 16) for g in pruned.groups)


def test_frozen_parameters_are_pruned_and_stay_frozen() -> None:
    entry = find("small-cnn-28")
    module = entry.build(10).requires_grad_(False)
    pruned = prune(module, entry.spec, 0.5)
    assert pruned.removed >= 0.5


def test_grouped_convolutions_stay_whole_and_say_so() -> None:
    pruned = prune(Grouped(), SPEC, 0.2)
    assert "grouped convolution" in pruned.left_whole["b"]
    by_name = {cost.name: cost for cost in layer_costs(pruned.module, SPEC)}
    assert by_name["b"].out_channels == 32


def test_one_model_leaves_nothing_behind_for_the_next() -> None:
    first = prune(Branches(), SPEC, 0.4)
    prune(Grouped(), SPEC, 0.2)
    again = prune(Branches(), SPEC, 0.4)
    assert [g.kept for g in first.groups] == [g.kept for g in again.groups]


def test_named_layers_stay_whole() -> None:
    entry = find("small-cnn-28")
    pruned = prune(entry.build(10), entry.spec, 0.4, keep_whole=("conv1",))
    assert pruned.left_whole["conv1"] == "it was named to stay whole"
    assert {g.name for g in pruned.groups} == {"conv2", "fc1"}
    with pytest.raises(PruneFailed, match="no layers conv9"):
        prune(entry.build(10), entry.spec, 0.4, keep_whole=("conv9",))


def test_unimportant_channels_go_first() -> None:
    entry = find("small-cnn-28")
    module = entry.build(10)
    with torch.no_grad():
        # Quiet in all three layers of its group: its own filter, and who reads it.
        quiet = torch.arange(0, 32, 2)
        module.conv1.weight[quiet] *= 1e-3  # type: ignore[operator, index]
        module.conv2.weight[:, quiet] *= 1e-3  # type: ignore[operator, index]
        loud = module.conv1.weight[1::2].clone()  # type: ignore[index]
    pruned = prune(module, entry.spec, 0.7, rounding=(16,))
    kept = pruned.module.conv1.weight  # type: ignore[union-attr]
    assert isinstance(kept, Tensor)
    assert torch.equal(kept, loud)


@pytest.mark.parametrize("ratio", [0.0, 1.0, -1.0, 0.9999])
def test_ratios_that_cannot_be_are_refused(ratio: float) -> None:
    entry = find("small-cnn-28")
    with pytest.raises(PruneFailed):
        prune(entry.build(10), entry.spec, ratio)


def test_a_model_that_cannot_be_traced_is_refused() -> None:
    class Whimsical(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(3 * 256, 5)

        def forward(self, x: Tensor) -> Tensor:
            return torch.zeros(x.shape[0], 5)

    with pytest.raises(PruneFailed):
        prune(Whimsical(), SPEC, 0.5)
