"""Whatever the caller holds as an image, as the bytes of a file."""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
from numpy.typing import NDArray


@runtime_checkable
class PillowImage(Protocol):
    """What is used of a PIL.Image.Image; Pillow itself is not needed here."""

    mode: str

    def save(self, fp: Any, format: str | None = None) -> None: ...  # noqa: A002 - Pillow's name

    def convert(self, mode: str | None = None) -> Any: ...


ImageLike: TypeAlias = (
    bytes | bytearray | memoryview | str | os.PathLike[str] | PillowImage | NDArray[np.uint8]
)
"""Bytes of an image file, a path to one, a Pillow image, or pixels as uint8 (H, W),
(H, W, 1), (H, W, 3) or (H, W, 4)."""


def encoded(image: ImageLike) -> bytes:
    """Return the bytes of an image file. Files are sent as they are, pixels as PNG.

    Raises:
        TypeError: If `image` is nothing of the kind.
        ValueError: If an array has the wrong shape or dtype.
        OSError: If a path cannot be read.
    """
    if isinstance(image, bytes):
        return image
    if isinstance(image, bytearray | memoryview):
        return bytes(image)
    if isinstance(image, str | os.PathLike):
        return Path(image).read_bytes()
    if isinstance(image, np.ndarray):
        return png(image)
    if isinstance(image, PillowImage):
        buffer = io.BytesIO()
        # PNG has no CMYK, YCbCr, LAB, HSV or float pixels.
        portable = image.mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")
        (image if portable else image.convert("RGB")).save(buffer, format="PNG")
        return buffer.getvalue()
    raise TypeError(
        f"image must be bytes, a path, a Pillow image or a uint8 array, not {type(image).__name__}"
    )


_PNG_COLOR_TYPE = {1: 0, 3: 2, 4: 6}


def png(pixels: NDArray[np.uint8]) -> bytes:
    """Return pixels, uint8 (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), as a PNG file."""
    array = pixels[:, :, None] if pixels.ndim == 2 else pixels
    if array.ndim != 3 or array.shape[2] not in _PNG_COLOR_TYPE or 0 in array.shape:
        raise ValueError(
            f"pixels must have the shape (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), "
            f"not {pixels.shape}"
        )
    if array.dtype != np.uint8:
        raise ValueError(f"pixels must be uint8 with values 0 to 255, not {pixels.dtype}")
    height, width, channels = array.shape
    rows = np.ascontiguousarray(array).reshape(height, width * channels)
    # Every row begins with its filter type; 0 is none.
    scanlines = np.hstack([np.zeros((height, 1), np.uint8), rows]).tobytes()
    header = struct.pack(">IIBBBBB", width, height, 8, _PNG_COLOR_TYPE[channels], 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        (_chunk(b"IHDR", header), _chunk(b"IDAT", zlib.compress(scanlines)), _chunk(b"IEND", b""))
    )


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def encoded_all(images: Sequence[ImageLike]) -> list[bytes]:
    """Return the bytes of several images, naming the one that is wrong."""
    results = []
    for index, image in enumerate(images):
        try:
            results.append(encoded(image))
        except (TypeError, ValueError) as error:
            raise type(error)(f"images[{index}]: {error}") from None
    return results
