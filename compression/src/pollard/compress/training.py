"""Fit weights: one loop for training from scratch and for recovery after pruning."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from pollard.compress.checkpoint import Checkpoint
from pollard.compress.data import Dataset, Part
from pollard.compress.errors import TrainingDiverged
from pollard.compress.evaluate import predict_part, right_answers, torch_predictor
from pollard.compress.progress import Reporter
from pollard.compress.spec import InputSpec


@dataclass(frozen=True)
class FitConfig:
    """How to fit."""

    epochs: int
    batch_size: int = 64
    learning_rate: float = 1e-3
    """Peak of a one-cycle schedule (Smith and Topin, 2017)."""
    weight_decay: float = 1e-4
    optimizer: Literal["adamw", "sgd"] = "adamw"
    seed: int = 0
    distill_weight: float = 0.0
    """Share of the loss that is distillation (Hinton et al., 2015); the rest is
    cross-entropy."""
    distill_temperature: float = 4.0


@dataclass
class History:
    """What happened in each epoch."""

    loss: list[float] = field(default_factory=list)
    choose_accuracy: list[float] = field(default_factory=list)
    """On the choosing part, after each epoch."""
    best_epoch: int = 0
    """From 1; 0 means the state before the first epoch."""
    start_accuracy: float = 0.0
    """On the choosing part, before the first epoch."""
    stopped: str = ""
    """Why it ended early; empty when it did not."""


def seed_everything(seed: int) -> None:
    """Seed PyTorch's and NumPy's global generators."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)


def choose_accuracy(module: nn.Module, spec: InputSpec, part: Part) -> float:
    """Return the module's accuracy on ``part``, 0 to 1."""
    logits = predict_part(torch_predictor(module, spec), part, 256)
    return float(right_answers(logits, part).mean())


def fit(
    module: nn.Module,
    data: Dataset,
    spec: InputSpec,
    config: FitConfig,
    *,
    teacher: nn.Module | None = None,
    reporter: Reporter | None = None,
    title: str = "Training",
    checkpoint: Checkpoint | None = None,
) -> History:
    """Fit ``module`` in place; it ends with the best state on the choosing part.

    A loss that is not finite stops the work; the best state so far is kept.

    Args:
        module: Whose weights to fit.
        data: Its train and choose parts are used; held-out is not touched.
        spec: Normalisation and augmentation.
        config: How.
        teacher: Parent to distil from when ``config.distill_weight`` is set.
        reporter: Told of progress.
        title: What to call the work.
        checkpoint: Where to note now and then how far it is, and from where to go on
            if something is there; the result is the same, to the bit, as without a break.

    Raises:
        OSError: the checkpoint cannot be written.
        TrainingDiverged: the state before the first epoch gives answers that
            are not finite, or nothing good was reached from scratch.
    """
    reporter = reporter or Reporter()
    run = _Run.begin(module, data, spec, config)
    if checkpoint is not None and (saved := checkpoint.load()) is not None:
        run.restore(saved)
    history, total = run.history, run.steps * config.epochs
    if teacher is not None:
        teacher.eval()
    with reporter.step(title, total) as step:
        step.advance(run.done)
        while run.epoch <= config.epochs and not history.stopped:
            module.train()
            while run.position < len(data.train):
                images, labels = run.batch(data.train)
                inputs = spec.normalize(augment(images, spec, run.generator))
                loss = _loss(module, teacher, inputs, torch.from_numpy(labels), config)
                if not torch.isfinite(loss):
                    history.stopped = f"the loss was {loss.item()} in epoch {run.epoch}"
                    break
                run.learn(loss)
                step.advance(note=f"loss {run.losses[-1]:.3f}, best {run.best:.2%}")
                if checkpoint is not None and checkpoint.due:
                    checkpoint.save(run.state())
            if not history.stopped:
                run.end_epoch(choose_accuracy(module, spec, data.choose))
                if checkpoint is not None and checkpoint.due:
                    checkpoint.save(run.state())
    if history.stopped and history.best_epoch == 0 and teacher is None:
        raise TrainingDiverged(
            f"{history.stopped}, before any good state; lower the learning rate "
            f"(it is {config.learning_rate:g})"
        )
    if history.stopped:
        reporter.say(
            f"{title} stopped: {history.stopped}; the state of epoch {history.best_epoch} is kept"
        )
    module.load_state_dict(run.best_state)
    module.eval()
    return history


def one_cycle(total: int) -> Callable[[int], float]:
    """Return the share of the peak learning rate at each of ``total`` steps.

    It rises for a fifth of the time and falls to nothing, both along a cosine.
    """
    rise = max(1, round(0.2 * total))

    def share(step: int) -> float:
        if step < rise:
            return 0.04 + 0.96 * (1 - math.cos(math.pi * step / rise)) / 2
        return max(1e-4, (1 + math.cos(math.pi * (step - rise) / max(1, total - rise))) / 2)

    return share


