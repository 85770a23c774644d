"""What a run would do, how long it would take, and whether its goal can be met.

Latency hardly depends on what the weights are: the untrained pruned model is timed as
it would be served. What accuracy recovery reaches cannot be known before, and is not guessed.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import nn

from pollard.compress import accelerator, half
from pollard.compress.accelerator import placed
from pollard.compress.budget import Budget, parse_budgets
from pollard.compress.candidates import Candidate, build, build_half
from pollard.compress.data import Part, part_sizes
from pollard.compress.devices import CUDA, Device, find_device, open_on
from pollard.compress.export import probe_images
from pollard.compress.macs import total_macs
from pollard.compress.models import LoadedModel, device_for, load_model, resolve
from pollard.compress.overruns import FinishedFile, find_overruns
from pollard.compress.pipeline import require_weights, torch_threads
from pollard.compress.progress import Reporter
from pollard.compress.prune import ROUNDING, Pruned, prune
from pollard.compress.quantize import QuantizeConfig
from pollard.compress.recipe import Recipe
from pollard.compress.run_stages import tables_for
from pollard.compress.search import TRIAL_SHARE, Point
from pollard.compress.shrink import plan_shrink, shrink_config
from pollard.compress.verify import MIN_SPEEDUP
from pollard.runtime.machine import Machine
from pollard.runtime.measure import Ratio, interleaved, ratio


@dataclass(frozen=True)
class Plan:
    """What :func:`make_plan` found."""

    images: dict[str, int]
    """Images by part, as listed; none has been decoded."""
    classes: int
    epochs: int
    macs: int
    pruned: Pruned | None
    speedups: dict[str, Ratio]
    """Candidate → how many times faster than the parent's float file."""
    recovery_seconds: float
    other_seconds: float
    """Everything but recovery, roughly: export, quantization and measuring."""
    search_seconds: float = 0.0
    """All trials of a search, before that."""
    why_not_timed: str = ""
    """Why no candidate could be timed; empty if they were."""
    overruns: Mapping[str, str] = field(default_factory=dict)
    """Candidates that take more than the budgets allow, and what they take."""

    @property
    def speed_is_met(self) -> bool:
        """Whether some candidate is faster than the parent, or nothing can be said of it here."""
        if self.why_not_timed:
            return True
        return any(
            found.lower >= MIN_SPEEDUP
            for name, found in self.speedups.items()
            if name not in self.overruns
        )

    def lines(self, recipe: Recipe) -> list[str]:
        """Return the plan in words."""
        planned = _planned(recipe)
        told = [
            f"Model {recipe.model}, {self.macs:,} MACs, {self.classes} classes; images: "
            + ", ".join(f"{count} {name}" for name, count in self.images.items())
        ]
        if recipe.search:
            told.append(
                f"Search: {recipe.search} trials, about {_duration(self.search_seconds)}; planned "
                "below is one of its points, half of the latency"
            )
        if self.pruned is None:
            met = f"nothing needs to be cut for {', '.join(planned.budget)}"
            told.append(f"Pruning: {met if planned.budget else 'none asked for'}")
        else:
            gone = f"{self.pruned.removed:.1%}"
            if planned.budget:
                told.append(
                    f"Pruning: by the table of latencies {', '.join(planned.budget)} can be met, "
                    f"roughly like this ({gone} of the MACs go):"
                )
            else:
                told.append(
                    f"Pruning: {recipe.prune:.0%} of the MACs asked for, {gone} can be removed "
                    f"with widths in steps of {self.pruned.rounding}"
                )
            told += [
                f"  {group.name}: {group.width} → {group.kept} channels"
                for group in self.pruned.groups
                if group.kept < group.width
            ]
            told += [f"  {name} is removed" for name in self.pruned.blocks]
            told += [
                f"  {d.name} ({d.in_features} → {d.out_features}): "
                + (f"two layers of rank {d.rank}" if d.rank else f"not factorised, {d.why}")
                for d in self.pruned.dense
            ]
            told += [f"  {name} stays whole: {why}" for name, why in self.pruned.left_whole.items()]
            told.append(f"Recovery: {self.epochs} epochs")
        told += [
            f"Speed of {name} before recovery: {found.estimate:.2f} × the parent "
            f"(lower bound {found.lower:.2f})"
            for name, found in self.speedups.items()
        ]
        told += [f"Not shipped: {beyond}" for beyond in self.overruns.values()]
        told.append(
            f"Faster than the parent (lower bound {MIN_SPEEDUP:g}): "
            + (
                f"not known, nothing can be timed here: {self.why_not_timed}"
                if self.why_not_timed
                else "can be met"
                if self.speed_is_met
                else "CANNOT be met on this machine"
            )
        )
        told.append(
            f"Accuracy within {recipe.max_drop:g} points: known only after recovery and measuring"
        )
        total = self.search_seconds + self.recovery_seconds + self.other_seconds
        told.append(
            f"Time: about {_duration(total)}, of which recovery {_duration(self.recovery_seconds)}"
        )
        if recipe.max_time is not None and total > 60 * recipe.max_time:
            told.append(
                f"That is more than {recipe.max_time:g} min: searching, recovery and training in 8 "
                "bits will be shortened, which costs accuracy"
            )
        return told


