"""Compress a module whose data, loss and metric are the caller's own.

The pipeline of :mod:`pollard.compress.pipeline` needs images in folders and gives a
signed bundle. This needs batches of tensors and a metric, and gives an ONNX file with
the module's own float input, and the pruned module, which can be trained further.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from pollard.compress import accelerator, bundling, export, quantize
from pollard.compress.accelerator import placed
from pollard.compress.anydata_cuts import (
    RECALIBRATION_BATCHES,
    Batches,
    Loss,
    batch_gradients,
    moved_batches,
    shrink_by_batches,
)
from pollard.compress.anydata_eight_bits import (
    Evaluate,
    MetricJudge,
    predictor,
    quantize_module,
    score,
)
from pollard.compress.budget import parse_budgets
from pollard.compress.channel_map import save_pruned
from pollard.compress.errors import DataInvalid, ExportFailed, GateRefused, UsageInvalid
from pollard.compress.latency import LatencyTable
from pollard.compress.macs import count_parameters, total_macs
from pollard.compress.overruns import FinishedFile, find_overruns
from pollard.compress.progress import Reporter
from pollard.compress.prune import Pruned, prune
from pollard.compress.recipe import (
    CALIBRATIONS,
    CPU_TARGETS,
    IMPORTANCES,
    Importance,
    Method,
    Target,
)
from pollard.compress.schedules import one_cycle
from pollard.compress.shrink import ShrinkConfig
from pollard.compress.training import recalibrate_by, seed_everything
from pollard.compress.verify import MIN_SPEEDUP
from pollard.runtime.bundle import write_durably
from pollard.runtime.machine import Machine
from pollard.runtime.measure import Ratio, interleaved, ratio
from pollard.runtime.sessions import open_session

_PARITY = 1e-3


@dataclass(frozen=True)
class ModelRecipe:
    """What :func:`compress_model` is asked to do.

    Raises:
        UsageInvalid: a value is out of its range.
    """

    max_drop: float
    """Most of the metric that may be lost, in its own unit: 0.01 is one point of an
    accuracy between 0 and 1."""
    target: Target = "cpu-int8"
    """"cpu-int8" lets float files compete, too; "cpu-fp32" means float only."""
    prune: float = 0.5
    """Share of the MACs to remove; 0 does not prune. Not used with ``budget``."""
    budget: tuple[str, ...] = ()
    """What the shipped file may take, such as "latency=0.4" or "size=300kB"; shares are of
    the parent's float file. Widths and residual blocks are chosen by measured latency."""
    importance: Importance = "l2"
    """How channels are ranked: "l1", "l2", "bn" or "taylor"."""
    prune_steps: int = 2
    """Cuts on the way to a budget, with recovery between them."""
    remove_blocks: bool = True
    """Whether whole residual blocks may go for a budget."""
    epochs: int = 2
    """Passes over the training data after pruning."""
    learning_rate: float = 1e-3
    """Peak of a one-cycle schedule of AdamW."""
    distill_weight: float = 0.5
    """Share of the loss that is the squared distance to the parent's outputs."""
    calibration_batches: int = 8
    """Batches that 8-bit ranges are measured on."""
    calibration: Method | Literal["auto"] = "auto"
    """How 8-bit ranges come from what was seen: "min-max", "mse", "percentile-99.999",
    "percentile-99.99" or "percentile-99.9"; "auto" compares them."""
    equalize: bool = True
    """Whether channels may be balanced between layers before they become 8 bits."""
    correct_biases: bool = True
    """Whether biases may make up for what rounding moves."""
    float_layers: bool = True
    """Whether layers may stay in float where 8 bits miss the gate."""
    keep_whole: tuple[str, ...] = ()
    """Layers whose outputs are not pruned, and that are not factorised."""
    factorize: float | None = None
    """Share of their squared weights that dense layers keep when two of a lower rank take
    their place; with a budget at least so much, and None leaves it to the budget; without
    one, None and 0 leave them as they are."""
    seed: int = 0

    def __post_init__(self) -> None:
        for good, message in (
            (
                self.target in CPU_TARGETS,
                f"target {self.target!r} is not one of {', '.join(CPU_TARGETS)}",
            ),
            (0 <= self.prune < 1, f"prune is {self.prune}; it must be at least 0 and below 1"),
            (
                self.importance in IMPORTANCES,
                f"importance {self.importance!r} is not one of {', '.join(IMPORTANCES)}",
            ),
            (1 <= self.prune_steps <= 20, f"prune_steps is {self.prune_steps}; it is 1 to 20"),
            (self.max_drop >= 0, f"max_drop is {self.max_drop}; it must not be negative"),
            (self.epochs >= 0, f"epochs is {self.epochs}"),
            (self.learning_rate > 0, f"learning_rate is {self.learning_rate}"),
            (0 <= self.distill_weight <= 1, f"distill_weight is {self.distill_weight}"),
            (self.calibration_batches > 0, f"calibration_batches is {self.calibration_batches}"),
            (
                self.calibration in CALIBRATIONS,
                f"calibration {self.calibration!r} is not one of {', '.join(CALIBRATIONS)}",
            ),
            (
                self.target == "cpu-int8" or self.prunes,
                "target cpu-fp32 with prune 0 leaves nothing to do",
            ),
        ):
            if not good:
                raise UsageInvalid(message)
        parse_budgets(self.budget)

    @property
    def prunes(self) -> bool:
        """Whether anything is to be cut."""
        return bool(self.budget) or self.prune > 0

    @property
    def quantize_config(self) -> quantize.QuantizeConfig:
        """What may be tried in 8 bits, on this machine."""
        return quantize.QuantizeConfig(
            reduce_range=not Machine.detect().has_vnni,
            method=self.calibration,
            equalize=self.equalize,
            correct_biases=self.correct_biases,
            float_layers=self.float_layers,
        )


