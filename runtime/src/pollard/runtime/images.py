"""Decode image files into pixels, trusting nothing that they say.

The format is recognised by content, never by name. Size limits are checked
against the header, before any pixel is decoded.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms

from pollard.runtime import _formats
from pollard.runtime.errors import ImageDamaged, ImageEmpty, ImageTooLarge, ImageUnsupported

FORMATS = _formats.READABLE
"""Names of the formats that are read: JPEG, PNG, WebP, GIF (the first frame), TIFF (the
first page), BMP, and AVIF where Pillow was built with it."""

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

# What `convert` understands. Others, such as 32-bit and floating-point TIFF, have no
# scale that says what is white.
_MODES = {
    *("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr"),
    *("I;16", "I;16B", "I;16L", "I;16N"),
}

# Whatever its ratio, an image of a megapixel does no harm.
_SMALL_PIXELS = 1_000_000


@dataclass(frozen=True)
class ImageLimits:
    """How large an image may be."""

    max_bytes: int = 32 * 1024**2
    """Largest encoded file, in bytes."""
    max_pixels: int = 36_000_000
    """Most pixels, width times height: of the file, and of any size in between. Pillow
    takes 4 bytes for a pixel, and twice that while it turns the image upright: a JPEG
    of this size is decoded within 300 MB."""
    max_pixels_per_byte: int = 10_000
    """Most pixels for each byte of the file, beyond one megapixel. Blank pages have
    up to 8,000; files with more are made to cost more than they do to send."""


def decode(
    content: bytes,
    *,
    gray: bool = False,
    apply_exif_orientation: bool = True,
    apply_icc_profile: bool = False,
    background: Sequence[int] = (),
    limits: ImageLimits | None = None,
) -> NDArray[np.uint8]:
    """Decode a file of one of `FORMATS`.

    Args:
        content: Bytes of the file.
        gray: Give ITU-R 601-2 luma instead of red, green and blue.
        apply_exif_orientation: Turn the image upright as its EXIF data say.
        apply_icc_profile: Convert the colours to sRGB by the embedded profile.
        background: Red, green and blue, 0-255, that show through transparent
            pixels; empty drops the alpha channel as it is.
        limits: How large the image may be.

    Returns:
        uint8 pixels, height × width × channels; 3 channels, or 1 when gray.

    Raises:
        ImageEmpty: there are no bytes.
        ImageUnsupported: not an image, or of another format.
        ImageTooLarge: beyond the limits.
        ImageDamaged: truncated or otherwise unreadable.
    """
    image = open_image(content, limits)
    if apply_exif_orientation:
        image = upright(image)
    if apply_icc_profile:
        image = to_srgb(image)
    return to_array(convert(image, gray=gray, background=background))


def open_image(
    content: bytes,
    limits: ImageLimits | None = None,
    before_loading: Callable[[Image.Image], None] | None = None,
) -> Image.Image:
    """Check the size of an image file, decode it, and return it as stored.

    The pixels are neither turned upright nor converted.

    Args:
        content: Bytes of the file.
        limits: How large the image may be.
        before_loading: Is given the image when only its header has been read.

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
    name = _formats.recognize(content)
    if name not in FORMATS:
        what = f"the format {name} is not supported" if name else "the content is not an image"
        raise ImageUnsupported(f"{what}; send {_names(FORMATS)}", format=name)
    try:
        _check_size(_formats.size_before_opening(name, content), content, limits)
        image = _formats.open_header(name, content)
        _check_size(image.size, content, limits)
    except (ImageTooLarge, MemoryError):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageTooLarge(f"the {name} image is too large: {error}", format=name) from error
    except Exception as error:
        raise ImageDamaged(
            f"the {name} image's header is truncated or damaged: {error}", format=name
        ) from error
    if image.mode not in _MODES:
        raise ImageUnsupported(
            f"{name} images with samples of the kind {image.mode!r} are not supported; "
            "send 8 or 16 bits a sample, grey or coloured",
            format=name,
            mode=image.mode,
        )
    try:
        if before_loading is not None:
            before_loading(image)
        image.load()
    except MemoryError:
        raise
    except Exception as error:
        # Pillow's plugins raise OSError, SyntaxError, ValueError, struct.error,
        # zlib.error and others for what is one thing here.
        raise ImageDamaged(
            f"the {name} image is truncated or damaged: {error}", format=name
        ) from error
    return image


