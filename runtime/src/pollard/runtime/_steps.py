"""What each preprocessing step does: checked once, then run on every image.

`transforms.Pipeline` is the face of this module.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pollard.bundle.v1 import bundle_pb2
from pollard.runtime import images
from pollard.runtime.errors import ImageTooLarge, ImageTooSmall, StepsInvalid
from pollard.runtime.images import ImageLimits

# Far beyond any input of a convolutional network; a manifest cannot ask for
# more memory than a large image takes.
MAX_SIDE = 16384

_FILTERS: dict[int, Image.Resampling] = {
    bundle_pb2.INTERPOLATION_UNSPECIFIED: Image.Resampling.BILINEAR,
    bundle_pb2.INTERPOLATION_NEAREST: Image.Resampling.NEAREST,
    bundle_pb2.INTERPOLATION_BILINEAR: Image.Resampling.BILINEAR,
    bundle_pb2.INTERPOLATION_BICUBIC: Image.Resampling.BICUBIC,
    bundle_pb2.INTERPOLATION_BOX: Image.Resampling.BOX,
    bundle_pb2.INTERPOLATION_LANCZOS: Image.Resampling.LANCZOS,
}

# Types that hold every pixel value, 0 to 255, unchanged.
CAST_TYPES: dict[int, type[np.generic]] = {
    bundle_pb2.DATA_TYPE_UINT8: np.uint8,
    bundle_pb2.DATA_TYPE_UINT16: np.uint16,
    bundle_pb2.DATA_TYPE_UINT32: np.uint32,
    bundle_pb2.DATA_TYPE_UINT64: np.uint64,
    bundle_pb2.DATA_TYPE_INT16: np.int16,
    bundle_pb2.DATA_TYPE_INT32: np.int32,
    bundle_pb2.DATA_TYPE_INT64: np.int64,
    bundle_pb2.DATA_TYPE_FP16: np.float16,
    bundle_pb2.DATA_TYPE_FP32: np.float32,
    bundle_pb2.DATA_TYPE_FP64: np.float64,
}


@dataclass(frozen=True)
class Geometry:
    """Where the upright image went.

    A point (x, y) of the tensor, in pixels from the upper left corner, lies at
    ((x - offset_x) / scale_x, (y - offset_y) / scale_y) of the upright image.
    A mirrored axis has a negative scale. When ``transposed``, the tensor's x
    is compared with the image's y and the other way round:
    x_image = (y - offset_y) / scale_y, y_image = (x - offset_x) / scale_x.
    """

    width: int
    """Width of the upright image in pixels."""
    height: int
    """Height of the upright image in pixels."""
    scale_x: float = 1.0
    scale_y: float = 1.0
    offset_x: float = 0.0
    offset_y: float = 0.0
    transposed: bool = False
    """Whether a quarter turn exchanged the axes."""

    def to_image(self, x: float, y: float) -> tuple[float, float]:
        """Return the point of the upright image that is shown at (x, y) of the tensor."""
        along = (x - self.offset_x) / self.scale_x
        down = (y - self.offset_y) / self.scale_y
        return (down, along) if self.transposed else (along, down)


class Work:
    """One image on its way through the steps.

    OpenCV leaves an array where Pillow leaves an image. The one becomes the other, which
    copies every pixel, when a step asks for it and not before.
    """

    def __init__(
        self,
        image: Image.Image,
        geometry: Geometry,
        limits: ImageLimits,
        full_size: tuple[int, int] | None = None,
    ) -> None:
        self._held: Image.Image | NDArray[np.uint8] = image
        self.geometry = geometry
        self.limits = limits
        self.array: NDArray[np.generic] | None = None
        """What the steps that give no image have made."""
        self.full_size = full_size
        """Size before the decoder scaled down; what comes out must not depend on that."""

    @property
    def image(self) -> Image.Image:
        if isinstance(self._held, np.ndarray):
            self._held = Image.fromarray(self._held)
        return self._held

    @image.setter
    def image(self, image: Image.Image) -> None:
        self._held = image

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        if isinstance(self._held, np.ndarray):
            return self._held.shape[1], self._held.shape[0]
        return self._held.size

    def draw(self, pixels: NDArray[np.uint8]) -> None:
        """Go on with these pixels, height × width (× 3)."""
        self._held = pixels

    def cut(self, left: int, top: int, width: int, height: int) -> None:
        """Go on with a part that lies within."""
        if isinstance(self._held, np.ndarray):
            self._held = self._held[top : top + height, left : left + width]
        else:
            self._held = self._held.crop((left, top, left + width, top + height))

    def pixels(self) -> NDArray[np.generic]:
        if self.array is None:
            if isinstance(self._held, np.ndarray):
                self.array = np.ascontiguousarray(images.with_channels(self._held))
            else:
                self.array = images.to_array(self._held)
        return self.array

    def moved(
        self,
        *,
        scale: tuple[float, float] = (1.0, 1.0),
        offset: tuple[float, float] = (0.0, 0.0),
        transpose: bool = False,
    ) -> None:
        """Record that points went to (x * scale + offset), then, perhaps, changed axes."""
        old = self.geometry
        scale_x, scale_y = old.scale_x * scale[0], old.scale_y * scale[1]
        offset_x = old.offset_x * scale[0] + offset[0]
        offset_y = old.offset_y * scale[1] + offset[1]
        if transpose:
            scale_x, scale_y = scale_y, scale_x
            offset_x, offset_y = offset_y, offset_x
        self.geometry = Geometry(
            old.width,
            old.height,
            scale_x,
            scale_y,
            offset_x,
            offset_y,
            old.transposed != transpose,
        )


@dataclass
class Plan:
    """What is known of the image between two steps, before there is one."""

    channels: int = 3
    order: str = "RGB"
    width: int | None = None
    height: int | None = None
    dtype: type[np.generic] = np.uint8
    layout: str = "HWC"
    is_array: bool = False
    views: int = 1


Run = Callable[[Work], None]


class FiveCrop:
    """The step that makes five of one: the corners, then the centre."""

    views = 5

    def __init__(self, width: int, height: int) -> None:
        self.width = width
        self.height = height

    def parts(self, work: Work) -> list[Work]:
        """Return the five crops."""
        _check_fits(work, self.width, self.height)
        right = work.size[0] - self.width
        bottom = work.size[1] - self.height
        corners = [(0, 0), (right, 0), (0, bottom), (right, bottom)]
        parts = []
        for left, top in [*corners, _center(work, self.width, self.height)]:
            part = Work(work.image, work.geometry, work.limits)
            _crop(part, left, top, self.width, self.height)
            parts.append(part)
        return parts


def prepare_five_crop(message: bundle_pb2.FiveCrop, plan: Plan, where: str) -> FiveCrop:
    if plan.views > 1:
        raise StepsInvalid(f"{where}: only one step cuts out five crops")
    _plan_crop(plan, message.width, message.height, where)
    plan.views = FiveCrop.views
    return FiveCrop(message.width, message.height)


def wanted_size(message: bundle_pb2.Resize, size: tuple[int, int]) -> tuple[int, int]:
    """Return the size to which a checked resize step scales an image of that size."""
    if message.mode == bundle_pb2.RESIZE_MODE_SHORT_SIDE:
        return _short_side(*size, message.height)
    if message.mode == bundle_pb2.RESIZE_MODE_LETTERBOX:
        return _within(size, message.width, message.height)
    return message.width, message.height


def _prepare_resize(message: bundle_pb2.Resize, plan: Plan, where: str) -> Run:
    resample = _resampler(message.interpolation, where)
    width, height = message.width, message.height
    if message.mode == bundle_pb2.RESIZE_MODE_SHORT_SIDE:
        _check_sides(where, height=height)
        if plan.width is not None and plan.height is not None:
            plan.width, plan.height = _short_side(plan.width, plan.height, height)
        else:
            plan.width = plan.height = None

        def short_side(work: Work) -> None:
            _resize(work, _short_side(*(work.full_size or work.size), height), resample)

        return short_side
    _check_sides(where, width=width, height=height)
    plan.width, plan.height = width, height
    if message.mode == bundle_pb2.RESIZE_MODE_EXACT:
        return lambda work: _resize(work, (width, height), resample)
    if message.mode != bundle_pb2.RESIZE_MODE_LETTERBOX:
        raise StepsInvalid(f"{where}: mode is not set or unknown ({message.mode})")
    fill = _color(f"{where}: fill", message.fill, plan.channels)

    def letterbox(work: Work) -> None:
        inner = _within(work.full_size or work.size, width, height)
        _resize(work, inner, resample)
        left, top = (width - inner[0]) // 2, (height - inner[1]) // 2
        _paste(work, (width, height), (left, top), fill)

    return letterbox


def _prepare_center_crop(message: bundle_pb2.CenterCrop, plan: Plan, where: str) -> Run:
    width, height = message.width, message.height
    _plan_crop(plan, width, height, where)

    def center_crop(work: Work) -> None:
        _check_fits(work, width, height)
        _crop(work, *_center(work, width, height), width, height)

    return center_crop


def _plan_crop(plan: Plan, width: int, height: int, where: str) -> None:
    _check_sides(where, width=width, height=height)
    if (plan.width or width) < width or (plan.height or height) < height:
        raise StepsInvalid(
            f"{where}: {width} × {height} does not fit into {plan.width} × {plan.height}"
        )
    plan.width, plan.height = width, height


def _check_fits(work: Work, width: int, height: int) -> None:
    old_width, old_height = work.size
    if old_width < width or old_height < height:
        raise ImageTooSmall(
            f"the image is too small: {old_width} × {old_height} where a crop of "
            f"{width} × {height} is taken",
            width=old_width,
            height=old_height,
            crop_width=width,
            crop_height=height,
        )


def _center(work: Work, width: int, height: int) -> tuple[int, int]:
    # Python's rounding to even, as the reference pipelines do it.
    return round((work.size[0] - width) / 2), round((work.size[1] - height) / 2)


def _crop(work: Work, left: int, top: int, width: int, height: int) -> None:
    work.cut(left, top, width, height)
    work.moved(offset=(-left, -top))


def _prepare_pad(message: bundle_pb2.Pad, plan: Plan, where: str) -> Run:
    left, top, right, bottom = message.left, message.top, message.right, message.bottom
    if max(left, top, right, bottom) > MAX_SIDE:
        raise StepsInvalid(f"{where}: a border is wider than {MAX_SIDE} pixels")
    fill = _color(f"{where}: fill", message.fill, plan.channels)
    if plan.width is not None:
        plan.width += left + right
    if plan.height is not None:
        plan.height += top + bottom

    def pad(work: Work) -> None:
        width, height = work.size
        _paste(work, (width + left + right, height + top + bottom), (left, top), fill)

    return pad


def _prepare_flip(message: bundle_pb2.Flip, plan: Plan, where: str) -> Run:
    horizontal, vertical = message.horizontal, message.vertical

    def flip(work: Work) -> None:
        if horizontal:
            work.image = work.image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            work.moved(scale=(-1, 1), offset=(work.image.width, 0))
        if vertical:
            work.image = work.image.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
            work.moved(scale=(1, -1), offset=(0, work.image.height))

    return flip


def _prepare_rotate(message: bundle_pb2.Rotate, plan: Plan, where: str) -> Run:
    turns = message.quarter_turns
    if turns > 3:
        raise StepsInvalid(f"{where}: quarter_turns is 0 to 3, not {turns}")
    if turns % 2:
        plan.width, plan.height = plan.height, plan.width

    def rotate(work: Work) -> None:
        # A counter-clockwise quarter turn exchanges the axes and mirrors the new vertical one.
        for _ in range(turns):
            work.image = work.image.transpose(Image.Transpose.ROTATE_90)
            work.moved(transpose=True)
            work.moved(scale=(1, -1), offset=(0, work.image.height))

    return rotate


def _prepare_color_order(message: bundle_pb2.ColorOrder, plan: Plan, where: str) -> Run:
    if message.order not in ("RGB", "BGR"):
        raise StepsInvalid(f'{where}: order is "RGB" or "BGR", not {message.order!r}')
    if plan.channels != 3:
        raise StepsInvalid(f"{where}: a grey image has no colour order")
    reverse = message.order != plan.order
    plan.order = message.order

    def color_order(work: Work) -> None:
        if reverse:
            work.image = Image.merge("RGB", work.image.split()[::-1])

    return color_order


def _prepare_cast(message: bundle_pb2.Cast, plan: Plan, where: str) -> Run:
    dtype = CAST_TYPES.get(message.data_type)
    name = (
        bundle_pb2.DataType.Name(message.data_type)
        if message.data_type in bundle_pb2.DataType.values()
        else str(message.data_type)
    )
    if dtype is None:
        raise StepsInvalid(f"{where}: {name} cannot hold pixels")
    if issubclass(plan.dtype, np.floating) and not issubclass(dtype, np.floating):
        raise StepsInvalid(f"{where}: {name} cannot hold the fractions of a float")
    plan.dtype, plan.is_array = dtype, True

    def cast(work: Work) -> None:
        work.array = work.pixels().astype(dtype, copy=False)

    return cast


def _prepare_normalize(message: bundle_pb2.Normalize, plan: Plan, where: str) -> Run:
    if len(message.mean) != plan.channels or len(message.std) != plan.channels:
        raise StepsInvalid(
            f"{where}: mean and std need {plan.channels} values each, "
            f"not {len(message.mean)} and {len(message.std)}"
        )
    scale = np.float32(message.scale)
    mean = np.asarray(message.mean, np.float32)
    std = np.asarray(message.std, np.float32)
    if not (np.isfinite(scale) and np.isfinite(mean).all() and np.isfinite(std).all()):
        raise StepsInvalid(f"{where}: scale, mean and std must be finite")
    if scale == 0 or (std == 0).any():
        raise StepsInvalid(f"{where}: scale and std must not be 0")
    if message.layout not in ("", "NHWC", "NCHW"):
        raise StepsInvalid(f'{where}: layout is "NHWC" or "NCHW", not {message.layout!r}')
    if plan.layout != "HWC":
        raise StepsInvalid(f"{where}: the image is normalised and transposed already")
    plan.dtype, plan.is_array = np.float32, True
    to_nchw = message.layout == "NCHW"
    if to_nchw:
        plan.layout = "CHW"

    def normalize(work: Work) -> None:
        array = work.pixels().astype(np.float32)
        array *= scale
        array -= mean
        array /= std
        work.array = array.transpose(2, 0, 1) if to_nchw else array

    return normalize


PREPARE: dict[str, Callable[..., Run]] = {
    "resize": _prepare_resize,
    "center_crop": _prepare_center_crop,
    "pad": _prepare_pad,
    "flip": _prepare_flip,
    "rotate": _prepare_rotate,
    "color_order": _prepare_color_order,
    "cast": _prepare_cast,
    "normalize": _prepare_normalize,
}


def _short_side(width: int, height: int, size: int) -> tuple[int, int]:
    if width <= height:
        return size, int(size * height / width)
    return int(size * width / height), size


def _within(size: tuple[int, int], width: int, height: int) -> tuple[int, int]:
    scale = min(width / size[0], height / size[1])
    return (
        min(width, max(1, round(size[0] * scale))),
        min(height, max(1, round(size[1] * scale))),
    )


Resample = Callable[[Work, tuple[int, int]], None]


def _resampler(interpolation: int, where: str) -> Resample:
    if interpolation == bundle_pb2.INTERPOLATION_OPENCV_AREA:
        return _opencv_area(where)
    if interpolation not in _FILTERS:
        raise StepsInvalid(f"{where}: unknown interpolation {interpolation}")
    resample = _FILTERS[interpolation]

    def resized(work: Work, size: tuple[int, int]) -> None:
        work.image = work.image.resize(size, resample)

    return resized


def _opencv_area(where: str) -> Resample:
    try:
        cv2 = importlib.import_module("cv2")
    except ImportError as error:
        raise StepsInvalid(
            f"{where}: INTERPOLATION_OPENCV_AREA needs OpenCV, which is not installed here; "
            "pip install 'pollard-runtime[opencv]'"
        ) from error

    def area(work: Work, size: tuple[int, int]) -> None:
        work.draw(cv2.resize(np.asarray(work.image), size, interpolation=cv2.INTER_AREA))

    return area


def _resize(work: Work, size: tuple[int, int], resample: Resample) -> None:
    _check_size(work, size)
    old = work.size
    resample(work, size)
    work.full_size = None
    work.moved(scale=(size[0] / old[0], size[1] / old[1]))


def _paste(work: Work, size: tuple[int, int], at: tuple[int, int], fill: tuple[int, ...]) -> None:
    if size == work.size:
        return
    _check_size(work, size)
    canvas = Image.new(work.image.mode, size, fill[0] if len(fill) == 1 else fill)
    canvas.paste(work.image, at)
    work.image = canvas
    work.moved(offset=at)


def _check_size(work: Work, size: tuple[int, int]) -> None:
    # A long thin image grows without bound when its short side is scaled up.
    if size[0] * size[1] > work.limits.max_pixels:
        raise ImageTooLarge(
            f"the image would become {size[0]} × {size[1]} pixels; "
            f"at most {work.limits.max_pixels} are allowed in all",
            width=size[0],
            height=size[1],
            limit_pixels=work.limits.max_pixels,
        )


def _check_sides(where: str, **sides: int) -> None:
    for name, value in sides.items():
        if not 1 <= value <= MAX_SIDE:
            raise StepsInvalid(f"{where}: {name} is 1 to {MAX_SIDE}, not {value}")


def check_color(where: str, color: Sequence[int], channels: int) -> None:
    if color and (len(color) != channels or max(color) > 255):
        raise StepsInvalid(f"{where} needs {channels} values of 0 to 255, not {list(color)}")


def _color(where: str, color: Sequence[int], channels: int) -> tuple[int, ...]:
    check_color(where, color, channels)
    return tuple(color) or (0,) * channels
