from __future__ import annotations

import pytest
import torch

from pollard.compress.errors import ModelUnknown
from pollard.compress.macs import count_parameters, example_input
from pollard.compress.zoo import ENTRIES, find


@pytest.mark.parametrize("name", sorted(ENTRIES))
def test_models_take_their_input_and_give_one_logit_per_class(name: str) -> None:
    entry = find(name)
    with torch.no_grad():
        logits = entry.build(7).eval()(example_input(entry.spec, 2))
    assert logits.shape == (2, 7)


def test_resnet_keys_are_those_of_published_checkpoints() -> None:
    keys = set(find("resnet20-cifar").build(10).state_dict())
    for key in ("conv1.weight", "bn1.running_mean", "layer2.0.conv1.weight", "layer3.2.bn2.bias"):
        assert key in keys
    assert {"linear.weight", "linear.bias"} <= keys
    assert not [key for key in keys if "shortcut" in key]


@pytest.mark.parametrize(("name", "millions"), [("resnet20-cifar", 0.27), ("resnet56-cifar", 0.85)])
def test_resnets_have_the_size_of_the_paper(name: str, millions: float) -> None:
    assert count_parameters(find(name).build(10)) / 1e6 == pytest.approx(millions, abs=0.005)


def test_an_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(ModelUnknown, match="did you mean 'resnet20-cifar'"):
        find("resnet20-cifr")
