"""What a model takes: size, pixels, normalisation. Shared by data, export and bundle."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from pollard.bundle.v1 import bundle_pb2
from pollard.compress.errors import UsageInvalid
from pollard.runtime import transforms

# Grey of a letterbox's border.
_FILL = 114

Augmentation = Literal["none", "shift", "crop-flip"]


@dataclass(frozen=True)
class InputSpec:
    """The image input of a model."""

    height: int
    """Height in pixels."""
    width: int
    """Width in pixels."""
    channels: int
    """1 (grey) or 3 (red, green, blue)."""
    mean: tuple[float, ...]
    """Subtracted from pixels scaled to 0-1; one value per channel."""
    std: tuple[float, ...]
    """Divided by after that; one value per channel."""
    augmentation: Augmentation = "none"
    """What training does to its images: "shift" moves them by up to a tenth,
    "crop-flip" moves them and mirrors every other one."""
    short_side: int = 0
    """Pixels that the shorter side is scaled to before the centre is cut out, as is
    usual for ImageNet; 0 scales the whole image to `height` × `width`."""
    letterbox: bool = False
    """Whether the whole image is scaled to fit within `height` × `width` with its proportions
    kept, and the rest filled with grey, as is usual for detectors."""

    def __post_init__(self) -> None:
        if self.channels not in (1, 3):
            raise UsageInvalid(f"images have 1 or 3 channels, not {self.channels}")
        if self.height < 1 or self.width < 1:
            raise UsageInvalid(f"an input of {self.height}x{self.width} pixels is none")
        if len(self.mean) != self.channels or len(self.std) != self.channels:
            raise UsageInvalid(
                f"mean {self.mean} and std {self.std} need one value for each of the "
                f"{self.channels} channels"
            )
        if not all(math.isfinite(value) for value in (*self.mean, *self.std)):
            raise UsageInvalid(f"mean {self.mean} and std {self.std} must be finite")
        if any(value <= 0 for value in self.std):
            raise UsageInvalid(f"std {self.std} must be positive")
        if self.short_side and self.short_side < max(self.height, self.width):
            raise UsageInvalid(
                f"the shorter side is scaled to {self.short_side} pixels; no "
                f"{self.height}x{self.width} can be cut out of that"
            )

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width, channels."""
        return (self.height, self.width, self.channels)

    def steps(self) -> list[bundle_pb2.PreprocessStep]:
        """Return the steps from an image file to uint8 pixels of `shape`."""
        decode = transforms.decode(gray=self.channels == 1)
        if self.letterbox:
            mode = bundle_pb2.RESIZE_MODE_LETTERBOX
            fill = [_FILL] * self.channels
            return [decode, transforms.resize(self.width, self.height, mode=mode, fill=fill)]
        if not self.short_side:
            return [decode, transforms.resize(self.width, self.height)]
        mode = bundle_pb2.RESIZE_MODE_SHORT_SIDE
        return [
            decode,
            transforms.resize(0, self.short_side, mode=mode),
            transforms.center_crop(self.width, self.height),
        ]

    @cached_property
    def pipeline(self) -> transforms.Pipeline:
        """The steps, ready to run: the same implementation as in serving."""
        return transforms.Pipeline(self.steps())

    def normalize(
        self, pixels: NDArray[np.uint8] | torch.Tensor, device: torch.device | None = None
    ) -> torch.Tensor:
        """Turn pixels into what the PyTorch model takes.

        Args:
            pixels: uint8 [batch, height, width, channels].
            device: Where to compute; where the pixels are if None.

        Returns:
            float32 [batch, channels, height, width], (pixel / 255 - mean) / std.
        """
        tensor = torch.from_numpy(pixels) if isinstance(pixels, np.ndarray) else pixels
        # Bytes travel to a device, a quarter of the floats.
        tensor = tensor if device is None else tensor.to(device)
        mean = torch.tensor(self.mean).view(1, -1, 1, 1).to(tensor.device)
        std = torch.tensor(self.std).view(1, -1, 1, 1).to(tensor.device)
        return ((tensor.permute(0, 3, 1, 2).float() / 255.0 - mean) / std).contiguous()


def parse_size(text: str) -> tuple[int, int, int]:
    """Read "HxWxC", such as "64x64x3".

    Raises:
        UsageInvalid: it is not of that form.
    """
    parts = text.lower().replace("×", "x").split("x")
    if len(parts) != 3 or not all(part.isdigit() for part in parts):
        raise UsageInvalid(f"input size {text!r} is not HEIGHTxWIDTHxCHANNELS, such as 64x64x3")
    height, width, channels = (int(part) for part in parts)
    return height, width, channels


def parse_channels(text: str, channels: int, name: str) -> tuple[float, ...]:
    """Read one number for all channels or one for each, separated by commas.

    Raises:
        UsageInvalid: something is not a number, or their count is wrong.
    """
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UsageInvalid(f"{name} {text!r} is not a list of numbers such as 0.5,0.5") from None
    if len(values) == 1:
        values = values * channels
    if len(values) != channels:
        raise UsageInvalid(f"{name} {text!r} has {len(values)} values for {channels} channels")
    return values