@dataclass(frozen=True)
class ModelFigures:
    """One file and what was measured of it."""

    name: str
    """"parent-fp32", "parent-int8", "pruned-fp32" or "pruned-int8"."""
    metric: float
    latency_us: float
    """Median for one input, one thread."""
    speedup: Ratio
    """Against the parent's float file, interleaved."""
    size_bytes: int


@dataclass(frozen=True)
class CompressedModel:
    """What :func:`compress_model` gives."""

    directory: Path
    """`model.onnx`, `report.json`, and `model.safetensors` with `channels.json` for
    :func:`pollard.compress.channel_map.load_pruned`."""
    shipped: str
    """Which candidate `model.onnx` is."""
    parent: ModelFigures
    chosen: ModelFigures
    candidates: list[ModelFigures]
    module: nn.Module = field(repr=False)
    """The shipped model in PyTorch, float and still trainable."""
    pruned: Pruned | None = field(repr=False)


def compress_model(
    model: nn.Module,
    train_data: Batches,
    eval_fn: Evaluate,
    recipe: ModelRecipe,
    example_input: Tensor,
    out: Path | str,
    *,
    loss_fn: Loss = functional.cross_entropy,
    confirm_fn: Evaluate | None = None,
    reporter: Reporter | None = None,
) -> CompressedModel:
    """Compress a trained module with the caller's own data, loss and metric.

    Args:
        model: Trained; takes one float tensor and gives one. It is not changed. If it is on a
            GPU, recovery and all that looks at its outputs run there.
        train_data: Recovery and calibration go through it.
        eval_fn: The metric that everything is chosen by.
        recipe: What to do.
        example_input: float32 [1, …]; the first axis is the batch.
        out: Directory to write; it appears complete or not at all.
        loss_fn: From outputs and targets to a scalar.
        confirm_fn: The metric on other data than ``eval_fn`` uses, for an unbiased
            last word; without it the chosen file is judged by what chose it.
        reporter: Told of progress.

    Raises:
        UsageInvalid, DataInvalid: arguments are not as described.
        GateRefused: nothing holds the gate and is faster; the numbers are in it.
        CompressionError: the model cannot be pruned, exported or quantized.
    """
    reporter = reporter or Reporter()
    example_input = example_input.cpu()
    first = _first(train_data, example_input).cpu()
    parent = copy.deepcopy(model).eval().cpu()
    with accelerator.on(accelerator.home_of(model)), bundling.staging(Path(out)) as stage:
        modules = {"parent": parent}
        # Before recovery, which may take hours: not every model can be exported.
        files = {"parent-fp32": _file("parent", parent, example_input, first)}
        pruned: Pruned | None = None

        def recover(module: nn.Module, epochs: int) -> None:
            with placed(module, parent):
                _recover(
                    module, parent, train_data, eval_fn, loss_fn, replace(recipe, epochs=epochs),
                    reporter,
                )  # fmt: skip

        if recipe.budget:
            pruned = shrink_by_batches(
                parent, train_data, loss_fn, example_input, _shrink_config(recipe), recipe.epochs,
                recover, reporter,
            )  # fmt: skip
        elif recipe.prune or recipe.factorize:
            with reporter.step("Pruning", 1):
                pruned = prune(
                    parent,
                    example_input,
                    recipe.prune,
                    keep_whole=recipe.keep_whole,
                    importance=recipe.importance,
                    gradients=batch_gradients(train_data, loss_fn),
                    factorize=recipe.factorize or 0.0,
                    tables=[LatencyTable(target) for target in _targets(recipe)],
                )
            recover(pruned.module, recipe.epochs)
        if pruned is not None:
            modules["pruned"] = pruned.module
            with reporter.step("Exporting", 1):
                files["pruned-fp32"] = _file("pruned", pruned.module, example_input, first)
        quantization: dict[str, dict[str, Any]] = {}
        if recipe.target == "cpu-int8":
            metric = score(eval_fn, predictor(open_session(files["parent-fp32"])))
            for kind, module in modules.items():
                name, raw = f"{kind}-int8", files.pop(f"{kind}-fp32")
                judge = MetricJudge(raw, metric, eval_fn, recipe.max_drop)
                files[f"{kind}-fp32"] = raw
                files[name], quantization[name] = quantize_module(
                    module, example_input, train_data, recipe.calibration_batches, judge,
                    recipe.quantize_config, reporter,
                )  # fmt: skip
        with reporter.step("Measuring", 1):
            rows = _measure(files, eval_fn, example_input, 40)
        overruns = _overruns(rows, modules, example_input, recipe, reporter)
        chosen = _choose(rows, recipe.max_drop, overruns)
        final = {name: files[name] for name in ("parent-fp32", chosen.name)}
        with reporter.step("Confirming the choice", 1):
            confirmed = _measure(final, confirm_fn or eval_fn, example_input, 80)
        parent_row, chosen_row = confirmed
        _choose(confirmed, recipe.max_drop, overruns)
        kind = chosen.name.partition("-")[0]
        shipped = copy.deepcopy(modules[kind]).requires_grad_(True)
        folder = stage / bundling.BUNDLE
        folder.mkdir()
        narrowed = pruned if kind == "pruned" else None
        save_pruned(shipped, folder, narrowed.channels if narrowed else None)
        write_durably(folder / "model.onnx", files[chosen.name])
        report = {
            "schema_version": 1,
            "recipe": asdict(recipe),
            "shipped": chosen.name,
            "confirmed_on_other_data": confirm_fn is not None,
            "parent": asdict(parent_row),
            "chosen": asdict(chosen_row),
            "candidates": [asdict(row) for row in rows],
            "quantization": quantization,
            "macs": {name: total_macs(m, example_input) for name, m in modules.items()},
            "parameters": {name: count_parameters(m) for name, m in modules.items()},
            "left_whole": pruned.left_whole if pruned else {},
            "removed_blocks": pruned.blocks if pruned else [],
            "dense": [asdict(plan) for plan in pruned.dense] if pruned else [],
            "search": pruned.search if pruned else None,
            "processor": Machine.detect().processor,
            "tool_versions": bundling.tool_versions(),
        }
        write_durably(folder / "report.json", (json.dumps(report, indent=1) + "\n").encode())
    return CompressedModel(Path(out), chosen.name, parent_row, chosen_row, rows, shipped, narrowed)


