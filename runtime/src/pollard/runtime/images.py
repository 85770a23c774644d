"""Decode image files into pixels, trusting nothing that they say.

The format is recognised by content, never by name. Size limits are checked
against the header, before any pixel is decoded.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, JpegImagePlugin, PngImagePlugin

from pollard.runtime.errors import ImageDamaged, ImageEmpty, ImageTooLarge, ImageUnsupported

_ORIENTATION_TAG = 0x0112

# What undoes each EXIF orientation; 1 and anything unknown mean upright.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

_JPEG = b"\xff\xd8\xff"
_PNG = b"\x89PNG\r\n\x1a\n"

# Formats that are told apart only to name them in the refusal.
_OTHER_FORMATS = (
    (b"GIF8", "GIF"),
    (b"BM", "BMP"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"\0\0\1\0", "ICO"),
    (b"\0\0\0\x0cjP  ", "JPEG 2000"),
    (b"\xff\x0a", "JPEG XL"),
    (b"8BPS", "Photoshop"),
    (b"%PDF", "PDF"),
    (b"PK\3\4", "ZIP"),
)


@dataclass(frozen=True)
class ImageLimits:
    """How large an image may be."""

    max_bytes: int = 32 * 1024**2
    """Largest encoded file, in bytes."""
    max_pixels: int = 100_000_000
    """Most pixels, width times height: of the file, and of any size in between."""


def decode(
    content: bytes,
    *,
    gray: bool = False,
    apply_exif_orientation: bool = True,
    background: Sequence[int] = (),
    limits: ImageLimits | None = None,
) -> NDArray[np.uint8]:
    """Decode a JPEG or PNG file.

    Args:
        content: Bytes of the file.
        gray: Give ITU-R 601-2 luma instead of red, green and blue.
        apply_exif_orientation: Turn the image upright as its EXIF data say.
        background: Red, green and blue, 0-255, that show through transparent
            pixels; empty drops the alpha channel as it is.
        limits: How large the image may be.

    Returns:
        uint8 pixels, height × width × channels; 3 channels, or 1 when gray.

    Raises:
        ImageEmpty: there are no bytes.
        ImageUnsupported: not an image, or not JPEG or PNG.
        ImageTooLarge: beyond the limits.
        ImageDamaged: truncated or otherwise unreadable.
    """
    image = open_image(content, limits)
    if apply_exif_orientation:
        image = upright(image)
    return to_array(convert(image, gray=gray, background=background))


def open_image(content: bytes, limits: ImageLimits | None = None) -> Image.Image:
    """Check the size of a JPEG or PNG file, decode it, and return it as stored.

    The pixels are neither turned upright nor converted.

    Raises:
        ImageInvalid: as `decode` says.
    """
    limits = limits or ImageLimits()
    if not content:
        raise ImageEmpty("the image is empty: it has 0 bytes")
    if len(content) > limits.max_bytes:
        raise ImageTooLarge(
            f"the image has {len(content)} bytes; at most {limits.max_bytes} are allowed",
            size_bytes=len(content),
            limit_bytes=limits.max_bytes,
        )
    image = _open_header(content)
    width, height = image.size
    if width * height > limits.max_pixels:
        raise ImageTooLarge(
            f"the image has {width} × {height} pixels; "
            f"at most {limits.max_pixels} are allowed in all",
            width=width,
            height=height,
            limit_pixels=limits.max_pixels,
        )
    try:
        image.load()
    except MemoryError:
        raise
    except Exception as error:
        # Pillow's plugins raise OSError, SyntaxError, ValueError, struct.error,
        # zlib.error and others for what is one thing here.
        raise ImageDamaged(
            f"the {image.format} image is truncated or damaged: {error}", format=image.format
        ) from error
    return image


def _open_header(content: bytes) -> Image.Image:
    # The plugins are called directly because Image.open() guesses among all
    # formats and has a pixel limit of its own, a global.
    file = io.BytesIO(content)
    try:
        if content.startswith(_JPEG):
            return JpegImagePlugin.jpeg_factory(file)
        if content.startswith(_PNG):
            return PngImagePlugin.PngImageFile(file)
    except MemoryError:
        raise
    except Exception as error:
        name = "JPEG" if content.startswith(_JPEG) else "PNG"
        raise ImageDamaged(
            f"the {name} image's header is truncated or damaged: {error}", format=name
        ) from error
    found = _name_format(content)
    if found:
        raise ImageUnsupported(
            f"the format {found} is not supported; send JPEG or PNG", format=found
        )
    raise ImageUnsupported("the content is not an image that can be read; send JPEG or PNG")


def _name_format(content: bytes) -> str:
    for magic, name in _OTHER_FORMATS:
        if content.startswith(magic):
            return name
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return "WebP"
    if content[4:8] == b"ftyp":
        return "AVIF" if content[8:12] in (b"avif", b"avis") else "HEIF or MP4"
    text = content[:512].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype html", b"<html")):
        return "HTML"
    if text.startswith((b"<svg", b"<?xml")):
        return "SVG or XML"
    return ""


def upright(image: Image.Image) -> Image.Image:
    """Turn a decoded image as its EXIF orientation says; unreadable EXIF data are ignored."""
    try:
        orientation = image.getexif().get(_ORIENTATION_TAG)
    except Exception:  # damaged metadata do not make the pixels wrong
        return image
    method = _UPRIGHT.get(orientation) if isinstance(orientation, int) else None
    return image if method is None else image.transpose(method)


def convert(image: Image.Image, *, gray: bool, background: Sequence[int] = ()) -> Image.Image:
    """Convert any decoded image to mode "L" or "RGB".

    16-bit samples keep their high byte. Transparency, from an alpha channel, a
    palette or a key colour, is laid over ``background`` when one is given and
    dropped otherwise.
    """
    wanted = "L" if gray else "RGB"
    if image.mode == wanted and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):
        image = _reduce_16_bit(image)
    if background and image.has_transparency_data:
        below = Image.new("RGBA", image.size, (*background, 255))
        image = Image.alpha_composite(below, image.convert("RGBA")).convert("RGB")
    elif "transparency" in image.info:
        # Pillow would keep the key colour as an alpha channel.
        image = image.convert("RGBA")
    return image if image.mode == wanted else image.convert(wanted)


def _reduce_16_bit(image: Image.Image) -> Image.Image:
    samples = np.asarray(image)
    luma = Image.fromarray((samples >> 8).astype(np.uint8))
    key = image.info.get("transparency")
    if isinstance(key, int):
        alpha = np.where(samples == key, 0, 255).astype(np.uint8)
        luma = Image.merge("LA", (luma, Image.fromarray(alpha)))
    return luma


def to_array(image: Image.Image) -> NDArray[np.uint8]:
    """Return the pixels of an "L" or "RGB" image as height × width × channels, writable."""
    array = np.array(image, dtype=np.uint8)
    return array[:, :, np.newaxis] if array.ndim == 2 else array


def from_array(pixels: NDArray[np.uint8]) -> Image.Image:
    """Return an image of uint8 pixels, height × width (× 1, 2, 3 or 4 channels).

    Raises:
        ValueError: the array has another shape or element type.
    """
    channels = pixels.shape[2] if pixels.ndim == 3 else 1
    if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3) or channels not in (1, 2, 3, 4):
        raise ValueError(
            "pixels must be uint8 of height × width × 1 to 4 channels, "
            f"not {pixels.dtype} of {pixels.shape}"
        )
    if 0 in pixels.shape:
        raise ValueError(f"pixels of shape {pixels.shape} hold no image")
    if pixels.ndim == 3 and channels == 1:
        pixels = pixels[:, :, 0]
    return Image.fromarray(np.ascontiguousarray(pixels))
