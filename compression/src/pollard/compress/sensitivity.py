"""How much each group, block and 8-bit layer matters, by taking it away and looking.

The measure is the divergence of the answers from the parent's, in nats an image, on
images of the choosing part: finer than counting mistakes, so that few images suffice.
Batch norms are measured anew after each change; without that every deep change looks fatal.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from pollard.compress.accelerator import placed
from pollard.compress.data import Dataset
from pollard.compress.dense import DenseLayer
from pollard.compress.evaluate import predict_part, torch_predictor
from pollard.compress.groups import Group, Prunable
from pollard.compress.knapsack import options
from pollard.compress.progress import Reporter
from pollard.compress.spec import InputSpec
from pollard.compress.tasks import task_of
from pollard.compress.training import recalibrate_batch_norm


@dataclass(frozen=True)
class Sensitivities:
    """Losses in nats an image, each by itself."""

    groups: Mapping[str, Mapping[int, float]]
    """Group → width → loss."""
    blocks: Mapping[str, float]
    """Residual block → loss without it."""
    dense: Mapping[str, Mapping[int, float]] = field(default_factory=dict)
    """Dense layer → rank of the product in its place → loss."""


def measure_sensitivities(
    prunable: Prunable,
    blocks: Sequence[str],
    data: Dataset,
    spec: InputSpec,
    teacher: nn.Module,
    *,
    dense: Mapping[str, tuple[DenseLayer, list[int]]] | None = None,
    images: int = 256,
    reporter: Reporter | None = None,
) -> Sensitivities:
    """Measure what losing half of each group, and each block, does to the answers.

    Between no loss and half of a group, and beyond, the loss follows the share of the
    importance that goes.

    Args:
        prunable: From :func:`pollard.compress.groups.analyse`; it is as before afterwards.
        blocks: Names of residual blocks that can go.
        data: Batch norms are measured on its training images, losses on its choosing ones.
        spec: What the model takes.
        teacher: The parent, whose answers are the right ones.
        dense: As for :func:`measure_losses`.
        images: How many of each are used.
        reporter: Told of progress.
    """
    probe = data.choose.take(slice(images))
    task = task_of(data.task)
    wanted = predict_part(torch_predictor(teacher, spec), probe)

    def distance(module: nn.Module) -> float:
        return task.divergence(wanted, predict_part(torch_predictor(module, spec), probe))

    def recalibrate(module: nn.Module) -> None:
        recalibrate_batch_norm(module, data.train, spec, images)

    with placed(prunable.module):
        return measure_losses(
            prunable, blocks, distance, recalibrate, dense=dense, reporter=reporter
        )


def measure_losses(
    prunable: Prunable,
    blocks: Sequence[str],
    distance: Callable[[nn.Module], float],
    recalibrate: Callable[[nn.Module], None],
    *,
    dense: Mapping[str, tuple[DenseLayer, list[int]]] | None = None,
    reporter: Reporter | None = None,
) -> Sensitivities:
    """Measure what losing half of each group, each block, and most ranks of dense layers does.

    Args:
        prunable: As for :func:`measure_sensitivities`.
        blocks: Likewise.
        distance: How far a module's answers are from the right ones.
        recalibrate: Measures a module's batch norms anew, in place.
        dense: Name → dense layer that can be factorised, and the ranks in question.
        reporter: Told of progress.
    """
    reporter, dense = reporter or Reporter(), dense or {}
    work = prunable.module
    state = copy.deepcopy(work.state_dict())
    recalibrate(work)
    # What measuring the batch norms on few images does by itself is no group's fault.
    floor = distance(work)

    def measured(change: Callable[[], None]) -> float:
        work.load_state_dict(state)
        change()
        recalibrate(work)
        return max(0.0, distance(work) - floor)

    groups: dict[str, dict[int, float]] = {}
    singles: dict[str, float] = {}
    low: dict[str, dict[int, float]] = {}
    count = len(prunable.groups) + len(blocks) + len(dense)
    with reporter.step("Sensitivity", count) as step:
        for group in prunable.groups:
            widths = options(group.width, len(group.units[0]))
            if widths:
                near = min(widths, key=lambda width: abs(width - group.width / 2))
                lost = prunable.doomed(group, near)
                loss = measured(lambda lost=lost: _silence(work, lost))  # type: ignore[misc]
                groups[group.name] = curve(group, widths, near, loss)
            step.advance(note=group.name)
        for block in blocks:
            owner, _, attribute = block.rpartition(".")
            holder, original = work.get_submodule(owner), work.get_submodule(block)
            work.load_state_dict(state)
            setattr(holder, attribute, nn.Identity())
            try:
                recalibrate(work)
                singles[block] = max(0.0, distance(work) - floor)
            finally:
                setattr(holder, attribute, original)
            step.advance(note=block)
        for name, (layer, ranks) in dense.items():
            near = ranks[len(ranks) // 2]
            loss = measured(lambda layer=layer, near=near: _flatten(work, layer, near))  # type: ignore[misc]
            low[name] = layer.curve(ranks, near, loss)
            step.advance(note=name)
    work.load_state_dict(state)
    work.eval()
    return Sensitivities(groups, singles, low)


def curve(group: Group, widths: Sequence[int], near: int, loss: float) -> dict[int, float]:
    """Return the loss at each width, in proportion to the importance that goes."""
    ranked = np.sort(group.importance.detach().double().clamp_min(0).numpy())
    total = float(ranked.sum()) or 1.0
    gone = {width: float(ranked[: group.width - width].sum()) / total for width in widths}
    # Channels of no importance at all still count a little: ties go to fewer of them.
    share = {w: gone[w] + 0.01 * (1 - w / group.width) for w in widths}
    return {width: loss * share[width] / share[near] for width in widths}


def guessed_sensitivities(
    prunable: Prunable,
    blocks: Sequence[str],
    dense: Mapping[str, tuple[DenseLayer, list[int]]] | None = None,
) -> Sensitivities:
    """Return losses without looking at data: each group by the importance that goes.

    Good enough to say whether a budget can be met.
    """
    groups = {}
    for group in prunable.groups:
        widths = options(group.width, len(group.units[0]))
        if widths:
            groups[group.name] = curve(group, widths, widths[0], 1.0)
    low = {
        name: layer.curve(ranks, ranks[-1], 1.0 - layer.energy(ranks[-1]))
        for name, (layer, ranks) in (dense or {}).items()
    }
    return Sensitivities(groups, dict.fromkeys(blocks, 0.5), low)


def _silence(module: nn.Module, lost: Mapping[str, list[int]]) -> None:
    """Zero the outputs that go; what they feed then gets what it would get without them."""
    with torch.no_grad():
        for name, indices in lost.items():
            layer = module.get_submodule(name)
            transposed = isinstance(layer, nn.ConvTranspose2d) and layer.groups == 1
            for parameter in layer.parameters(recurse=False):
                rows = parameter.transpose(0, 1) if transposed and parameter.ndim > 1 else parameter
                rows.index_fill_(0, torch.tensor(indices).to(rows.device), 0)


def _flatten(module: nn.Module, layer: DenseLayer, rank: int) -> None:
    """Leave a dense layer's weights no more than a rank."""
    weight = module.get_submodule(layer.name).weight
    assert isinstance(weight, Tensor)  # noqa: S101 - narrows the type
    with torch.no_grad():
        first, second = layer.factors(weight, rank)
        weight.copy_(second @ first)


def _divergence(wanted: Tensor, found: Tensor) -> float:
    return float(functional.kl_div(found, wanted, reduction="batchmean", log_target=True))


def answer_divergence(wanted: NDArray[np.float32], found: NDArray[np.float32]) -> float:
    """Return how far logits are from those wanted, in nats an image."""
    pair = [functional.log_softmax(torch.from_numpy(x), 1) for x in (wanted, found)]
    return _divergence(pair[0], pair[1])
