"""Figures of a classifier's answers; the same as scikit-learn's on the same answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pollard.compress.evaluate import Accuracy, paired_drop, wilson

# Bins of confidence, as usual (Guo et al., 2017).
_BINS = 15

# Resamples of the images for intervals of figures that no formula is known for.
_RESAMPLES = 1000

Scores = NDArray[np.float64]
"""Probabilities, [n, classes]; a row that is not finite is a wrong answer."""
Labels = NDArray[np.int64]


@dataclass(frozen=True)
class ClassFigures:
    """Figures of one class."""

    label: str
    precision: float
    """Share of the answers with this class that are right; 0 where there are none."""
    recall: float
    """Share of the images of this class that are found; 0 where there are none."""
    f1: float
    """Harmonic mean of the two."""
    support: int
    """Images of the class."""


@dataclass(frozen=True)
class Bin:
    """Answers of similar confidence."""

    lower: float
    upper: float
    samples: int
    confidence: float
    """Mean of the best scores."""
    accuracy: float


@dataclass(frozen=True)
class Calibration:
    """Whether a model is as often right as it says."""

    error: float
    """Expected calibration error: mean gap between confidence and accuracy (Guo et al., 2017)."""
    bins: list[Bin]


def predictions(scores: Scores) -> Labels:
    """Return the best class of each row, the first of equals; −1 where a row is not finite."""
    best = scores.argmax(axis=1)
    return np.where(np.isfinite(scores).all(axis=1), best, -1)


def top_k(scores: Scores, labels: Labels, k: int, dataset: str = "") -> Accuracy:
    """Return how often the true class is among the ``k`` best, with its interval."""
    true = scores[np.arange(len(labels)), labels][:, None]
    index = np.arange(scores.shape[1])
    # Of equal scores the first counts as the better, as in argmax.
    ahead = (scores > true) | ((scores == true) & (index < labels[:, None]))
    right = (ahead.sum(axis=1) < k) & np.isfinite(scores).all(axis=1)
    return wilson(int(right.sum()), len(labels), dataset)


def confusion(answers: Labels, labels: Labels, classes: int) -> NDArray[np.int64]:
    """Return how often class i was answered with class j, [classes, classes]; without −1."""
    matrix = np.zeros((classes, classes), np.int64)
    given = answers >= 0
    np.add.at(matrix, (labels[given], answers[given]), 1)
    return matrix


def by_class(answers: Labels, labels: Labels, classes: list[str]) -> list[ClassFigures]:
    """Return precision, recall and F1 of every class."""
    precision, recall, f1, support = _figures(answers, labels, len(classes))
    return [
        ClassFigures(name, float(p), float(r), float(f), int(n))
        for name, p, r, f, n in zip(classes, precision, recall, f1, support, strict=True)
    ]


def _figures(
    answers: Labels, labels: Labels, classes: int
) -> tuple[Scores, Scores, Scores, NDArray[np.int64]]:
    found = np.bincount(labels[answers == labels], minlength=classes)
    given = np.bincount(answers[answers >= 0], minlength=classes)
    support = np.bincount(labels, minlength=classes)
    precision = found / np.maximum(1, given)
    recall = found / np.maximum(1, support)
    f1 = 2 * found / np.maximum(1, given + support)
    return precision, recall, f1, support


def macro_f1_interval(answers: Labels, labels: Labels, classes: int) -> tuple[float, float]:
    """Return the 95 % interval of the macro F1: percentiles of the bootstrap, seeded."""
    generator = np.random.default_rng(0)
    values = []
    for _ in range(_RESAMPLES):
        chosen = generator.integers(0, len(labels), len(labels))
        f1, support = _figures(answers[chosen], labels[chosen], classes)[2:]
        # A small class may be absent from a resample; then it says nothing.
        values.append(f1[support > 0].mean())
    lower, upper = np.percentile(values, [2.5, 97.5])
    return float(lower), float(upper)


def calibration(scores: Scores, labels: Labels) -> Calibration:
    """Return the calibration of the best scores, in bins of equal width."""
    finite = np.isfinite(scores).all(axis=1)
    confidence = scores[finite].max(axis=1)
    right = scores[finite].argmax(axis=1) == labels[finite]
    # Bins are open below and closed above; a confidence of 0 belongs to the first.
    place = np.clip(np.ceil(confidence * _BINS).astype(int) - 1, 0, _BINS - 1)
    bins, error = [], 0.0
    for index in range(_BINS):
        inside = place == index
        count = int(inside.sum())
        said = float(confidence[inside].mean()) if count else 0.0
        share = float(right[inside].mean()) if count else 0.0
        bins.append(Bin(index / _BINS, (index + 1) / _BINS, count, said, share))
        error += count * abs(said - share)
    return Calibration(error / max(1, int(finite.sum())), bins)


def log_loss(scores: Scores, labels: Labels) -> float:
    """Return the mean negative logarithm of the true class's score, in nats."""
    finite = np.isfinite(scores).all(axis=1)
    true = scores[finite, labels[finite]]
    # No score counts as less than the smallest step of float64, as in scikit-learn.
    tiny = np.finfo(np.float64).eps
    return float(-np.log(np.clip(true, tiny, 1 - tiny)).mean()) if finite.any() else float("nan")


def agreement(one: Labels, other: Labels, labels: Labels, dataset: str = "") -> dict[str, Any]:
    """Compare two models' answers to the same images.

    Args:
        one: Best classes of the first, −1 for none.
        other: Those of the second.
        labels: The true classes.
        dataset: Name of the images.
    """
    same = wilson(int(((one == other) & (one >= 0)).sum()), len(labels), dataset)
    drop = paired_drop(other == labels, one == labels)
    return {
        "same_answer": same.to_json(),
        "only_first_right": int(((one == labels) & (other != labels)).sum()),
        "only_second_right": int(((one != labels) & (other == labels)).sum()),
        "difference_points": {
            "estimate": 0.0 - drop.points,
            "lower": 0.0 - drop.upper,
            "upper": 0.0 - drop.lower,
        },
    }
