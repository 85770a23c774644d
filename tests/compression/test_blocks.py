from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from pollard.compress.blocks import find_blocks, remove_blocks, without
from pollard.compress.channel_map import load_pruned, save_pruned
from pollard.compress.errors import PruneFailed
from pollard.compress.macs import total_macs
from pollard.compress.spec import InputSpec
from pollard.compress.zoo import find

SPEC = InputSpec(32, 32, 3, (0.5,) * 3, (0.25,) * 3)


def no_norms(module: nn.Module) -> None:
    """Leave the statistics as they are."""
    del module


def test_only_blocks_that_add_and_keep_the_shape_can_go(
    architectures: dict[str, Callable[[], nn.Module]],
) -> None:
    resnet = find("resnet20-cifar")
    assert find_blocks(resnet.build(10), resnet.spec) == [
        "layer1.0", "layer1.1", "layer1.2", "layer2.1", "layer2.2", "layer3.1", "layer3.2",
    ]  # fmt: skip
    assert find_blocks(architectures["resnet"](), SPEC) == ["2", "4"]
    assert find_blocks(architectures["preactivation-resnet"](), SPEC) == ["1", "3"]
    for name in ("vgg", "densenet", "googlenet", "shufflenet", "shared", "unet"):
        assert find_blocks(architectures[name](), SPEC) == []


@pytest.mark.long
def test_the_blocks_that_cost_least_accuracy_go_first(tmp_path: Path) -> None:
    entry = find("resnet20-cifar")
    parent = entry.build(10).eval()
    # Among blocks of one kind the latency saved is one figure: accuracy decides.
    cost = {"layer1.0": 0.3, "layer1.1": 0.02, "layer1.2": 0.2}
    names = find_blocks(parent, entry.spec)

    def accuracy(module: nn.Module) -> float:
        gone = [name for name in names if isinstance(module.get_submodule(name), nn.Identity)]
        return 0.9 - sum(cost.get(name, 0.5) for name in gone)

    automatic = remove_blocks(parent, entry.spec, None, no_norms, accuracy)
    order = [score.name for score in automatic.scores if score.name.startswith("layer1")]
    assert order == ["layer1.1", "layer1.2", "layer1.0"]
    assert all(score.saved_us > 0 for score in automatic.scores)
    assert automatic.removed == ["layer1.1"]
    assert total_macs(automatic.module, entry.spec) < total_macs(parent, entry.spec)
    assert isinstance(parent.get_submodule("layer1.1").conv1, nn.Conv2d)

    save_pruned(automatic.module, tmp_path)
    inputs = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        again = load_pruned(entry.build(10), tmp_path)(inputs)
        assert torch.equal(again, automatic.module.eval()(inputs))
        assert torch.equal(again, without(parent, ["layer1.1"])(inputs))


def test_more_blocks_than_there_are_cannot_go() -> None:
    entry = find("small-cnn-28")
    with pytest.raises(PruneFailed, match="0 residual blocks"):
        remove_blocks(entry.build(10), entry.spec, 2, no_norms, lambda _: 1.0)
