from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pollard.compress.candidates import build
from pollard.compress.errors import ModelUnknown
from pollard.compress.evaluate import session_predictor
from pollard.compress.export import probe_images
from pollard.compress.macs import count_parameters, example_input, total_macs
from pollard.compress.models import load_model
from pollard.compress.prune import prune
from pollard.compress.tasks import task_of
from pollard.compress.zoo import ENTRIES, find
from pollard.runtime.sessions import open_session

# Names and shapes of the state dicts, parameters and 10^9 MACs as torchvision 0.29 has
# them, and the first five logits that it computes from the numbers below.
TORCHVISION: dict[str, Any] = json.loads(
    Path(__file__).with_name("torchvision.json").read_text(encoding="utf-8")
)
PUBLISHED = {
    "resnet18": (11_689_512, 1.814),
    "resnet34": (21_797_672, 3.664),
    "resnet50": (25_557_032, 4.089),
    "vgg16": (138_357_544, 15.47),
    "vgg16-bn": (138_365_992, 15.47),
    "inception-v3": (27_161_264, 5.713),
    "mobilenet-v2": (3_504_872, 0.301),
}


def _numbers(count: int, seed: int) -> Tensor:
    return ((torch.arange(count) * 7919 + seed * 104729) % 10007).float() / 5003.0 - 1


def _fill(module: nn.Module) -> None:
    """Give a model weights that depend on names and shapes alone."""
    with torch.no_grad():
        for seed, (key, value) in enumerate(sorted(module.state_dict().items())):
            if not value.is_floating_point():
                continue
            noise = _numbers(value.numel(), seed).reshape(value.shape)
            if value.ndim > 1:
                value.copy_(noise * (6 / value[0].numel()) ** 0.5)
            elif key.endswith(("running_var", "weight")):
                value.copy_(1 + 0.3 * noise)
            else:
                value.copy_(0.1 * noise)


@pytest.mark.parametrize("name", sorted(ENTRIES.keys() - PUBLISHED.keys()))
def test_models_take_their_input_and_answer_as_their_task_does(name: str) -> None:
    entry = find(name)
    with torch.no_grad():
        outputs = entry.build(7).eval()(example_input(entry.spec, 2))
    assert task_of(entry.task).check(outputs, 2) == 7


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_imagenet_models_are_those_that_checkpoints_are_published_for(name: str) -> None:
    entry, theirs = find(name), TORCHVISION[name]
    parameters, _ = PUBLISHED[name]
    with torch.device("meta"):
        module = entry.build(entry.classes)
    assert {k: list(v.shape) for k, v in module.state_dict().items()} == theirs["state"]
    assert count_parameters(module) == parameters
    assert entry.classes == 1000


# One of each kind: the others differ in the number of their layers, which the table shows.
@pytest.mark.parametrize(
    ("name", "size"),
    [("resnet18", 96), ("resnet50", 96), ("vgg16-bn", 64), ("inception-v3", 96),
     ("mobilenet-v2", 96)],
)  # fmt: skip
def test_imagenet_models_compute_what_torchvision_computes(name: str, size: int) -> None:
    entry = find(name)
    with torch.device("meta"):
        module = entry.build(1000)
    module.to_empty(device="cpu").eval()
    _fill(module)
    with torch.no_grad():
        logits = module(_numbers(2 * 3 * size * size, 5).reshape(2, 3, size, size))
    torch.testing.assert_close(
        logits[:, :5], torch.tensor(TORCHVISION[name]["logits"]), rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_imagenet_models_take_the_macs_that_are_published(name: str) -> None:
    entry = find(name)
    with torch.device("meta"):
        module = entry.build(1000)
        example = torch.zeros(1, 3, entry.spec.height, entry.spec.width)
        assert total_macs(module, example) / 1e9 == pytest.approx(PUBLISHED[name][1], abs=6e-4)


# The one with the most branches stands for all; `python -m bench.zoo` takes all of them.
@pytest.mark.long
@pytest.mark.parametrize(("name", "size"), [("inception-v3", 75)])
def test_imagenet_models_are_pruned_and_exported(name: str, size: int, tmp_path: Path) -> None:
    spec = replace(find(name).spec, height=size, width=size, short_side=0)
    parent = load_model(name, classes=4, spec=spec).module
    pruned = prune(parent, spec, 0.5)
    assert 0.5 <= pruned.removed <= 0.57
    (file,) = build("pruned", pruned.module, spec, tmp_path)
    assert file.parity is not None
    logits = session_predictor(open_session(file.path))(probe_images(spec, 3, seed=1))
    assert logits.shape == (3, 4)


def test_resnet_keys_are_those_of_published_checkpoints() -> None:
    keys = set(find("resnet20-cifar").build(10).state_dict())
    for key in ("conv1.weight", "bn1.running_mean", "layer2.0.conv1.weight", "layer3.2.bn2.bias"):
        assert key in keys
    assert {"linear.weight", "linear.bias"} <= keys
    assert not [key for key in keys if "shortcut" in key]


@pytest.mark.parametrize(("name", "millions"), [("resnet20-cifar", 0.27), ("resnet56-cifar", 0.85)])
def test_resnets_have_the_size_of_the_paper(name: str, millions: float) -> None:
    assert count_parameters(find(name).build(10)) / 1e6 == pytest.approx(millions, abs=0.005)


def test_the_512_cnn_has_the_size_of_the_book() -> None:
    assert count_parameters(find("small-cnn-512").build(1)) == 3_453_121


def test_an_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(ModelUnknown, match="did you mean 'resnet20-cifar'"):
        find("resnet20-cifr")
