"""numpy arrays to the raw tensors of the Open Inference Protocol, and back."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pollard.client.errors import InvalidAnswer

_NUMPY_OF = {
    "BOOL": np.dtype(np.bool_),
    "UINT8": np.dtype("<u1"),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "INT8": np.dtype("<i1"),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP16": np.dtype("<f2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
}
_NAME_OF = {dtype: name for name, dtype in _NUMPY_OF.items()}


def datatype_of(array: NDArray[Any]) -> str:
    """Return the protocol's name of an array's element type.

    Raises:
        TypeError: If the protocol has no such type.
    """
    if array.dtype.kind in "OSU":
        return "BYTES"
    if array.dtype.name == "bfloat16":  # registered with numpy by ml_dtypes
        return "BF16"
    try:
        return _NAME_OF[array.dtype.newbyteorder("<") if array.dtype.itemsize > 1 else array.dtype]
    except KeyError:
        raise TypeError(
            f"arrays of dtype {array.dtype} cannot be sent; convert to one of "
            + ", ".join(sorted(dtype.name for dtype in _NAME_OF))
        ) from None


def to_raw(array: NDArray[Any]) -> bytes:
    """Return an array's elements, row-major and little-endian."""
    if array.dtype.kind in "OSU":
        return b"".join(_length_prefixed(element) for element in array.ravel())
    if array.dtype.byteorder == ">":
        array = array.astype(array.dtype.newbyteorder("<"))
    return array.tobytes(order="C")


def from_raw(datatype: str, shape: Sequence[int], raw: bytes) -> NDArray[Any]:
    """Return the array that `to_raw` wrote. BF16 comes as float32; the values are the same.

    Raises:
        InvalidAnswer: If the bytes do not fit shape and type.
    """
    if datatype == "BYTES":
        return np.array(_split_prefixed(raw), dtype=np.object_).reshape(shape)
    if datatype == "BF16":
        bits = np.frombuffer(raw, dtype="<u2").astype("<u4") << 16
        return bits.view("<f4").reshape(shape)
    try:
        dtype = _NUMPY_OF[datatype]
    except KeyError:
        raise InvalidAnswer(f"the server sent a tensor of unknown type {datatype!r}") from None
    expected = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    if len(raw) != expected:
        raise InvalidAnswer(
            f"the server sent {len(raw)} bytes for a tensor {datatype} {list(shape)}, "
            f"which takes {expected}"
        )
    return np.frombuffer(raw, dtype=dtype).reshape(shape)


def _length_prefixed(element: object) -> bytes:
    if isinstance(element, str):
        element = element.encode()
    if not isinstance(element, bytes):
        raise TypeError(f"an array of objects must hold bytes or str, not {type(element).__name__}")
    return struct.pack("<I", len(element)) + element


def _split_prefixed(raw: bytes) -> list[bytes]:
    elements = []
    offset = 0
    while offset < len(raw):
        (length,) = struct.unpack_from("<I", raw, offset)
        offset += 4
        if offset + length > len(raw):
            raise InvalidAnswer("the server sent a BYTES tensor that ends within an element")
        elements.append(raw[offset : offset + length])
        offset += length
    return elements
