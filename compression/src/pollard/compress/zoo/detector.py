"""A small anchor-free detector of one stage: FCOS (Tian et al., 2019) at a single scale.

Every cell of a grid says how far the four edges of an object are from its middle, and what it
is. As in generalized focal loss (Li et al., 2020) the score of a class is trained to be the
overlap of the cell's box with the object's: it takes the place of a branch for centre-ness.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

_PRIOR = 0.01
"""Score of everything at the start (Lin et al., 2017): most cells show nothing."""

_START = 0.7
"""Logarithm of all distances at the start, in cells."""

_REACH = 4.0
"""Logarithm of the largest distance, in cells: beyond it is no image."""


def _unit(ins: int, outs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(ins, outs, 3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(outs),
        nn.ReLU(inplace=True),
    )


class SmallFcos(nn.Module):
    """Takes float32 [batch, 3, height, width]; gives boxes and scores.

    Boxes are float32 [batch, cells, 4]: left, upper, right and lower edge in pixels of the input;
    scores are logits [batch, cells, classes]. A cell has 8 × 8 pixels; those of a row follow
    each other.
    """

    stride = 8

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.stem = _unit(3, 16, 2)
        self.stage1 = nn.Sequential(_unit(16, 32, 2), _unit(32, 32))
        self.stage2 = nn.Sequential(_unit(32, 64, 2), _unit(64, 64))
        self.stage3 = nn.Sequential(_unit(64, 64, 2), _unit(64, 64))
        self.lateral = nn.Conv2d(64, 64, 1)
        self.box_tower = _unit(64, 64)
        self.class_tower = _unit(64, 64)
        self.box_head = nn.Conv2d(64, 4, 3, padding=1)
        self.class_head = nn.Conv2d(64, classes, 3, padding=1)
        nn.init.zeros_(self.box_head.weight)
        nn.init.normal_(self.class_head.weight, std=0.01)
        for head, start in ((self.box_head, _START), (self.class_head, math.log(_PRIOR))):
            assert head.bias is not None  # noqa: S101 - it was asked for
            nn.init.constant_(head.bias, start)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        fine = self.stage2(self.stage1(self.stem(x)))
        coarse = functional.interpolate(self.stage3(fine), scale_factor=2.0, mode="nearest")
        seen = functional.relu(self.lateral(fine) + coarse)
        distances = self.box_head(self.box_tower(seen))
        scores = self.class_head(self.class_tower(seen))
        return self._boxes(distances), scores.flatten(2).transpose(1, 2)

    def _boxes(self, distances: Tensor) -> Tensor:
        height, width = distances.shape[2:]
        # A logarithm is rounded by the same share of a small distance and of a large one.
        away = distances.clamp(max=_REACH).exp() * self.stride
        x = (torch.arange(width, dtype=away.dtype, device=away.device) + 0.5) * self.stride
        y = (torch.arange(height, dtype=away.dtype, device=away.device) + 0.5) * self.stride
        middle_y, middle_x = torch.meshgrid(y, x, indexing="ij")
        middles = torch.stack([middle_x, middle_y])
        boxes = torch.cat([middles - away[:, :2], middles + away[:, 2:]], 1)
        return boxes.flatten(2).transpose(1, 2)
