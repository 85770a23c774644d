"""Decoding: every JPEG and PNG becomes upright pixels, what is no image an error that says why."""

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pollard.runtime import images
from pollard.runtime.errors import (
    ImageDamaged,
    ImageEmpty,
    ImageInvalid,
    ImageTooLarge,
    ImageUnsupported,
)


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def photograph(width: int = 40, height: int = 30) -> Image.Image:
    y, x = np.mgrid[0:height, 0:width]
    pixels = np.stack([x * 6 % 256, y * 8 % 256, (x + y) * 3 % 256], axis=2)
    return Image.fromarray(pixels.astype(np.uint8))


def png_of_size(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 100))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_gives_the_pixels_that_pillow_gives(kind):
    content = encode(photograph(), kind)
    decoded = images.decode(content)
    assert decoded.dtype == np.uint8
    assert decoded.shape == (30, 40, 3)
    assert np.array_equal(decoded, np.asarray(Image.open(io.BytesIO(content))))


def test_progressive_and_grey_and_cmyk_jpeg_become_rgb():
    picture = photograph()
    for image, options in [
        (picture, {"progressive": True}),
        (picture.convert("L"), {}),
        (picture.convert("CMYK"), {}),
    ]:
        content = encode(image, "JPEG", **options)
        expected = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
        assert np.array_equal(images.decode(content), expected)


def test_gray_gives_one_channel_of_luma():
    content = encode(photograph(), "PNG")
    decoded = images.decode(content, gray=True)
    assert decoded.shape == (30, 40, 1)
    assert np.array_equal(decoded[:, :, 0], np.asarray(photograph().convert("L")))


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone(kind, orientation):
    upright = photograph()
    inverse = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]
    stored = upright if inverse is None else upright.transpose(inverse)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 100, "subsampling": 0} if kind == "JPEG" else {}
    content = encode(stored, kind, exif=exif, **options)
    decoded = images.decode(content).astype(int)
    assert decoded.shape == (30, 40, 3)
    assert np.abs(decoded - np.asarray(upright).astype(int)).mean() < 2
    raw = images.decode(content, apply_exif_orientation=False)
    assert raw.shape[:2] == (stored.height, stored.width)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_exif_does_not_make_a_good_image_bad():
    content = encode(photograph(), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff broken")
    assert images.decode(content).shape == (30, 40, 3)


def test_palette_png():
    picture = photograph().quantize(16)
    expected = np.asarray(picture.convert("RGB"))
    assert np.array_equal(images.decode(encode(picture, "PNG")), expected)


def test_black_and_white_png():
    picture = photograph().convert("1")
    decoded = images.decode(encode(picture, "PNG"), gray=True)
    assert set(np.unique(decoded)) == {0, 255}


def test_16_bit_grey_png_keeps_the_high_byte():
    samples = (np.arange(1200, dtype=np.uint16) * 54).reshape(30, 40)
    decoded = images.decode(encode(Image.fromarray(samples), "PNG"), gray=True)
    assert np.array_equal(decoded[:, :, 0], samples >> 8)
    assert images.decode(encode(Image.fromarray(samples), "PNG")).shape == (30, 40, 3)


def half_transparent() -> Image.Image:
    picture = photograph().convert("RGBA")
    alpha = np.full((30, 40), 255, np.uint8)
    alpha[:, :20] = 0
    picture.putalpha(Image.fromarray(alpha))
    return picture


def test_alpha_is_dropped_as_it_is_without_a_background():
    decoded = images.decode(encode(half_transparent(), "PNG"))
    assert np.array_equal(decoded, np.asarray(photograph()))


def test_background_shows_through_transparent_pixels():
    decoded = images.decode(encode(half_transparent(), "PNG"), background=(10, 20, 30))
    assert (decoded[:, :20] == (10, 20, 30)).all()
    assert np.array_equal(decoded[:, 20:], np.asarray(photograph())[:, 20:])


def test_background_shows_through_a_transparent_palette_entry_and_key_colour():
    palette = Image.new("P", (4, 2), 1)
    palette.putpalette([0, 0, 0, 200, 100, 50])
    content = encode(palette, "PNG", transparency=1)
    assert (images.decode(content, background=(1, 2, 3)) == (1, 2, 3)).all()
    assert (images.decode(content) == (200, 100, 50)).all()
    key = encode(Image.new("RGB", (4, 2), (9, 8, 7)), "PNG", transparency=(9, 8, 7))
    assert (images.decode(key, background=(1, 2, 3)) == (1, 2, 3)).all()
    assert (images.decode(key) == (9, 8, 7)).all()


def test_transparent_key_of_a_16_bit_grey_png():
    samples = np.array([[1000, 40000]], np.uint16)
    content = encode(Image.fromarray(samples), "PNG", transparency=1000)
    assert images.decode(content, gray=True, background=(255, 255, 255)).ravel().tolist() == [
        255,
        40000 >> 8,
    ]
    assert images.decode(content, gray=True).ravel().tolist() == [1000 >> 8, 40000 >> 8]


def test_no_bytes():
    with pytest.raises(ImageEmpty, match="0 bytes"):
        images.decode(b"")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"hello, this is text", "not an image"),
        (b"\0" * 100, "not an image"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIF"),
        (b"\0\0\1\0\1\0", "ICO"),
        (b"<!DOCTYPE html><html>", "HTML"),
        (b"  <svg xmlns='x'/>", "SVG"),
        (b"%PDF-1.7", "PDF"),
        (b"II+\0\x08\0\0\0", "BigTIFF"),
    ],
)
def test_what_is_not_read_is_named(content, words):
    with pytest.raises(ImageUnsupported, match=words):
        images.decode(content)


