"""Cut a network down to a budget: look, choose, cut, recover, and once more.

The choice is made for the file that is to be shipped: with 8 bits allowed, both the table
of float and that of 8-bit operators are asked, and the one that meets the budget at the
smaller loss decides.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pollard.compress.accelerator import placed
from pollard.compress.blocks import find_blocks, without
from pollard.compress.budget import Budget, parse_budgets
from pollard.compress.cut_files import Recovered, load_cut, recover_stage, save_cut
from pollard.compress.data import Dataset
from pollard.compress.dense import (
    DenseLayer,
    DensePlan,
    decompose,
    find_dense,
    outer_names,
    put_factors,
    ranks_now,
)
from pollard.compress.errors import PruneFailed
from pollard.compress.export import try_export
from pollard.compress.groups import Gradients, Prunable, analyse, compose
from pollard.compress.kernels import Kernel
from pollard.compress.knapsack import Choice, CostModel, Picked, choose
from pollard.compress.latency import LatencyTable
from pollard.compress.macs import total_macs
from pollard.compress.operations import list_operations
from pollard.compress.profile import pixels
from pollard.compress.progress import Reporter
from pollard.compress.prune import GroupPlan, Pruned
from pollard.compress.recipe import Importance, Recipe
from pollard.compress.sensitivity import (
    Sensitivities,
    guessed_sensitivities,
    measure_sensitivities,
)
from pollard.compress.spec import InputSpec
from pollard.compress.stages import Stages, temporary_stages
from pollard.compress.tasks import task_of
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
    factorize: float | None = None
    """Share of their squared weights that dense layers keep at least where they are
    factorised; 0 leaves them as they are, and None leaves it to the budget."""


Dense = Mapping[str, tuple[DenseLayer, list[int]]]
"""Name → dense layer that can be factorised, and the ranks in question."""


@dataclass(frozen=True)
class Around:
    """What a model is cut by: what it takes, and its data as functions."""

    takes: InputSpec | Tensor
    gradients: Gradients
    """For the importance "taylor"."""
    losses: Callable[[Prunable, Sequence[str], Dense], Sensitivities]
    """What narrowing each group, leaving out each block, and factorising would cost."""


def shrink_config(recipe: Recipe) -> ShrinkConfig:
    """Return how a recipe wants its budget met."""
    # With 8 bits allowed float files compete, too.
    targets = ("cpu-int8", "cpu-fp32") if recipe.target == "cpu-int8" else (recipe.target,)
    return ShrinkConfig(
        parse_budgets(recipe.budget),
        targets,
        recipe.prune_steps,
        recipe.importance,
        recipe.keep_whole,
        recipe.remove_blocks,
        recipe.factorize,
    )


def parent_costs(
    module: nn.Module, takes: InputSpec | Tensor, reporter: Reporter
) -> dict[str, float]:
    """Return what the parent's float file takes, from the table."""
    return costs_of(module, takes, "cpu-fp32", reporter)


def costs_of(
    module: nn.Module, takes: InputSpec | Tensor, target: str, reporter: Reporter
) -> dict[str, float]:
    """Return what a module's file of a target takes as it is, from the table."""
    operations = list_operations(module, takes)
    weight, besides = _BYTES[target]
    model = CostModel(operations, (), LatencyTable(target), _fixed(takes, target), weight, besides)
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
    stages: Stages | None = None,
) -> tuple[Pruned | None, History | None]:
    """Return a smaller model that meets the budgets, recovered, and how that went.

    Args:
        parent: It is not changed.
        data: Train and choose are used.
        spec: What the parent takes.
        config: What to meet, and how.
        fit: Recovery; its epochs are shared out among the steps.
        reporter: Told of progress.
        stages: Where every cut and every recovery is kept; nothing is when None.

    Returns:
        None twice where the parent meets the budgets in one of the targets as it is.

    Raises:
        PruneFailed: they cannot be met.
    """
    reporter = reporter or Reporter()
    if stages is None:
        with temporary_stages(reporter) as stages:
            return shrink(parent, data, spec, config, fit, reporter=reporter, stages=stages)
    reference = parent_costs(parent, spec, reporter)
    result: Recovered | None = None
    between = epochs_between(fit.epochs, config.steps)
    around = Around(
        spec,
        loss_gradients(data, spec),
        lambda prunable, blocks, dense: measure_sensitivities(
            prunable, blocks, data, spec, parent, dense=dense, reporter=reporter
        ),
    )
    left, before, source = fit.epochs, "", Path()
    for step in range(1, config.steps + 1):
        cut = stages.run(
            "prune",
            {"budget": config, "reference": reference, "step": step, "after": before},
            lambda folder, step=step, result=result: save_cut(  # type: ignore[misc]
                cut_step(
                    step,
                    None if result is None else result.pruned,
                    parent,
                    around,
                    config,
                    reference,
                    reporter,
                ),
                folder,
            ),
            lambda folder: load_cut(parent, folder),
        )
        if cut.value is None and result is None:
            return None, None
        # A step with nothing left to cut is the last, and gets all epochs that are left.
        last = cut.value is None or step == config.steps
        source = source if cut.value is None else cut.folder
        epochs = left if last else between
        share = epochs / left if left else 1.0
        left -= epochs
        given = dataclasses.replace(fit, epochs=epochs)
        inputs = {"of": cut.key, "after": before}
        start = result.pruned.module if cut.value is None and result is not None else None
        done = recover_stage(
            stages, source, inputs, parent, data, spec, given, reporter, start=start, share=share
        )
        result, before = done.value, done.key
        if last:
            break
    assert result is not None  # noqa: S101 - the first step cuts or returns
    return result.pruned, result.history


