"""Models whose channels cannot be followed everywhere are pruned where they can be."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations

from pollard.compress.groups import analyse
from pollard.compress.prune import Pruned, prune
from pollard.compress.spec import InputSpec

SPEC = InputSpec(16, 16, 3, (0.0,) * 3, (1.0,) * 3)
CLASSES = 5

Silenced = Callable[[nn.Module, Pruned], nn.Module]


def unit(ins: int, outs: int, size: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(ins, outs, size, stride, size // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outs),
        nn.ReLU(),
    )


class Model(nn.Module):
    """Maps, a part that cannot be followed, maps that can be narrowed, and a dense layer."""

    def __init__(self, middle: nn.Module, ins: int = 32, outs: int = 32) -> None:
        super().__init__()
        self.stem = unit(3, ins, stride=2)
        self.middle = middle
        self.tail = nn.Sequential(unit(outs, 48), unit(48, 48))
        self.head = nn.Linear(48, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.tail(self.middle(self.stem(x))).mean((2, 3)))
        return logits


class Res2(nn.Module):
    """Parts of a split are added to each other, and joined again (Res2Net)."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(unit(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        first, *rest = torch.split(x, x.shape[1] // 4, 1)
        done = [first]
        for part, each in zip(self.parts, rest, strict=True):
            done.append(part(each if len(done) == 1 else each + done[-1]))
        return torch.cat(done, 1) + x


class Shuffle(nn.Module):
    """Halves that are split, joined and shuffled (ShuffleNet v2)."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(unit(16, 16, 1), unit(16, 16, groups=16), unit(16, 16, 1))

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, 1)
        out = torch.cat([left, self.body(right)], 1)
        batch, channels, height, width = out.shape
        out = out.view(batch, 2, channels // 2, height, width).transpose(1, 2)
        return out.reshape(batch, channels, height, width)


class FixedSplit(nn.Module):
    """Numbers of channels in the code of the model."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = unit(16, 16), unit(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        left, right = torch.split(x, [16, 16], 1)
        return torch.cat([self.left(left), self.right(right)], 1)


class Sliced(nn.Module):
    """As many cheap maps as are needed, and no more (GhostNet)."""

    def __init__(self) -> None:
        super().__init__()
        self.maps, self.cheap, self.next = unit(32, 16, 1), unit(16, 16, groups=16), unit(31, 32)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.maps(x)
        both = torch.cat([maps, self.cheap(maps)], 1)
        narrowed: Tensor = self.next(both[:, :31])
        return narrowed


class Buffered(nn.Module):
    """A constant with a value for each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.maps = unit(32, 32)
        self.register_buffer("scale", torch.linspace(0.8, 1.2, 32).view(1, 32, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        scaled: Tensor = self.maps(x) * self.scale
        return scaled


class Heads(nn.Module):
    """Attention of several heads over the places of the maps."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        tokens = x.flatten(2).transpose(1, 2)
        mixed, _ = self.attention(tokens, tokens, tokens, need_weights=False)
        return (tokens + mixed).transpose(1, 2).reshape(batch, channels, height, width)


class Spatial(nn.Module):
    """A map of one channel that all others are multiplied with (CBAM)."""

    def __init__(self) -> None:
        super().__init__()
        self.maps = unit(32, 32)
        self.attention = nn.Conv2d(2, 1, 7, padding=3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maps(x)
        seen = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
        return x * torch.sigmoid(self.attention(seen))


def with_old_norms() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.Sequential(
            torch.nn.utils.weight_norm(nn.Conv2d(32, 32, 3, padding=1)),
            nn.ReLU(),
            torch.nn.utils.spectral_norm(nn.Conv2d(32, 32, 3, padding=1)),
        )


def with_norms() -> nn.Module:
    return nn.Sequential(
        parametrizations.weight_norm(nn.Conv2d(32, 32, 3, padding=1)),
        nn.ReLU(),
        parametrizations.spectral_norm(nn.Conv2d(32, 32, 3, padding=1)),
    )


def seeded(middle: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(7)
        module = Model(middle())
        with torch.no_grad():
            for layer in module.modules():
                if isinstance(layer, nn.BatchNorm2d):
                    layer.weight.uniform_(0.5, 1.5)
                    layer.bias.uniform_(-0.3, 0.3)
            for _ in range(4):
                module(torch.randn(16, 3, 16, 16))
    return module.eval()


@pytest.mark.parametrize(
    ("middle", "layer", "why"),
    [
        (Res2, "stem.0", "hang together in too many ways"),
        (lambda: nn.Sequential(*(Shuffle() for _ in range(4))), "stem.0", "cannot be followed"),
        (FixedSplit, "stem.0", "the model does not run with fewer of its channels: split"),
        (Sliced, "middle.maps.0", "the model does not run with fewer of its channels"),
        (Buffered, "middle.maps.0", "the model does not run with fewer of its channels"),
        (Heads, "stem.0", "middle.attention is attention of several heads"),
        (Spatial, "middle.maps.0", "cannot be followed to middle.attention"),
        (with_norms, "middle.2", "are computed (weight_norm, spectral_norm, …)"),
        (with_old_norms, "middle.2", "are computed (weight_norm, spectral_norm, …)"),
    ],
    ids=["res2", "shuffles", "split", "slice", "buffer", "heads", "spatial", "norms", "old-norms"],
)
def test_what_cannot_be_narrowed_stays_whole_and_the_rest_is_pruned(
    middle: Callable[[], nn.Module], layer: str, why: str, silenced: Silenced
) -> None:
    parent = seeded(middle)
    pruned = prune(parent, SPEC, 0.2)
    assert pruned.removed >= 0.2
    assert why in pruned.left_whole[layer]
    assert "tail.0.0" in pruned.channels

    # Pruning is right if it does what silencing the same channels does.
    example = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(
            pruned.module(example), silenced(parent, pruned)(example), rtol=1e-4, atol=1e-4
        )


def test_a_refusal_says_what_stays_whole() -> None:
    with pytest.raises(Exception, match=r"Ask for less\. What stays whole: .*stem\.0") as caught:
        prune(seeded(Res2), SPEC, 0.95)
    assert "hang together in too many ways" in str(caught.value)


def test_an_analysis_changes_neither_the_model_nor_the_next_analysis() -> None:
    parent = seeded(FixedSplit)
    before = copy.deepcopy(parent.state_dict())
    example = torch.zeros(1, 3, 16, 16)
    first, second = (analyse(parent, example) for _ in range(2))
    assert [(g.name, g.width, g.layers) for g in first.groups] == [
        (g.name, g.width, g.layers) for g in second.groups
    ]
    assert first.left_whole == second.left_whole
    for name, value in parent.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.long
def test_maps_that_are_multiplied_with_each_other_end_soon() -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.maps = nn.Sequential(unit(3, 16), unit(16, 24, stride=2))
            self.left, self.right = nn.Conv2d(24, 12, 1), nn.Conv2d(24, 12, 1)
            self.head = nn.Linear(144, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            maps = self.maps(x)
            left, right = self.left(maps).flatten(2), self.right(maps).flatten(2)
            pooled = torch.einsum("bcn,bdn->bcd", left, right).flatten(1)
            logits: Tensor = self.head(functional.normalize(pooled, dim=1))
            return logits

    found = analyse(Pooled().eval(), torch.zeros(1, 3, 16, 16))
    assert {"left", "right"} <= found.left_whole.keys()
    assert {"maps.0.0", "maps.1.0"} <= {group.name for group in found.groups}
