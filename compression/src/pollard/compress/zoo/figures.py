"""What a zoo model costs, without making its weights."""

from __future__ import annotations

from typing import Any

import torch

from pollard.compress.macs import count_parameters, total_macs
from pollard.compress.zoo.registry import Entry


def describe(entry: Entry) -> dict[str, Any]:
    """Return name, parameters, MACs of one image, classes and input of a zoo model."""
    spec = entry.spec
    with torch.device("meta"):
        module = entry.build(entry.classes)
        example = torch.zeros(1, spec.channels, spec.height, spec.width)
        macs = total_macs(module, example)
    return {
        "name": entry.name,
        "summary": entry.summary,
        "parameters": count_parameters(module),
        "macs": macs,
        "classes": entry.classes,
        "input": {
            "height": spec.height,
            "width": spec.width,
            "channels": spec.channels,
            "mean": list(spec.mean),
            "std": list(spec.std),
            "short_side": spec.short_side,
        },
    }
