"""Fit weights: one loop for training from scratch and for recovery after pruning."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from pollard.compress import augmentation, augmentation_truth
from pollard.compress.accelerator import (
    device_chance,
    home_of,
    moved,
    placed,
    set_device_chance,
    used,
)
from pollard.compress.augmentation import Augment
from pollard.compress.checkpoint import Checkpoint
from pollard.compress.data import Dataset, Part
from pollard.compress.errors import TrainingDiverged
from pollard.compress.evaluate import predict_part, torch_predictor
from pollard.compress.pace import Pace
from pollard.compress.parallel import Team
from pollard.compress.progress import Reporter
from pollard.compress.schedules import Schedule, schedule
from pollard.compress.spec import InputSpec
from pollard.compress.tasks import Outputs, task_of
from pollard.compress.transfer import Frozen
from pollard.compress.truth import TaskName
from pollard.compress.zoo.inception import InceptionV3

# Weight of an auxiliary classifier's loss, as in the paper of Inception v3.
_AUXILIARY = 0.3


@dataclass(frozen=True)
class FitConfig:
    """How to fit."""

    epochs: int
    batch_size: int = 64
    learning_rate: float = 1e-3
    """Peak of the schedule."""
    weight_decay: float = 1e-4
    optimizer: Literal["adamw", "adam", "sgd"] = "adamw"
    seed: int = 0
    distill_weight: float = 0.0
    """Share of the loss that is distillation (Hinton et al., 2015); the rest is the task's."""
    distill_temperature: float = 4.0
    momentum: float = 0.9
    """Of SGD."""
    nesterov: bool = True
    """Whether SGD looks ahead by its momentum."""
    schedule: Schedule = "one-cycle"
    loss: Literal["cross-entropy", "mse"] = "cross-entropy"
    """Of classes: "mse" is the squared distance of the probabilities from the label (Brier's
    score). Boxes and masks have losses of their own."""
    label_smoothing: float = 0.0
    """Share of the label that is spread over all classes (Szegedy et al., 2016)."""
    augment: Augment | None = None
    """What is done to images; None: what the model's input says."""
    bf16: bool = False
    """Whether convolutions and products run in bfloat16; weights stay float32."""
    ema: float = 0.0
    """Decay of a mean of the weights over the steps, which is what is judged and kept; 0: none."""
    patience: int = 0
    """Epochs without a better one after which training ends; 0: never."""


@dataclass
class History:
    """What happened in each epoch."""

    loss: list[float] = field(default_factory=list)
    choose_accuracy: list[float] = field(default_factory=list)
    """What the task is judged by, on the choosing part, after each epoch."""
    best_epoch: int = 0
    """From 1; 0 means the state before the first epoch."""
    start_accuracy: float = 0.0
    """On the choosing part, before the first epoch."""
    stopped: str = ""
    """Why it ended early; empty when it did not."""


class Observer(Protocol):
    """Is told of every step and epoch."""

    def step(self, step: int, loss: float, learning_rate: float) -> None:
        """Take the loss of a step, which is counted from 1."""

    def epoch(self, epoch: int, loss: float, score: float, best: bool) -> None:
        """Take the mean loss of an epoch, the accuracy behind it, and whether it is the best."""


