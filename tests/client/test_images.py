"""Whatever is given as an image arrives as the bytes of a file with the same pixels."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from pollard.client._images import encoded, png


@given(
    st.sampled_from([(), (1,), (3,), (4,)]).flatmap(
        lambda tail: st.tuples(st.integers(1, 9), st.integers(1, 9)).flatmap(
            lambda size: hnp.arrays(np.uint8, (*size, *tail))
        )
    )
)
def test_pixels_become_a_png_that_holds_them(pixels: np.ndarray) -> None:
    with Image.open(io.BytesIO(png(pixels))) as image:
        back = np.asarray(image)
    np.testing.assert_array_equal(back, pixels[:, :, 0] if pixels.shape[2:] == (1,) else pixels)


def test_files_are_sent_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "x.jpg"
    path.write_bytes(b"whatever is in it")
    assert encoded(path) == encoded(str(path)) == b"whatever is in it"
    assert encoded(bytearray(b"ab")) == encoded(memoryview(b"ab")) == b"ab"


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV"])
def test_pillow_images_of_any_mode_become_files(mode: str) -> None:
    image = Image.new("RGB", (5, 4), (200, 100, 50)).convert(mode)
    with Image.open(io.BytesIO(encoded(image))) as back:
        assert back.size == (5, 4)


@pytest.mark.parametrize(
    "pixels",
    [
        np.zeros((4, 4), np.float32),
        np.zeros((4, 4, 2), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
        np.zeros((1, 4, 4, 3), np.uint8),
    ],
)
def test_arrays_that_are_no_picture_are_refused(pixels: np.ndarray) -> None:
    with pytest.raises(ValueError, match="pixels must"):
        png(pixels)


def test_other_things_are_refused() -> None:
    with pytest.raises(TypeError, match="int"):
        encoded(3)  # type: ignore[arg-type]  # what is tested


def test_a_missing_file_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        encoded(tmp_path / "none.png")
