"""Train a model from scratch, and measure the accuracy of one that exists."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pollard.compress.data import Dataset, load_data
from pollard.compress.errors import LabelsMismatch, OutputExists, UsageInvalid
from pollard.compress.evaluate import (
    Accuracy,
    Predict,
    accuracy,
    predict_part,
    right_answers,
    session_predictor,
    torch_predictor,
)
from pollard.compress.models import load_model, resolve, save_state
from pollard.compress.pipeline import require_weights, torch_threads
from pollard.compress.progress import Reporter
from pollard.compress.spec import InputSpec
from pollard.compress.training import FitConfig, History, fit, seed_everything
from pollard.runtime.bundle import MANIFEST, Bundle
from pollard.runtime.machine import Machine, select_variant
from pollard.runtime.sessions import check_signature, open_session
from pollard.runtime.transforms import Pipeline


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


def evaluate(
    model: str,
    data: str | Path,
    *,
    weights: str = "",
    spec: InputSpec | None = None,
    threads: int | None = None,
    reporter: Reporter | None = None,
) -> Accuracy:
    """Measure the accuracy on the held-out part.

    Args:
        model: A bundle's directory, or as for :func:`train`.
        data: As for :func:`train`.
        weights: Of a model that is not a bundle.
        spec: What such a model takes.
        threads: PyTorch's threads.
        reporter: Told of progress.

    Raises:
        CompressionError: the model or the data cannot be used.
        RuntimeFault: the bundle cannot be used on this machine.
    """
    path = Path(model)
    if path.is_dir() or (path / MANIFEST).exists():
        return _evaluate_bundle(Bundle.open(path), data, reporter)
    source = resolve(model, spec)
    require_weights(weights, source)
    with torch_threads(threads):
        dataset = load_data(data, source.spec, reporter=reporter)
        loaded = load_model(source, weights, classes=len(dataset.classes))
        return _held_out_accuracy(torch_predictor(loaded.module, source.spec), dataset)


def _evaluate_bundle(bundle: Bundle, data: str | Path, reporter: Reporter | None) -> Accuracy:
    variant = select_variant(bundle.manifest, Machine.detect())
    session = open_session(bundle.model_path(variant), target=variant.target)
    check_signature(session, bundle.manifest)
    dataset = load_data(data, Pipeline(bundle.manifest.preprocess), reporter=reporter)
    if bundle.labels and bundle.labels != dataset.classes:
        raise LabelsMismatch(
            f"the bundle's labels are {', '.join(bundle.labels[:20])}; the data's classes are "
            f"{', '.join(dataset.classes[:20])}"
        )
    return _held_out_accuracy(session_predictor(session), dataset)


def _held_out_accuracy(predict: Predict, data: Dataset) -> Accuracy:
    logits = predict_part(predict, data.held_out)
    return accuracy(right_answers(logits, data.held_out), data.held_out)
