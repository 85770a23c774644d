"""What training does to its images, so that a network does not learn them by heart.

Chance is drawn for a whole batch and applied to any part of it: the processes of a
data-parallel run draw the same and each augments its own share.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from pollard.compress.errors import UsageInvalid
from pollard.compress.spec import InputSpec


@dataclass(frozen=True)
class Augment:
    """How images are changed; 0 leaves a kind out."""

    shift: float = 0.0
    """Moved by up to so much of height and width, filled with black."""
    flip: bool = False
    """Every other image is mirrored."""
    rotation: float = 0.0
    """Turned by up to so many degrees, either way."""
    crop: float = 0.0
    """A random part is cut out and enlarged; it covers at least 1 minus so much of the area."""
    colour: float = 0.0
    """Brightness, contrast and saturation times 1 ± so much."""
    mixup: float = 0.0
    """α of the Beta distribution that two images and their labels are blended by (Zhang et
    al., 2018)."""
    cutmix: float = 0.0
    """α of the share of one image that is pasted into another (Yun et al., 2019)."""

    def __post_init__(self) -> None:
        for name, limit in (("shift", 1), ("crop", 1), ("colour", 1), ("rotation", 180)):
            value = getattr(self, name)
            if not 0 <= value <= limit or (name == "crop" and value == 1):
                raise UsageInvalid(f"augmentation {name} is {value:g}; it lies from 0 to {limit}")
        if min(self.mixup, self.cutmix) < 0:
            raise UsageInvalid(f"mixup {self.mixup:g} and cutmix {self.cutmix:g} are at least 0")

    @property
    def mixes(self) -> bool:
        """Whether labels are blended, too."""
        return self.mixup > 0 or self.cutmix > 0


def parse(text: str) -> Augment:
    """Read "flip,shift=0.1,rotation=15,mixup=0.2"; "none" is nothing.

    Raises:
        UsageInvalid: a kind is unknown, lacks its number, or is out of range.
    """
    defaults = {"shift": 0.1, "rotation": 15.0, "crop": 0.5, "colour": 0.2, "mixup": 0.2,
                "cutmix": 1.0}  # fmt: skip
    fields: dict[str, Any] = {}
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        name, given, value = part.partition("=")
        name = {"color": "colour", "rotate": "rotation"}.get(name, name)
        if name == "none" and text.strip() == "none":
            continue
        if name == "flip" and not given:
            fields["flip"] = True
        elif name in defaults:
            try:
                fields[name] = float(value) if given else defaults[name]
            except ValueError:
                raise UsageInvalid(f"augmentation {part!r}: {value!r} is not a number") from None
        else:
            raise UsageInvalid(
                f"augmentation {part!r} is unknown; there are none, flip, and with =NUMBER "
                f"{', '.join(defaults)}"
            )
    return Augment(**fields)


def of_spec(spec: InputSpec) -> Augment:
    """Return what a model's input says of itself."""
    if spec.augmentation == "none":
        return Augment()
    if spec.augmentation == "shift":
        return Augment(shift=0.1)
    return Augment(shift=0.125, flip=True)


@dataclass(frozen=True)
class Drawn:
    """Chance for one batch; each array has a row an image, or is None."""

    rows: NDArray[np.int64] | None = None
    columns: NDArray[np.int64] | None = None
    mirrored: NDArray[np.bool_] | None = None
    reach: tuple[int, int] = (0, 0)
    matrices: NDArray[np.float32] | None = None
    """Where output pixels come from, affine [n, 2, 3] in coordinates from −1 to 1."""
    colours: NDArray[np.float32] | None = None
    """Factors of brightness, contrast and saturation, [n, 3]."""
    partner: NDArray[np.int64] | None = None
    """Which image of the batch each is mixed with."""
    share: float = 1.0
    """Of the image itself; the rest is its partner's."""
    box: tuple[int, int, int, int] | None = None
    """Top, bottom, left, right of the part that is the partner's; None blends."""

    def part(self, chosen: slice | NDArray[np.int64]) -> Drawn:
        """Return the chance of some images; partners stay numbers of the whole batch."""

        def cut(values: Any) -> Any:
            return None if values is None else values[chosen]

        return Drawn(
            cut(self.rows), cut(self.columns), cut(self.mirrored), self.reach,
            cut(self.matrices), cut(self.colours), cut(self.partner), self.share, self.box,
        )  # fmt: skip


def draw(config: Augment, count: int, spec: InputSpec, generator: np.random.Generator) -> Drawn:
    """Draw the chance for ``count`` images."""
    height, width = spec.height, spec.width
    rows = columns = mirrored = matrices = colours = partner = box = None
    reach, share = (0, 0), 1.0
    if config.shift:
        reach = (max(1, int(config.shift * height)), max(1, int(config.shift * width)))
        rows = generator.integers(0, 2 * reach[0] + 1, count)
        columns = generator.integers(0, 2 * reach[1] + 1, count)
    if config.flip:
        mirrored = generator.random(count) < 0.5
    if config.rotation or config.crop:
        matrices = _matrices(config, count, spec, generator)
    if config.colour:
        factors = generator.uniform(1 - config.colour, 1 + config.colour, (count, 3))
        colours = factors.astype(np.float32)
    kinds = [name for name in ("mixup", "cutmix") if getattr(config, name) > 0]
    if kinds and count > 1:
        kind = kinds[int(generator.integers(len(kinds)))]
        alpha = getattr(config, kind)
        share = float(generator.beta(alpha, alpha))
        partner = generator.permutation(count)
        if kind == "cutmix":
            box = _box(share, height, width, generator)
            share = 1 - (box[1] - box[0]) * (box[3] - box[2]) / (height * width)
    return Drawn(rows, columns, mirrored, reach, matrices, colours, partner, share, box)


