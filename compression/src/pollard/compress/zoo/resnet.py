"""The ResNets for ImageNet (He et al., 2016), with the strides of PyTorch's version.

Names and shapes of the state dict are torchvision's: conv1, bn1, layerN.M.convK,
layerN.M.bnK, layerN.0.downsample, fc. The stride of a bottleneck lies in its 3×3
convolution, as in every checkpoint that is published for PyTorch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional


def _projection(ins: int, outs: int, stride: int) -> nn.Sequential | None:
    if stride == 1 and ins == outs:
        return None
    return nn.Sequential(nn.Conv2d(ins, outs, 1, stride, bias=False), nn.BatchNorm2d(outs))


class BasicBlock(nn.Module):
    """Two 3×3 convolutions beside a shortcut."""

    expansion = 1

    def __init__(self, ins: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(ins, planes, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = _projection(ins, planes, stride)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        result: Tensor = self.relu(out + shortcut)
        return result


class Bottleneck(nn.Module):
    """1×1, 3×3 and 1×1 convolution beside a shortcut."""

    expansion = 4

    def __init__(self, ins: int, planes: int, stride: int) -> None:
        super().__init__()
        outs = planes * self.expansion
        self.conv1 = nn.Conv2d(ins, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, outs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _projection(ins, outs, stride)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        result: Tensor = self.relu(out + shortcut)
        return result


def _stage(
    block: type[BasicBlock | Bottleneck], ins: int, planes: int, blocks: int, stride: int
) -> nn.Sequential:
    first = block(ins, planes, stride)
    outs = planes * block.expansion
    return nn.Sequential(first, *(block(outs, planes, 1) for _ in range(blocks - 1)))


class ResNet(nn.Module):
    """Takes float32 [batch, 3, 224, 224] (or another multiple of 32); gives [batch, classes]."""

    def __init__(
        self, block: type[BasicBlock | Bottleneck], blocks: Sequence[int], classes: int = 1000
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, padding=1)
        wide = block.expansion
        self.layer1 = _stage(block, 64, 64, blocks[0], 1)
        self.layer2 = _stage(block, 64 * wide, 128, blocks[1], 2)
        self.layer3 = _stage(block, 128 * wide, 256, blocks[2], 2)
        self.layer4 = _stage(block, 256 * wide, 512, blocks[3], 2)
        self.fc = nn.Linear(512 * wide, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        out = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        out = self.layer4(self.layer3(self.layer2(self.layer1(out))))
        # Not adaptive pooling: that exports as ReduceMean, which no quantizer fuses.
        out = functional.avg_pool2d(out, (out.shape[2], out.shape[3]))
        logits: Tensor = self.fc(torch.flatten(out, 1))
        return logits


def resnet18(classes: int = 1000) -> ResNet:
    """Return the ResNet of 18 layers."""
    return ResNet(BasicBlock, (2, 2, 2, 2), classes)


def resnet34(classes: int = 1000) -> ResNet:
    """Return the ResNet of 34 layers."""
    return ResNet(BasicBlock, (3, 4, 6, 3), classes)


def resnet50(classes: int = 1000) -> ResNet:
    """Return the ResNet of 50 layers."""
    return ResNet(Bottleneck, (3, 4, 6, 3), classes)
