"""Every format that is read gives the pixels that Pillow gives; hostile files are image errors."""

import io
import random
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from pollard.runtime import images
from pollard.runtime.errors import ImageDamaged, ImageInvalid, ImageTooLarge, ImageUnsupported
from pollard.runtime.transforms import Pipeline, decode, resize

FORMATS = ["JPEG", "PNG", "WebP", "AVIF", "GIF", "TIFF", "BMP"]
# Pillow warns of damaged metadata; warnings are errors here.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    if kind == "AVIF" and "AVIF" not in images.FORMATS:
        pytest.skip("this Pillow reads no AVIF")
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def photograph(width: int = 40, height: int = 30) -> Image.Image:
    y, x = np.mgrid[0:height, 0:width]
    pixels = np.stack([x * 6 % 256, y * 8 % 256, (x + y) * 3 % 256], axis=2)
    return Image.fromarray(pixels.astype(np.uint8))


def plain(content: bytes, mode: str = "RGB") -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)).convert(mode))


VARIANTS = [
    ("WebP", "RGB", {}),
    ("WebP", "RGB", {"lossless": True}),
    ("WebP", "RGBA", {"lossless": True}),
    ("AVIF", "RGB", {}),
    ("GIF", "RGB", {}),
    ("GIF", "L", {}),
    ("BMP", "RGB", {}),
    ("BMP", "L", {}),
    ("BMP", "P", {}),
    ("BMP", "1", {}),
    ("TIFF", "RGB", {}),
    ("TIFF", "RGB", {"compression": "tiff_lzw"}),
    ("TIFF", "RGB", {"compression": "tiff_adobe_deflate"}),
    ("TIFF", "RGB", {"compression": "jpeg"}),
    ("TIFF", "CMYK", {}),
    ("TIFF", "P", {}),
    ("TIFF", "1", {"compression": "group4"}),
    ("PNG", "RGB", {"interlace": True}),
]


@pytest.mark.parametrize(("kind", "mode", "options"), VARIANTS)
def test_gives_the_pixels_that_pillow_gives(kind, mode, options):
    content = encode(photograph().convert(mode), kind, **options)
    assert np.array_equal(images.decode(content), plain(content))


def test_gif_gives_its_first_frame():
    frames = [Image.new("RGB", (8, 6), color) for color in ("red", "lime", "blue")]
    content = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert (images.decode(content) == (255, 0, 0)).all()


def test_16_bit_tiff_keeps_the_high_byte_in_either_order():
    samples = (np.arange(1200, dtype=np.uint16) * 54).reshape(30, 40)
    for order in ("<", ">"):
        picture = Image.fromarray(samples.astype(f"{order}u2"))
        decoded = images.decode(encode(picture, "TIFF"), gray=True)
        assert np.array_equal(decoded[:, :, 0], samples >> 8)


def test_floating_point_samples_are_refused():
    content = encode(Image.fromarray(np.zeros((4, 4), np.float32)), "TIFF")
    with pytest.raises(ImageUnsupported, match="'F'"):
        images.decode(content)


@pytest.mark.parametrize("kind", ["WebP", "AVIF", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_undone_or_left(kind, orientation):
    inverse = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }.get(orientation)
    stored = photograph() if inverse is None else photograph().transpose(inverse)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"WebP": {"lossless": True}, "AVIF": {"quality": 100}, "TIFF": {}}[kind]
    content = encode(stored, kind, exif=exif, **options)
    decoded = images.decode(content).astype(int)
    assert np.abs(decoded - np.asarray(photograph()).astype(int)).mean() < 3
    raw = images.decode(content, apply_exif_orientation=False).astype(int)
    assert np.abs(raw - np.asarray(stored).astype(int)).mean() < 3


def test_alpha_of_webp_lies_over_the_background():
    picture = photograph().convert("RGBA")
    picture.putalpha(0)
    content = encode(picture, "WebP", lossless=True, exact=True)
    assert (images.decode(content, background=(1, 2, 3)) == (1, 2, 3)).all()


def swapped_profile() -> bytes:
    """sRGB with the red and blue primaries exchanged: what it does cannot be overlooked."""
    content = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    count = int.from_bytes(content[128:132], "big")
    tags = {bytes(content[at : at + 4]): at for at in range(132, 132 + 12 * count, 12)}
    red, blue = tags[b"rXYZ"] + 4, tags[b"bXYZ"] + 4
    content[red : red + 8], content[blue : blue + 8] = (
        content[blue : blue + 8],
        content[red : red + 8],
    )
    return bytes(content)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WebP", "TIFF", "AVIF"])
