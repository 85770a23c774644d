"""Paint answers over the images that they are about.

Needs Pillow (`pip install 'pollard-client[draw]'`), the one part of this package that does.
"""

from __future__ import annotations

import colorsys
import io
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, ImageOps

from pollard.client._images import ImageLike, encoded
from pollard.client.types import Prediction, ScoredLabel

UNSEEN = 255
"""Class of the pixels of a mask that the model did not see."""

_OPACITY = 0.5
_GOLDEN = 0.61803398875
"""Steps of the golden ratio around the colour wheel never come close to one another."""

_LINES = 5
_GRAY = (32, 32, 32)
_BACKGROUND = "background"

_LARGE_FONT, _SMALL_FONT = 13, 8
"""Sizes of letters for a picture of 240 pixels, and the smallest that can be read."""

_READABLE, _ENLARGED, _LONGEST = 100, 200, 2048
"""A picture whose shorter side has fewer pixels than the first is enlarged until it has the second,
but no side grows beyond the third."""


def draw(image: ImageLike, prediction: Prediction) -> Image.Image:
    """Return the upright image with what was answered painted over it.

    Boxes get their label and score, masks a colour for each class with a legend, classifications
    a caption. A class that is labelled "background" gets no colour: what it covers stays as it is.
    An image too small for words is enlarged by a whole number, each of its pixels to a square.

    Args:
        image: The image that was sent, as `VisionClient.predict` takes it.
        prediction: The answer.

    Raises:
        ValueError: the answer is about an image of another size.
        OSError: the image cannot be read.
    """
    with Image.open(io.BytesIO(encoded(image))) as opened:
        canvas = ImageOps.exif_transpose(opened).convert("RGB")
    if prediction.size is not None and prediction.size != canvas.size:
        raise ValueError(
            f"the answer is about an image of {prediction.size[0]} × {prediction.size[1]} pixels, "
            f"this one has {canvas.width} × {canvas.height}"
        )
    if prediction.mask is not None:
        background = [each.index for each in prediction.areas if _is_background(each)]
        canvas = _with_mask(canvas, prediction.mask, [UNSEEN, *background])
    times = _enlargement(canvas.size)
    canvas = canvas.resize((canvas.width * times, canvas.height * times), Image.Resampling.NEAREST)
    scale = max(1, round(min(canvas.size) / 240))
    pen = ImageDraw.Draw(canvas)
    size = _LARGE_FONT + 3 * (scale - 1)
    # Of a small picture something is to be seen beside its words.
    font = ImageFont.load_default(size=max(_SMALL_FONT, min(size, min(canvas.size) // 14)))
    # The best box is painted last, on top of the others.
    for found in reversed(prediction.objects or ()):
        color = color_of(found.label.index)
        x1, y1, x2, y2 = (times * edge for edge in (found.x1, found.y1, found.x2, found.y2))
        pen.rectangle((x1, y1, x2, y2), outline=color, width=1 + scale)
        # A rim, that a box is seen on an object of its colour.
        pen.rectangle((x1 - 1, y1 - 1, x2 + 1, y2 + 1), outline=_GRAY)
        text = f"{_name(found.label)} {found.label.score:.2f}"
        _tag(pen, font, text, (x1, y1), color, canvas.size)
    if prediction.mask is not None:
        _legend(
            pen,
            font,
            [
                (f"{_name(a)} {a.score:.0%}", _GRAY if _is_background(a) else color_of(a.index))
                for a in prediction.areas
            ],
        )
    elif prediction.labels:
        _legend(pen, font, [(f"{_name(a)} {a.score:.2f}", _GRAY) for a in prediction.labels])
    return canvas


def color_of(class_index: int) -> tuple[int, int, int]:
    """Return the colour that stands for a class, always the same."""
    bright = 0.95 if class_index % 2 == 0 else 0.8
    red, green, blue = colorsys.hsv_to_rgb(class_index * _GOLDEN % 1.0, 0.85, bright)
    return round(red * 255), round(green * 255), round(blue * 255)


def _enlargement(size: tuple[int, int]) -> int:
    shorter, longer = min(size), max(size)
    if shorter >= _READABLE:
        return 1
    return max(1, min(math.ceil(_ENLARGED / shorter), _LONGEST // longer))


def _is_background(label: ScoredLabel) -> bool:
    return label.label.lower() == _BACKGROUND


def _with_mask(
    canvas: Image.Image, mask: NDArray[np.uint8], unpainted: Sequence[int]
) -> Image.Image:
    palette = np.array([color_of(index) for index in range(256)], np.uint8)
    painted = Image.fromarray(palette[mask])
    opacity = np.where(np.isin(mask, unpainted), 0, round(255 * _OPACITY)).astype(np.uint8)
    canvas.paste(painted, mask=Image.fromarray(opacity))
    return canvas


def _name(label: ScoredLabel) -> str:
    return label.label or f"class {label.index}"


def _legend(
    pen: ImageDraw.ImageDraw,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    lines: list[tuple[str, tuple[int, int, int]]],
) -> None:
    top = 0.0
    for text, color in lines[:_LINES]:
        top = _tag(pen, font, text, (0, top), color, (1 << 30, 1 << 30), below=True)


def _tag(
    pen: ImageDraw.ImageDraw,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    text: str,
    at: tuple[float, float],
    color: tuple[int, int, int],
    size: tuple[int, int],
    *,
    below: bool = False,
) -> float:
    """Write on a patch of colour, above a point where there is room; return the lower edge."""
    left, _, right, _ = font.getbbox(text)
    # The same for every word, that lines are evenly far apart.
    _, top, _, bottom = font.getbbox("Ág")
    width, height = right - left + 6, bottom - top + 6
    x = max(0.0, min(at[0], size[0] - width))
    y = at[1] if below or at[1] < height else at[1] - height
    pen.rectangle((x, y, x + width, y + height), fill=color)
    light = 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2] > 140
    pen.text((x + 3 - left, y + 3 - top), text, fill="black" if light else "white", font=font)
    return y + height
