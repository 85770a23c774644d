"""Rewrite shortcuts without parameters as convolutions that compute the same.

Option-A shortcuts (He et al., 2016) take every second pixel and fill up with
zero channels. Torch-Pruning cannot follow the channels through that, and
onnxruntime runs it as float slices and pads; a 1×1 convolution with stride 2 and
weights 0 and 1 is exactly equal, prunable, and quantizes with everything else.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def rewrite_shortcuts(module: nn.Module, example: Tensor) -> list[str]:
    """Replace option-A shortcuts in place.

    They are recognised by what they do, not by their class: every parameter-free
    leaf that widens its input and halves its size is compared with the
    convolution on random values.

    Args:
        module: The model.
        example: An input, float32 [batch, channels, height, width].

    Returns:
        Names of the modules that were replaced.
    """
    shapes: dict[str, tuple[torch.Size, torch.Size]] = {}
    hooks = []

    def record(name: str) -> object:
        def hook(_: nn.Module, inputs: tuple[object, ...], output: object) -> None:
            if len(inputs) == 1 and isinstance(inputs[0], Tensor) and isinstance(output, Tensor):
                shapes[name] = (inputs[0].shape, output.shape)

        return hook

    leaves = {
        name: leaf
        for name, leaf in module.named_modules()
        if name and not list(leaf.children()) and not list(leaf.parameters())
    }
    for name, leaf in leaves.items():
        hooks.append(leaf.register_forward_hook(record(name)))
    was_training = module.training
    module.eval()
    with torch.no_grad():
        module(example)
    module.train(was_training)
    for hook in hooks:
        hook.remove()

    replaced: list[str] = []
    for name, (before, after) in shapes.items():
        if len(before) != 4 or len(after) != 4 or after[1] <= before[1]:
            continue
        convolution = _equal_convolution(leaves[name], before, after)
        if convolution is not None:
            parent_name, _, attribute = name.rpartition(".")
            setattr(module.get_submodule(parent_name), attribute, convolution)
            replaced.append(name)
    return replaced


def _equal_convolution(leaf: nn.Module, before: torch.Size, after: torch.Size) -> nn.Conv2d | None:
    channels, planes = before[1], after[1]
    stride = round(before[2] / after[2])
    convolution = nn.Conv2d(channels, planes, 1, stride=stride, bias=False)
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(before, generator=generator)
    with torch.no_grad():
        wanted = leaf(probe)
        # Padding on both sides, in front only, behind only.
        for offset in ((planes - channels) // 2, planes - channels, 0):
            weight = torch.zeros_like(convolution.weight)
            weight[torch.arange(channels) + offset, torch.arange(channels), 0, 0] = 1.0
            convolution.weight.copy_(weight)
            got = convolution(probe)
            if got.shape == wanted.shape and torch.equal(got, wanted):
                return convolution
    return None
