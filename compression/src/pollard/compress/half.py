"""Float16 files for CUDA: weights and arithmetic in 16 bits, pixels in, float32 logits out.

The conversion is onnxruntime's own (`onnxruntime.transformers.float16`); what goes in and comes out
keeps its type, so that a float16 file takes the place of a float32 one.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from typing import Any

import onnx
import onnx_ir
from onnx import TensorProto

from pollard.compress.errors import ExportFailed
from pollard.compress.export import strip_metadata

CHANNELS = 8
"""Tensor cores take float16 channels in multiples of this; other widths are padded or slow."""

LARGEST = 65504.0
"""Largest finite float16."""


def to_float16(model: onnx.ModelProto, *, keep_float: Collection[str] = ()) -> onnx.ModelProto:
    """Return a float32 model with weights and arithmetic in float16.

    Args:
        model: What to convert; it is not changed. Its inputs and outputs keep their types.
        keep_float: Names of nodes that go on in float32.

    Raises:
        ExportFailed: a weight is not finite or too large for float16, or the converter gives up.
    """
    for tensor in model.graph.initializer:
        if tensor.data_type != TensorProto.FLOAT:
            continue
        largest = _largest(tensor)
        if not largest <= LARGEST:
            raise ExportFailed(
                f"the weights {tensor.name!r} reach {largest:.4g}, and float16 ends at "
                f"{LARGEST:g}; a float16 file of this model cannot be made"
            )
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    # The converter infers types itself, and takes weights that are listed here for activations.
    del copy.graph.value_info[:]
    try:
        half: onnx.ModelProto = _converter()(
            copy, keep_io_types=True, node_block_list=sorted(keep_float)
        )
        half = _sorted(half)
        strip_metadata(half)
        onnx.checker.check_model(half)
    except Exception as error:  # the converter raises whatever its steps raise
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ExportFailed(f"the model cannot be converted to float16: {first}") from error
    return half


def _sorted(model: onnx.ModelProto) -> onnx.ModelProto:
    # The converter appends its casts, and nodes must come after those that they read.
    graph = onnx_ir.from_proto(model)
    graph.graph.sort()
    return onnx_ir.to_proto(graph)


def _largest(tensor: onnx.TensorProto) -> float:
    """Return the largest magnitude; infinite if there is a NaN."""
    import numpy as np
    from onnx import numpy_helper

    values = np.abs(numpy_helper.to_array(tensor))
    if not values.size:
        return 0.0
    return float(np.nan_to_num(values, nan=np.inf, posinf=np.inf).max())


def _converter() -> Any:
    # The package puts its folder on the path of imports when it is imported, which nothing else
    # here wants.
    import sys

    path = list(sys.path)
    try:
        from onnxruntime.transformers.float16 import convert_float_to_float16
    finally:
        sys.path[:] = path
    logging.getLogger("onnxruntime.transformers.float16").setLevel(logging.ERROR)
    return convert_float_to_float16
