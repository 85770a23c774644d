"""What a task must know, and what its figures are made of."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pollard.bundle.v1 import bundle_pb2
from pollard.compress.data import Part
from pollard.compress.evaluate import Accuracy, Drop
from pollard.compress.truth import TaskName

Outputs = Tensor | tuple[Tensor, ...]
"""What a module gives."""

Mixed = tuple[Tensor, float] | None
"""The partners' truth and the share of the image itself, where images are mixed."""

# Resamples of the images for intervals of figures that no formula is known for.
RESAMPLES = 200


class LossOptions(Protocol):
    """What a loss is told."""

    @property
    def loss(self) -> str:
        """Which, where there are several."""

    @property
    def label_smoothing(self) -> float:
        """Share of a label that is spread over all classes."""

    @property
    def distill_temperature(self) -> float:
        """What logits are divided by where a teacher's are learnt."""


class Verdict(ABC):
    """How right a model's answers are, kept image by image, so that two can be compared."""

    @abstractmethod
    def accuracy(self, part: Part) -> Accuracy:
        """Return the figure that the model is judged by, with its 95 % interval."""

    @abstractmethod
    def drop_from(self, parent: Any) -> Drop:
        """Return what is lost against another verdict of the same kind on the same images."""


class Resampled(Verdict):
    """A verdict whose figure can be computed of images that count several times."""

    metric: str

    @property
    @abstractmethod
    def images(self) -> int:
        """How many images there are."""

    @abstractmethod
    def value(self, weights: NDArray[np.int64] | None = None) -> float:
        """Return the figure, 0 to 1, where each image counts so often; once when None."""

    def accuracy(self, part: Part) -> Accuracy:
        """Return the figure with its interval: percentiles of the bootstrap, seeded."""
        found = [self.value(weights) for weights in resamples(self.images)]
        low, high = _interval(found)
        value = self.value()
        return Accuracy(
            value, self.images, min(low, value), max(high, value), part.name, self.metric
        )

    def drop_from(self, parent: Resampled) -> Drop:
        """Return the points lost, with the bootstrap's interval of the pairs."""
        lost = [parent.value(weights) - self.value(weights) for weights in resamples(self.images)]
        low, high = _interval(lost)
        points = parent.value() - self.value()
        return Drop(100 * points, 100 * min(low, points), 100 * max(high, points))


def resamples(images: int) -> Sequence[NDArray[np.int64]]:
    """Return how often each image counts in each resample; always the same for a number."""
    generator = np.random.default_rng(images)
    drawn = generator.integers(0, images, (RESAMPLES, images))
    return [np.bincount(row, minlength=images) for row in drawn]


def _interval(values: Sequence[float]) -> tuple[float, float]:
    low, high = np.quantile(values, (0.025, 0.975))
    return float(low), float(high)


class Task(Protocol):
    """One thing that networks are for."""

    name: TaskName
    metric: str
    """What answers are judged by, for people: "accuracy", "mAP" or "mIoU"."""
    metric_key: str
    """The same in a manifest: "top1", "mAP50-95" or "mIoU"."""

    def check(self, outputs: object, batch: int) -> int:
        """Return the number of classes of a module's outputs.

        Raises:
            ModelUnknown: they are no answers of this task.
        """

    def loss(
        self, outputs: Outputs, truth: Tensor, size: tuple[int, int], options: LossOptions,
        mixed: Mixed = None,
    ) -> Tensor:  # fmt: skip
        """Return the loss of a batch.

        Args:
            outputs: Of the module, float32.
            truth: The part's labels of the batch.
            size: Height and width of the input in pixels.
            options: Which loss.
            mixed: What images were mixed with.
        """

    def distillation(self, outputs: Outputs, wanted: Outputs, options: LossOptions) -> Tensor:
        """Return how far answers are from a teacher's."""

    def judge(self, answers: NDArray[np.float32], part: Part, classes: int) -> Verdict:
        """Return how right answers are, as :func:`pollard.compress.evaluate.predict_part` packs
        them."""

    def agreement(
        self, answers: NDArray[np.float32], others: NDArray[np.float32], part: Part
    ) -> tuple[float, float]:
        """Return how much of one model's answers another one gives, and of how much in all."""

    def divergence(self, wanted: NDArray[np.float32], given: NDArray[np.float32]) -> float:
        """Return how far answers are from those wanted, in nats an image; for choices."""

    def confusion(
        self, answers: NDArray[np.float32], part: Part, classes: int
    ) -> NDArray[np.int64]:
        """Return how often class i was answered with class j."""

    def confusion_labels(self, classes: list[str]) -> list[str]:
        """Return the names of the rows of :meth:`confusion`."""

    def describe(self, manifest: bundle_pb2.Manifest, classes: Sequence[str]) -> None:
        """Write task, outputs and postprocessing into a manifest whose graph is the task's own."""
