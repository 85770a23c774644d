"""A class for each pixel."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from pollard.bundle.v1 import bundle_pb2
from pollard.compress.data import Part
from pollard.compress.errors import ModelUnknown
from pollard.compress.evaluate import OUTPUT
from pollard.compress.tasks.base import LossOptions, Mixed, Outputs, Resampled
from pollard.compress.truth import TaskName
from pollard.runtime.segmentation import UNSEEN, segment
from pollard.runtime.transforms import Geometry

Mask = NDArray[np.uint8]

_GOLDEN = 0.61803398875
"""Steps of the golden ratio around the colour wheel never come close to one another."""


@dataclass(frozen=True)
class Overlaps(Resampled):
    """How classes of pixels overlap with what is true."""

    counts: NDArray[np.int64] = field(repr=False)
    """Pixels [images, classes, 3]: rightly so called, so called, and truly so."""
    metric: str = "mIoU"

    @property
    def images(self) -> int:
        return len(self.counts)

    def value(self, weights: NDArray[np.int64] | None = None) -> float:
        found = self.by_class(weights)
        known = found[~np.isnan(found)]
        return float(known.mean()) if len(known) else 0.0

    def by_class(self, weights: NDArray[np.int64] | None = None) -> NDArray[np.float64]:
        """Return intersection over union of each class; NaN where there is none of it."""
        counts = self.counts if weights is None else self.counts * weights[:, None, None]
        both, said, true = (counts[..., i].sum(axis=0).astype(np.float64) for i in range(3))
        either = said + true - both
        shares: NDArray[np.float64] = np.divide(
            both, either, out=np.full(len(both), np.nan), where=either > 0
        )
        return shares


class Segmentation:
    """Answers are logits [batch, classes, height, width], at any resolution."""

    name: TaskName = "segmentation"
    metric = "mIoU"
    metric_key = "mIoU"

    def check(self, outputs: object, batch: int) -> int:
        if (
            not isinstance(outputs, Tensor)
            or outputs.ndim != 4
            or outputs.shape[0] != batch
            or outputs.shape[2:] == (1, 1)  # those of classes, not flattened
        ):
            form = list(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
            raise ModelUnknown(
                f"must give logits of shape [batch, classes, height, width], it gives {form}"
            )
        return int(outputs.shape[1])

    def loss(
        self, outputs: Outputs, truth: Tensor, size: tuple[int, int], options: LossOptions,
        mixed: Mixed = None,
    ) -> Tensor:  # fmt: skip
        del mixed  # refused before
        assert isinstance(outputs, Tensor)  # noqa: S101 - `check` has seen it
        scores = _at(outputs, size)
        wanted = torch.where(truth == UNSEEN, -1, truth.long())
        entropy = functional.cross_entropy(
            scores, wanted, ignore_index=-1, label_smoothing=options.label_smoothing
        )
        return entropy + _dice(scores, wanted)

    def distillation(self, outputs: Outputs, wanted: Outputs, options: LossOptions) -> Tensor:
        assert isinstance(outputs, Tensor)  # noqa: S101 - `check` has seen it
        assert isinstance(wanted, Tensor)  # noqa: S101
        t = options.distill_temperature
        soft = functional.kl_div(
            functional.log_softmax(outputs / t, 1),
            functional.log_softmax(wanted / t, 1),
            reduction="none",
            log_target=True,
        )
        return t * t * soft.sum(1).mean()

    def judge(self, answers: NDArray[np.float32], part: Part, classes: int) -> Overlaps:
        return judge_masks(self._masks(answers, part), part, classes)

    def _masks(self, answers: NDArray[np.float32], part: Part) -> list[Mask]:
        manifest = bundle_pb2.Manifest()
        self.describe(manifest, ())
        height, width = part.images.shape[1:3]
        return [
            mask_of({OUTPUT: one[None]}, manifest, truth.geometry, (width, height))
            for one, truth in zip(answers, part.truths, strict=True)
        ]

    def agreement(
        self, answers: NDArray[np.float32], others: NDArray[np.float32], part: Part
    ) -> tuple[float, float]:
        del part
        same = answers.argmax(axis=1) == others.argmax(axis=1)
        # Counted in images: pixels of one image are no independent answers.
        return float(same.mean(axis=(1, 2)).sum()), float(len(same))

    def divergence(self, wanted: NDArray[np.float32], given: NDArray[np.float32]) -> float:
        if not np.isfinite(given).all():
            return math.inf
        pair = [torch.from_numpy(each).log_softmax(1) for each in (wanted, given)]
        return float(
            functional.kl_div(pair[1], pair[0], reduction="none", log_target=True).sum(1).mean()
        )

    def confusion(
        self, answers: NDArray[np.float32], part: Part, classes: int
    ) -> NDArray[np.int64]:
        return confuse_masks(self._masks(answers, part), part, classes)

    def confusion_labels(self, classes: list[str]) -> list[str]:
        return classes

    def describe(self, manifest: bundle_pb2.Manifest, classes: Sequence[str]) -> None:
        manifest.task = bundle_pb2.TASK_SEGMENTATION
        manifest.outputs.add(
            name=OUTPUT,
            data_type=bundle_pb2.DATA_TYPE_FP32,
            shape=[-1, len(classes), -1, -1],
            layout="NCHW",
        )
        manifest.postprocess.segmentation.CopyFrom(
            bundle_pb2.Segmentation(output=OUTPUT, palette=palette(classes))
        )


def palette(classes: Sequence[str]) -> list[int]:
    """Return colours for pictures of masks, three values a class; a background is black."""
    made: list[int] = []
    for index, name in enumerate(classes):
        bright = 0.95 if index % 2 == 0 else 0.8
        colour = colorsys.hsv_to_rgb(index * _GOLDEN % 1.0, 0.85, bright)
        made += [0, 0, 0] if name == "background" else [round(255 * c) for c in colour]
    return made


def mask_of(
    outputs: dict[str, NDArray[np.generic]],
    manifest: bundle_pb2.Manifest,
    geometry: Geometry,
    input_size: tuple[int, int],
) -> Mask:
    """Return the mask of one image as a server would give it.

    Args:
        outputs: Of this image.
        manifest: Says which they are.
        geometry: Where the image went.
        input_size: Width and height of the tensor.
    """
    return segment(outputs, manifest, geometry, input_size)


def judge_masks(masks: Sequence[Mask], part: Part, classes: int) -> Overlaps:
    """Return how right masks of the images' own sizes are.

    What is not known counts nowhere; what the model did not see, as not found.
    """
    counts = np.zeros((len(masks), classes, 3), np.int64)
    for place, (said, true) in enumerate(zip(masks, _truths(part), strict=True)):
        known = true != UNSEEN
        said, true = said[known], true[known]
        counts[place, :, 0] = np.bincount(true[said == true], minlength=256)[:classes]
        counts[place, :, 1] = np.bincount(said, minlength=256)[:classes]
        counts[place, :, 2] = np.bincount(true, minlength=256)[:classes]
    return Overlaps(counts)


def confuse_masks(masks: Sequence[Mask], part: Part, classes: int) -> NDArray[np.int64]:
    """Return how many pixels of class i were called class j."""
    matrix = np.zeros((classes, classes), np.int64)
    for said, true in zip(masks, _truths(part), strict=True):
        known = (true != UNSEEN) & (said != UNSEEN)
        pairs = true[known].astype(np.int64) * classes + said[known]
        matrix += np.bincount(pairs, minlength=classes * classes).reshape(classes, classes)
    return matrix


def _truths(part: Part) -> list[Mask]:
    return [truth.mask for truth in part.truths if truth.mask is not None]


def _at(scores: Tensor, size: tuple[int, int]) -> Tensor:
    """Enlarge as the answers are enlarged where they are served."""
    if scores.shape[2:] == size:
        return scores
    return functional.interpolate(scores, size, mode="bilinear", align_corners=False)


def _dice(scores: Tensor, wanted: Tensor) -> Tensor:
    """Return the mean Dice loss of the classes (Milletari et al., 2016).

    Small classes weigh as much in it as large ones, as they do in what is judged.
    """
    known = (wanted >= 0)[:, None]
    said = scores.softmax(1) * known
    true = functional.one_hot(wanted.clamp(min=0), scores.shape[1]).movedim(3, 1) * known
    both = (said * true).sum((0, 2, 3))
    total = (said + true).sum((0, 2, 3))
    present = true.sum((0, 2, 3)) > 0
    each = 1 - (2 * both + 1) / (total + 1)
    return (each * present).sum() / present.sum().clamp(min=1)