def _check_size(size: tuple[int, int] | None, content: bytes, limits: ImageLimits) -> None:
    if size is None:
        return
    width, height = size
    pixels = width * height
    if pixels > limits.max_pixels:
        raise ImageTooLarge(
            f"the image has {width} × {height} pixels; "
            f"at most {limits.max_pixels} are allowed in all",
            width=width,
            height=height,
            limit_pixels=limits.max_pixels,
        )
    if pixels > max(_SMALL_PIXELS, limits.max_pixels_per_byte * len(content)):
        raise ImageTooLarge(
            f"the image has {width} × {height} pixels in only {len(content)} bytes; "
            f"at most {limits.max_pixels_per_byte} pixels a byte are allowed",
            width=width,
            height=height,
            size_bytes=len(content),
            limit_pixels_per_byte=limits.max_pixels_per_byte,
        )


def _names(formats: Sequence[str]) -> str:
    return f"{', '.join(formats[:-1])} or {formats[-1]}"


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Return the width and height that an image will have when `upright` has turned it."""
    turned = _upright_method(image) in (
        Image.Transpose.TRANSPOSE,
        Image.Transpose.ROTATE_270,
        Image.Transpose.TRANSVERSE,
        Image.Transpose.ROTATE_90,
    )
    return (image.height, image.width) if turned else image.size


def _upright_method(image: Image.Image) -> Image.Transpose | None:
    try:
        orientation = image.getexif().get(_ORIENTATION_TAG)
    except Exception:  # damaged metadata do not make the pixels wrong
        return None
    return _UPRIGHT.get(orientation) if isinstance(orientation, int) else None


def upright(image: Image.Image) -> Image.Image:
    """Turn a decoded image as its EXIF orientation says; unreadable EXIF data are ignored."""
    method = _upright_method(image)
    return image if method is None else image.transpose(method)


def to_srgb(image: Image.Image) -> Image.Image:
    """Convert a decoded image to sRGB by its ICC profile, perceptually, as Pillow's ImageCms does.

    An image without a profile stays as it is, and so does one whose profile
    cannot be read or is for another kind of colours, as in browsers.
    """
    content = image.info.get("icc_profile")
    if not isinstance(content, bytes) or not content:
        return image
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(content))
        space = profile.profile.xcolor_space.strip()
    except Exception:  # damaged metadata do not make the pixels wrong
        return image
    base, alpha = _split_alpha(image)
    if base.mode == "L" and space == "RGB":
        base = base.convert("RGB")
    if {"L": "GRAY", "RGB": "RGB", "CMYK": "CMYK"}.get(base.mode) != space:
        return image
    try:
        colors = ImageCms.profileToProfile(
            base, profile, ImageCms.createProfile("sRGB"), outputMode="RGB"
        )
    except ImageCms.PyCMSError:
        return image
    if colors is None:
        return image
    # Neither the profile nor a key colour holds any more.
    colors.info = {}
    if alpha is not None:
        colors.putalpha(alpha)
    return colors


def _split_alpha(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Return the colours as "L", "RGB" or "CMYK", and the alpha channel where there is one."""
    if image.mode.startswith("I"):
        image = _reduce_16_bit(image)
    if image.has_transparency_data:
        image = image.convert("LA" if image.mode == "LA" else "RGBA")
        alpha = image.getchannel("A")
        return image.convert("L" if image.mode == "LA" else "RGB"), alpha
    if image.mode in ("L", "RGB", "CMYK"):
        return image, None
    return image.convert("L" if image.mode == "1" else "RGB"), None


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
    elif image.mode in ("La", "RGBa"):  # from there Pillow converts to no other mode
        image = image.convert("LA" if image.mode == "La" else "RGBA")
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
    return with_channels(np.array(image, dtype=np.uint8))


def with_channels(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return pixels of height × width (× channels) as height × width × channels."""
    return pixels[:, :, np.newaxis] if pixels.ndim == 2 else pixels


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
