"""Models on their way to a tool that reads files, large weights in a file of their own.

Protobuf makes one piece of a whole model when it writes one, in a buffer that grows by doubling and
is then copied: four times the weights. Weights that are written by themselves are copied once, and
onnxruntime maps them instead of reading them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto

_WHOLE_BYTES = 32 * 1024**2
"""Models with fewer bytes of weights are written in one piece."""

_INLINE_BYTES = 4096
"""Weights that are smaller stay in the model, where shapes are inferred from them."""

_SUFFIX = ".weights"


def save(model: onnx.ModelProto, path: Path) -> None:
    """Write a model, and what is large of its weights to a file beside it.

    Args:
        model: It is not changed.
        path: Where to write; the weights go to the same name with a suffix.
    """
    if sum(len(tensor.raw_data) for tensor in model.graph.initializer) < _WHOLE_BYTES:
        onnx.save(model, path)
        return
    beside = path.with_name(path.name + _SUFFIX)
    light = onnx.ModelProto()
    _copy(model, light, without="graph")
    _copy(model.graph, light.graph, without="initializer")
    with beside.open("wb") as file:
        for tensor in model.graph.initializer:
            copied = light.graph.initializer.add()
            raw = tensor.raw_data
            if len(raw) < _INLINE_BYTES:
                copied.CopyFrom(tensor)
                continue
            _copy(tensor, copied, without="raw_data")
            copied.data_location = TensorProto.EXTERNAL
            place = {"location": beside.name, "offset": file.tell(), "length": len(raw)}
            for key, value in place.items():
                copied.external_data.add(key=key, value=str(value))
            file.write(raw)
    onnx.save(light, path)


def _copy(message: Any, to: Any, *, without: str) -> None:
    for field, value in message.ListFields():
        if field.name == without:
            continue
        if field.is_repeated:
            getattr(to, field.name).extend(value)
        elif field.message_type is not None:
            getattr(to, field.name).CopyFrom(value)
        else:
            setattr(to, field.name, value)