def epochs_between(epochs: int, steps: int) -> int:
    """Return how many of the epochs go to each recovery but the last."""
    between = 0 if steps < 2 else max(1, round(0.3 * epochs / (steps - 1)))
    return min(between, epochs // steps)


def cut_step(
    step: int,
    earlier: Pruned | None,
    parent: nn.Module,
    around: Around,
    config: ShrinkConfig,
    reference: dict[str, float],
    reporter: Reporter,
) -> Pruned | None:
    """Take one step toward the budgets; None where they are met as it is.

    Args:
        step: From 1.
        earlier: What the step before left, recovered.
        parent: Of all steps.
        around: What to cut by.
        config: What to meet, and how.
        reference: From :func:`parent_costs`.
        reporter: Told of progress.

    Raises:
        PruneFailed: the budgets cannot be met.
        ExportFailed: the parent cannot be exported, so that no cut would be of use.
    """
    spec = around.takes
    prunable = analyse(
        parent if earlier is None else earlier.module,
        spec,
        keep_whole=config.keep_whole,
        importance=config.importance,
        gradients=around.gradients,
    )
    if meets(prunable, spec, config, reference, reporter):
        return None
    if earlier is None and isinstance(spec, InputSpec):
        try_export(parent, spec)  # before recovery, which may take hours
    blocks = find_blocks(prunable.module, spec) if config.remove_blocks else []
    dense, whole = offered(prunable.module, spec, config)
    losses = around.losses(prunable, blocks, dense)
    toward = 1.0 / (config.steps - step + 1)
    target, picked = pick(prunable, losses, spec, config, reference, toward, reporter)
    cut = apply(prunable, picked, dense, whole)
    told = _told(step, target, picked, losses, prunable)
    joined = _joined(parent, spec, earlier, cut, total_macs(cut.module, spec))
    so_far = [] if earlier is None or earlier.search is None else earlier.search["steps"]
    search = {
        "budgets": [budget.text for budget in config.budgets],
        "importance": config.importance,
        "parent": dict(reference),
        "steps": [*so_far, told],
    }
    return dataclasses.replace(joined, search=search)


def meets(
    prunable: Prunable,
    spec: InputSpec | Tensor,
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
    prunable: Prunable,
    losses: Sensitivities,
    spec: InputSpec | Tensor,
    target: str,
    reporter: Reporter,
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
    fixed = _fixed(spec, target)
    model = CostModel(operations, choices, table, fixed, weight, besides, losses.dense)
    model.prepare(reporter)
    return model


def pick(
    prunable: Prunable,
    losses: Sensitivities,
    spec: InputSpec | Tensor,
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


def offered(
    module: nn.Module, takes: InputSpec | Tensor, config: ShrinkConfig
) -> tuple[Dense, list[DensePlan]]:
    """Return the dense layers that may be factorised, and why others may not."""
    if config.factorize == 0:
        return {}, []
    layers, whole = find_dense(module, takes, config.keep_whole)
    least = config.factorize or 0.0
    found = {layer.name: (layer, layer.ranks(least)) for layer in layers}
    whole += [
        DensePlan(
            layer.name, layer.in_features, layer.out_features, 0, 1.0,
            f"no rank that saves weights keeps {least:.1%} of its energy",
        )
        for layer, ranks in found.values()
        if not ranks
    ]  # fmt: skip
    return {name: pair for name, pair in found.items() if pair[1]}, whole


def apply(
    prunable: Prunable,
    picked: Picked,
    dense: Dense | None = None,
    whole: Sequence[DensePlan] = (),
) -> Pruned:
    """Cut what was picked; ``prunable`` is used up.

    Args:
        prunable: What it is cut from.
        picked: From :func:`pick`.
        dense: From :func:`offered`.
        whole: Likewise.
    """
    for group in prunable.groups:
        group.kept = picked.state.widths.get(group.name, group.width)
    plans = [GroupPlan(g.name, g.layers, g.width, g.kept) for g in prunable.groups]
    channels = prunable.cut()
    blocks = sorted(picked.state.removed)
    module = without(prunable.module, blocks)
    factorized = [_factorize(module, name, picked.state.ranks.get(name, 0)) for name in dense or {}]
    outer = outer_names(prunable.module)
    plans = [
        dataclasses.replace(plan, name=outer.get(plan.name, plan.name), layers=layers)
        for plan in plans
        if (layers := [n for name in plan.layers if (n := outer.get(name, name))])
    ]
    return Pruned(
        module,
        plans,
        0,
        prunable.macs,
        0,
        prunable.rewritten,
        {n: why for name, why in prunable.left_whole.items() if (n := outer.get(name, name))},
        {n: kept for name, kept in channels.items() if (n := outer.get(name, name))},
        blocks,
        dense=[*whole, *factorized],
    )


def _factorize(module: nn.Module, name: str, rank: int) -> DensePlan:
    """Put a rank in the place of a dense layer as it is by now; 0 leaves it."""
    dense: Any = module.get_submodule(name)
    outs, ins = dense.weight.shape
    if not rank:
        why = "the budgets were met at a smaller loss without"
        return DensePlan(name, ins, outs, 0, 1.0, why)
    layer = decompose(name, dense.weight)
    if rank > layer.limit:
        why = f"after narrowing a rank of {rank} saves nothing any more"
        return DensePlan(name, ins, outs, 0, 1.0, why)
    put_factors(module, layer, rank)
    return DensePlan(name, ins, outs, rank, layer.energy(rank), "chosen for the budgets")


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
    dense, whole = offered(prunable.module, spec, config)
    losses = guessed_sensitivities(prunable, blocks, dense)
    _, picked = pick(prunable, losses, spec, config, reference, 1.0, reporter)
    cut = apply(prunable, picked, dense, whole)
    return _joined(parent, spec, None, cut, total_macs(cut.module, spec))


def measure_tables(
    parent: nn.Module, takes: InputSpec, config: ShrinkConfig, reporter: Reporter
) -> None:
    """Measure ahead what any cut of ``parent`` is sure to need of the tables of latencies."""
    parent_costs(parent, takes, reporter)
    prunable = analyse(parent, takes, keep_whole=config.keep_whole)
    blocks = find_blocks(prunable.module, takes) if config.remove_blocks else []
    dense, _ = offered(prunable.module, takes, config)
    losses = guessed_sensitivities(prunable, blocks, dense)
    for target in config.targets:
        cost_model(prunable, losses, takes, target, reporter)


def loss_gradients(data: Dataset, spec: InputSpec, images: int = 256) -> Gradients:
    """Return a function that adds the gradients of the loss on some training images."""

    def add(module: nn.Module) -> None:
        module.eval()
        with placed(module) as device:
            for start in range(0, min(images, len(data.train)), 64):
                piece = data.train.images[start : min(images, start + 64)]
                labels = torch.from_numpy(data.train.labels[start : start + len(piece)]).to(device)
                outputs = module(spec.normalize(np.ascontiguousarray(piece), device))
                size = (spec.height, spec.width)
                loss = task_of(data.task).loss(outputs, labels, size, FitConfig(0))
                loss.backward()  # type: ignore[no-untyped-call]

    return add


def _fixed(takes: InputSpec | Tensor, target: str) -> tuple[Kernel, ...]:
    """Return what stands before the network: nothing where it takes tensors."""
    return () if isinstance(takes, Tensor) else (pixels(takes, target),)


def _joined(
    parent: nn.Module, spec: InputSpec | Tensor, earlier: Pruned | None, cut: Pruned, macs: int
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
        dense=_dense_of_both(earlier, cut),
    )


def _dense_of_both(earlier: Pruned, cut: Pruned) -> list[DensePlan]:
    """Return what became of each dense layer in all cuts."""
    found = {plan.name: plan for plan in earlier.dense}
    found |= {plan.name: plan for plan in cut.dense}
    return ranks_now(cut.module, list(found.values()))


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
        "ranks": dict(picked.state.ranks),
        "dense": {
            name: {str(rank): loss for rank, loss in ranks.items()}
            for name, ranks in losses.dense.items()
        },
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
