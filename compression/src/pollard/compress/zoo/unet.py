"""A small U-Net (Ronneberger et al., 2015).

Padded convolutions and batch norms, as is usual since; what goes up is enlarged and then
convolved, because transposed convolutions have no 8-bit kernel on processors.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

_WIDTHS = (16, 32, 64)


def _double(ins: int, outs: int, first_stride: int = 1) -> nn.Sequential:
    layers: list[nn.Module] = []
    for source, stride in ((ins, first_stride), (outs, 1)):
        layers += [
            nn.Conv2d(source, outs, 3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(outs),
            nn.ReLU(inplace=True),
        ]
    return nn.Sequential(*layers)


class SmallUNet(nn.Module):
    """Takes float32 [batch, 3, height, width]; gives logits of half the height and width.

    They are [batch, classes, height / 2, width / 2]; the sides must be multiples of 8. Answers are
    enlarged where they are served, and full resolution would take four times as long.
    """

    def __init__(self, classes: int = 6) -> None:
        super().__init__()
        one, two, three = _WIDTHS
        self.down1 = _double(3, one, 2)
        self.down2 = _double(one, two)
        self.down3 = _double(two, three)
        # As in the paper, what comes up has its channels halved before it meets the others.
        self.narrow2 = nn.Conv2d(three, two, 1)
        self.narrow1 = nn.Conv2d(two, one, 1)
        self.up2 = _double(two + two, two)
        self.up1 = _double(one + one, one)
        self.pool = nn.MaxPool2d(2)
        self.head = nn.Conv2d(one, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        fine = self.down1(x)
        middle = self.down2(self.pool(fine))
        coarse = self.down3(self.pool(middle))
        middle = self.up2(torch.cat([_enlarged(self.narrow2(coarse)), middle], 1))
        fine = self.up1(torch.cat([_enlarged(self.narrow1(middle)), fine], 1))
        scores: Tensor = self.head(fine)
        return scores


def _enlarged(x: Tensor) -> Tensor:
    return functional.interpolate(x, scale_factor=2.0, mode="nearest")
