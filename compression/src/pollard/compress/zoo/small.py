"""The small CNNs of classic tutorials."""

from __future__ import annotations

from torch import Tensor, nn


class SmallCnn28(nn.Module):
    """28×28 grey images: conv32, pool, conv64, pool, dense64, dense.

    Takes float32 [batch, 1, 28, 28]; gives logits [batch, classes].
    """

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3, padding=1)
        self.conv2 = nn.Conv2d(32, 64, 3, padding=1)
        self.pool = nn.MaxPool2d(2)
        self.relu = nn.ReLU()
        self.flatten = nn.Flatten()
        self.fc1 = nn.Linear(64 * 7 * 7, 64)
        self.fc2 = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.relu(self.conv1(x)))
        x = self.pool(self.relu(self.conv2(x)))
        x = self.relu(self.fc1(self.flatten(x)))
        out: Tensor = self.fc2(x)
        return out


class SmallCnn224(nn.Module):
    """224×224 colour images: three convolutions with pooling, one dense layer.

    Takes float32 [batch, 3, 224, 224]; gives logits [batch, classes].
    """

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 32, 3, padding=1)
        self.conv2 = nn.Conv2d(32, 64, 3, padding=1)
        self.conv3 = nn.Conv2d(64, 128, 3, padding=1)
        self.pool = nn.MaxPool2d(2)
        self.relu = nn.ReLU()
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(128 * 28 * 28, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.relu(self.conv1(x)))
        x = self.pool(self.relu(self.conv2(x)))
        x = self.pool(self.relu(self.conv3(x)))
        out: Tensor = self.fc(self.flatten(x))
        return out


class SmallCnn512(nn.Module):
    """150×150 colour images: four convolutions with pooling, dense512, dense.

    The network of the tutorials on cats and dogs (Chollet, 2017, §5.2); convolutions have
    no padding, as there.

    Takes float32 [batch, 3, 150, 150]; gives logits [batch, classes].
    """

    def __init__(self, classes: int = 2) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 32, 3)
        self.conv2 = nn.Conv2d(32, 64, 3)
        self.conv3 = nn.Conv2d(64, 128, 3)
        self.conv4 = nn.Conv2d(128, 128, 3)
        self.pool = nn.MaxPool2d(2)
        self.relu = nn.ReLU()
        self.flatten = nn.Flatten()
        self.fc1 = nn.Linear(128 * 7 * 7, 512)
        self.fc2 = nn.Linear(512, classes)

    def forward(self, x: Tensor) -> Tensor:
        for conv in (self.conv1, self.conv2, self.conv3, self.conv4):
            x = self.pool(self.relu(conv(x)))
        x = self.relu(self.fc1(self.flatten(x)))
        out: Tensor = self.fc2(x)
        return out
