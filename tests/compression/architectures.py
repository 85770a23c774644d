"""Small classifiers in the styles that people compress, written for tests and benchmarks.

Each takes float32 [batch, 3, 32, 32] and gives logits float32 [batch, 10].
`ARCHITECTURES` maps names to functions that build them with seeded weights and
batch-norm statistics that are not those of a fresh model.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

CLASSES = 10


def unit(
    ins: int, outs: int, size: int = 3, stride: int = 1, groups: int = 1, act: type | None = nn.ReLU
) -> nn.Sequential:
    """Convolution, batch norm, activation."""
    layers: list[nn.Module] = [
        nn.Conv2d(ins, outs, size, stride, size // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outs),
    ]
    return nn.Sequential(*layers, *([] if act is None else [act()]))


class Head(nn.Module):
    """Global average and a dense layer."""

    def __init__(self, ins: int) -> None:
        super().__init__()
        self.fc = nn.Linear(ins, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(x.mean((2, 3)))
        return out


class Vgg(nn.Sequential):
    """Plain stack that is flattened into two dense layers."""

    def __init__(self) -> None:
        super().__init__(
            unit(3, 32), nn.MaxPool2d(2), unit(32, 64), nn.MaxPool2d(2), unit(64, 64),
            nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64 * 16, 128), nn.ReLU(), nn.Dropout(0.5),
            nn.Linear(128, CLASSES),
        )  # fmt: skip


class _Bottleneck(nn.Module):
    def __init__(self, ins: int, outs: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        inner = outs // 2
        self.body = nn.Sequential(
            unit(ins, inner, 1),
            unit(inner, inner, 3, stride, groups),
            unit(inner, outs, 1, act=None),
        )
        same = stride == 1 and ins == outs
        self.shortcut = nn.Identity() if same else unit(ins, outs, 1, stride, act=None)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


class ResNet(nn.Sequential):
    """Bottlenecks with projections."""

    def __init__(self, groups: int = 1) -> None:
        super().__init__(
            unit(3, 32), _Bottleneck(32, 64, 1, groups), _Bottleneck(64, 64, 1, groups),
            _Bottleneck(64, 128, 2, groups), _Bottleneck(128, 128, 1, groups), Head(128),
        )  # fmt: skip


class _PreActivation(nn.Module):
    def __init__(self, ins: int, outs: int, stride: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(ins), nn.BatchNorm2d(outs)
        self.conv1 = nn.Conv2d(ins, outs, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outs, outs, 3, 1, 1, bias=False)
        same = stride == 1 and ins == outs
        self.shortcut = None if same else nn.Conv2d(ins, outs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        inner = torch.relu(self.norm1(x))
        out = self.conv2(torch.relu(self.norm2(self.conv1(inner))))
        return out + (x if self.shortcut is None else self.shortcut(inner))


class PreActivationResNet(nn.Sequential):
    """Batch norms in front of the convolutions."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 32, 3, padding=1), _PreActivation(32, 32, 1), _PreActivation(32, 64, 2),
            _PreActivation(64, 64, 1), nn.BatchNorm2d(64), nn.ReLU(), Head(64),
        )  # fmt: skip


class _DenseLayer(nn.Module):
    def __init__(self, ins: int, growth: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.BatchNorm2d(ins), nn.ReLU(), nn.Conv2d(ins, 2 * growth, 1, bias=False),
            nn.BatchNorm2d(2 * growth), nn.ReLU(),
            nn.Conv2d(2 * growth, growth, 3, padding=1, bias=False),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.body(x)], 1)