def _shrink_config(recipe: ModelRecipe) -> ShrinkConfig:
    return ShrinkConfig(
        parse_budgets(recipe.budget),
        _targets(recipe),
        recipe.prune_steps,
        recipe.importance,
        recipe.keep_whole,
        recipe.remove_blocks,
        recipe.factorize,
    )


def _targets(recipe: ModelRecipe) -> tuple[str, ...]:
    return ("cpu-int8", "cpu-fp32") if recipe.target == "cpu-int8" else (recipe.target,)


def _first(train_data: Batches, example: Tensor) -> Tensor:
    if isinstance(train_data, Iterator):
        raise UsageInvalid("train_data is gone through several times; give a list or a data loader")
    if example.ndim < 2 or not example.is_floating_point():
        raise UsageInvalid("example_input must be a float tensor [1, …]")
    for batch in train_data:
        inputs = batch[0] if isinstance(batch, (tuple, list)) and len(batch) == 2 else None
        if not isinstance(inputs, Tensor):
            raise DataInvalid("train_data must give pairs (inputs, targets), inputs as a tensor")
        if inputs.shape[1:] != example.shape[1:]:
            raise DataInvalid(
                f"train_data gives inputs {list(inputs.shape[1:])}, "
                f"example_input is {list(example.shape[1:])}"
            )
        return inputs
    raise DataInvalid("train_data is empty")


