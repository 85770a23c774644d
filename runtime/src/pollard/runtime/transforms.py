"""Preprocessing as data: the steps of a manifest, carried out with Pillow.

One implementation serves training, calibration, evaluation and serving, so the
pixels that a model meets are those that it was made for. They are the same as
those of a plain Pillow pipeline.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, JpegImagePlugin

from pollard.bundle.v1 import bundle_pb2
from pollard.runtime import images
from pollard.runtime._steps import (
    CAST_TYPES,
    PREPARE,
    FiveCrop,
    Geometry,
    Plan,
    Run,
    Work,
    check_color,
    prepare_five_crop,
    wanted_size,
)
from pollard.runtime.errors import StepsInvalid, TensorInvalid
from pollard.runtime.images import ImageLimits

__all__ = [
    "Geometry",
    "Pipeline",
    "Transformed",
    "cast",
    "center_crop",
    "color_order",
    "decode",
    "five_crop",
    "flip",
    "normalize",
    "pad",
    "resize",
    "rotate",
]

MAX_STEPS = 64


@dataclass(frozen=True)
class Transformed:
    """One image, ready for the model."""

    array: NDArray[np.generic]
    """Height × width × channels, or channels × height × width after a
    normalisation to "NCHW"; contiguous. With one view without the batch
    dimension, with several views they lie along the first dimension."""
    geometry: Geometry
    """Where the image went; with five crops, that of the centre."""
    geometries: tuple[Geometry, ...] = ()
    """Where the image went, for each view; empty means one, `geometry`."""

    @property
    def batch(self) -> NDArray[np.generic]:
        """The views along the first dimension, also when there is only one."""
        return self.array if self.geometries else self.array[np.newaxis]


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
        plan = Plan()
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
    def views(self) -> int:
        """Number of tensors that one image gives: 5 with five crops, otherwise 1."""
        return self._plan.views

    @property
    def output_shape(self) -> tuple[int, int, int] | None:
        """Shape of every view in `layout`; None when it depends on the image."""
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
        full: tuple[int, int] | None = None

        def shrink(image: Image.Image) -> None:
            nonlocal full
            if isinstance(image, JpegImagePlugin.JpegImageFile) and self._reduce is not None:
                turn = self._decode.apply_exif_orientation
                full = images.upright_size(image) if turn else image.size
                wanted = wanted_size(self._reduce, full)
                image.draft(None, wanted if full == image.size else wanted[::-1])

        image = images.open_image(content, self.limits, shrink)
        if self._decode.apply_exif_orientation:
            image = images.upright(image)
        if self._decode.apply_icc_profile:
            image = images.to_srgb(image)
        return self._run(self._to_color(image), full or image.size)

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
        return self._run(self._to_color(image), image.size)

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
        if CAST_TYPES.get(spec.data_type) is not self._plan.dtype:
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

    def _run(self, image: Image.Image, full: tuple[int, int]) -> Transformed:
        start = Geometry(*full, image.width / full[0], image.height / full[1])
        works = [Work(image, start, self.limits, full_size=None if full == image.size else full)]
        del image  # large; every step may let it go
        for run in self._runs:
            if isinstance(run, FiveCrop):
                works = [part for work in works for part in run.parts(work)]
                continue
            for work in works:
                run(work)
        if self.views == 1:
            return Transformed(np.ascontiguousarray(works[0].pixels()), works[0].geometry)
        geometries = tuple(work.geometry for work in works)
        return Transformed(np.stack([work.pixels() for work in works]), geometries[-1], geometries)

    def _prepare_decode(self, plan: Plan) -> bundle_pb2.Decode:
        if self.steps[0].WhichOneof("step") != "decode":
            raise StepsInvalid("step 1 must be decode", step=1)
        message = self.steps[0].decode
        if message.color_mode not in bundle_pb2.ColorMode.values():
            raise StepsInvalid(f"step 1 (decode): unknown colour mode {message.color_mode}", step=1)
        self._reduce: bundle_pb2.Resize | None = None
        if message.reduced_scale:
            if len(self.steps) < 2 or self.steps[1].WhichOneof("step") != "resize":
                raise StepsInvalid(
                    "step 1 (decode): reduced_scale needs a resize as step 2", step=1
                )
            self._reduce = self.steps[1].resize
        check_color("step 1 (decode): background", message.background, 3)
        if message.color_mode == bundle_pb2.COLOR_MODE_GRAY:
            plan.channels, plan.order = 1, "L"
        return message

    def _prepare(self, index: int, step: bundle_pb2.PreprocessStep, plan: Plan) -> Run | FiveCrop:
        kind = step.WhichOneof("step")
        where = f"step {index + 1} ({kind})"
        if kind is None:
            raise StepsInvalid(f"step {index + 1} is empty or unknown", step=index + 1)
        if kind == "decode":
            raise StepsInvalid(f"{where}: only the first step decodes", step=index + 1)
        if plan.is_array and kind not in ("cast", "normalize"):
            raise StepsInvalid(f"{where} must come before cast and normalize", step=index + 1)
        if kind == "five_crop":
            return prepare_five_crop(step.five_crop, plan, where)
        prepare = PREPARE[kind]
        return prepare(getattr(step, kind), plan, where)


def decode(
    *,
    gray: bool = False,
    exif: bool = True,
    icc: bool = False,
    reduced_scale: bool = False,
    background: Sequence[int] = (),
) -> bundle_pb2.PreprocessStep:
    """Return a step that decodes to red, green and blue, or to grey, upright.

    With ``icc``, embedded colour profiles are converted to sRGB; with
    ``reduced_scale``, the JPEG decoder may scale down to what the resize that
    follows needs.
    """
    mode = bundle_pb2.COLOR_MODE_GRAY if gray else bundle_pb2.COLOR_MODE_RGB
    return bundle_pb2.PreprocessStep(
        decode=bundle_pb2.Decode(
            color_mode=mode,
            apply_exif_orientation=exif,
            apply_icc_profile=icc,
            reduced_scale=reduced_scale,
            background=background,
        )
    )


def resize(
    width: int,
    height: int,
    *,
    mode: bundle_pb2.ResizeMode.ValueType = bundle_pb2.RESIZE_MODE_EXACT,
    interpolation: bundle_pb2.Interpolation.ValueType = bundle_pb2.INTERPOLATION_BILINEAR,
    fill: Sequence[int] = (),
) -> bundle_pb2.PreprocessStep:
    """Return a step that resizes; ``RESIZE_MODE_SHORT_SIDE`` takes the height only."""
    return bundle_pb2.PreprocessStep(
        resize=bundle_pb2.Resize(
            mode=mode, width=width, height=height, interpolation=interpolation, fill=fill
        )
    )


def center_crop(width: int, height: int) -> bundle_pb2.PreprocessStep:
    """Return a step that cuts out the centre."""
    return bundle_pb2.PreprocessStep(center_crop=bundle_pb2.CenterCrop(width=width, height=height))


def five_crop(width: int, height: int) -> bundle_pb2.PreprocessStep:
    """Return a step that cuts out the four corners and the centre: five views of one image."""
    return bundle_pb2.PreprocessStep(five_crop=bundle_pb2.FiveCrop(width=width, height=height))


def pad(
    left: int, top: int, right: int, bottom: int, *, fill: Sequence[int] = ()
) -> bundle_pb2.PreprocessStep:
    """Return a step that adds a border, in pixels."""
    return bundle_pb2.PreprocessStep(
        pad=bundle_pb2.Pad(left=left, top=top, right=right, bottom=bottom, fill=fill)
    )


def flip(*, horizontal: bool = False, vertical: bool = False) -> bundle_pb2.PreprocessStep:
    """Return a step that mirrors."""
    return bundle_pb2.PreprocessStep(flip=bundle_pb2.Flip(horizontal=horizontal, vertical=vertical))


def rotate(quarter_turns: int) -> bundle_pb2.PreprocessStep:
    """Return a step that turns counter-clockwise."""
    return bundle_pb2.PreprocessStep(rotate=bundle_pb2.Rotate(quarter_turns=quarter_turns))


def color_order(order: str) -> bundle_pb2.PreprocessStep:
    """Return a step that orders the channels, "RGB" or "BGR"."""
    return bundle_pb2.PreprocessStep(color_order=bundle_pb2.ColorOrder(order=order))


def cast(data_type: bundle_pb2.DataType.ValueType) -> bundle_pb2.PreprocessStep:
    """Return a step that changes the element type and keeps the values."""
    return bundle_pb2.PreprocessStep(cast=bundle_pb2.Cast(data_type=data_type))


def normalize(
    mean: Sequence[float], std: Sequence[float], *, scale: float = 1 / 255, layout: str = "NHWC"
) -> bundle_pb2.PreprocessStep:
    """Return a step that computes (x * scale - mean) / std in float32."""
    return bundle_pb2.PreprocessStep(
        normalize=bundle_pb2.Normalize(scale=scale, mean=mean, std=std, layout=layout)
    )