def augment(
    images: NDArray[np.uint8], spec: InputSpec, generator: np.random.Generator
) -> NDArray[np.uint8]:
    """Move each image by up to a tenth (and mirror it), filling with black.

    Args:
        images: uint8 [n, height, width, channels].
        spec: Says what is done.
        generator: Source of chance.
    """
    if spec.augmentation == "none":
        return images
    count, height, width, _ = images.shape
    reach_y, reach_x = max(1, height // 10), max(1, width // 10)
    if spec.augmentation == "crop-flip":
        reach_y, reach_x = max(1, height // 8), max(1, width // 8)
    padded = np.pad(images, ((0, 0), (reach_y, reach_y), (reach_x, reach_x), (0, 0)))
    rows = generator.integers(0, 2 * reach_y + 1, count)[:, None] + np.arange(height)
    columns = generator.integers(0, 2 * reach_x + 1, count)[:, None] + np.arange(width)
    if spec.augmentation == "crop-flip":
        mirrored = generator.random(count) < 0.5
        columns[mirrored] = columns[mirrored, ::-1]
    moved: NDArray[np.uint8] = padded[
        np.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]
    ]
    return moved


def recalibrate_batch_norm(
    module: nn.Module, data: Part, spec: InputSpec, images: int = 2048, batch_size: int = 128
) -> None:
    """Measure the batch-norm statistics anew; weights stay as they are."""
    starts = range(0, min(images, len(data)), batch_size)
    pieces = (data.images[start : start + batch_size] for start in starts)
    recalibrate_by(module, (spec.normalize(piece) for piece in pieces))


def recalibrate_by(module: nn.Module, batches: Iterable[Tensor]) -> None:
    """Measure the batch-norm statistics anew on inputs, float32 [batch, …]."""
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain average over all batches
    module.train()
    with torch.no_grad():
        for inputs in batches:
            if len(inputs) > 1:
                module(inputs)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    module.eval()


def _optimizer(parameters: list[nn.Parameter], config: FitConfig) -> torch.optim.Optimizer:
    if config.optimizer == "sgd":
        return torch.optim.SGD(
            parameters,
            lr=config.learning_rate,
            momentum=0.9,
            nesterov=True,
            weight_decay=config.weight_decay,
        )
    return torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)


@dataclass
class _Run:
    """Where a fit stands between two steps."""

    module: nn.Module
    parameters: list[nn.Parameter]
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LambdaLR
    generator: np.random.Generator
    batch_size: int
    steps: int
    """Of an epoch."""
    history: History
    best: float
    best_state: dict[str, Tensor]
    order: NDArray[np.int64]
    """In which the images of this epoch come."""
    epoch: int = 1
    position: int = 0
    """In ``order``, of the next image."""
    losses: list[float] = field(default_factory=list)
    """Of this epoch."""

    @classmethod
    def begin(cls, module: nn.Module, data: Dataset, spec: InputSpec, config: FitConfig) -> _Run:
        seed_everything(config.seed)
        generator = np.random.default_rng(config.seed)
        start = choose_accuracy(module, spec, data.choose)
        parameters = [p for p in module.parameters() if p.requires_grad]
        steps = math.ceil(len(data.train) / config.batch_size)
        optimizer = _optimizer(parameters, config)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, one_cycle(steps * config.epochs))
        return cls(
            module,
            parameters,
            optimizer,
            schedule,
            generator,
            config.batch_size,
            steps,
            History(start_accuracy=start),
            start,
            copy.deepcopy(module.state_dict()),
            generator.permutation(len(data.train)),
        )

    @property
    def done(self) -> int:
        """Steps behind it."""
        return (self.epoch - 1) * self.steps + len(self.losses)

    def batch(self, part: Part) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        chosen = self.order[self.position : self.position + self.batch_size]
        self.position += self.batch_size
        # Batch norm cannot train on a single image.
        if len(chosen) == 1:
            chosen = np.concatenate([chosen, self.order[:1]])
        chosen = np.sort(chosen)  # sequential reads when the images are in a file
        return part.images[chosen], part.labels[chosen]

    def learn(self, loss: Tensor) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.parameters, 5.0)
        self.optimizer.step()
        self.schedule.step()
        self.losses.append(loss.item())

    def end_epoch(self, score: float) -> None:
        self.history.loss.append(float(np.mean(self.losses)))
        self.history.choose_accuracy.append(score)
        # The later of two equals: it has been trained longer.
        if score >= self.best and _finite(self.module):
            self.best, self.history.best_epoch = score, self.epoch
            self.best_state = copy.deepcopy(self.module.state_dict())
        self.epoch, self.position, self.losses = self.epoch + 1, 0, []
        self.order = self.generator.permutation(len(self.order))

    def state(self) -> dict[str, Any]:
        """Return everything that the next step depends on."""
        return {
            "module": self.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            # The counters of NumPy's generators have 128 bits.
            "generator": json.dumps(self.generator.bit_generator.state),
            "torch_generator": torch.get_rng_state(),
            "history": asdict(self.history),
            "best": self.best,
            "best_state": self.best_state,
            "order": torch.from_numpy(self.order),
            "epoch": self.epoch,
            "position": self.position,
            "losses": self.losses,
        }

    def restore(self, saved: Mapping[str, Any]) -> None:
        self.module.load_state_dict(saved["module"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.schedule.load_state_dict(saved["schedule"])
        self.generator.bit_generator.state = json.loads(saved["generator"])
        torch.set_rng_state(saved["torch_generator"])
        self.history = History(**saved["history"])
        self.best, self.best_state = saved["best"], saved["best_state"]
        self.order = saved["order"].numpy()
        self.epoch, self.position = saved["epoch"], saved["position"]
        self.losses = list(saved["losses"])


def _loss(
    module: nn.Module,
    teacher: nn.Module | None,
    inputs: Tensor,
    labels: Tensor,
    config: FitConfig,
) -> Tensor:
    logits = module(inputs)
    hard = functional.cross_entropy(logits, labels)
    if teacher is None or config.distill_weight == 0:
        return hard
    with torch.no_grad():
        wanted = teacher(inputs)
    t = config.distill_temperature
    soft = functional.kl_div(
        functional.log_softmax(logits / t, 1),
        functional.log_softmax(wanted / t, 1),
        reduction="batchmean",
        log_target=True,
    )
    # T² keeps the gradients of both parts of one size.
    return config.distill_weight * t * t * soft + (1 - config.distill_weight) * hard


def _finite(module: nn.Module) -> bool:
    return all(
        bool(v.isfinite().all()) for v in module.state_dict().values() if v.is_floating_point()
    )
