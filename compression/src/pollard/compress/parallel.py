"""Data-parallel training: processes that torchrun starts, each with its share of a batch.

Every process draws the same chance and holds the same weights; gradients are summed over
the processes, weighted by the images behind them. So a run of several processes learns what
one process learns from the same batches, but for the order of summation; batch norms, which
see only their process's share, make it differ.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import distributed, nn


@dataclass(frozen=True)
class Team:
    """The processes of a run, and which this is."""

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process tells and writes."""
        return self.rank == 0

    def share(self, count: int) -> slice:
        """Return which of ``count`` images this process takes, at least one."""
        if self.size == 1:
            return slice(0, count)
        start = self.rank * count // self.size
        end = (self.rank + 1) * count // self.size
        return slice(min(start, count - 1), max(end, min(start, count - 1) + 1))

    def weight(self, count: int) -> float:
        """Return the weight of this share's mean in the mean of ``count`` images.

        With fewer images than processes some are taken twice and count half.
        """
        if self.size == 1:
            return 1.0
        if count < self.size:
            return 1.0 / self.size
        share = self.share(count)
        return float(share.stop - share.start) / count

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Add the gradients of all processes up, in place."""
        if self.size == 1:
            return
        gradients = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        distributed.all_reduce(flat)
        pieces = torch.split(flat, [gradient.numel() for gradient in gradients])
        for gradient, piece in zip(gradients, pieces, strict=True):
            gradient.copy_(piece.view_as(gradient))

    def sum(self, value: float) -> float:
        """Add a number of all processes up."""
        if self.size == 1:
            return value
        held = torch.tensor([value], dtype=torch.float64)
        distributed.all_reduce(held)
        return held.item()

    def average_statistics(self, module: nn.Module) -> None:
        """Make the batch norms of all processes the same: the mean of what each has seen."""
        if self.size == 1:
            return
        for buffer in module.buffers():
            if buffer.is_floating_point():
                distributed.all_reduce(buffer)
                buffer /= self.size


def process_count() -> int:
    """Return how many processes torchrun has started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


@contextmanager
def team(device: torch.device) -> Iterator[Team]:
    """Join the processes that torchrun has started; alone without it.

    Args:
        device: Where this process computes: GPUs add gradients up among themselves, by NCCL.
    """
    if process_count() == 1:
        yield Team()
        return
    by_nccl = device.type == "cuda" and distributed.is_nccl_available()
    distributed.init_process_group("cpu:gloo,cuda:nccl" if by_nccl else "gloo")
    try:
        yield Team(distributed.get_rank(), distributed.get_world_size())
    finally:
        distributed.destroy_process_group()
