"""Element types: how the Open Inference Protocol, NumPy, ONNX and the manifest
name the same thing."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from pollard.bundle.v1 import bundle_pb2

# Protocol name, NumPy type, onnxruntime's name. BF16 has no NumPy type: it is
# carried as its bits. BYTES are Python bytes in arrays of objects.
_TYPES: tuple[tuple[str, np.dtype[np.generic], str], ...] = (
    ("BOOL", np.dtype(np.bool_), "tensor(bool)"),
    ("UINT8", np.dtype(np.uint8), "tensor(uint8)"),
    ("UINT16", np.dtype(np.uint16), "tensor(uint16)"),
    ("UINT32", np.dtype(np.uint32), "tensor(uint32)"),
    ("UINT64", np.dtype(np.uint64), "tensor(uint64)"),
    ("INT8", np.dtype(np.int8), "tensor(int8)"),
    ("INT16", np.dtype(np.int16), "tensor(int16)"),
    ("INT32", np.dtype(np.int32), "tensor(int32)"),
    ("INT64", np.dtype(np.int64), "tensor(int64)"),
    ("FP16", np.dtype(np.float16), "tensor(float16)"),
    ("FP32", np.dtype(np.float32), "tensor(float)"),
    ("FP64", np.dtype(np.float64), "tensor(double)"),
    ("BF16", np.dtype(np.uint16), "tensor(bfloat16)"),
    ("BYTES", np.dtype(np.object_), "tensor(string)"),
)

NUMPY = {name: dtype for name, dtype, _ in _TYPES}
"""NumPy type by protocol name."""

FROM_ONNXRUNTIME = {onnx: name for name, _, onnx in _TYPES}
"""Protocol name by onnxruntime's name."""

FROM_NUMPY = {dtype: name for name, dtype, _ in _TYPES if name != "BF16"}
"""Protocol name by NumPy type."""


def protocol_name(data_type: bundle_pb2.DataType.ValueType) -> str:
    """Return the protocol's name of a manifest's type, such as ``"FP32"``."""
    return bundle_pb2.DataType.Name(data_type).removeprefix("DATA_TYPE_")


def manifest_type(name: str) -> bundle_pb2.DataType.ValueType:
    """Return the manifest's type for a protocol name.

    Raises:
        ValueError: the name is unknown.
    """
    return bundle_pb2.DataType.Value(f"DATA_TYPE_{name}")


def describe(name: str, shape: Iterable[int]) -> str:
    """Return ``"UINT8[-1,28,28,1]"`` for messages."""
    return f"{name}[{','.join(str(size) for size in shape)}]"
