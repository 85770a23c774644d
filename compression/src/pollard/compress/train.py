"""Train a model."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pollard.compress.data import Dataset, load_data
from pollard.compress.errors import OutputExists, UsageInvalid
from pollard.compress.evaluate import (
    Accuracy,
    Predict,
    accuracy,
    predict_part,
    right_answers,
    torch_predictor,
)
from pollard.compress.models import load_model, resolve, save_state
from pollard.compress.pipeline import torch_threads
from pollard.compress.progress import Reporter
from pollard.compress.spec import InputSpec
from pollard.compress.training import FitConfig, History, fit, seed_everything


@dataclass(frozen=True)
class TrainResult:
    """A trained model."""

    source: str
    weights: Path
    accuracy: Accuracy
    """On the held-out part."""
    history: History
    data: Dataset

    def to_json(self) -> dict[str, Any]:
        """Return the figures."""
        return {
            "model": self.source,
            "weights": str(self.weights),
            "accuracy": self.accuracy.to_json(),
            "history": asdict(self.history),
            "data": {"name": self.data.name, "digest": self.data.digest, "split": self.data.split},
        }


def train(
    model: str,
    data: str | Path,
    out: Path | str,
    *,
    epochs: int | None = None,
    learning_rate: float | None = None,
    batch_size: int | None = None,
    max_train_images: int | None = None,
    seed: int = 0,
    threads: int | None = None,
    spec: InputSpec | None = None,
    force: bool = False,
    reporter: Reporter | None = None,
) -> TrainResult:
    """Train ``model`` from scratch and write the best epoch's weights.

    The best epoch is chosen on the choosing part; the accuracy given back is
    that of the held-out part.

    Args:
        model: As for :func:`pollard.compress.models.resolve`.
        data: As for :func:`pollard.compress.data.load_data`.
        out: File to write, `.safetensors`.
        epochs: The model's own default when None, as the next two.
        learning_rate: Peak of the schedule.
        batch_size: Images per step.
        max_train_images: Use only so many training images.
        seed: Of initialisation, order and augmentation.
        threads: PyTorch's threads.
        spec: What the model takes.
        force: Replace a file that is there.
        reporter: Told of progress.

    Raises:
        OutputExists: the file is there.
        TrainingDiverged: the loss was not finite.
        CompressionError: the model or the data cannot be used.
    """
    out = Path(out)
    if out.suffix != ".safetensors":
        raise UsageInvalid(f"weights are written as .safetensors; {out} ends otherwise")
    if out.exists() and not force:
        raise OutputExists(f"{out} exists; choose another name, or --force to replace it")
    source = resolve(model, spec)
    with torch_threads(threads):
        dataset = load_data(data, source.spec, max_train_images=max_train_images, reporter=reporter)
        seed_everything(seed)
        loaded = load_model(source, classes=len(dataset.classes))
        defaults = source.training
        config = FitConfig(
            epochs=epochs or defaults.epochs,
            batch_size=batch_size or defaults.batch_size,
            learning_rate=learning_rate or defaults.learning_rate,
            weight_decay=defaults.weight_decay,
            optimizer=defaults.optimizer,
            seed=seed,
        )
        history = fit(loaded.module, dataset, source.spec, config, reporter=reporter)
        found = _held_out_accuracy(torch_predictor(loaded.module, source.spec), dataset)
    save_state(loaded.module, out)
    return TrainResult(source.reference, out, found, history, dataset)


def _held_out_accuracy(predict: Predict, data: Dataset) -> Accuracy:
    logits = predict_part(predict, data.held_out)
    return accuracy(right_answers(logits, data.held_out), data.held_out)
