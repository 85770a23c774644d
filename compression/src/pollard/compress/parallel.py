"""Data-parallel training: processes that torchrun starts, each with its share of a batch.

Every process draws the same chance and holds the same weights; gradients are summed over
the processes, weighted by the images behind them. So a run of several processes learns what
one process learns from the same batches, but for the order of summation; batch norms, which
see only their process's share, make it differ.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import distributed, nn

from pollard.compress.errors import UsageInvalid

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store


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

    Raises:
        UsageInvalid: others compute on another kind of device, and could not be added to.
    """
    if process_count() == 1:
        yield Team()
        return
    # Not every build of PyTorch has them.
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    store, rank, size = next(rendezvous("env://"))
    _agree(PrefixStore("devices", store), rank, size, device)
    by_nccl = device.type == "cuda" and distributed.is_nccl_available()
    distributed.init_process_group(
        "cpu:gloo,cuda:nccl" if by_nccl else "gloo",
        store=PrefixStore("team", store),
        rank=rank,
        world_size=size,
    )
    try:
        yield Team(rank, size)
    finally:
        distributed.destroy_process_group()


def _agree(store: Store, rank: int, size: int, device: torch.device) -> None:
    """Raise UsageInvalid in all processes where not all compute on one kind of device."""
    store.set(f"kind/{rank}", device.type)
    kinds = Counter(store.get(f"kind/{each}").decode() for each in range(size))
    if len(kinds) == 1:
        return
    store.set(f"read/{rank}", "")
    if rank == 0:  # may hold the store, which the others read
        store.wait([f"read/{each}" for each in range(size)])
    told = ", ".join(f"{count} on {kind}" for kind, count in sorted(kinds.items()))
    raise UsageInvalid(
        f"the {size} processes compute on different kinds of devices ({told}), which cannot add "
        "their gradients up: give --device cpu, or --device cuda, to all of them"
    )