def _recover(
    module: nn.Module,
    parent: nn.Module,
    data: Batches,
    eval_fn: Evaluate,
    loss_fn: Loss,
    recipe: ModelRecipe,
    reporter: Reporter,
) -> None:
    """Fit ``module`` in place, where it and its parent are placed; it ends with the best state by
    the metric."""
    seed_everything(recipe.seed)
    parameters = [p for p in module.parameters() if p.requires_grad]
    steps = sum(1 for _ in data)
    optimizer = torch.optim.AdamW(parameters, lr=recipe.learning_rate, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, one_cycle(steps * recipe.epochs))
    # Those of the parent describe channels that are gone.
    recalibrate_by(module, (batch[0] for batch in itertools.islice(data, RECALIBRATION_BATCHES)))
    best, state = score(eval_fn, module), copy.deepcopy(module.state_dict())
    with reporter.step("Recovering", steps * recipe.epochs) as step:
        for _ in range(recipe.epochs):
            module.train()
            for inputs, targets in moved_batches(data, accelerator.used()):
                outputs = module(inputs)
                loss = (1 - recipe.distill_weight) * loss_fn(outputs, targets)
                if recipe.distill_weight:
                    with torch.no_grad():
                        wanted = parent(inputs)
                    loss = loss + recipe.distill_weight * functional.mse_loss(outputs, wanted)
                value = loss.item()
                if not math.isfinite(value):
                    reporter.say("The loss is not finite; the best state so far is kept")
                    module.load_state_dict(state)
                    module.eval()
                    return
                optimizer.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]
                nn.utils.clip_grad_norm_(parameters, 5.0)
                optimizer.step()
                schedule.step()
                step.advance(note=f"loss {value:.3f}")
            now = score(eval_fn, module)
            if now >= best:
                best, state = now, copy.deepcopy(module.state_dict())
    module.load_state_dict(state)
    module.eval()


def _file(kind: str, module: nn.Module, example: Tensor, probe: Tensor) -> bytes:
    """Return a module's float file, which computes what the module does."""
    with torch.no_grad():
        wanted: object = module(probe)
    if not isinstance(wanted, Tensor):
        raise UsageInvalid(f"the {kind} gives a {type(wanted).__name__}; it must give one tensor")
    if not wanted.isfinite().all():
        raise ExportFailed(f"the {kind} gives values that are not finite; look at its weights")
    raw = export.serialize(export.export_core(module, example))
    got = predictor(open_session(raw))(probe)
    worst = float((got - wanted).abs().max()) / (float(wanted.max() - wanted.min()) or 1.0)
    if not worst <= _PARITY:
        with torch.no_grad():
            chance = export.by_chance(wanted.numpy(), lambda: module(probe).numpy())
        raise ExportFailed(
            f"the exported {kind} differs from the PyTorch model by {worst:.2e} of the outputs' "
            f"range (allowed {_PARITY:g}){chance}"
        )
    return raw


def _measure(
    files: dict[str, bytes], eval_fn: Evaluate, example: Tensor, rounds: int
) -> list[ModelFigures]:
    sessions = [open_session(raw) for raw in files.values()]
    feeds = {export.CORE_INPUT: example[:1].detach().float().contiguous().numpy()}
    turns = interleaved([lambda s=s: s.raw.run(None, feeds) for s in sessions], rounds=rounds)  # type: ignore[misc]
    return [
        ModelFigures(
            name,
            score(eval_fn, predictor(session)),
            float(np.median(times)),
            ratio(turns[0], times),
            len(raw),
        )
        for (name, raw), session, times in zip(files.items(), sessions, turns, strict=True)
    ]


def _overruns(
    rows: list[ModelFigures],
    modules: dict[str, nn.Module],
    example: Tensor,
    recipe: ModelRecipe,
    reporter: Reporter,
) -> dict[str, str]:
    files = []
    for row in rows:
        kind, _, kept_as = row.name.partition("-")
        files.append(FinishedFile(row.name, f"cpu-{kept_as}", modules[kind], row.size_bytes))
    return find_overruns(files, example, parse_budgets(recipe.budget), reporter)


def _choose(rows: list[ModelFigures], max_drop: float, overruns: dict[str, str]) -> ModelFigures:
    parent, *rivals = rows
    told = "; ".join(
        f"{row.name} {row.metric:.4g} at {row.latency_us:.1f} µs ({row.speedup.estimate:.2f} × "
        f"as fast, lower bound {row.speedup.lower:.2f})"
        for row in rows
    )
    told += "".join(f"; {beyond}" for beyond in overruns.values())
    figures = {"candidates": [asdict(row) for row in rows]}
    holding = [
        row
        for row in rivals
        if parent.metric - row.metric <= max_drop + 1e-12 and row.name not in overruns
    ]
    if not holding:
        within = " within the budget" if overruns else ""
        raise GateRefused(
            f"nothing loses at most {max_drop:g} of the metric{within}: {told}", figures
        )
    fastest = min(holding, key=lambda row: row.latency_us)
    if fastest.speedup.lower < MIN_SPEEDUP:
        raise GateRefused(f"nothing that holds the gate is faster than the parent: {told}", figures)
    return fastest
