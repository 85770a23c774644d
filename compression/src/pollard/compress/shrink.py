"""Cut a network down to a budget: look, choose, cut, recover, and once more.

The choice is made for the file that is to be shipped: with 8 bits allowed, both the table
of float and that of 8-bit operators are asked, and the one that meets the budget at the
smaller loss decides.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from pollard.compress.blocks import find_blocks, without
from pollard.compress.budget import Budget
from pollard.compress.data import Dataset
from pollard.compress.errors import PruneFailed
from pollard.compress.groups import Gradients, Prunable, analyse, compose
from pollard.compress.knapsack import Choice, CostModel, Picked, choose
from pollard.compress.latency import LatencyTable
from pollard.compress.macs import total_macs
from pollard.compress.operations import list_operations
from pollard.compress.profile import pixels, trace
from pollard.compress.progress import Reporter
from pollard.compress.prune import GroupPlan, Pruned
from pollard.compress.recipe import Importance
from pollard.compress.recover import recover
from pollard.compress.sensitivity import (
    Sensitivities,
    guessed_sensitivities,
    measure_sensitivities,
)
from pollard.compress.spec import InputSpec
from pollard.compress.training import FitConfig, History

# Bytes of a weight, and what the file holds for each operator besides.
_BYTES = {"cpu-fp32": (4.0, 300.0), "cpu-int8": (1.05, 2200.0)}


@dataclass(frozen=True)
class ShrinkConfig:
    """How to meet a budget."""

    budgets: Sequence[Budget]
    targets: Sequence[str]
    """Targets that the file may have, such as both of "cpu-int8" and "cpu-fp32"."""
    steps: int = 2
    """Cuts, with recovery between them."""
    importance: Importance = "l2"
    keep_whole: tuple[str, ...] = ()
    remove_blocks: bool = True


def parent_costs(module: nn.Module, spec: InputSpec, reporter: Reporter) -> dict[str, float]:
    """Return what the parent's float file takes, from the table."""
    operations, _ = trace(module, spec, "cpu-fp32")
    table = LatencyTable("cpu-fp32")
    weight, besides = _BYTES["cpu-fp32"]
    model = CostModel(operations, (), table, (pixels(spec, "cpu-fp32"),), weight, besides)
    model.prepare(reporter)
    return model.costs(model.whole())