def test_too_many_bytes_are_refused_before_they_are_looked_at():
    with pytest.raises(ImageTooLarge, match="1000 bytes; at most 999"):
        images.decode(b"x" * 1000, limits=images.ImageLimits(max_bytes=999))


def test_too_many_pixels_are_refused_by_the_header():
    with pytest.raises(ImageTooLarge, match="60000 × 60000"):
        images.decode(png_of_size(60000, 60000))
    jpeg = bytearray(encode(photograph(), "JPEG"))
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = b"\xff\xff\xff\xff"
    with pytest.raises(ImageTooLarge, match="65535 × 65535"):
        images.decode(bytes(jpeg))


def test_sizes_up_to_the_limit_need_no_global_setting():
    # Pillow warns above 89 megapixels; warnings are errors here.
    content = encode(Image.new("1", (9500, 9500)), "PNG")
    image = images.open_image(content, images.ImageLimits(max_pixels=100_000_000))
    assert image.size == (9500, 9500)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_truncated_at_every_place(kind):
    noise = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
    content = encode(Image.fromarray(noise), kind)
    # The last bytes are the end marker, without which the pixels are complete.
    for end in range(1, len(content) - 16, 7):
        with pytest.raises(ImageInvalid):
            images.decode(content[:end])
    with pytest.raises(ImageDamaged, match=kind):
        images.decode(content[: len(content) // 2])


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow warns of damaged metadata
@settings(max_examples=200, deadline=None)
@given(st.sampled_from(["JPEG", "PNG"]), st.lists(st.tuples(st.integers(0), st.integers(1, 255))))
def test_flipped_bits_give_pixels_or_an_image_error(kind, flips):
    content = bytearray(encode(photograph(16, 12), kind))
    for position, mask in flips:
        content[position % len(content)] ^= mask
    try:
        decoded = images.decode(bytes(content), limits=images.ImageLimits(max_pixels=1_000_000))
    except ImageInvalid:
        return
    assert decoded.dtype == np.uint8
    assert decoded.ndim == 3


@settings(max_examples=200, deadline=None)
@given(st.sampled_from([b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"]), st.binary(max_size=300))
def test_random_bytes_are_an_image_error(magic, tail):
    with pytest.raises(ImageInvalid):
        images.decode(magic + tail)