def _matrices(
    config: Augment, count: int, spec: InputSpec, generator: np.random.Generator
) -> NDArray[np.float32]:
    angle = np.radians(generator.uniform(-config.rotation, config.rotation, count))
    # Areas and sides as usual for ImageNet: any area, up to a quarter narrower or wider.
    area = generator.uniform(1 - config.crop, 1, count)
    ratio = np.exp(generator.uniform(-1, 1, count) * (math.log(4 / 3) if config.crop else 0))
    wide = np.minimum(1, np.sqrt(area * ratio))
    high = np.minimum(1, np.sqrt(area / ratio))
    left = generator.uniform(-1, 1, count) * (1 - wide)
    top = generator.uniform(-1, 1, count) * (1 - high)
    # In pixels the picture turns, in coordinates from −1 to 1 it must be sheared for that.
    aspect = spec.height / spec.width
    cos, sin = np.cos(angle), np.sin(angle)
    rows = [
        [cos * wide, -sin * high * aspect, left],
        [sin * wide / aspect, cos * high, top],
    ]
    return np.array(rows, np.float32).transpose(2, 0, 1)


def _box(
    share: float, height: int, width: int, generator: np.random.Generator
) -> tuple[int, int, int, int]:
    side = math.sqrt(1 - share)
    middle_y, middle_x = int(generator.integers(height)), int(generator.integers(width))
    half_y, half_x = int(height * side) // 2, int(width * side) // 2
    return (
        max(0, middle_y - half_y),
        min(height, middle_y + half_y),
        max(0, middle_x - half_x),
        min(width, middle_x + half_x),
    )


def apply(images: Tensor, drawn: Drawn) -> Tensor:
    """Change images, uint8 [n, height, width, channels], one by one; nothing is mixed here.

    It is done where the images are: on a GPU, if they are there.
    """
    images = move_pixels(images, drawn, fill=0)
    if drawn.matrices is None and drawn.colours is None:
        return images
    values = images.contiguous().permute(0, 3, 1, 2).float()
    if drawn.matrices is not None:
        matrices = torch.from_numpy(drawn.matrices).to(values.device)
        grid = functional.affine_grid(matrices, list(values.shape), align_corners=False)
        values = functional.grid_sample(values, grid, align_corners=False)
    if drawn.colours is not None:
        values = _coloured(values, torch.from_numpy(drawn.colours).to(values.device))
    return values.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def move_pixels(images: Tensor, drawn: Drawn, fill: int) -> Tensor:
    """Move and mirror pixels of one byte a channel, [n, height, width, channels].

    Args:
        images: Any that are as large as the images, such as their masks.
        drawn: Chance for them.
        fill: What stands where there was nothing.
    """
    if (drawn.rows is None or drawn.columns is None) and drawn.mirrored is None:
        return images
    count, height, width, channels = images.shape
    (y, x), device = drawn.reach, images.device
    columns = torch.arange(width, device=device).expand(count, width)
    if drawn.mirrored is not None:
        mirrored = torch.from_numpy(drawn.mirrored).to(device)
        columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    rows = torch.arange(height, device=device).expand(count, height)
    if drawn.rows is not None and drawn.columns is not None:
        rows = rows + torch.from_numpy(drawn.rows).to(device)[:, None]
        columns = columns + torch.from_numpy(drawn.columns).to(device)[:, None]
        images = functional.pad(images, (0, 0, x, x, y, y), value=fill)
    # Pixel by pixel, as rows of one long table: the fastest that PyTorch has for bytes.
    tall, wide = images.shape[1:3]
    first = torch.arange(count, device=device)[:, None, None] * tall
    where = (first + rows[:, :, None]) * wide + columns[:, None, :]
    pixels = images.reshape(-1, channels).index_select(0, where.reshape(-1))
    return pixels.view(count, height, width, channels)


def _coloured(values: Tensor, factors: Tensor) -> Tensor:
    brightness, contrast, saturation = (factors[:, i].view(-1, 1, 1, 1) for i in range(3))
    values = (values * brightness).clamp(0, 255)
    mean = values.mean((1, 2, 3), keepdim=True)
    values = (mean + (values - mean) * contrast).clamp(0, 255)
    if values.shape[1] == 1:
        return values
    # Luma of ITU-R BT.601, as in Pillow.
    weights = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1).to(values.device)
    grey = (values * weights).sum(1, keepdim=True)
    return grey + (values - grey) * saturation


def mix(inputs: Tensor, partners: Tensor, drawn: Drawn) -> Tensor:
    """Mix each input with its partner, float32 [n, channels, height, width]."""
    if drawn.box is None:
        return drawn.share * inputs + (1 - drawn.share) * partners
    top, bottom, left, right = drawn.box
    mixed = inputs.clone()
    mixed[:, :, top:bottom, left:right] = partners[:, :, top:bottom, left:right]
    return mixed
