from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional

from pollard.compress.macs import example_input
from pollard.compress.shortcuts import rewrite_shortcuts
from pollard.compress.zoo import find


def test_option_a_shortcuts_become_exactly_equal_convolutions() -> None:
    entry = find("resnet20-cifar")
    model = entry.build(10).eval()
    rewritten = copy.deepcopy(model)
    names = rewrite_shortcuts(rewritten, example_input(entry.spec))
    assert names == ["layer2.0.shortcut", "layer3.0.shortcut"]
    assert isinstance(rewritten.get_submodule(names[0]), nn.Conv2d)
    with torch.no_grad():
        x = torch.randn(3, 3, 32, 32)
        assert torch.equal(model(x), rewritten(x))


def test_shortcuts_of_other_authors_are_recognised_by_what_they_do() -> None:
    class Elsewhere(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return functional.pad(functional.avg_pool2d(x, 1, 2), (0, 0, 0, 0, 0, 4))

    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), Elsewhere(), nn.ReLU())
    assert rewrite_shortcuts(model, torch.randn(1, 3, 8, 8)) == ["1"]


def test_other_layers_without_parameters_stay() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.MaxPool2d(2), nn.PixelShuffle(2), nn.ReLU())
    assert rewrite_shortcuts(model, torch.randn(1, 3, 10, 10)) == []
