"""VGG-16 (Simonyan and Zisserman, 2015, column D), plain and with batch norms.

Names and shapes of the state dict are torchvision's: features.N, classifier.0, .3, .6.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

# Widths of the convolutions, stage by stage; a pooling ends each.
_STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))

# Side of the feature map that the dense layers are made for.
_SIDE = 7


def _features(batch_norm: bool) -> nn.Sequential:
    layers: list[nn.Module] = []
    ins = 3
    for widths in _STAGES:
        for outs in widths:
            layers.append(nn.Conv2d(ins, outs, 3, padding=1))
            if batch_norm:
                layers.append(nn.BatchNorm2d(outs))
            layers.append(nn.ReLU(inplace=True))
            ins = outs
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers)


def _initialise(module: nn.Module) -> None:
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, 0, 0.01)
        if isinstance(layer, nn.Conv2d | nn.Linear) and layer.bias is not None:
            nn.init.zeros_(layer.bias)


class Vgg(nn.Module):
    """Takes float32 [batch, 3, 224, 224]; gives logits [batch, classes].

    Other sizes from 32 pixels on are averaged to the 7 × 7 that the dense layers take.
    """

    def __init__(self, classes: int = 1000, *, batch_norm: bool = False) -> None:
        super().__init__()
        self.features = _features(batch_norm)
        self.classifier = nn.Sequential(
            nn.Linear(512 * _SIDE * _SIDE, 4096),
            nn.ReLU(inplace=True),
            nn.Dropout(),
            nn.Linear(4096, 4096),
            nn.ReLU(inplace=True),
            nn.Dropout(),
            nn.Linear(4096, classes),
        )
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        out = self.features(x)
        if tuple(out.shape[2:]) != (_SIDE, _SIDE):
            out = functional.adaptive_avg_pool2d(out, _SIDE)
        logits: Tensor = self.classifier(torch.flatten(out, 1))
        return logits


class CifarVgg(nn.Module):
    """The convolutions of VGG-16 with batch norms, and one dense layer.

    Takes float32 [batch, 3, 32, 32]; gives logits [batch, classes].
    """

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.features = _features(batch_norm=True)
        self.classifier = nn.Linear(512, classes)
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(torch.flatten(self.features(x), 1))
        return logits


def vgg16(classes: int = 1000) -> Vgg:
    """Return VGG-16."""
    return Vgg(classes)


def vgg16_bn(classes: int = 1000) -> Vgg:
    """Return VGG-16 with batch norms."""
    return Vgg(classes, batch_norm=True)
