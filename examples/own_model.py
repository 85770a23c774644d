"""A model of your own, as `pollard train` and `pollard compress` take it.

From this directory:

    pollard train own_model:make --input-size 32x32x3 --mean 0.5 --std 0.25 \\
        --data images.zip --out own.safetensors
    pollard compress own_model:make --input-size 32x32x3 --mean 0.5 --std 0.25 \\
        --data images.zip --weights own.safetensors --out own-bundle
"""

from __future__ import annotations

from torch import Tensor, nn


class OwnModel(nn.Module):
    """Two blocks with a shortcut around the second, and a linear head."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 32, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU()
        )
        self.block = nn.Sequential(
            nn.Conv2d(32, 64, 3, padding=1, bias=False),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.Conv2d(64, 32, 3, padding=1, bias=False),
            nn.BatchNorm2d(32),
        )
        self.head = nn.Linear(32, classes)

    def forward(self, image: Tensor) -> Tensor:
        """Return the scores, [batch, classes], of normalised images [batch, 3, height, width]."""
        features = self.stem(image)
        features = nn.functional.relu(features + self.block(features))
        return self.head(features.mean((2, 3)))


def make() -> nn.Module:
    """The factory that commands name as `own_model:make`."""
    return OwnModel()
