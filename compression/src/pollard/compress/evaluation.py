"""Judge a model, and compare two, on images that chose nothing; how classifiers are judged."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pollard.compress import evaluation_tasks, metrics
from pollard.compress.answers import BATCH, Answers, answer
from pollard.compress.data import PartName
from pollard.compress.errors import DataDamaged
from pollard.compress.evaluate import Accuracy
from pollard.compress.evaluation_tasks import TaskEvaluation
from pollard.compress.metrics import Calibration, ClassFigures
from pollard.compress.progress import Reporter
from pollard.compress.spec import InputSpec

# Pairs of classes that are told as the most frequent mistakes.
_MISTAKES = 10


@dataclass(frozen=True)
class Evaluation:
    """How good a model's answers are."""

    model: str
    """Who answered, for people."""
    accuracy: Accuracy
    """Of the best class."""
    top5: Accuracy | None
    """Of the five best; None where there are no more than five classes."""
    classes: list[ClassFigures]
    macro: dict[str, float]
    """Precision, recall and F1, mean over the classes."""
    weighted: dict[str, float]
    """The same, weighted by the classes' images."""
    macro_f1_interval: tuple[float, float]
    """95 % interval of the macro F1, by bootstrap."""
    calibration: Calibration
    log_loss: float
    """Mean negative logarithm of the true class's probability, in nats."""
    confusion: NDArray[np.int64]
    """How often class i was answered with class j, [classes, classes]."""
    not_finite: int
    """Answers that were no numbers; they count as wrong, and in no column."""
    damaged: list[str]
    """Files that were left out, each with the reason."""
    compared: dict[str, Any] | None = None
    """Agreement with a second model, and the second model's accuracy."""

    def mistakes(self) -> list[tuple[str, str, int]]:
        """Return the most frequent mistakes: true class, answer, how often."""
        wrong = self.confusion.copy()
        np.fill_diagonal(wrong, 0)
        order = np.argsort(-wrong, axis=None, kind="stable")[:_MISTAKES]
        names = [figures.label for figures in self.classes]
        pairs = [np.unravel_index(int(place), wrong.shape) for place in order]
        return [(names[i], names[j], int(wrong[i, j])) for i, j in pairs if wrong[i, j]]

    def to_json(self) -> dict[str, Any]:
        """Return all figures."""
        return {
            "model": self.model,
            "accuracy": self.accuracy.to_json(),
            "top5": None if self.top5 is None else self.top5.to_json(),
            "macro": self.macro | {"f1_interval": list(self.macro_f1_interval)},
            "weighted": self.weighted,
            "classes": [asdict(figures) for figures in self.classes],
            "calibration": asdict(self.calibration),
            "log_loss": self.log_loss,
            "confusion": self.confusion.tolist(),
            "not_finite": self.not_finite,
            "damaged": self.damaged,
            "compared": self.compared,
        }


def evaluate(
    model: str,
    data: str | Path,
    *,
    weights: str = "",
    server: str = "",
    against: str = "",
    against_weights: str = "",
    spec: InputSpec | None = None,
    part: PartName = "held-out",
    threads: int | None = None,
    device: str = "auto",
    batch_size: int = BATCH,
    reporter: Reporter | None = None,
) -> Evaluation | TaskEvaluation:
    """Measure a model, and compare it with a second one if there is one.

    Args:
        model: As for :func:`pollard.compress.answers.answer`.
        data: Likewise, as are the arguments that follow.
        weights: Of a model that is neither a bundle nor a file nor served.
        server: Address of a vision service; then ``model`` is a served model's name.
        against: A second model that answers the same images; never served.
        against_weights: Its weights.
        spec: What a factory's model takes.
        part: Which images; the held-out part has chosen nothing.
        threads: Of one call.
        device: Of a PyTorch model, as for :func:`pollard.compress.accelerator.find`.
        batch_size: Images of a call.
        reporter: Told of progress.

    Raises:
        CompressionError: a model or the data cannot be used.
        RuntimeFault: the bundle or file cannot be used on this machine.
        PollardError: the server refuses.
    """
    task = evaluation_tasks.kind_of(model, server, spec)
    if task != "classification":

        def find(name: str, its_weights: str, address: str) -> evaluation_tasks.Found:
            return evaluation_tasks.find(
                name, data, task, weights=its_weights, server=address, spec=spec, part=part,
                threads=threads, device=device, batch_size=batch_size, reporter=reporter,
            )  # fmt: skip

        rival = find(against, against_weights, "") if against else None
        return evaluation_tasks.judge(find(model, weights, server), rival)

    def ask(name: str, its_weights: str, address: str) -> Answers:
        return answer(
            name, data, weights=its_weights, server=address, spec=spec, part=part,
            threads=threads, device=device, batch_size=batch_size, reporter=reporter,
        )  # fmt: skip

    first = ask(model, weights, server)
    second = ask(against, against_weights, "") if against else None
    return judge(first, second)


def judge(first: Answers, second: Answers | None = None) -> Evaluation:
    """Return the figures of answers, and how they compare with a second model's.

    Raises:
        DataDamaged: the two were not asked about the same images.
    """
    labels, count = first.labels, len(first.classes)
    best = metrics.predictions(first.scores)
    figures = metrics.by_class(best, labels, first.classes)
    support = np.array([one.support for one in figures])
    names = ("precision", "recall", "f1")
    table = np.array([[getattr(one, name) for name in names] for one in figures])
    compared = None
    if second is not None:
        if not np.array_equal(labels, second.labels):
            raise DataDamaged(
                f"{first.source} answered {len(labels)} images and {second.source} "
                f"{len(second.labels)}: not every file can be read by both, so that their "
                "answers cannot be paired; take the damaged files away"
            )
        other = metrics.predictions(second.scores)
        compared = {
            "model": second.source,
            "accuracy": metrics.top_k(second.scores, labels, 1, first.dataset).to_json(),
            **metrics.agreement(best, other, labels, first.dataset),
        }
    return Evaluation(
        first.source,
        metrics.top_k(first.scores, labels, 1, first.dataset),
        metrics.top_k(first.scores, labels, 5, first.dataset) if count > 5 else None,
        figures,
        dict(zip(names, (float(v) for v in table.mean(axis=0)), strict=True)),
        dict(zip(names, (float(v) for v in support @ table / support.sum()), strict=True)),
        metrics.macro_f1_interval(best, labels, count),
        metrics.calibration(first.scores, labels),
        metrics.log_loss(first.scores, labels),
        metrics.confusion(best, labels, count),
        int((best < 0).sum()),
        first.damaged,
        compared,
    )
