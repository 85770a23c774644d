"""One class for each image."""

from __future__ import annotations

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
from pollard.compress.evaluate import (
    OUTPUT,
    Accuracy,
    Drop,
    confusion,
    paired_drop,
    right_answers,
    wilson,
)
from pollard.compress.tasks.base import LossOptions, Mixed, Outputs, Verdict
from pollard.compress.truth import TaskName


@dataclass(frozen=True)
class Right(Verdict):
    """Which answers are right."""

    right: NDArray[np.bool_] = field(repr=False)
    """[images]."""

    def accuracy(self, part: Part) -> Accuracy:
        """Return the share that is right, with Wilson's interval."""
        return wilson(int(self.right.sum()), len(self.right), part.name)

    def drop_from(self, parent: Right) -> Drop:
        """Return the points lost, with the paired interval."""
        return paired_drop(parent.right, self.right)


class Classification:
    """Answers are logits [batch, classes]."""

    name: TaskName = "classification"
    metric = "accuracy"
    metric_key = "top1"

    def check(self, outputs: object, batch: int) -> int:
        if not isinstance(outputs, Tensor) or outputs.ndim != 2 or outputs.shape[0] != batch:
            form = list(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
            flat = (
                isinstance(outputs, Tensor) and outputs.ndim > 2 and set(outputs.shape[2:]) == {1}
            )
            hint = ", which .flatten(1) makes of it" if flat else ""
            raise ModelUnknown(f"must give logits of shape [batch, classes], it gives {form}{hint}")
        return int(outputs.shape[1])

    def loss(
        self, outputs: Outputs, truth: Tensor, size: tuple[int, int], options: LossOptions,
        mixed: Mixed = None,
    ) -> Tensor:  # fmt: skip
        assert isinstance(outputs, Tensor)  # noqa: S101 - `check` has seen it
        if mixed is not None:
            others, share = mixed
            own = self.loss(outputs, truth, size, options)
            return share * own + (1 - share) * self.loss(outputs, others, size, options)
        if options.loss == "cross-entropy":
            return functional.cross_entropy(outputs, truth, label_smoothing=options.label_smoothing)
        classes = outputs.shape[1]
        wanted = functional.one_hot(truth, classes) * (1 - options.label_smoothing)
        wanted = wanted + options.label_smoothing / classes
        return (outputs.softmax(1) - wanted).square().sum(1).mean()

    def distillation(self, outputs: Outputs, wanted: Outputs, options: LossOptions) -> Tensor:
        assert isinstance(outputs, Tensor)  # noqa: S101 - `check` has seen it
        assert isinstance(wanted, Tensor)  # noqa: S101
        t = options.distill_temperature
        soft = functional.kl_div(
            functional.log_softmax(outputs / t, 1),
            functional.log_softmax(wanted / t, 1),
            reduction="batchmean",
            log_target=True,
        )
        # T² keeps the gradients of both parts of one size.
        return t * t * soft

    def judge(self, answers: NDArray[np.float32], part: Part, classes: int) -> Right:
        del classes
        return Right(right_answers(answers, part))

    def agreement(
        self, answers: NDArray[np.float32], others: NDArray[np.float32], part: Part
    ) -> tuple[float, float]:
        del part
        same = answers.argmax(axis=1) == others.argmax(axis=1)
        return float(same.sum()), float(len(same))

    def divergence(self, wanted: NDArray[np.float32], given: NDArray[np.float32]) -> float:
        pair = [torch.from_numpy(each).double().log_softmax(1) for each in (wanted, given)]
        return float(functional.kl_div(pair[1], pair[0], reduction="batchmean", log_target=True))

    def confusion(
        self, answers: NDArray[np.float32], part: Part, classes: int
    ) -> NDArray[np.int64]:
        return confusion(answers, part.labels, classes)

    def confusion_labels(self, classes: list[str]) -> list[str]:
        return classes

    def describe(self, manifest: bundle_pb2.Manifest, classes: Sequence[str]) -> None:
        manifest.task = bundle_pb2.TASK_CLASSIFICATION
        manifest.outputs.add(
            name=OUTPUT,
            data_type=bundle_pb2.DATA_TYPE_FP32,
            shape=[-1, len(classes)],
            layout="NC",
        )
        manifest.postprocess.classification.CopyFrom(
            bundle_pb2.Classification(output=OUTPUT, activation=bundle_pb2.ACTIVATION_SOFTMAX)
        )


__all__ = ["Classification", "Right"]
