from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from pollard.compress.kernels import KINDS
from pollard.compress.macs import layer_costs
from pollard.compress.operations import Operation, list_operations
from pollard.compress.spec import InputSpec
from pollard.compress.zoo import find

SPEC = InputSpec(32, 32, 3, (0.5,) * 3, (0.25,) * 3)


def by_name(module: nn.Module, spec: InputSpec = SPEC) -> dict[str, Operation]:
    return {operation.name: operation for operation in list_operations(module, spec)}


def test_norms_activations_and_additions_belong_to_their_layer() -> None:
    entry = find("resnet20-cifar")
    operations = by_name(entry.build(10), entry.spec)
    assert len(operations) == 19 + 1 + 2 + 1  # convolutions, dense, pads, pooling
    first, second = operations["layer1.0.conv1"], operations["layer1.0.conv2"]
    assert (first.activation, first.adds) == ("Relu", False)
    assert (second.activation, second.adds) == ("Relu", True)
    assert second.inputs == (("layer1.0.conv1", 16),)
    strided = operations["layer2.0.conv1"]
    assert (strided.stride, strided.height, strided.out_height) == ((2, 2), 32, 16)


def test_channels_follow_other_widths_through_concatenation_and_flattening() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 24, 1)
            self.mix, self.head = nn.Conv2d(32, 16, 1), nn.Linear(16 * 4, 5)

        def forward(self, x: Tensor) -> Tensor:
            mixed = self.mix(torch.cat([self.a(x), self.b(x)], 1))
            out: Tensor = self.head(torch.flatten(nn.functional.max_pool2d(mixed, 16), 1))
            return out

    operations = by_name(Net())
    kept = {"b": 0.5, "mix": 0.25}
    assert operations["mix"].channels() == (32, 16)
    assert operations["mix"].channels(kept) == (8 + 12, 4)
    assert operations["head"].channels(kept) == (16, 5)
    assert operations["/maxpool"].channels(kept) == (4, 4)


def test_a_shared_layer_appears_as_often_as_it_runs(
    architectures: dict[str, Callable[[], nn.Module]],
) -> None:
    names = [op.name for op in list_operations(architectures["shared"](), SPEC) if op.is_layer]
    assert len(names) > len(set(names))


@pytest.mark.parametrize("name", ["densenet", "mobilenet-v3", "efficientnet", "unet", "fpn", "vgg"])
def test_layers_are_those_that_are_counted_and_everything_can_be_timed(
    name: str, architectures: dict[str, Callable[[], nn.Module]]
) -> None:
    module = architectures[name]()
    operations = list_operations(module, SPEC)
    counted = {(c.name, c.in_channels, c.out_channels) for c in layer_costs(module, SPEC)}
    assert {(op.name, *op.channels()) for op in operations if op.is_layer} == counted
    assert {op.kind for op in operations} <= KINDS


def test_what_runs_inside_a_block_is_known() -> None:
    operations = by_name(find("resnet20-cifar").build(10), find("resnet20-cifar").spec)
    inside = [name for name, op in operations.items() if op.within("layer2.0")]
    assert inside == ["layer2.0.conv1", "layer2.0.conv2", "layer2.0.shortcut/pad"]
