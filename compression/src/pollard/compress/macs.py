"""Count multiply-accumulate operations and parameters."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pollard.compress.spec import InputSpec

COUNTED = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.Linear)


@dataclass(frozen=True)
class LayerCost:
    """Cost of one convolution or dense layer for one image."""

    name: str
    kind: str
    in_channels: int
    out_channels: int
    output: str
    """Size of its output, such as "14×14"."""
    macs: int
    parameters: int


def example_input(spec: InputSpec | Tensor, batch: int = 1) -> Tensor:
    """Return a seeded example, float32 [batch, channels, height, width].

    A tensor is an example itself; its first element is repeated.
    """
    if isinstance(spec, Tensor):
        return spec[:1].repeat(batch, *[1] * (spec.ndim - 1))
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, spec.channels, spec.height, spec.width, generator=generator)


def layer_costs(module: nn.Module, spec: InputSpec | Tensor) -> list[LayerCost]:
    """Return the cost of every convolution and dense layer, in the order they run.

    A layer that runs twice counts twice in its `macs`.
    """
    if (known := getattr(module, "costs_of_layers", None)) is not None:
        return list(known())  # it has no layers to watch, as a network from an ONNX file
    found: dict[str, LayerCost] = {}
    hooks = []

    def watch(name: str, layer: nn.Module) -> None:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            weight = layer.weight
            assert isinstance(weight, Tensor)  # noqa: S101 - narrows the type
            if isinstance(layer, nn.ConvTranspose2d):
                each = inputs[0][0, 0].numel() * weight.numel()
            else:
                each = output.numel() // (output.shape[0] * weight.shape[0]) * weight.numel()
            if isinstance(layer, nn.Linear):
                channels = (layer.in_features, layer.out_features)
            else:
                channels = (int(layer.in_channels), int(layer.out_channels))  # type: ignore[arg-type]
            before = found[name].macs if name in found else 0
            found[name] = LayerCost(
                name,
                type(layer).__name__,
                *channels,
                "×".join(str(size) for size in output.shape[2:]) or "1",
                before + each,
                sum(p.numel() for p in layer.parameters()),
            )

        hooks.append(layer.register_forward_hook(hook))

    for name, layer in module.named_modules():
        if isinstance(layer, COUNTED):
            watch(name, layer)
    was_training = module.training
    module.eval()
    with torch.no_grad():
        module(example_input(spec))
    module.train(was_training)
    for hook in hooks:
        hook.remove()
    return list(found.values())


def total_macs(module: nn.Module, spec: InputSpec | Tensor) -> int:
    """Return the multiply-accumulate operations for one image."""
    return sum(cost.macs for cost in layer_costs(module, spec))


def count_parameters(module: nn.Module) -> int:
    """Return the number of parameters."""
    if (known := getattr(module, "count_of_parameters", None)) is not None:
        return int(known())
    return sum(parameter.numel() for parameter in module.parameters())
