"""Cut a module by the caller's own batches and loss."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pollard.compress.accelerator import moved, placed, used
from pollard.compress.groups import Gradients, Prunable
from pollard.compress.progress import Reporter
from pollard.compress.prune import Pruned
from pollard.compress.sensitivity import Sensitivities, measure_losses
from pollard.compress.shrink import (
    Around,
    Dense,
    ShrinkConfig,
    cut_step,
    epochs_between,
    parent_costs,
)
from pollard.compress.training import recalibrate_by

Batches = Iterable[tuple[Tensor, Any]]
"""Inputs, float32 [batch, …], with what the loss compares the outputs with. It is
gone through several times: a list or a data loader, not a generator."""

Loss = Callable[[Tensor, Any], Tensor]
"""From outputs and targets to a scalar."""

# Batches that batch norms are measured on, and that sensitivities are.
RECALIBRATION_BATCHES = 16
_PROBES = 4


def shrink_by_batches(
    parent: nn.Module,
    data: Batches,
    loss_fn: Loss,
    example: Tensor,
    config: ShrinkConfig,
    epochs: int,
    recover: Callable[[nn.Module, int], None],
    reporter: Reporter,
) -> Pruned | None:
    """Return a smaller module that meets the budgets, recovered.

    What a cut costs is how far it moves the outputs from the parent's: their squared
    distance, as a share of how much the parent's outputs vary.

    Args:
        parent: It is not changed.
        data: Batches for gradients, batch norms and sensitivities.
        loss_fn: From outputs and targets to a scalar.
        example: float32 [1, …].
        config: What to meet, and how.
        epochs: Of recovery, shared out among the steps.
        recover: Fits a module in place for some epochs.
        reporter: Told of progress.

    Returns:
        None where the parent meets the budgets as it is.

    Raises:
        PruneFailed: they cannot be met.
    """
    probes = [inputs.to(used()) for inputs, _ in itertools.islice(data, _PROBES)]
    wanted = _outputs(parent, probes)
    spread = float(wanted.var(0, unbiased=False).mean()) or 1.0

    def distance(module: nn.Module) -> float:
        return float((_outputs(module, probes) - wanted).square().mean()) / spread

    def recalibrate(module: nn.Module) -> None:
        recalibrate_by(module, probes)

    def losses(prunable: Prunable, blocks: Sequence[str], dense: Dense) -> Sensitivities:
        # Not to and fro for each of them.
        with placed(prunable.module):
            return measure_losses(
                prunable, blocks, distance, recalibrate, dense=dense, reporter=reporter
            )

    around = Around(example, batch_gradients(data, loss_fn), losses)
    reference = parent_costs(parent, example, reporter)
    between, left = epochs_between(epochs, config.steps), epochs
    found: Pruned | None = None
    for step in range(1, config.steps + 1):
        cut = cut_step(step, found, parent, around, config, reference, reporter)
        last = cut is None or step == config.steps
        if cut is not None:
            found = cut
        elif found is None:
            return None
        given = left if last else between
        left -= given
        recover(found.module, given)
        if last:
            break
    return found


def batch_gradients(data: Batches, loss_fn: Loss) -> Gradients:
    """Return a function that adds the gradients of the loss on some batches."""

    def add(module: nn.Module) -> None:
        module.eval()
        with placed(module) as device:
            for inputs, targets in moved_batches(itertools.islice(data, _PROBES), device):
                loss_fn(module(inputs), targets).backward()  # type: ignore[no-untyped-call]

    return add


def moved_batches(data: Batches, device: torch.device) -> Iterator[tuple[Tensor, Any]]:
    """Yield batches with their tensors on a device."""
    for inputs, targets in data:
        yield inputs.to(device), moved(targets, device)


def _outputs(module: nn.Module, probes: Sequence[Tensor]) -> Tensor:
    module.eval()
    with placed(module) as device, torch.no_grad():
        return torch.cat([module(inputs.to(device)) for inputs in probes])