def test_icc_profile_is_applied_when_asked_for_and_only_then(kind):
    profile = swapped_profile()
    content = encode(photograph(), kind, icc_profile=profile)
    opened = Image.open(io.BytesIO(content)).convert("RGB")
    expected = ImageCms.profileToProfile(
        opened,
        ImageCms.ImageCmsProfile(io.BytesIO(profile)),
        ImageCms.createProfile("sRGB"),
        outputMode="RGB",
    )
    converted = images.decode(content, apply_icc_profile=True)
    assert np.array_equal(converted, np.asarray(expected))
    assert np.abs(converted[:, :, ::-1].astype(int) - np.asarray(opened)).max() <= 3
    assert np.array_equal(images.decode(content), np.asarray(opened))
    steps = [decode(icc=True), resize(10, 8)]
    assert np.array_equal(
        Pipeline(steps).apply(content).array,
        np.asarray(expected.resize((10, 8), Image.Resampling.BILINEAR)),
    )


def test_icc_profile_keeps_transparency():
    picture = photograph().convert("RGBA")
    picture.putalpha(0)
    content = encode(picture, "PNG", icc_profile=swapped_profile())
    decoded = images.decode(content, apply_icc_profile=True, background=(7, 8, 9))
    assert (decoded == (7, 8, 9)).all()


@pytest.mark.parametrize("mode", ["L", "LA", "P", "CMYK", "1"])
def test_a_profile_for_other_colours_or_a_damaged_one_does_not_make_a_good_image_bad(mode):
    kind = "JPEG" if mode == "CMYK" else "PNG"
    picture = photograph().convert(mode)
    for profile in (b"no profile", swapped_profile()[:200], swapped_profile()):
        content = encode(picture, kind, icc_profile=profile)
        assert images.decode(content, apply_icc_profile=True).shape == (30, 40, 3)
    content = encode(picture, kind, icc_profile=b"no profile")
    assert np.array_equal(images.decode(content, apply_icc_profile=True), images.decode(content))


# -- Hostile files ----------------------------------------------------------------------------


def image_error_or_pixels(content: bytes) -> bool:
    try:
        pixels = images.decode(
            content, apply_icc_profile=True, limits=images.ImageLimits(max_pixels=4_000_000)
        )
    except ImageInvalid:
        return False
    assert pixels.dtype == np.uint8
    assert pixels.shape[2] == 3
    return True