def make_plan(recipe: Recipe) -> Plan:
    """Look at model and data, prune a copy, time it; write nothing.

    Raises:
        DataInvalid: the data cannot be split as the run would split them.
        PruneFailed: the share of the MACs cannot be removed; the message says how much can.
        CompressionError: see :mod:`pollard.compress.errors`.
    """
    trials, budgets, recipe = recipe.search, parse_budgets(recipe.budget), _planned(recipe)
    source = resolve(recipe.model, recipe.spec)
    require_weights(recipe.weights, source)
    if recipe.prunes:
        source.require_pytorch("pruning")
    classes, images = part_sizes(recipe.data, source.task, recipe.max_train_images)
    parent = load_model(source, recipe.weights, classes=len(classes))
    epochs = source.training.recover_epochs if recipe.epochs is None else recipe.epochs
    place = device_for(source, recipe.device, Reporter())
    with torch_threads(recipe.threads), accelerator.on(place):
        pruned = None
        recovery = 0.0
        if recipe.budget:
            pruned = plan_shrink(parent.module, source.spec, shrink_config(recipe))
        elif recipe.prunes:
            pruned = prune(
                parent.module,
                source.spec,
                recipe.prune,
                keep_whole=recipe.keep_whole,
                rounding=half.MULTIPLES if recipe.target == CUDA else ROUNDING,
                factorize=recipe.factorize or 0.0,
                tables=tables_for(recipe),
            )
        if pruned is not None:
            batch = recipe.batch_size or source.training.batch_size
            recovery = _step_seconds(parent, pruned, batch) * epochs * images["train"] / batch
        else:
            epochs = 0
        started = time.monotonic()
        device = find_device(recipe.target, Machine.detect())
        speedups, overruns = _speedups(recipe, parent, pruned, device, budgets)
        other = 3 * (time.monotonic() - started)
    macs = total_macs(parent.module, source.spec)
    # A trial has three tenths of an epoch on one thread, and measures less.
    trial = TRIAL_SHARE * recovery / max(1, epochs) * (recipe.threads or 1) + other / 2
    rounds = -(-trials // max(1, min(trials, Machine.detect().cores)))
    return Plan(
        images, len(classes), epochs, macs, pruned, speedups, recovery, other, rounds * trial,
        device.why_not, overruns,
    )  # fmt: skip


def _planned(recipe: Recipe) -> Recipe:
    """Return what is planned: of a search the point of half the latency."""
    if not recipe.search:
        return recipe
    return Point(0.5, recipe.importance, recipe.remove_blocks).apply(recipe)


def _step_seconds(parent: LoadedModel, pruned: Pruned, batch: int) -> float:
    """Median time of a step of distillation."""
    pixels = np.resize(probe_images(parent.spec), (batch, *parent.spec.shape))
    pruned.module.train()
    times: list[float] = []
    with placed(parent.module, pruned.module) as device:
        inputs = parent.spec.normalize(pixels, device)
        for _ in range(4):
            started = time.perf_counter()
            with torch.no_grad():
                parent.module(inputs)
            loss = pruned.module(inputs).square().mean()
            loss.backward()
            loss.item()  # waits for a GPU
            times.append(time.perf_counter() - started)
    pruned.module.zero_grad(set_to_none=True)
    pruned.module.eval()
    return float(np.median(times[1:]))


def _speedups(
    recipe: Recipe,
    parent: LoadedModel,
    pruned: Pruned | None,
    device: Device,
    budgets: Sequence[Budget],
) -> tuple[dict[str, Ratio], dict[str, str]]:
    """Return how many times faster each candidate is, and which of them go beyond a budget."""
    spec = parent.spec
    probes = probe_images(spec, 32)
    part = Part("probe", probes, np.zeros(len(probes), np.int64))
    config = None
    if recipe.target == "cpu-int8":
        vnni = Machine.detect().has_vnni if recipe.vnni is None else recipe.vnni
        config = QuantizeConfig(len(probes), reduce_range=not vnni)
    with tempfile.TemporaryDirectory(prefix="pollard-plan-") as folder:

        def made(kind: str, module: nn.Module) -> list[Candidate]:
            if recipe.target == CUDA:
                return build_half(kind, module, spec, Path(folder), part, len(part))
            return build(kind, module, spec, Path(folder), part, config)

        built = made("parent", parent.module)
        if pruned is not None:
            # Statistics of the parent, over channels that are gone, leave nothing but speed.
            built += made("pruned", pruned.module)
        if recipe.target == CUDA:
            built = [built[0], *(c for c in built if c.target == CUDA)]
        files = [FinishedFile(c.name, c.target, c.module, c.size_bytes) for c in built]
        overruns = find_overruns(files, spec, budgets, Reporter())
        if not device.timed:
            return {}, overruns
        batch = np.resize(probes, (device.judged_batch, *spec.shape))
        calls = [
            lambda s=session: s.raw.run(None, {s.inputs[0].name: batch})
            for session in (open_on(device, candidate) for candidate in built)
        ]
        turns = interleaved(calls, rounds=20)
    timed = zip(built[1:], turns[1:], strict=True)
    return {c.name: ratio(turns[0], times) for c, times in timed}, overruns


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