def seed_everything(seed: int) -> None:
    """Seed PyTorch's and NumPy's global generators."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)


def choose_accuracy(
    module: nn.Module, spec: InputSpec, part: Part, team: Team | None = None
) -> float:
    """Return the module's accuracy on ``part``, or what its task has in its place, 0 to 1."""
    team = team or Team()
    if part.task != "classification":
        # No sum over images: every process looks at all of them.
        team = Team()
    own = part.take(slice(team.rank, None, team.size))
    if not len(own):
        return team.sum(0.0) / len(part)
    answers = predict_part(torch_predictor(module, spec), own, 256)
    classes = answers.shape[1] if part.task != "detection" else answers.shape[2] - 4
    found = task_of(part.task).judge(answers, own, classes).accuracy(own).value
    return team.sum(found * len(own)) / len(part)


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
    frozen: Frozen | None = None,
    team: Team | None = None,
    observer: Observer | None = None,
    seconds: float = math.inf,
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
            if something is there; the result is the same as without a break, on the processor
            to the bit.
        frozen: Which layers learn, and from when on; all from the start when None.
        team: The processes that share the batches; all must call this with the same.
        observer: Told of steps and epochs.
        seconds: What it may take, about. Fewer steps are taken where not all of them fit,
            and the learning rate falls to its end within those that do.

    Raises:
        OSError: the checkpoint cannot be written.
        TrainingDiverged: the state before the first epoch gives answers that
            are not finite, or nothing good was reached from scratch.
    """
    reporter, team = reporter or Reporter(), team or Team()
    with placed(module, *(() if teacher is None else (teacher,))):
        # Channels last is the order that convolutions run fastest in; outputs follow the weights.
        module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        run = _Run.begin(module, data, spec, config, team)
        if checkpoint is not None and (saved := checkpoint.load()) is not None:
            run.restore(saved)
        total, pace = run.total, Pace(seconds)

        def note() -> None:
            if checkpoint is not None and team.leads and checkpoint.due:
                checkpoint.save(run.state())

        if teacher is not None:
            teacher.eval()
        with reporter.step(title, total) as step:
            step.advance(run.done)
            while run.done < run.total and not run.history.stopped:
                module.train()
                if frozen is not None:
                    frozen.apply(module, run.epoch)
                for loss in _steps(run, data, spec, config, teacher):
                    if math.isfinite(seconds):
                        run.keep_to(pace, config)
                    step.advance(note=f"loss {loss:.3f}, best {run.best:.2%}")
                    if observer is not None:
                        observer.step(run.done, loss, run.optimizer.param_groups[0]["lr"])
                    note()
                if run.diverged:
                    break
                team.average_statistics(module)
                with run.judged():
                    run.end_epoch(choose_accuracy(module, spec, data.choose, team), config)
                if observer is not None:
                    observer.epoch(*run.last_epoch())
                note()
        _tell_end(run, total, title, config, reporter, has_teacher=teacher is not None)
        module.load_state_dict(run.best_state)
        module.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        if frozen is not None:
            module.requires_grad_(True)
        module.eval()
        return run.history


def _steps(
    run: _Run, data: Dataset, spec: InputSpec, config: FitConfig, teacher: nn.Module | None
) -> Iterator[float]:
    """Take the steps that are left of an epoch, and yield the loss of each.

    One that is not finite is not learnt from, and ends the run.
    """
    while run.position < len(data.train) and run.done < run.total:
        inputs, labels, mixed, weight = run.batch(data.train, spec, config)
        loss = _loss(run.module, teacher, inputs, labels, config, data.task, mixed)
        value = run.team.sum(weight * loss.item())
        if not math.isfinite(value):
            run.diverged = True
            run.history.stopped = f"the loss was {value} in epoch {run.epoch}"
            return
        run.learn(weight * loss, value)
        yield value


def _tell_end(
    run: _Run, total: int, title: str, config: FitConfig, reporter: Reporter, *, has_teacher: bool
) -> None:
    """Say what ended a run early; raise TrainingDiverged where nothing of it can be kept."""
    history = run.history
    if run.diverged and history.best_epoch == 0 and not has_teacher:
        raise TrainingDiverged(
            f"{history.stopped}, before any good state; lower the learning rate "
            f"(it is {config.learning_rate:g})"
        )
    if history.stopped:
        reporter.say(
            f"{title} stopped: {history.stopped}; the state of epoch {history.best_epoch} is kept"
        )
    elif run.total < total:
        history.stopped = f"{run.total:,} of {total:,} steps fitted into the time that was given"
        reporter.say(f"{title} was shortened: {history.stopped}")


def recalibrate_batch_norm(
    module: nn.Module, data: Part, spec: InputSpec, images: int = 2048, batch_size: int = 128
) -> None:
    """Measure the batch-norm statistics anew; weights stay as they are."""
    starts = range(0, min(images, len(data)), batch_size)
    pieces = (data.images[start : start + batch_size] for start in starts)
    recalibrate_by(module, (spec.normalize(piece, used()) for piece in pieces))


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
    with placed(module) as device, torch.no_grad():
        for inputs in batches:
            if len(inputs) > 1:
                module(inputs.to(device))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    module.eval()


def _optimizer(parameters: list[nn.Parameter], config: FitConfig) -> torch.optim.Optimizer:
    rate, decay = config.learning_rate, config.weight_decay
    if config.optimizer == "sgd":
        ahead = config.nesterov and config.momentum > 0
        return torch.optim.SGD(
            parameters, lr=rate, momentum=config.momentum, nesterov=ahead, weight_decay=decay
        )
    kind = torch.optim.Adam if config.optimizer == "adam" else torch.optim.AdamW
    return kind(parameters, lr=rate, weight_decay=decay)


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
    total: int
    """Of all epochs, or fewer where the time is limited."""
    team: Team
    mean_decay: float
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
    mean: dict[str, Tensor] = field(default_factory=dict)
    """Mean of the weights over the steps; empty when none is kept."""
    diverged: bool = False
    """Whether a loss was not finite."""

    @classmethod
    def begin(
        cls, module: nn.Module, data: Dataset, spec: InputSpec, config: FitConfig, team: Team
    ) -> _Run:
        seed_everything(config.seed)
        generator = np.random.default_rng(config.seed)
        start = choose_accuracy(module, spec, data.choose, team)
        parameters = [p for p in module.parameters() if p.requires_grad]
        steps = math.ceil(len(data.train) / config.batch_size)
        optimizer = _optimizer(parameters, config)
        rates = torch.optim.lr_scheduler.LambdaLR(
            optimizer, schedule(config.schedule, steps * config.epochs)
        )
        return cls(
            module,
            parameters,
            optimizer,
            rates,
            generator,
            config.batch_size,
            steps,
            steps * config.epochs,
            team,
            config.ema,
            History(start_accuracy=start),
            start,
            copy.deepcopy(module.state_dict()),
            generator.permutation(len(data.train)),
            mean=copy.deepcopy(module.state_dict()) if config.ema else {},
        )

    @property
    def done(self) -> int:
        """Steps behind it."""
        return (self.epoch - 1) * self.steps + len(self.losses)

    def batch(
        self, part: Part, spec: InputSpec, config: FitConfig
    ) -> tuple[Tensor, Tensor, tuple[Tensor, float] | None, float]:
        """Return this process's share of the next batch.

        Inputs, labels; the partners' labels and the share of the image itself where
        images are mixed; and the weight of this share's mean loss.
        """
        chosen = self.order[self.position : self.position + self.batch_size]
        self.position += self.batch_size
        # Batch norm cannot train on a single image.
        if (lacking := 2 * self.team.size - len(chosen)) > 0:
            chosen = np.concatenate([chosen, np.resize(self.order, lacking)])
        chosen = np.sort(chosen)  # sequential reads when the images are in a file
        how = augmentation.of_spec(spec) if config.augment is None else config.augment
        drawn = augmentation.draw(how, len(chosen), spec, self.generator)
        own = self.team.share(len(chosen))
        images = augmentation.apply(self._pixels(part, chosen[own]), drawn.part(own))
        inputs = spec.normalize(images)
        truth = augmentation_truth.move(part.labels[chosen[own]], drawn.part(own), part.task, spec)
        labels = torch.from_numpy(truth).to(self.device)
        mixed = None
        if drawn.partner is not None:
            partners = drawn.partner[own]
            if self.team.size == 1:
                others = inputs[torch.from_numpy(partners).to(self.device)]
            else:
                pixels = self._pixels(part, chosen[partners])
                others = spec.normalize(augmentation.apply(pixels, drawn.part(partners)))
            inputs = augmentation.mix(inputs, others, drawn)
            theirs = torch.from_numpy(part.labels[chosen[partners]])
            mixed = (theirs.to(self.device), drawn.share)
        return inputs, labels, mixed, self.team.weight(len(chosen))

    def _pixels(self, part: Part, chosen: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(part.images[chosen]).to(self.device)

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return home_of(self.module)

    def learn(self, loss: Tensor, value: float) -> None:
        """Take a step down this share's loss; ``value`` is that of all shares."""
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self.team.sum_gradients(self.parameters)
        nn.utils.clip_grad_norm_(self.parameters, 5.0)
        self.optimizer.step()
        self.schedule.step()
        self.losses.append(value)
        # At first a shorter mean, or it would hold on to the random start.
        decay = min(self.mean_decay, (1 + self.done) / (10 + self.done))
        if self.mean:
            self._move_mean(decay)

    def _move_mean(self, decay: float) -> None:
        now = self.module.state_dict()
        moving = [key for key, value in now.items() if value.is_floating_point()]
        # All at once: one by one, a GPU would wait for the next to be asked for.
        move = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
        move([self.mean[key] for key in moving], [now[key] for key in moving], None)
        for key in now.keys() - moving:
            self.mean[key].copy_(now[key])

    def keep_to(self, pace: Pace, config: FitConfig) -> None:
        """End after as many steps as fit into the time, with the learning rate where it would be
        then."""
        left = self.total - self.done
        # By one clock: processes that disagree would wait for each other for ever.
        fit_in = round(self.team.sum(pace.fitting(left) if self.team.leads else 0))
        if fit_in < left:
            self.total = self.done + fit_in
            self.schedule.lr_lambdas = [schedule(config.schedule, max(1, self.total))]

    @contextmanager
    def judged(self) -> Iterator[None]:
        """Put the mean of the weights into the module meanwhile, if there is one."""
        if not self.mean:
            yield
            return
        kept = copy.deepcopy(self.module.state_dict())
        self.module.load_state_dict(self.mean)
        try:
            yield
        finally:
            self.module.load_state_dict(kept)

    def end_epoch(self, score: float, config: FitConfig) -> None:
        self.history.loss.append(float(np.mean(self.losses)))
        self.history.choose_accuracy.append(score)
        # The later of two equals: it has been trained longer.
        if score >= self.best and _finite(self.module):
            self.best, self.history.best_epoch = score, self.epoch
            self.best_state = copy.deepcopy(self.module.state_dict())
        self.epoch, self.position, self.losses = self.epoch + 1, 0, []
        self.order = self.generator.permutation(len(self.order))
        waited = self.epoch - 1 - self.history.best_epoch
        if config.patience and waited >= config.patience and self.done < self.total:
            self.history.stopped = f"no epoch of the last {waited} was better"

    def last_epoch(self) -> tuple[int, float, float, bool]:
        """Return number, mean loss and accuracy of the epoch behind it, and whether it is the
        best."""
        last, history = self.epoch - 1, self.history
        return last, history.loss[-1], history.choose_accuracy[-1], history.best_epoch == last

    def state(self) -> dict[str, Any]:
        """Return everything that the next step depends on."""
        return {
            "module": self.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            # The counters of NumPy's generators have 128 bits.
            "generator": json.dumps(self.generator.bit_generator.state),
            "torch_generator": torch.get_rng_state(),
            "device_generator": device_chance(self.device),
            "history": asdict(self.history),
            "best": self.best,
            "best_state": self.best_state,
            "order": torch.from_numpy(self.order),
            "epoch": self.epoch,
            "position": self.position,
            "losses": self.losses,
            "mean": self.mean,
            "total": self.total,
        }

    def restore(self, saved: Mapping[str, Any]) -> None:
        self.module.load_state_dict(saved["module"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.schedule.load_state_dict(saved["schedule"])
        self.generator.bit_generator.state = json.loads(saved["generator"])
        torch.set_rng_state(saved["torch_generator"])
        set_device_chance(self.device, saved.get("device_generator"))
        self.history = History(**saved["history"])
        self.best, self.best_state = saved["best"], saved["best_state"]
        self.order = saved["order"].numpy()
        self.epoch, self.position = saved["epoch"], saved["position"]
        self.losses = list(saved["losses"])
        self.mean = moved(saved.get("mean", {}), self.device)
        self.total = saved.get("total", self.total)


def _loss(
    module: nn.Module,
    teacher: nn.Module | None,
    inputs: Tensor,
    labels: Tensor,
    config: FitConfig,
    task_name: TaskName,
    mixed: tuple[Tensor, float] | None = None,
) -> Tensor:
    task, second = task_of(task_name), None
    outputs: Outputs
    kind = inputs.device.type
    with torch.autocast(kind, torch.bfloat16) if config.bf16 else nullcontext():
        if teacher is None and isinstance(module, InceptionV3):
            outputs, second = module.forward_with_auxiliary(inputs)
        else:
            outputs = module(inputs)
    size = (inputs.shape[2], inputs.shape[3])
    outputs = _as_float(outputs)
    hard = task.loss(outputs, labels, size, config, mixed)
    if second is not None:
        hard = hard + _AUXILIARY * task.loss(second.float(), labels, size, config, mixed)
    if teacher is None or config.distill_weight == 0:
        return hard
    with torch.no_grad():
        wanted = teacher(inputs)
    soft = task.distillation(outputs, wanted, config)
    return config.distill_weight * soft + (1 - config.distill_weight) * hard


def _as_float(outputs: Any) -> Outputs:
    if isinstance(outputs, Tensor):
        return outputs.float()
    return tuple(each.float() for each in outputs)


def _finite(module: nn.Module) -> bool:
    return all(
        bool(v.isfinite().all()) for v in module.state_dict().values() if v.is_floating_point()
    )