@pytest.mark.parametrize("kind", FORMATS)
def test_truncated_at_50_places(kind):
    noise = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
    content = encode(Image.fromarray(noise), kind)
    # In TIFF the pixels come first or last; a trailer without pixels may be missing.
    places = random.Random(1).sample(range(1, len(content) - 16), 50)
    good = sum(image_error_or_pixels(content[:end]) for end in places)
    assert good <= (2 if kind == "TIFF" else 0)
    with pytest.raises(ImageDamaged, match=kind):
        images.decode(content[: len(content) // 2])


@pytest.mark.parametrize("kind", FORMATS)
def test_flipped_bits(kind):
    content = encode(photograph(), kind)
    chance = random.Random(2)
    for _ in range(150):
        damaged = bytearray(content)
        for _ in range(chance.choice((1, 3, 20))):
            damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
        image_error_or_pixels(bytes(damaged))


@pytest.mark.parametrize("kind", FORMATS)
def test_a_name_or_what_follows_does_not_matter(kind):
    content = encode(photograph(), kind)
    expected = images.decode(content)
    for tail in (b"<html><script>alert(1)</script>", b"PK\3\4" + b"\0" * 60, b"\0" * 1000):
        assert np.array_equal(images.decode(content + tail), expected)


def test_what_only_begins_like_an_image_is_damaged():
    for magic in (b"GIF89a", b"GIF89a/*<script>*/", b"BM", b"II*\0", b"MM\0*", b"\xff\xd8\xff"):
        with pytest.raises(ImageInvalid):
            images.decode(magic)
        with pytest.raises(ImageInvalid):
            images.decode(magic + b"<html></html>" * 20)
    with pytest.raises(ImageInvalid):
        images.decode(b"RIFF\xff\0\0\0WEBPVP8 " + b"\0" * 40)
    with pytest.raises(ImageInvalid):
        images.decode(b"\0\0\0\x1cftypavif\0\0\0\0avifmif1miaf" + b"\0" * 40)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_bomb(width: int, height: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(100_000))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    )


def lying_header(kind: str) -> bytes:
    """Return a file whose header says that it is as large as the format can say."""
    content = bytearray(encode(photograph(), kind))
    if kind == "JPEG":
        frame = content.index(b"\xff\xc0")
        content[frame + 5 : frame + 9] = b"\xff" * 4
    elif kind == "PNG":
        content = bytearray(png_bomb(60_000, 60_000))
    elif kind == "GIF":
        content[6:10] = b"\xff" * 4
    elif kind == "BMP":
        struct.pack_into("<ii", content, 18, 60_000, 60_000)
    elif kind == "WebP":
        assert content[12:16] == b"VP8 "
        content[26:30] = b"\xff\x3f\xff\x3f"
    elif kind == "AVIF":
        at = content.index(b"ispe") + 8
        struct.pack_into(">II", content, at, 16_000, 16_000)
    elif kind == "TIFF":
        order = "<" if content[:2] == b"II" else ">"
        (first,) = struct.unpack_from(f"{order}I", content, 4)
        (count,) = struct.unpack_from(f"{order}H", content, first)
        for at in range(first + 2, first + 2 + 12 * count, 12):
            if struct.unpack_from(f"{order}H", content, at)[0] in (256, 257):
                struct.pack_into(f"{order}HII", content, at + 2, 4, 1, 60_000)
    return bytes(content)


@pytest.mark.parametrize("kind", FORMATS)
def test_lying_headers_are_refused_before_any_pixel_is_decoded(kind):
    with pytest.raises(ImageTooLarge, match="pixels") as caught:
        images.decode(lying_header(kind))
    assert int(caught.value.metadata["width"]) >= 16_000


@pytest.mark.parametrize("options", [{}, {"lossless": True}, {"exif": b"Exif\0\0x"}])
def test_webp_of_every_kind_is_measured_before_it_is_opened(options):
    content = encode(photograph(300, 20), "WebP", **options)
    with pytest.raises(ImageTooLarge, match="300 × 20"):
        images.decode(content, limits=images.ImageLimits(max_pixels=5_999))
    assert images.decode(content, limits=images.ImageLimits(max_pixels=6_000)).shape[1] == 300


def test_a_gif_frame_beyond_its_screen_counts():
    content = bytearray(encode(photograph(), "GIF"))
    at = content.index(b",", 13 + 3 * 2 ** ((content[10] & 7) + 1))
    struct.pack_into("<HHHH", content, at + 1, 0, 0, 9_000, 9_000)
    with pytest.raises(ImageTooLarge):
        images.decode(bytes(content), limits=images.ImageLimits(max_pixels=1_000_000))


def test_gif_of_10000_frames_costs_one():
    frame = encode(Image.new("L", (16, 16), 7), "GIF")
    start = frame.index(b",", 13 + 3 * 2 ** ((frame[10] & 7) + 1))
    content = frame[:-1] + frame[start:-1] * 9_999 + b";"
    assert (images.decode(content) == 7).all()


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw"])
def test_tiff_with_cyclic_directories(compression):
    content = bytearray(encode(photograph(), "TIFF", compression=compression))
    (first,) = struct.unpack_from("<I", content, 4)
    (count,) = struct.unpack_from("<H", content, first)
    struct.pack_into("<I", content, first + 2 + 12 * count, first)
    assert np.array_equal(images.decode(bytes(content)), np.asarray(photograph()))


def test_many_pixels_in_few_bytes_are_refused():
    blank = encode(Image.new("1", (3000, 3000)), "PNG")
    with pytest.raises(ImageTooLarge, match="in only"):
        images.decode(blank, limits=images.ImageLimits(max_pixels_per_byte=1_000))
    assert images.decode(blank).shape == (3000, 3000, 3)
    with pytest.raises(ImageTooLarge, match="in only"):
        images.decode(encode(Image.new("RGB", (3000, 3000)), "WebP", lossless=True))
    # Whatever its ratio, a megapixel does no harm.
    small = encode(Image.new("1", (1000, 1000)), "PNG")
    limits = images.ImageLimits(max_pixels_per_byte=1)
    assert images.decode(small, limits=limits).shape == (1000, 1000, 3)
