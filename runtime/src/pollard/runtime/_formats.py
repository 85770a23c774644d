"""Which image formats are read, how each is recognised by its content, and who opens it."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable

from PIL import (
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

_MAGICS = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"BM", "BMP"),
    # Told apart only to name them in the refusal.
    (b"II+\0", "BigTIFF"),
    (b"MM\0+", "BigTIFF"),
    (b"\0\0\1\0", "ICO"),
    (b"\0\0\0\x0cjP  ", "JPEG 2000"),
    (b"\xff\x0a", "JPEG XL"),
    (b"8BPS", "Photoshop"),
    (b"%PDF", "PDF"),
    (b"PK\3\4", "ZIP"),
)


class _Tiff(TiffImagePlugin.TiffImageFile):
    """A TIFF file whose pixels stay as they are stored; Pillow would turn them upright."""

    def load_end(self) -> None:
        """Leave the image as it is (called by Pillow)."""
        # Pillow announces the size that the image has when upright.
        self._size = self.im.size


def _open_tiff(file: io.BytesIO) -> Image.Image:
    image = _Tiff(file)
    # Now, because loading moves the file.
    image.getexif()
    return image


_OPENERS: dict[str, Callable[[io.BytesIO], Image.Image]] = {
    "JPEG": JpegImagePlugin.jpeg_factory,
    "PNG": PngImagePlugin.PngImageFile,
    "GIF": GifImagePlugin.GifImageFile,
    "TIFF": _open_tiff,
    "BMP": BmpImagePlugin.BmpImageFile,
}
# Pillow can be built without these.
if getattr(WebPImagePlugin, "SUPPORTED", False):
    _OPENERS["WebP"] = WebPImagePlugin.WebPImageFile
if getattr(AvifImagePlugin, "SUPPORTED", False):
    _OPENERS["AVIF"] = AvifImagePlugin.AvifImageFile

READABLE = tuple(
    name for name in ("JPEG", "PNG", "WebP", "AVIF", "GIF", "TIFF", "BMP") if name in _OPENERS
)
"""Names of the formats that are read here."""


def recognize(content: bytes) -> str:
    """Return the name of the format of a file by its content; empty when unknown."""
    for magic, name in _MAGICS:
        if content.startswith(magic):
            return name
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return "WebP"
    if content[4:8] == b"ftyp":
        # The brand, then a version, then the brands that it is compatible with.
        end = min(int.from_bytes(content[:4], "big"), 256)
        brands = [content[8:12], *(content[at : at + 4] for at in range(16, end, 4))]
        return "AVIF" if b"avif" in brands or b"avis" in brands else "HEIF or MP4"
    text = content[:512].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype html", b"<html")):
        return "HTML"
    if text.startswith((b"<svg", b"<?xml", b"<!doctype svg")):
        return "SVG or XML"
    return ""


def open_header(name: str, content: bytes) -> Image.Image:
    """Read the header of a file of a readable format; its pixels are not decoded.

    The plugins are called directly because Image.open() guesses among all
    formats and has a pixel limit of its own, a global.

    Raises:
        Exception: whatever Pillow's plugin raises for a damaged header.
    """
    return _OPENERS[name](io.BytesIO(content))


def size_before_opening(name: str, content: bytes) -> tuple[int, int] | None:
    """Return width and height where opening a file alone takes memory for all its pixels.

    None for other formats, and for a header that is too short or unknown: the
    plugin refuses it.
    """
    try:
        if name == "GIF":
            return struct.unpack_from("<HH", content, 6)
        return _webp_size(content) if name == "WebP" else None
    except struct.error:
        return None


def _webp_size(content: bytes) -> tuple[int, int] | None:
    kind = content[12:16]
    if kind == b"VP8X":
        low, high = struct.unpack_from("<IH", content, 24)
        return (low & 0xFFFFFF) + 1, (low >> 24 | high << 8) + 1
    if kind == b"VP8L":
        (bits,) = struct.unpack_from("<I", content, 21)
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", content, 26)
        return width & 0x3FFF, height & 0x3FFF
    return None
