"""Inception v3 (Szegedy et al., 2016).

Names and shapes of the state dict are torchvision's, the auxiliary classifier among
them. torchvision's checkpoints were made with pixels from −1 to 1: that is their
normalisation here, and nothing is rescaled inside.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

_ROW3, _COLUMN3, _ROW7, _COLUMN7 = (1, 3), (3, 1), (1, 7), (7, 1)


class Unit(nn.Module):
    """Convolution, batch norm, ReLU."""

    def __init__(
        self,
        ins: int,
        outs: int,
        size: int | tuple[int, int],
        *,
        stride: int = 1,
        padding: int = 0,
    ) -> None:
        """Build it.

        Args:
            ins: Channels that come in.
            outs: Channels that go out.
            size: Of the filter; rows and columns are padded to keep the image's size.
            stride: Of the filter.
            padding: On all sides of a square filter.
        """
        super().__init__()
        if isinstance(size, int):
            size, borders = (size, size), (padding, padding)
        else:
            borders = (size[0] // 2, size[1] // 2)
        self.conv = nn.Conv2d(ins, outs, size, stride, borders, bias=False)
        self.bn = nn.BatchNorm2d(outs, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.bn(self.conv(x)), inplace=True)


def _smoothed(x: Tensor) -> Tensor:
    return functional.avg_pool2d(x, 3, stride=1, padding=1)


def _halved(x: Tensor) -> Tensor:
    return functional.max_pool2d(x, 3, stride=2)


class Mixed5(nn.Module):
    """35 × 35: filters of 1, 5 and twice 3 pixels, and an average."""

    def __init__(self, ins: int, pooled: int) -> None:
        super().__init__()
        self.branch1x1 = Unit(ins, 64, 1)
        self.branch5x5_1 = Unit(ins, 48, 1)
        self.branch5x5_2 = Unit(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = Unit(ins, 64, 1)
        self.branch3x3dbl_2 = Unit(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = Unit(96, 96, 3, padding=1)
        self.branch_pool = Unit(ins, pooled, 1)

    def forward(self, x: Tensor) -> Tensor:
        five = self.branch5x5_2(self.branch5x5_1(x))
        three = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), five, three, self.branch_pool(_smoothed(x))], 1)


class Mixed6a(nn.Module):
    """From 35 × 35 to 17 × 17."""

    def __init__(self, ins: int) -> None:
        super().__init__()
        self.branch3x3 = Unit(ins, 384, 3, stride=2)
        self.branch3x3dbl_1 = Unit(ins, 64, 1)
        self.branch3x3dbl_2 = Unit(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = Unit(96, 96, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, _halved(x)], 1)


class Mixed6(nn.Module):
    """17 × 17: filters of 7 pixels taken apart into rows and columns."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.branch1x1 = Unit(768, 192, 1)
        self.branch7x7_1 = Unit(768, width, 1)
        self.branch7x7_2 = Unit(width, width, _ROW7)
        self.branch7x7_3 = Unit(width, 192, _COLUMN7)
        self.branch7x7dbl_1 = Unit(768, width, 1)
        self.branch7x7dbl_2 = Unit(width, width, _COLUMN7)
        self.branch7x7dbl_3 = Unit(width, width, _ROW7)
        self.branch7x7dbl_4 = Unit(width, width, _COLUMN7)
        self.branch7x7dbl_5 = Unit(width, 192, _ROW7)
        self.branch_pool = Unit(768, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        once = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        twice = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        twice = self.branch7x7dbl_5(self.branch7x7dbl_4(twice))
        return torch.cat([self.branch1x1(x), once, twice, self.branch_pool(_smoothed(x))], 1)


class Mixed7a(nn.Module):
    """From 17 × 17 to 8 × 8."""

    def __init__(self) -> None:
        super().__init__()
        self.branch3x3_1 = Unit(768, 192, 1)
        self.branch3x3_2 = Unit(192, 320, 3, stride=2)
        self.branch7x7x3_1 = Unit(768, 192, 1)
        self.branch7x7x3_2 = Unit(192, 192, _ROW7)
        self.branch7x7x3_3 = Unit(192, 192, _COLUMN7)
        self.branch7x7x3_4 = Unit(192, 192, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        seven = self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x)))
        three = self.branch3x3_2(self.branch3x3_1(x))
        return torch.cat([three, self.branch7x7x3_4(seven), _halved(x)], 1)


