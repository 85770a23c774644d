"""Accuracy with its uncertainty."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from pollard.compress.accelerator import in_full, placed
from pollard.compress.data import Part
from pollard.compress.spec import InputSpec
from pollard.runtime.sessions import Session

# Two-sided 95 % of the normal distribution.
Z95 = 1.959963984540054

OUTPUT = "logits"
"""What the only output of a graph is called."""

Predict = Callable[[NDArray[np.uint8]], NDArray[np.float32]]
"""From uint8 images [n, height, width, channels] to answers, float32 with images along the first
dimension: logits [n, classes]; of a model with several outputs all of them, side by side along
the last dimension."""


@dataclass(frozen=True)
class Accuracy:
    """Share of right answers with its Wilson 95 % interval (Wilson, 1927), or what a task has
    in its place."""

    value: float
    samples: int
    lower: float
    upper: float
    dataset: str
    metric: str = "accuracy"
    """What it is: "accuracy", "mAP" or "mIoU"."""

    @property
    def title(self) -> str:
        """Name of the metric at the beginning of a line."""
        return self.metric[0].upper() + self.metric[1:] if self.metric.islower() else self.metric

    def __str__(self) -> str:
        return (
            f"{self.value:.2%} (n = {self.samples}, 95 % interval "
            f"{self.lower:.2%} to {self.upper:.2%})"
        )

    def to_json(self) -> dict[str, Any]:
        """Return the fields."""
        return asdict(self)


@dataclass(frozen=True)
class Drop:
    """Accuracy lost against the parent, in points, on the same images.

    The interval is the paired one of Agresti and Min (2005): half a pair is
    added to each kind of disagreement, so that none observed is not none at all.
    """

    points: float
    lower: float
    upper: float

    def __str__(self) -> str:
        return f"{self.points:+.2f} points (95 % interval {self.lower:+.2f} to {self.upper:+.2f})"


def wilson(right: int, samples: int, dataset: str = "") -> Accuracy:
    """Return ``right`` of ``samples`` as an accuracy with its interval."""
    if samples < 1:
        raise ValueError("an accuracy needs at least one sample")
    return wilson_share(right, samples, dataset)


def wilson_share(right: float, total: float, dataset: str = "") -> Accuracy:
    """Return as :func:`wilson` where part of a sample may be right, such as of its pixels."""
    samples = round(total)
    share = right / total
    z2 = Z95 * Z95
    centre = (share + z2 / (2 * samples)) / (1 + z2 / samples)
    half = (
        Z95
        * math.sqrt(share * (1 - share) / samples + z2 / (4 * samples * samples))
        / (1 + z2 / samples)
    )
    # At both ends an end of the interval is the share itself, but for rounding.
    lower, upper = max(0.0, min(centre - half, share)), min(1.0, max(centre + half, share))
    return Accuracy(share, samples, lower, upper, dataset)


def paired_drop(parent: NDArray[np.bool_], candidate: NDArray[np.bool_]) -> Drop:
    """Return what ``candidate`` lost.

    Args:
        parent: Whether the parent's answers are right, bool [n].
        candidate: The same for the candidate, of the same images.
    """
    samples = len(parent)
    lost = int(np.sum(parent & ~candidate))
    won = int(np.sum(~parent & candidate))
    b, c, n = lost + 0.5, won + 0.5, samples + 1.0
    centre = (b - c) / n
    half = Z95 * math.sqrt(max(0.0, b + c - (b - c) ** 2 / n)) / n
    return Drop(100 * (lost - won) / samples, 100 * (centre - half), 100 * (centre + half))


class TorchPredictor:
    """Answers with a PyTorch module in evaluation mode, on the device that is in use."""

    def __init__(self, module: nn.Module, spec: InputSpec) -> None:
        self.module, self._spec = module, spec

    def __call__(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        self.module.eval()
        with placed(self.module) as device, in_full(device), torch.inference_mode():
            given = self.module(self._spec.normalize(images, device))
            outputs = given if isinstance(given, tuple | list) else (given,)
            return pack([each.float().cpu().numpy() for each in outputs])


def torch_predictor(module: nn.Module, spec: InputSpec) -> Predict:
    """Return a function that answers with a PyTorch module in evaluation mode."""
    return TorchPredictor(module, spec)


def session_predictor(session: Session) -> Predict:
    """Return a function that answers with an ONNX file as it is served."""
    name = session.inputs[0].name
    outputs = [output.name for output in session.outputs]

    def predict(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        given = session.run({name: images}, outputs)
        return pack([np.asarray(given[output], np.float32) for output in outputs])

    return predict


def pack(outputs: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
    """Return several outputs as one, side by side along the last dimension."""
    return outputs[0] if len(outputs) == 1 else np.concatenate(outputs, axis=-1)


def predict_part(predict: Predict, part: Part, batch_size: int = 64) -> NDArray[np.float32]:
    """Return the answers for a whole part, as :data:`Predict` gives them."""
    # Not to and fro for each batch.
    modules = (predict.module,) if isinstance(predict, TorchPredictor) else ()
    with placed(*modules):
        return np.concatenate([predict(images) for images, _ in part.batches(batch_size)])


def right_answers(logits: NDArray[np.float32], part: Part) -> NDArray[np.bool_]:
    """Return which answers are right, bool [n]; an answer that is not finite is wrong."""
    finite = np.isfinite(logits).all(axis=1)
    right: NDArray[np.bool_] = (logits.argmax(axis=1) == part.labels) & finite
    return right


def accuracy(right: NDArray[np.bool_], part: Part) -> Accuracy:
    """Return the accuracy of answers on ``part``."""
    return wilson(int(right.sum()), len(right), part.name)


def confusion(
    logits: NDArray[np.float32], labels: NDArray[np.int64], classes: int
) -> NDArray[np.int64]:
    """Return how often class i was answered with class j, int64 [classes, classes]."""
    matrix = np.zeros((classes, classes), np.int64)
    np.add.at(matrix, (labels, logits.argmax(axis=1)), 1)
    return matrix
