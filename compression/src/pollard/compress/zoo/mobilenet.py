"""MobileNetV2 (Sandler et al., 2018).

Names and shapes of the state dict are torchvision's: features.N.conv.M, classifier.1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

# Expansion, width and blocks, stage by stage (table 2).
_STAGES = (
    (1, 16, 1),
    (6, 24, 2),
    (6, 32, 3),
    (6, 64, 4),
    (6, 96, 3),
    (6, 160, 3),
    (6, 320, 1),
)


def _unit(ins: int, outs: int, size: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(ins, outs, size, stride, size // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outs),
        nn.ReLU6(inplace=True),
    )


class InvertedResidual(nn.Module):
    """Widen, filter each channel by itself, narrow; beside a shortcut where shapes allow."""

    def __init__(self, ins: int, outs: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = ins * expansion
        widen = [] if expansion == 1 else [_unit(ins, wide, 1)]
        self.conv = nn.Sequential(
            *widen,
            _unit(wide, wide, 3, stride, wide),
            nn.Conv2d(wide, outs, 1, bias=False),
            nn.BatchNorm2d(outs),
        )
        self.adds = stride == 1 and ins == outs

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.conv(x)
        return x + made if self.adds else made


class MobileNetV2(nn.Module):
    """Takes float32 [batch, 3, 224, 224] (or another multiple of 32); gives [batch, classes]."""

    def __init__(
        self, classes: int = 1000, strides: Sequence[int] = (2, 1, 2, 2, 2, 1, 2, 1)
    ) -> None:
        """Build it.

        Args:
            classes: Number of logits.
            strides: Of the first convolution and of each stage.
        """
        super().__init__()
        layers: list[nn.Module] = [_unit(3, 32, 3, strides[0])]
        ins = 32
        for (expansion, outs, blocks), stride in zip(_STAGES, strides[1:], strict=True):
            for index in range(blocks):
                layers.append(InvertedResidual(ins, outs, 1 if index else stride, expansion))
                ins = outs
        layers.append(_unit(ins, 1280, 1))
        self.features = nn.Sequential(*layers)
        dense = nn.Linear(1280, classes)
        self.classifier = nn.Sequential(nn.Dropout(0.2), dense)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
        nn.init.normal_(dense.weight, 0, 0.01)
        nn.init.zeros_(dense.bias)

    def forward(self, x: Tensor) -> Tensor:
        out = self.features(x)
        # Not adaptive pooling: that exports as ReduceMean, which no quantizer fuses.
        out = functional.avg_pool2d(out, (out.shape[2], out.shape[3]))
        logits: Tensor = self.classifier(torch.flatten(out, 1))
        return logits


def mobilenet_v2(classes: int = 1000) -> MobileNetV2:
    """Return MobileNetV2 for images of 224 pixels."""
    return MobileNetV2(classes)


def mobilenet_v2_cifar(classes: int = 10) -> MobileNetV2:
    """Return MobileNetV2 for images of 32 pixels: the same layers, two strides of 1 for 2."""
    return MobileNetV2(classes, (1, 1, 1, 2, 2, 1, 2, 1))