class Mixed7(nn.Module):
    """8 × 8: rows and columns side by side."""

    def __init__(self, ins: int) -> None:
        super().__init__()
        self.branch1x1 = Unit(ins, 320, 1)
        self.branch3x3_1 = Unit(ins, 384, 1)
        self.branch3x3_2a = Unit(384, 384, _ROW3)
        self.branch3x3_2b = Unit(384, 384, _COLUMN3)
        self.branch3x3dbl_1 = Unit(ins, 448, 1)
        self.branch3x3dbl_2 = Unit(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = Unit(384, 384, _ROW3)
        self.branch3x3dbl_3b = Unit(384, 384, _COLUMN3)
        self.branch_pool = Unit(ins, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        one, two = self.branch3x3_1(x), self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        branches = [
            self.branch1x1(x),
            *(self.branch3x3_2a(one), self.branch3x3_2b(one)),
            *(self.branch3x3dbl_3a(two), self.branch3x3dbl_3b(two)),
            self.branch_pool(_smoothed(x)),
        ]
        return torch.cat(branches, 1)


class Auxiliary(nn.Module):
    """A second classifier on the 17 × 17 features, which helps training only."""

    SIDE = 17

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.conv0 = Unit(768, 128, 1)
        self.conv1 = Unit(128, 768, 5)
        self.fc = nn.Linear(768, classes)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(self.conv0(functional.avg_pool2d(x, 5, stride=3)))
        logits: Tensor = self.fc(torch.flatten(out, 1))
        return logits


class InceptionV3(nn.Module):
    """Takes float32 [batch, 3, 299, 299] (from 75 pixels on); gives logits [batch, classes]."""

    def __init__(self, classes: int = 1000) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Unit(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = Unit(32, 32, 3)
        self.Conv2d_2b_3x3 = Unit(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = Unit(64, 80, 1)
        self.Conv2d_4a_3x3 = Unit(80, 192, 3)
        self.Mixed_5b = Mixed5(192, 32)
        self.Mixed_5c = Mixed5(256, 64)
        self.Mixed_5d = Mixed5(288, 64)
        self.Mixed_6a = Mixed6a(288)
        self.Mixed_6b = Mixed6(128)
        self.Mixed_6c = Mixed6(160)
        self.Mixed_6d = Mixed6(160)
        self.Mixed_6e = Mixed6(192)
        self.AuxLogits: Auxiliary | None = Auxiliary(classes)
        self.Mixed_7a = Mixed7a()
        self.Mixed_7b = Mixed7(1280)
        self.Mixed_7c = Mixed7(2048)
        self.dropout = nn.Dropout()
        self.fc = nn.Linear(2048, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.1, a=-0.2, b=0.2)

    def forward(self, x: Tensor) -> Tensor:
        return self._classify(self._features(x))

    def forward_with_auxiliary(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the logits, and those of the auxiliary classifier where the size allows it."""
        features = self._features(x)
        auxiliary = None
        if self.AuxLogits is not None and min(features.shape[2:]) >= Auxiliary.SIDE:
            auxiliary = self.AuxLogits(features)
        return self._classify(features), auxiliary

    def drop_auxiliary(self) -> None:
        """Forget the auxiliary classifier: nothing but training needs it."""
        self.AuxLogits = None

    def _features(self, x: Tensor) -> Tensor:
        out = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        out = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(_halved(out)))
        out = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(_halved(out))))
        out = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(out)))
        features: Tensor = self.Mixed_6e(self.Mixed_6d(out))
        return features

    def _classify(self, features: Tensor) -> Tensor:
        out = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(features)))
        # Not adaptive pooling: that exports as ReduceMean, which no quantizer fuses.
        out = functional.avg_pool2d(out, (out.shape[2], out.shape[3]))
        logits: Tensor = self.fc(torch.flatten(self.dropout(out), 1))
        return logits


def inception_v3(classes: int = 1000) -> InceptionV3:
    """Return Inception v3."""
    return InceptionV3(classes)
