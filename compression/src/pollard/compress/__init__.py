"""Compression: from a trained PyTorch CNN to the fastest bundle that keeps its accuracy.

What is exported here is imported when it is first used: the commands register
themselves from this package whenever `pollard` starts, and PyTorch takes seconds.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import pollard.runtime  # noqa: F401  # switches telemetry off, before anything imports onnxruntime

if TYPE_CHECKING:
    from pollard.compress.anydata import CompressedModel, ModelRecipe, compress_model
    from pollard.compress.blocks import remove_blocks
    from pollard.compress.channel_map import load_pruned, save_pruned
    from pollard.compress.data import Dataset, load_data
    from pollard.compress.errors import CompressionError, GateRefused
    from pollard.compress.models import LoadedModel, load_model
    from pollard.compress.pipeline import (
        BundleResult,
        CompressionResult,
        bundle_parent,
        compress,
    )
    from pollard.compress.recipe import Recipe
    from pollard.compress.spec import InputSpec

__all__ = [
    "BundleResult",
    "CompressedModel",
    "CompressionError",
    "CompressionResult",
    "Dataset",
    "GateRefused",
    "InputSpec",
    "LoadedModel",
    "ModelRecipe",
    "Recipe",
    "bundle_parent",
    "compress",
    "compress_model",
    "load_data",
    "load_model",
    "load_pruned",
    "remove_blocks",
    "save_pruned",
]

_HOMES = {
    "BundleResult": "pipeline",
    "CompressedModel": "anydata",
    "CompressionError": "errors",
    "CompressionResult": "pipeline",
    "Dataset": "data",
    "GateRefused": "errors",
    "InputSpec": "spec",
    "LoadedModel": "models",
    "ModelRecipe": "anydata",
    "Recipe": "recipe",
    "bundle_parent": "pipeline",
    "compress": "pipeline",
    "compress_model": "anydata",
    "load_data": "data",
    "load_model": "models",
    "load_pruned": "channel_map",
    "remove_blocks": "blocks",
    "save_pruned": "channel_map",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
