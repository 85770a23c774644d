"""Train a model: from scratch, or from what another network has learnt."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn

from pollard.compress import accelerator, augmentation_truth, kept_weights
from pollard.compress.augmentation import Augment
from pollard.compress.checkpoint import Checkpoint, checkpoint_beside
from pollard.compress.curves import EpochTable, Observers, TensorBoard, write_page
from pollard.compress.data import Dataset, load_data
from pollard.compress.errors import LabelsMismatch, OutputExists, UsageInvalid
from pollard.compress.evaluate import Accuracy, Predict, predict_part, torch_predictor
from pollard.compress.models import Source, device_for, load_model, resolve, save_state
from pollard.compress.parallel import Team, team
from pollard.compress.pipeline import torch_threads
from pollard.compress.progress import Reporter
from pollard.compress.run_stages import code_digest
from pollard.compress.schedules import SCHEDULES, Schedule
from pollard.compress.spec import InputSpec
from pollard.compress.tasks import task_of
from pollard.compress.training import FitConfig, History, fit, seed_everything
from pollard.compress.transfer import Frozen, freeze_backbone, load_backbone
from pollard.runtime.digests import sha256_file

Optimizer = Literal["adamw", "adam", "sgd"]
Loss = Literal["cross-entropy", "mse"]


@dataclass(frozen=True)
class TrainOptions:
    """How to train; None stands for what suits the model."""

    epochs: int | None = None
    batch_size: int | None = None
    """Images of a step, of all processes together."""
    learning_rate: float | None = None
    """Peak of the schedule."""
    weight_decay: float | None = None
    optimizer: Optimizer | None = None
    momentum: float = 0.9
    """Of SGD."""
    nesterov: bool = True
    schedule: Schedule = "one-cycle"
    loss: Loss = "cross-entropy"
    label_smoothing: float = 0.0
    augment: Augment | None = None
    bf16: bool = False
    ema: float = 0.0
    """Decay of the mean of the weights; 0: none."""
    patience: int = 0
    """Epochs without a better one after which training ends; 0: never."""
    start: Path | None = None
    """Weights of the same architecture to begin from, for these classes or others; a file, or a
    bundle that keeps them."""
    freeze: Literal["none", "backbone"] = "none"
    unfreeze_every: int = 0
    """Epochs after which one more block learns, from the last to the first; 0: never."""

    def __post_init__(self) -> None:
        for name, values in (
            ("optimizer", (None, "adamw", "adam", "sgd")),
            ("schedule", SCHEDULES),
            ("loss", ("cross-entropy", "mse")),
            ("freeze", ("none", "backbone")),
        ):
            if getattr(self, name) not in values:
                known = ", ".join(str(value) for value in values if value)
                raise UsageInvalid(f"{name} {getattr(self, name)!r} is not one of {known}")
        for name in ("momentum", "label_smoothing", "ema"):
            if not 0 <= getattr(self, name) < 1:
                raise UsageInvalid(f"{name} is {getattr(self, name):g}; it lies from 0 to below 1")
        if self.learning_rate is not None and not self.learning_rate > 0:
            raise UsageInvalid(f"the learning rate is {self.learning_rate:g}; it must be positive")
        if self.freeze == "backbone" and self.start is None:
            raise UsageInvalid(
                "a frozen backbone of random weights learns nothing: give --from FILE, too"
            )
        if self.unfreeze_every and self.freeze != "backbone":
            raise UsageInvalid("--unfreeze-every needs --freeze backbone")

    def fill_in(self, source: Source, seed: int) -> FitConfig:
        """Return the whole configuration for a model.

        Raises:
            UsageInvalid: something is asked for that the model's task has not.
        """
        defaults = source.training
        if source.task != "classification":
            if self.loss != "cross-entropy":
                raise UsageInvalid(f"loss {self.loss} is of classes; {source.task} has its own")
            if self.label_smoothing and source.task == "detection":
                raise UsageInvalid(
                    "the scores of boxes are trained to be their overlap; there is no label to "
                    "smooth"
                )
            if self.augment is not None:
                augmentation_truth.check(self.augment, source.task)
        given = self.weight_decay
        return FitConfig(
            epochs=self.epochs or defaults.epochs,
            batch_size=self.batch_size or defaults.batch_size,
            learning_rate=self.learning_rate or defaults.learning_rate,
            weight_decay=defaults.weight_decay if given is None else given,
            optimizer=self.optimizer or defaults.optimizer,
            seed=seed,
            momentum=self.momentum,
            nesterov=self.nesterov,
            schedule=self.schedule,
            loss=self.loss,
            label_smoothing=self.label_smoothing,
            augment=self.augment,
            bf16=self.bf16,
            ema=self.ema,
            patience=self.patience,
        )


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
    options: TrainOptions | None = None,
    max_train_images: int | None = None,
    validation: float | None = None,
    seed: int = 0,
    threads: int | None = None,
    device: str = "auto",
    spec: InputSpec | None = None,
    classes: int | None = None,
    force: bool = False,
    resume: bool = False,
    checkpoint_seconds: float = 30.0,
    max_seconds: float = math.inf,
    curves: Path | None = None,
    tensorboard: Path | None = None,
    reporter: Reporter | None = None,
) -> TrainResult:
    """Train ``model`` and write the best epoch's weights.

    The best epoch is chosen on the choosing part; the accuracy given back is
    that of the held-out part. How far it is stands in a checkpoint beside
    ``out`` until it is done. Under torchrun every process calls this with the
    same arguments, and the first writes.

    Args:
        model: As for :func:`pollard.compress.models.resolve`.
        data: As for :func:`pollard.compress.data.load_data`.
        out: File to write, `.safetensors`.
        options: How.
        max_train_images: Use only so many training images.
        validation: As for :func:`pollard.compress.data.load_data`.
        seed: Of initialisation, order and augmentation.
        threads: PyTorch's threads.
        device: As for :func:`pollard.compress.accelerator.find`.
        spec: What the model takes.
        classes: Number of classes that the data must have.
        force: Replace a file that is there, and forget an unfinished run.
        resume: Go on with an unfinished run, to the same weights as without a break.
        checkpoint_seconds: At least so long between two checkpoints.
        max_seconds: What fitting may take, about; fewer steps are taken where not all of them
            fit, and the learning rate falls to its end within those.
        curves: Page to write with loss and accuracy.
        tensorboard: Directory for TensorBoard's files.
        reporter: Told of progress.

    Raises:
        OutputExists: the file is there, or an unfinished run.
        UsageInvalid: the unfinished run has another recipe; the differences are named. Or other
            processes of torchrun compute on another kind of device.
        DeviceUnusable: there is no such device.
        TrainingDiverged: the loss was not finite.
        CompressionError: the model or the data cannot be used.
    """
    out, options = Path(out), options or TrainOptions()
    if out.suffix != ".safetensors":
        raise UsageInvalid(f"weights are written as .safetensors; {out} ends otherwise")
    if out.exists() and not force:
        raise OutputExists(f"{out} exists; choose another name, or --force to replace it")
    path = checkpoint_beside(out)
    if path.exists() and not (force or resume):
        raise OutputExists(
            f"an unfinished run has left {path}: --resume goes on with it, --force begins anew"
        )
    source = resolve(model, spec)
    source.require_pytorch("training")
    config = options.fill_in(source, seed)
    reporter = reporter if reporter is not None and leads() else Reporter()
    place = device_for(source, device, reporter)
    with accelerator.on(place), team(place) as processes, torch_threads(threads):
        dataset = load_data(
            data, source.spec, task=source.task, max_train_images=max_train_images,
            validation=validation, reporter=reporter,
        )  # fmt: skip
        if classes is not None and classes != len(dataset.classes):
            raise LabelsMismatch(
                f"the data have {len(dataset.classes)} classes, not {classes}: "
                f"{', '.join(dataset.classes[:20])}"
            )
        seed_everything(seed)
        loaded = load_model(source, classes=len(dataset.classes), auxiliary=True)
        accelerator.tell(place, reporter)
        frozen = _begin_from(options, loaded.module, source, reporter)
        recipe = _recipe(source, loaded.module, dataset, config, options)
        checkpoint = Checkpoint(path, recipe, every_seconds=checkpoint_seconds)
        if resume:
            _check_recipe(checkpoint)
            if not path.exists():
                reporter.say(f"There is no unfinished run at {path}; this begins anew")
        elif processes.leads:
            checkpoint.remove()
        board = _board(tensorboard, processes)
        observers = Observers(
            [EpochTable(reporter, config.epochs, task_of(source.task).metric), *board]
        )
        history = fit(
            loaded.module, dataset, source.spec, config, reporter=reporter, checkpoint=checkpoint,
            frozen=frozen, team=processes, observer=observers if processes.leads else None,
            seconds=max_seconds,
        )  # fmt: skip
        found = _held_out_accuracy(torch_predictor(loaded.module, source.spec), dataset)
        if processes.leads:
            save_state(loaded.module, out)
            checkpoint.remove()
            for one in board:
                one.close(found.value)
            if curves is not None:
                write_page(curves, source.name, history, found)
    return TrainResult(source.reference, out, found, history, dataset)


def _begin_from(
    options: TrainOptions, module: Any, source: Source, reporter: Reporter
) -> Frozen | None:
    """Load the weights to begin from, and plan which layers learn."""
    if options.start is not None:
        state = kept_weights.read(options.start)
        whole = load_backbone(module, source.spec, state, options.start)
        reporter.say(
            f"Begun from {options.start}"
            + (", the head too" if whole else "; the head is new, for other classes")
        )
    if options.freeze == "none":
        return None
    return freeze_backbone(module, source.spec, options.unfreeze_every)


def _recipe(
    source: Source, module: nn.Module, data: Dataset, config: FitConfig, options: TrainOptions
) -> str:
    """Return all that a run depends on, as text; what goes on must have the same."""
    start = "" if options.start is None else sha256_file(kept_weights.weights_file(options.start))
    # What is built in is told by its name; a later version of Pollard may go on with it.
    own = not source.reference.startswith("zoo:")
    fields = {
        "model": source.reference,
        **({"model_layers": repr(module), "model_code": code_digest(module)} if own else {}),
        "input": asdict(source.spec),
        "data": data.digest,
        "split": data.split,
        "from": start,
        "freeze": options.freeze,
        "unfreeze_every": options.unfreeze_every,
        **asdict(config),
    }
    return json.dumps(fields, sort_keys=True)


def _check_recipe(checkpoint: Checkpoint) -> None:
    """Raise UsageInvalid where the checkpoint's recipe is another, with the differences."""
    owner = checkpoint.owner()
    if owner in ("", checkpoint.belongs_to):
        return
    was, now = _flat(json.loads(owner)), _flat(json.loads(checkpoint.belongs_to))
    differences = [
        f"{name} was {_short(was.get(name))} and is {_short(now.get(name))}"
        for name in sorted(was.keys() | now.keys())
        if was.get(name) != now.get(name)
    ]
    raise UsageInvalid(
        f"the unfinished run {checkpoint.path} has another recipe: {'; '.join(differences)}. Give "
        "the same to go on, or --force instead of --resume to begin anew"
    )


def _flat(fields: dict[str, Any]) -> dict[str, Any]:
    """Return fields of fields under names such as "input.height": what differs is to be seen."""
    flat: dict[str, Any] = {}
    for name, value in fields.items():
        inner = _flat(value) if isinstance(value, dict) else {"": value}
        flat |= {f"{name}.{key}".rstrip("."): one for key, one in inner.items()}
    return flat


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:40]}…"


def _board(tensorboard: Path | None, processes: Team) -> list[TensorBoard]:
    return [TensorBoard(tensorboard)] if tensorboard is not None and processes.leads else []


def _held_out_accuracy(predict: Predict, data: Dataset) -> Accuracy:
    answers = predict_part(predict, data.held_out)
    found = task_of(data.task).judge(answers, data.held_out, len(data.classes))
    return found.accuracy(data.held_out)


def leads() -> bool:
    """Return whether this process is the one that tells and writes."""
    return os.environ.get("RANK", "0") == "0"