def shrink(
    parent: nn.Module,
    data: Dataset,
    spec: InputSpec,
    config: ShrinkConfig,
    fit: FitConfig,
    *,
    reporter: Reporter | None = None,
) -> tuple[Pruned | None, History | None]:
    """Return a smaller model that meets the budgets, recovered, and how that went.

    Args:
        parent: It is not changed.
        data: Train and choose are used.
        spec: What the parent takes.
        config: What to meet, and how.
        fit: Recovery; its epochs are shared out among the steps.
        reporter: Told of progress.

    Returns:
        None twice where the parent meets the budgets in one of the targets as it is.

    Raises:
        PruneFailed: they cannot be met.
    """
    reporter = reporter or Reporter()
    reference = parent_costs(parent, spec, reporter)
    module = parent
    result: Pruned | None = None
    history: History | None = None
    told: list[dict[str, Any]] = []
    between = 0 if config.steps < 2 else max(1, round(0.3 * fit.epochs / (config.steps - 1)))
    between = min(between, fit.epochs // config.steps)
    for step in range(1, config.steps + 1):
        prunable = analyse(
            module, spec, keep_whole=config.keep_whole, importance=config.importance,
            gradients=loss_gradients(data, spec),
        )  # fmt: skip
        blocks = find_blocks(prunable.module, spec) if config.remove_blocks else []
        losses: Sensitivities | None = None
        if not meets(prunable, spec, config, reference, reporter):
            losses = measure_sensitivities(prunable, blocks, data, spec, parent, reporter=reporter)
        elif step == 1:
            return None, None
        if losses is None:
            break
        toward = 1.0 / (config.steps - step + 1)
        target, picked = pick(prunable, losses, spec, config, reference, toward, reporter)
        cut = apply(prunable, picked)
        told.append(_told(step, target, picked, losses, prunable))
        macs = total_macs(cut.module, spec)
        result = _joined(parent, spec, result, cut, macs)
        module = cut.module
        last = step == config.steps
        epochs = fit.epochs - between * (config.steps - 1) if last else between
        history = recover(
            module, parent, data, spec, dataclasses.replace(fit, epochs=epochs), reporter=reporter
        )
    assert result is not None  # noqa: S101 - the first step cuts or returns
    search = {
        "budgets": [budget.text for budget in config.budgets],
        "importance": config.importance,
        "parent": dict(reference),
        "steps": told,
    }
    return dataclasses.replace(result, search=search), history


def meets(
    prunable: Prunable,
    spec: InputSpec,
    config: ShrinkConfig,
    reference: dict[str, float],
    reporter: Reporter,
) -> bool:
    """Tell whether a model meets the budgets as it is, in one of the targets."""
    for target in config.targets:
        model = cost_model(prunable, Sensitivities({}, {}), spec, target, reporter)
        costs = model.costs(model.whole())
        if all(costs[b.resource] <= b.limit(reference[b.resource]) for b in config.budgets):
            return True
    return False


def cost_model(
    prunable: Prunable, losses: Sensitivities, spec: InputSpec, target: str, reporter: Reporter
) -> CostModel:
    """Return what a model takes in a target at any widths; its rows are measured."""
    choices = [
        Choice(
            group.name,
            tuple(group.layers),
            group.width,
            len(group.units[0]),
            losses.groups[group.name],
        )
        for group in prunable.groups
        if losses.groups.get(group.name)
    ]
    weight, besides = _BYTES[target]
    operations = list_operations(prunable.module, spec)
    table = LatencyTable(target)
    model = CostModel(operations, choices, table, (pixels(spec, target),), weight, besides)
    model.prepare(reporter)
    return model


def pick(
    prunable: Prunable,
    losses: Sensitivities,
    spec: InputSpec,
    config: ShrinkConfig,
    reference: dict[str, float],
    toward: float,
    reporter: Reporter,
) -> tuple[str, Picked]:
    """Choose for each target, and return the one that loses least.

    Raises:
        PruneFailed: no target meets the budgets.
    """
    found: list[tuple[str, Picked]] = []
    problems: list[str] = []
    for target in config.targets:
        model = cost_model(prunable, losses, spec, target, reporter)
        try:
            picked = choose(model, losses.blocks, config.budgets, reference, toward=toward)
            found.append((target, picked))
        except PruneFailed as error:
            problems.append(f"{target}: {error}")
    if not found:
        raise PruneFailed("; ".join(problems))
    return min(found, key=lambda pair: pair[1].loss)


def apply(prunable: Prunable, picked: Picked) -> Pruned:
    """Cut what was picked; ``prunable`` is used up."""
    for group in prunable.groups:
        group.kept = picked.state.widths.get(group.name, group.width)
    plans = [GroupPlan(g.name, g.layers, g.width, g.kept) for g in prunable.groups]
    channels = prunable.cut()
    blocks = sorted(picked.state.removed)
    module = without(prunable.module, blocks)
    return Pruned(
        module,
        plans,
        0,
        prunable.macs,
        0,
        prunable.rewritten,
        prunable.left_whole,
        channels,
        blocks,
    )


def plan_shrink(
    parent: nn.Module, spec: InputSpec, config: ShrinkConfig, reporter: Reporter | None = None
) -> Pruned | None:
    """Return what a budget would roughly leave, by importance alone, without data.

    Raises:
        PruneFailed: it cannot be met.
    """
    reporter = reporter or Reporter()
    reference = parent_costs(parent, spec, reporter)
    importance: Importance = "l2" if config.importance == "taylor" else config.importance
    prunable = analyse(parent, spec, keep_whole=config.keep_whole, importance=importance)
    if meets(prunable, spec, config, reference, reporter):
        return None
    blocks = find_blocks(prunable.module, spec) if config.remove_blocks else []
    losses = guessed_sensitivities(prunable, blocks)
    _, picked = pick(prunable, losses, spec, config, reference, 1.0, reporter)
    cut = apply(prunable, picked)
    return _joined(parent, spec, None, cut, total_macs(cut.module, spec))


def loss_gradients(data: Dataset, spec: InputSpec, images: int = 256) -> Gradients:
    """Return a function that adds the gradients of the loss on some training images."""

    def add(module: nn.Module) -> None:
        module.eval()
        for start in range(0, min(images, len(data.train)), 64):
            piece = data.train.images[start : min(images, start + 64)]
            labels = torch.from_numpy(data.train.labels[start : start + len(piece)])
            loss = functional.cross_entropy(
                module(spec.normalize(np.ascontiguousarray(piece))), labels
            )
            loss.backward()  # type: ignore[no-untyped-call]

    return add


def _joined(
    parent: nn.Module, spec: InputSpec, earlier: Pruned | None, cut: Pruned, macs: int
) -> Pruned:
    """Describe all cuts so far as one, in the parent's numbering."""
    if earlier is None:
        return dataclasses.replace(cut, macs_after=macs)
    groups = []
    for group in earlier.groups:
        # A group's first layer may have gone with its block.
        again = [g for g in cut.groups if set(g.layers) & set(group.layers)]
        groups.append(dataclasses.replace(group, kept=again[0].kept if again else group.kept))
    return dataclasses.replace(
        cut,
        groups=groups,
        macs_before=total_macs(parent, spec),
        macs_after=macs,
        rewritten=[*earlier.rewritten, *cut.rewritten],
        channels=compose(earlier.channels, cut.channels),
        blocks=[*earlier.blocks, *cut.blocks],
    )


def _told(
    step: int, target: str, picked: Picked, losses: Sensitivities, prunable: Prunable
) -> dict[str, Any]:
    return {
        "step": step,
        "target": target,
        "before": dict(picked.before),
        "after": dict(picked.after),
        "limits": dict(picked.limits),
        "expected_loss": picked.loss,
        "removed_blocks": sorted(picked.state.removed),
        "blocks": dict(losses.blocks),
        "groups": [
            {
                "name": group.name,
                "width": group.width,
                "kept": group.kept,
                "losses": {str(w): v for w, v in losses.groups.get(group.name, {}).items()},
            }
            for group in prunable.groups
        ],
    }