class DenseNet(nn.Sequential):
    """Every layer's channels are appended to its input."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 32, 3, padding=1), _DenseLayer(32, 16), _DenseLayer(48, 16),
            nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 32, 1), nn.AvgPool2d(2),
            _DenseLayer(32, 16), _DenseLayer(48, 16), nn.BatchNorm2d(64), nn.ReLU(), Head(64),
        )  # fmt: skip


class _Inception(nn.Module):
    def __init__(self, ins: int) -> None:
        super().__init__()
        self.one = unit(ins, 16, 1)
        self.three = nn.Sequential(unit(ins, 24, 1), unit(24, 32))
        self.five = nn.Sequential(unit(ins, 16, 1), unit(16, 24, 5))
        self.pooled = nn.Sequential(nn.MaxPool2d(3, 1, 1), unit(ins, 24, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.one(x), self.three(x), self.five(x), self.pooled(x)], 1)


class GoogLeNet(nn.Sequential):
    """Branches of several sizes, concatenated."""

    def __init__(self) -> None:
        super().__init__(
            unit(3, 32, stride=2), _Inception(32), nn.MaxPool2d(2), _Inception(96), Head(96)
        )


class _Fire(nn.Module):
    def __init__(self, ins: int, squeeze: int, expand: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(ins, squeeze, 1)
        self.left = nn.Conv2d(squeeze, expand, 1)
        self.right = nn.Conv2d(squeeze, expand, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.squeeze(x))
        return functional.relu(torch.cat((self.left(x), self.right(x)), dim=1))


class SqueezeNet(nn.Module):
    """Fire modules; the classifier is a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 32, 3, 2, 1), nn.ReLU(), _Fire(32, 16, 32), nn.MaxPool2d(2),
            _Fire(64, 16, 48),
        )  # fmt: skip
        self.classifier = nn.Conv2d(96, CLASSES, 1)
        self.pool = nn.AdaptiveAvgPool2d(1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.flatten(self.pool(self.classifier(self.features(x))), 1)


class _Shuffle(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        half = width // 2
        self.body = nn.Sequential(
            unit(half, half, 1), unit(half, half, 3, 1, half, None), unit(half, half, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, 1)
        out = torch.cat([left, self.body(right)], 1)
        batch, channels, height, width = out.shape
        out = out.view(batch, 2, channels // 2, height, width).transpose(1, 2)
        return out.reshape(batch, channels, height, width)


class ShuffleNet(nn.Sequential):
    """Halves that are split, concatenated and shuffled."""

    def __init__(self) -> None:
        super().__init__(
            unit(3, 32, stride=2), _Shuffle(32), _Shuffle(32), unit(32, 64, stride=2),
            _Shuffle(64), unit(64, 128, 1), Head(128),
        )  # fmt: skip


class _Squeeze(nn.Module):
    def __init__(self, width: int, gate: type[nn.Module]) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(width, 16, 1), nn.Conv2d(16, width, 1)
        self.gate = gate()

    def forward(self, x: Tensor) -> Tensor:
        scale = functional.adaptive_avg_pool2d(x, 1)
        gated: Tensor = self.gate(self.up(functional.relu(self.down(scale))))
        return x * gated


class _Inverted(nn.Module):
    def __init__(
        self, ins: int, outs: int, stride: int, act: type[nn.Module], gate: type[nn.Module] | None
    ) -> None:
        super().__init__()
        inner = 3 * ins
        self.body = nn.Sequential(
            unit(ins, inner, 1, act=act),
            unit(inner, inner, 3, stride, inner, act),
            nn.Identity() if gate is None else _Squeeze(inner, gate),
            unit(inner, outs, 1, act=None),
        )
        self.adds = stride == 1 and ins == outs

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(x)
        return x + out if self.adds else out


class MobileNet(nn.Sequential):
    """Inverted residuals around depthwise convolutions."""

    def __init__(
        self, act: type[nn.Module] = nn.ReLU6, gate: type[nn.Module] | None = None
    ) -> None:
        super().__init__(
            unit(3, 32, stride=2, act=act), _Inverted(32, 32, 1, act, gate),
            _Inverted(32, 48, 2, act, gate), _Inverted(48, 48, 1, act, gate),
            unit(48, 96, 1, act=act), Head(96),
        )  # fmt: skip


class UNet(nn.Module):
    """Encoder, transposed convolutions back up, skips that are concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = unit(3, 32), unit(32, 48), unit(48, 64)
        self.pool = nn.MaxPool2d(2)
        self.up2, self.up1 = nn.ConvTranspose2d(64, 48, 2, 2), nn.ConvTranspose2d(48, 32, 2, 2)
        self.join2, self.join1 = unit(96, 48), unit(64, 32)
        self.head = Head(32)

    def forward(self, x: Tensor) -> Tensor:
        one = self.one(x)
        two = self.two(self.pool(one))
        three = self.three(self.pool(two))
        two = self.join2(torch.cat([self.up2(three), two], 1))
        one = self.join1(torch.cat([self.up1(two), one], 1))
        out: Tensor = self.head(one)
        return out


class Fpn(nn.Module):
    """A pyramid: laterals are added to what is upsampled; one head is shared by all levels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = unit(3, 32)
        self.levels = nn.ModuleList([unit(32, 48, stride=2), unit(48, 64, stride=2)])
        self.laterals = nn.ModuleList([nn.Conv2d(48, 32, 1), nn.Conv2d(64, 32, 1)])
        self.smooth = nn.Conv2d(32, 32, 3, padding=1)
        self.head = Head(32)

    def forward(self, x: Tensor) -> Tensor:
        fine = self.levels[0](self.stem(x))
        coarse = self.levels[1](fine)
        top = self.laterals[1](coarse)
        merged = self.laterals[0](fine) + functional.interpolate(top, scale_factor=2.0)
        return self.head(torch.relu(self.smooth(merged))) + self.head(torch.relu(self.smooth(top)))


class Atrous(nn.Module):
    """Dilated branches of one width."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = unit(3, 32, stride=2)
        self.branches = nn.ModuleList(
            nn.Conv2d(32, 32, 3, padding=rate, dilation=rate) for rate in (1, 2, 4)
        )
        self.join = unit(96, 64, 1)
        self.head = Head(64)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        joined = torch.cat([torch.relu(branch(x)) for branch in self.branches], 1)
        out: Tensor = self.head(self.join(joined))
        return out


class Shared(nn.Module):
    """One block is run three times."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.out = unit(3, 48, stride=2), unit(48, 64)
        self.block = unit(48, 48)
        self.head = Head(64)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for _ in range(3):
            x = self.block(x)
        out: Tensor = self.head(self.out(x))
        return out


class Functional(nn.Module):
    """Bare parameters, functional calls and arithmetic instead of modules."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 32, 3, padding=1)
        self.weight = nn.Parameter(torch.randn(48, 32, 3, 3) * 0.08)
        self.scale = nn.Parameter(torch.ones(1, 48, 1, 1))
        self.inner, self.last = nn.Conv2d(48, 64, 3, padding=1), nn.Conv2d(64, 64, 3, padding=1)
        self.fc = nn.Linear(64 * 16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.leaky_relu(self.first(x), 0.1)
        x = functional.max_pool2d(functional.conv2d(x, self.weight, padding=1), 2) * self.scale
        x = functional.avg_pool2d(functional.elu(self.inner(x)), 2)
        x = functional.max_pool2d(torch.relu(self.last(x)), 2)
        return functional.linear(torch.flatten(x, 1), self.fc.weight, self.fc.bias)


class _Gated(nn.Module):
    def __init__(self, ins: int, outs: int) -> None:
        super().__init__()
        self.both = nn.Conv2d(ins, 2 * outs, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = torch.split(self.both(x), self.both.out_channels // 2, dim=1)
        return value * torch.sigmoid(gate)


class Gated(nn.Sequential):
    """One half of the channels gates the other."""

    def __init__(self) -> None:
        super().__init__(
            unit(3, 32, stride=2), _Gated(32, 32), nn.MaxPool2d(2), _Gated(32, 48), Head(48)
        )


class _ConvNextBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 3 * width), nn.Linear(3 * width, width)
        self.scale = nn.Parameter(torch.full((width,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.scale * self.down(functional.gelu(self.up(y)))
        return x + y.permute(0, 3, 1, 2)


class ConvNext(nn.Sequential):
    """Depthwise 7x7, layer norm, dense layers over the channels, a learned scale."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 32, 4, 4), _ConvNextBlock(32), nn.Conv2d(32, 64, 2, 2),
            _ConvNextBlock(64), Head(64),
        )  # fmt: skip


class TwoHeads(nn.Module):
    """An early and a late head, averaged."""

    def __init__(self) -> None:
        super().__init__()
        self.early, self.late = unit(3, 32, stride=2), unit(32, 64, stride=2)
        self.heads = nn.ModuleList([Head(32), Head(64)])

    def forward(self, x: Tensor) -> Tensor:
        early = self.early(x)
        return (self.heads[0](early) + self.heads[1](self.late(early))) / 2


class GroupedTransposed(nn.Module):
    """Grouped and depthwise transposed convolutions behind each other."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(unit(3, 32, stride=2), unit(32, 64, stride=2))
        self.grouped = nn.ConvTranspose2d(64, 64, 2, 2, groups=4)
        self.between = unit(64, 48)
        self.depthwise = nn.ConvTranspose2d(48, 48, 2, 2, groups=48)
        self.last = unit(48, 48)
        self.head = Head(48)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.grouped(self.down(x)))
        x = self.depthwise(self.between(x))
        out: Tensor = self.head(self.last(x))
        return out


class Ssd(nn.Module):
    """Heads of their own on three scales, whose answers for all places are joined."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = unit(3, 32, stride=2)
        self.scales = nn.ModuleList([unit(32, 48, stride=2), unit(48, 64, stride=2)])
        self.heads = nn.ModuleList(nn.Conv2d(w, 2 * CLASSES, 3, padding=1) for w in (32, 48, 64))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        levels = [x]
        for scale in self.scales:
            levels.append(scale(levels[-1]))
        answers = [
            head(level).flatten(2).unflatten(1, (2, CLASSES))
            for head, level in zip(self.heads, levels, strict=True)
        ]
        return torch.cat(answers, 3).mean(3).sum(1)


class Hourglass(nn.Module):
    """Down and up twice; what comes up is added to a residual branch of each size."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = unit(3, 48, stride=2)
        self.sides = nn.ModuleList([_Bottleneck(48, 48), _Bottleneck(48, 48)])
        self.downs = nn.ModuleList([_Bottleneck(48, 48), _Bottleneck(48, 48)])
        self.bottom, self.up = _Bottleneck(48, 48), nn.Upsample(scale_factor=2.0)
        self.head = Head(48)

    def forward(self, x: Tensor) -> Tensor:
        large = self.stem(x)
        small = self.downs[0](functional.max_pool2d(large, 2))
        least = self.bottom(self.downs[1](functional.max_pool2d(small, 2)))
        small = self.sides[1](small) + self.up(least)
        out: Tensor = self.head(self.sides[0](large) + self.up(small))
        return out


class CrossStage(nn.Module):
    """Half of the channels goes past a dense stage and is joined behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = unit(3, 64, stride=2)
        self.inner = nn.Sequential(unit(32, 32), unit(32, 32))
        self.join, self.last = unit(96, 64, 1), unit(64, 96, stride=2)
        self.head = Head(96)

    def forward(self, x: Tensor) -> Tensor:
        past, through = self.stem(x).chunk(2, 1)
        first = self.inner[0](through)
        joined = torch.cat([past, first, self.inner[1](first)], 1)
        out: Tensor = self.head(self.last(self.join(joined)))
        return out


class _Ghost(nn.Module):
    def __init__(self, ins: int, outs: int) -> None:
        super().__init__()
        self.primary = unit(ins, outs // 2, 1)
        self.cheap = unit(outs // 2, outs // 2, groups=outs // 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.primary(x)
        return torch.cat([x, self.cheap(x)], 1)


class GhostNet(nn.Sequential):
    """Half of the channels is made from the other half by cheap depthwise convolutions."""

    def __init__(self) -> None:
        super().__init__(
            unit(3, 32, stride=2), _Ghost(32, 64), nn.MaxPool2d(2), _Ghost(64, 96), Head(96)
        )


class SelectiveKernel(nn.Module):
    """Two branches of different reach, weighed against each other channel by channel."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = unit(3, 48, stride=2)
        self.near, self.far = unit(48, 48), nn.Conv2d(48, 48, 3, padding=2, dilation=2)
        self.squeeze, self.excite = nn.Conv2d(48, 16, 1), nn.Conv2d(16, 48, 1)
        self.last, self.head = unit(48, 64, stride=2), Head(64)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        near, far = self.near(x), torch.relu(self.far(x))
        mean = functional.adaptive_avg_pool2d(near + far, 1)
        share = torch.sigmoid(self.excite(torch.relu(self.squeeze(mean))))
        out: Tensor = self.head(self.last(near * share + far * (1 - share)))
        return out


class _InceptionResidual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            [unit(width, 16, 1), nn.Sequential(unit(width, 16, 1), unit(16, 24))]
        )
        self.up = nn.Conv2d(40, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + 0.3 * self.up(torch.cat([b(x) for b in self.branches], 1)))


class InceptionResNet(nn.Sequential):
    """Joined branches, scaled and added to what goes past them."""

    def __init__(self) -> None:
        super().__init__(
            unit(3, 48, stride=2), _InceptionResidual(48), _InceptionResidual(48),
            unit(48, 64, stride=2), Head(64),
        )  # fmt: skip


_MAKERS: dict[str, Callable[[], nn.Module]] = {
    "vgg": Vgg,
    "resnet": ResNet,
    "preactivation-resnet": PreActivationResNet,
    "resnext": lambda: ResNet(groups=4),
    "densenet": DenseNet,
    "googlenet": GoogLeNet,
    "squeezenet": SqueezeNet,
    "shufflenet": ShuffleNet,
    "mobilenet-v2": MobileNet,
    "mobilenet-v3": lambda: MobileNet(nn.Hardswish, nn.Hardsigmoid),
    "efficientnet": lambda: MobileNet(nn.SiLU, nn.Sigmoid),
    "unet": UNet,
    "fpn": Fpn,
    "atrous": Atrous,
    "shared": Shared,
    "functional": Functional,
    "gated": Gated,
    "convnext": ConvNext,
    "two-heads": TwoHeads,
    "grouped-transposed": GroupedTransposed,
    "ssd": Ssd,
    "hourglass": Hourglass,
    "cross-stage": CrossStage,
    "ghostnet": GhostNet,
    "selective-kernel": SelectiveKernel,
    "inception-resnet": InceptionResNet,
}


def _seeded(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(7)
        module = make()
        module.train()
        with torch.no_grad():
            # Batch norms that differ from channel to channel, as trained ones do.
            for layer in module.modules():
                if isinstance(layer, nn.BatchNorm2d):
                    layer.weight.uniform_(0.5, 1.5)
                    layer.bias.uniform_(-0.3, 0.3)
            for _ in range(8):
                module(torch.randn(32, 3, 32, 32))
    return module.eval()


ARCHITECTURES: dict[str, Callable[[], nn.Module]] = {
    name: (lambda make=make: _seeded(make))  # type: ignore[misc]
    for name, make in _MAKERS.items()
}
