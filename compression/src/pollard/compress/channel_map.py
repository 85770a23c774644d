"""Save a pruned model and load it into a fresh parent, without running any code from files.

A directory holds `model.safetensors` (weights) and `channels.json`: how wide every
layer is, which layers were put in place of others, and which channels were kept.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pollard.compress.dense import FactorizedLinear
from pollard.compress.errors import WeightsInvalid
from pollard.compress.models import load_state, read_state, save_state
from pollard.runtime.bundle import write_durably
from pollard.runtime.digests import sha256_file

# 2: with dense layers that were factorised; maps without are written as 1.
SCHEMA_VERSION = 2
WEIGHTS = "model.safetensors"
CHANNELS = "channels.json"

_CONVOLUTION = (
    "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups",
)  # fmt: skip
# What says how wide a layer is, by its class.
_ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "Conv1d": _CONVOLUTION,
    "Conv2d": _CONVOLUTION,
    "Conv3d": _CONVOLUTION,
    "ConvTranspose1d": _CONVOLUTION,
    "ConvTranspose2d": _CONVOLUTION,
    "ConvTranspose3d": _CONVOLUTION,
    "Linear": ("in_features", "out_features"),
    "BatchNorm1d": ("num_features",),
    "BatchNorm2d": ("num_features",),
    "BatchNorm3d": ("num_features",),
    "InstanceNorm2d": ("num_features",),
    "GroupNorm": ("num_channels", "num_groups"),
    "LayerNorm": ("normalized_shape",),
    "PReLU": ("num_parameters",),
    "Identity": (),
    # The two layers within say how wide it is.
    "FactorizedLinear": (),
}


def save_pruned(
    module: nn.Module, directory: Path | str, channels: Mapping[str, list[int]] | None = None
) -> None:
    """Write a pruned model.

    Args:
        module: From :func:`pollard.compress.prune.prune`, trained further or not.
        directory: Made if it is not there; its two files are replaced.
        channels: `Pruned.channels`, for people and tools; loading does without.

    Raises:
        OSError: it cannot be written.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    layers: dict[str, dict[str, Any]] = {}
    for name, layer in module.named_modules():
        kind = type(layer).__name__
        if name and kind in _ATTRIBUTES:
            layers[name] = {"type": kind, "bias": getattr(layer, "bias", None) is not None}
            layers[name].update({key: getattr(layer, key) for key in _ATTRIBUTES[kind]})
    factorized = any(layer["type"] == FactorizedLinear.__name__ for layer in layers.values())
    save_state(module, directory / WEIGHTS)
    content = {
        "schema_version": 2 if factorized else 1,
        "weights_sha256": sha256_file(directory / WEIGHTS),
        "layers": layers,
        "kept_channels": dict(channels or {}),
    }
    write_durably(directory / CHANNELS, (json.dumps(content, indent=1) + "\n").encode())


def load_pruned(parent: nn.Module, directory: Path | str) -> nn.Module:
    """Narrow a fresh parent to a saved model and load its weights, in place.

    Args:
        parent: Of the architecture that was pruned; its weights do not matter.
        directory: From :func:`save_pruned`.

    Returns:
        ``parent``, in evaluation mode.

    Raises:
        WeightsInvalid: files are absent, damaged, from a newer version, or of
            another architecture; ``parent`` is then of no use any more.
    """
    directory = Path(directory)
    layers = _read_map(directory)
    state = read_state(directory / WEIGHTS)
    for name, wanted in layers.items():
        try:
            layer = parent.get_submodule(name)
        except AttributeError:
            raise WeightsInvalid(f"{directory} has a layer {name}, the model has none") from None
        if type(layer).__name__ != wanted["type"]:
            layer = _replacement(name, type(layer).__name__, wanted)
            owner, _, attribute = name.rpartition(".")
            setattr(parent.get_submodule(owner), attribute, layer)
        for key in _ATTRIBUTES[wanted["type"]]:
            value = wanted[key]
            setattr(layer, key, tuple(value) if isinstance(value, list) else value)
    own = parent.state_dict()
    for key, tensor in state.items():
        if key in own and own[key].shape != tensor.shape:
            _reshape(parent, key, tensor)
    load_state(parent, state, directory / WEIGHTS)
    return parent.eval()


def _read_map(directory: Path) -> dict[str, dict[str, Any]]:
    path = directory / CHANNELS
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsInvalid(f"{path} cannot be read: {error}") from error
    version = content.get("schema_version") if isinstance(content, dict) else None
    if not isinstance(version, int):
        raise WeightsInvalid(f"{path} is not a channel map")
    if version > SCHEMA_VERSION:
        raise WeightsInvalid(
            f"{path} has version {version}, this Pollard reads up to {SCHEMA_VERSION}; "
            "install a newer one"
        )
    layers = content.get("layers")
    if not isinstance(layers, dict) or not all(
        isinstance(layer, dict)
        and layer.get("type") in _ATTRIBUTES
        and set(_ATTRIBUTES[layer["type"]]) <= layer.keys()
        for layer in layers.values()
    ):
        raise WeightsInvalid(f"{path} is damaged: its layers are not complete")
    weights = directory / WEIGHTS
    if not weights.is_file() or sha256_file(weights) != content.get("weights_sha256"):
        raise WeightsInvalid(f"{weights} is absent or not the file that {path} belongs to")
    return layers


def _replacement(name: str, found: str, wanted: Mapping[str, Any]) -> nn.Module:
    if wanted["type"] == "Identity":
        return nn.Identity()
    if wanted["type"] == FactorizedLinear.__name__ and found == "Linear":
        # Its two layers follow in the file and get their widths.
        return FactorizedLinear(1, 1, 1, bias=bool(wanted.get("bias")))
    if wanted["type"] == "Conv2d":
        # A shortcut without parameters that was rewritten.
        return nn.Conv2d(
            wanted["in_channels"],
            wanted["out_channels"],
            tuple(wanted["kernel_size"]),
            tuple(wanted["stride"]),
            bias=bool(wanted.get("bias")),
        )
    raise WeightsInvalid(f"{name} is a {wanted['type']} in the file and a {found} in the model")


def _reshape(module: nn.Module, key: str, tensor: Tensor) -> None:
    owner_name, _, attribute = key.rpartition(".")
    owner = module.get_submodule(owner_name)
    old = getattr(owner, attribute)
    if isinstance(old, nn.Parameter):
        empty = nn.Parameter(torch.empty_like(tensor), requires_grad=old.requires_grad)
        setattr(owner, attribute, empty)
    else:
        owner.register_buffer(attribute, torch.empty_like(tensor))
