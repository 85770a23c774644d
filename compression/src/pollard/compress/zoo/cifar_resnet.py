"""The ResNets for CIFAR (He et al., 2016, §4.2) with option-A shortcuts.

The keys of the state dict are those of the well-known PyTorch version: conv1,
bn1, layerN.M.convK, layerN.M.bnK, linear; shortcuts have no parameters.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class OptionAShortcut(nn.Module):
    """Every second pixel, the missing channels filled with zeros on both sides."""

    def __init__(self, planes: int) -> None:
        super().__init__()
        self.border = planes // 4

    def forward(self, x: Tensor) -> Tensor:
        return functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.border, self.border))


class BasicBlock(nn.Module):
    """Two 3×3 convolutions beside a shortcut."""

    def __init__(self, in_planes: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.shortcut: nn.Module = (
            OptionAShortcut(planes) if stride != 1 or in_planes != planes else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        out = functional.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return functional.relu(out + self.shortcut(x))


class CifarResNet(nn.Module):
    """Takes float32 [batch, 3, 32, 32]; gives logits [batch, classes]."""

    def __init__(self, blocks_per_stage: int, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, blocks_per_stage, 1)
        self.layer2 = self._stage(16, 32, blocks_per_stage, 2)
        self.layer3 = self._stage(32, 64, blocks_per_stage, 2)
        self.linear = nn.Linear(64, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    @staticmethod
    def _stage(in_planes: int, planes: int, blocks: int, stride: int) -> nn.Sequential:
        first = BasicBlock(in_planes, planes, stride)
        return nn.Sequential(first, *(BasicBlock(planes, planes, 1) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        out = functional.relu(self.bn1(self.conv1(x)))
        out = self.layer3(self.layer2(self.layer1(out)))
        # Not adaptive pooling: that exports as ReduceMean, which no quantizer fuses.
        out = functional.avg_pool2d(out, out.shape[3])
        logits: Tensor = self.linear(torch.flatten(out, 1))
        return logits


def resnet20(classes: int = 10) -> CifarResNet:
    """Return the ResNet of 20 layers."""
    return CifarResNet(3, classes)


def resnet56(classes: int = 10) -> CifarResNet:
    """Return the ResNet of 56 layers."""
    return CifarResNet(9, classes)
