"""Preprocessing as data: the steps of a manifest, carried out with Pillow.

One implementation serves training, calibration, evaluation and serving, so the
pixels that a model meets are those that it was made for. They are the same as
those of a plain Pillow pipeline.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pollard.bundle.v1 import bundle_pb2
from pollard.runtime import images
from pollard.runtime.errors import ImageInvalid, ImageTooLarge, StepsInvalid, TensorInvalid
from pollard.runtime.images import ImageLimits

# Far beyond any input of a convolutional network; a manifest cannot ask for
# more memory than a large image takes.
MAX_SIDE = 16384
MAX_STEPS = 64

_FILTERS: dict[int, Image.Resampling] = {
    bundle_pb2.INTERPOLATION_UNSPECIFIED: Image.Resampling.BILINEAR,
    bundle_pb2.INTERPOLATION_NEAREST: Image.Resampling.NEAREST,
    bundle_pb2.INTERPOLATION_BILINEAR: Image.Resampling.BILINEAR,
    bundle_pb2.INTERPOLATION_BICUBIC: Image.Resampling.BICUBIC,
    bundle_pb2.INTERPOLATION_BOX: Image.Resampling.BOX,
    bundle_pb2.INTERPOLATION_LANCZOS: Image.Resampling.LANCZOS,
}

# Types that hold every pixel value, 0 to 255, unchanged.
_CAST_TYPES: dict[int, type[np.generic]] = {
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


@dataclass(frozen=True)
class Transformed:
    """One image, ready for the model."""

    array: NDArray[np.generic]
    """Height × width × channels, or channels × height × width after a
    normalisation to "NCHW"; contiguous, without the batch dimension."""
    geometry: Geometry
    """Where the image went."""


@dataclass
class _Work:
    """One image on its way through the steps."""

    image: Image.Image
    geometry: Geometry
    limits: ImageLimits
    array: NDArray[np.generic] | None = None

    def pixels(self) -> NDArray[np.generic]:
        if self.array is None:
            self.array = images.to_array(self.image)
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
class _Plan:
    """What is known of the image between two steps, before there is one."""

    channels: int = 3
    order: str = "RGB"
    width: int | None = None
    height: int | None = None
    dtype: type[np.generic] = np.uint8
    layout: str = "HWC"
    is_array: bool = False


_Run = Callable[[_Work], None]


class Pipeline:
    """The preprocessing of one revision. Immutable and safe to share between threads.

    Raises:
        StepsInvalid: the steps contradict each other or ask for something
            impossible or not supported; the message names the step.
    """

    def __init__(
        self,
        steps: Iterable[bundle_pb2.PreprocessStep],
        limits: ImageLimits | None = None,
    ) -> None:
        """Check and prepare ``steps``.

        Args:
            steps: As in ``Manifest.preprocess``; the first one decodes.
            limits: How large an image may be.
        """
        self.steps = tuple(steps)
        self.limits = limits or ImageLimits()
        if not self.steps:
            raise StepsInvalid("there are no preprocessing steps: the model does not take images")
        if len(self.steps) > MAX_STEPS:
            raise StepsInvalid(f"{len(self.steps)} steps; at most {MAX_STEPS} are allowed")
        plan = _Plan()
        self._decode = self._prepare_decode(plan)
        self._runs = [
            self._prepare(index, step, plan) for index, step in enumerate(self.steps) if index
        ]
        self._plan = plan

    @property
    def channels(self) -> int:
        """Number of channels, 1 or 3."""
        return self._plan.channels

    @property
    def layout(self) -> str:
        """Order of the dimensions of a result: "HWC" or "CHW"."""
        return self._plan.layout

    @property
    def dtype(self) -> np.dtype[np.generic]:
        """Element type of every result."""
        return np.dtype(self._plan.dtype)

    @property
    def output_shape(self) -> tuple[int, int, int] | None:
        """Shape of every result in `layout`; None when it depends on the image."""
        plan = self._plan
        if plan.width is None or plan.height is None:
            return None
        if plan.layout == "CHW":
            return (plan.channels, plan.height, plan.width)
        return (plan.height, plan.width, plan.channels)

    def apply(self, content: bytes) -> Transformed:
        """Decode and transform one encoded image.

        Raises:
            ImageInvalid: the image is empty, damaged, too large, none at all,
                or too small for a crop.
        """
        image = images.open_image(content, self.limits)
        if self._decode.apply_exif_orientation:
            image = images.upright(image)
        return self._run(self._to_color(image))

    def apply_pixels(self, pixels: NDArray[np.uint8]) -> Transformed:
        """Transform pixels that are decoded and upright already.

        The result is that of a PNG file of these pixels.

        Args:
            pixels: uint8, height × width, or height × width × 1 (grey),
                2 (grey and alpha), 3 (red, green, blue) or 4 (and alpha).

        Raises:
            TensorInvalid: the array has another shape or element type.
            ImageInvalid: it is too large, or too small for a crop.
        """
        try:
            image = images.from_array(pixels)
        except ValueError as error:
            raise TensorInvalid(str(error), shape=pixels.shape, dtype=pixels.dtype) from error
        return self._run(self._to_color(image))

    def check_fits(self, spec: bundle_pb2.TensorSpec) -> None:
        """Check that a batch of results fits the model's input.

        Raises:
            StepsInvalid: the steps give another type, layout or size than the
                input takes.
        """
        wanted = list(spec.shape)
        given = [-1, *(self.output_shape or self._open_shape())]
        fits = len(wanted) == 4 and all(
            -1 in (a, b) or a == b for a, b in zip(wanted[1:], given[1:], strict=True)
        )
        if not fits:
            raise StepsInvalid(
                f"the steps give tensors of shape {given}, the input {spec.name!r} takes {wanted}",
                input=spec.name,
                given=given,
                wanted=wanted,
            )
        if _CAST_TYPES.get(spec.data_type) is not self._plan.dtype:
            raise StepsInvalid(
                f"the steps give {self.dtype}, the input {spec.name!r} takes "
                f"{bundle_pb2.DataType.Name(spec.data_type)}",
                input=spec.name,
            )

    def _open_shape(self) -> tuple[int, int, int]:
        width, height = self._plan.width or -1, self._plan.height or -1
        if self._plan.layout == "CHW":
            return (self._plan.channels, height, width)
        return (height, width, self._plan.channels)

    def _to_color(self, image: Image.Image) -> Image.Image:
        gray = self._decode.color_mode == bundle_pb2.COLOR_MODE_GRAY
        return images.convert(image, gray=gray, background=tuple(self._decode.background))

    def _run(self, image: Image.Image) -> Transformed:
        work = _Work(image, Geometry(image.width, image.height), self.limits)
        for run in self._runs:
            run(work)
        return Transformed(np.ascontiguousarray(work.pixels()), work.geometry)

    def _prepare_decode(self, plan: _Plan) -> bundle_pb2.Decode:
        if self.steps[0].WhichOneof("step") != "decode":
            raise StepsInvalid("step 1 must be decode", step=1)
        message = self.steps[0].decode
        if message.color_mode not in bundle_pb2.ColorMode.values():
            raise StepsInvalid(f"step 1 (decode): unknown colour mode {message.color_mode}", step=1)
        if message.apply_icc_profile:
            raise StepsInvalid("step 1 (decode): ICC profiles are not supported yet", step=1)
        if message.reduced_scale:
            raise StepsInvalid("step 1 (decode): reduced_scale is not supported yet", step=1)
        _check_color("step 1 (decode): background", message.background, 3)
        if message.color_mode == bundle_pb2.COLOR_MODE_GRAY:
            plan.channels, plan.order = 1, "L"
        return message

    def _prepare(self, index: int, step: bundle_pb2.PreprocessStep, plan: _Plan) -> _Run:
        kind = step.WhichOneof("step")
        where = f"step {index + 1} ({kind})"
        if kind is None:
            raise StepsInvalid(f"step {index + 1} is empty or unknown", step=index + 1)
        if kind == "decode":
            raise StepsInvalid(f"{where}: only the first step decodes", step=index + 1)
        if kind == "five_crop":
            raise StepsInvalid(f"{where} is not supported yet", step=index + 1)
        if plan.is_array and kind not in ("cast", "normalize"):
            raise StepsInvalid(f"{where} must come before cast and normalize", step=index + 1)
        prepare = _PREPARE[kind]
        return prepare(getattr(step, kind), plan, where)


def _prepare_resize(message: bundle_pb2.Resize, plan: _Plan, where: str) -> _Run:
    if message.interpolation == bundle_pb2.INTERPOLATION_OPENCV_AREA:
        raise StepsInvalid(f"{where}: INTERPOLATION_OPENCV_AREA is not supported yet")
    if message.interpolation not in _FILTERS:
        raise StepsInvalid(f"{where}: unknown interpolation {message.interpolation}")
    resample = _FILTERS[message.interpolation]
    width, height = message.width, message.height
    if message.mode == bundle_pb2.RESIZE_MODE_SHORT_SIDE:
        _check_sides(where, height=height)
        if plan.width is not None and plan.height is not None:
            plan.width, plan.height = _short_side(plan.width, plan.height, height)
        else:
            plan.width = plan.height = None

        def short_side(work: _Work) -> None:
            _resize(work, _short_side(*work.image.size, height), resample)

        return short_side
    _check_sides(where, width=width, height=height)
    plan.width, plan.height = width, height
    if message.mode == bundle_pb2.RESIZE_MODE_EXACT:
        return lambda work: _resize(work, (width, height), resample)
    if message.mode != bundle_pb2.RESIZE_MODE_LETTERBOX:
        raise StepsInvalid(f"{where}: mode is not set or unknown ({message.mode})")
    fill = _color(f"{where}: fill", message.fill, plan.channels)

    def letterbox(work: _Work) -> None:
        old_width, old_height = work.image.size
        scale = min(width / old_width, height / old_height)
        inner = (
            min(width, max(1, round(old_width * scale))),
            min(height, max(1, round(old_height * scale))),
        )
        _resize(work, inner, resample)
        left, top = (width - inner[0]) // 2, (height - inner[1]) // 2
        _paste(work, (width, height), (left, top), fill)

    return letterbox


def _prepare_center_crop(message: bundle_pb2.CenterCrop, plan: _Plan, where: str) -> _Run:
    width, height = message.width, message.height
    _check_sides(where, width=width, height=height)
    if (plan.width or width) < width or (plan.height or height) < height:
        raise StepsInvalid(
            f"{where}: {width} × {height} does not fit into {plan.width} × {plan.height}"
        )
    plan.width, plan.height = width, height

    def center_crop(work: _Work) -> None:
        old_width, old_height = work.image.size
        if old_width < width or old_height < height:
            raise ImageInvalid(
                f"the image is too small: {old_width} × {old_height} where a crop of "
                f"{width} × {height} is taken",
                width=old_width,
                height=old_height,
                crop_width=width,
                crop_height=height,
            )
        # Python's rounding to even, as the reference pipelines do it.
        left = round((old_width - width) / 2)
        top = round((old_height - height) / 2)
        work.image = work.image.crop((left, top, left + width, top + height))
        work.moved(offset=(-left, -top))

    return center_crop


def _prepare_pad(message: bundle_pb2.Pad, plan: _Plan, where: str) -> _Run:
    left, top, right, bottom = message.left, message.top, message.right, message.bottom
    if max(left, top, right, bottom) > MAX_SIDE:
        raise StepsInvalid(f"{where}: a border is wider than {MAX_SIDE} pixels")
    fill = _color(f"{where}: fill", message.fill, plan.channels)
    if plan.width is not None:
        plan.width += left + right
    if plan.height is not None:
        plan.height += top + bottom

    def pad(work: _Work) -> None:
        width, height = work.image.size
        _paste(work, (width + left + right, height + top + bottom), (left, top), fill)

    return pad


def _prepare_flip(message: bundle_pb2.Flip, plan: _Plan, where: str) -> _Run:
    horizontal, vertical = message.horizontal, message.vertical

    def flip(work: _Work) -> None:
        if horizontal:
            work.image = work.image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            work.moved(scale=(-1, 1), offset=(work.image.width, 0))
        if vertical:
            work.image = work.image.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
            work.moved(scale=(1, -1), offset=(0, work.image.height))

    return flip


def _prepare_rotate(message: bundle_pb2.Rotate, plan: _Plan, where: str) -> _Run:
    turns = message.quarter_turns
    if turns > 3:
        raise StepsInvalid(f"{where}: quarter_turns is 0 to 3, not {turns}")
    if turns % 2:
        plan.width, plan.height = plan.height, plan.width

    def rotate(work: _Work) -> None:
        # Each counter-clockwise quarter turn exchanges the axes and mirrors the new vertical one.
        if turns:
            method = (
                Image.Transpose.ROTATE_90,
                Image.Transpose.ROTATE_180,
                Image.Transpose.ROTATE_270,
            )[turns - 1]
            for _ in range(turns):
                work.moved(transpose=True)
                work.moved(scale=(1, -1))
            width, height = work.image.size
            work.image = work.image.transpose(method)
            # The mirrored axes start again at zero.
            shift = {1: (0, width), 2: (width, height), 3: (height, 0)}[turns]
            work.moved(offset=shift)

    return rotate


def _prepare_color_order(message: bundle_pb2.ColorOrder, plan: _Plan, where: str) -> _Run:
    if message.order not in ("RGB", "BGR"):
        raise StepsInvalid(f'{where}: order is "RGB" or "BGR", not {message.order!r}')
    if plan.channels != 3:
        raise StepsInvalid(f"{where}: a grey image has no colour order")
    reverse = message.order != plan.order
    plan.order = message.order

    def color_order(work: _Work) -> None:
        if reverse:
            work.image = Image.merge("RGB", work.image.split()[::-1])

    return color_order


def _prepare_cast(message: bundle_pb2.Cast, plan: _Plan, where: str) -> _Run:
    dtype = _CAST_TYPES.get(message.data_type)
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

    def cast(work: _Work) -> None:
        work.array = work.pixels().astype(dtype, copy=False)

    return cast


def _prepare_normalize(message: bundle_pb2.Normalize, plan: _Plan, where: str) -> _Run:
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

    def normalize(work: _Work) -> None:
        array = work.pixels().astype(np.float32)
        array *= scale
        array -= mean
        array /= std
        work.array = array.transpose(2, 0, 1) if to_nchw else array

    return normalize


_PREPARE: dict[str, Callable[..., _Run]] = {
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


def _resize(work: _Work, size: tuple[int, int], resample: Image.Resampling) -> None:
    _check_size(work, size)
    old = work.image.size
    work.image = work.image.resize(size, resample)
    work.moved(scale=(size[0] / old[0], size[1] / old[1]))


def _paste(
    work: _Work, size: tuple[int, int], at: tuple[int, int], fill: tuple[int, ...]
) -> None:
    if size == work.image.size:
        return
    _check_size(work, size)
    canvas = Image.new(work.image.mode, size, fill[0] if len(fill) == 1 else fill)
    canvas.paste(work.image, at)
    work.image = canvas
    work.moved(offset=at)


def _check_size(work: _Work, size: tuple[int, int]) -> None:
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


def _check_color(where: str, color: Sequence[int], channels: int) -> None:
    if color and (len(color) != channels or max(color) > 255):
        raise StepsInvalid(f"{where} needs {channels} values of 0 to 255, not {list(color)}")


def _color(where: str, color: Sequence[int], channels: int) -> tuple[int, ...]:
    _check_color(where, color, channels)
    return tuple(color) or (0,) * channels
