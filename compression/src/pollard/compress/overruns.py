"""Which finished files take more than the budgets allow, whatever their network was cut for.

A network is cut for the target that loses least, but files of all targets compete, the
parent's too: that one of them is fast does not make it small.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from pollard.compress.budget import Budget, amount
from pollard.compress.progress import Reporter
from pollard.compress.shrink import costs_of
from pollard.compress.spec import InputSpec

# What a cut comes to may be a little beside what was planned; files are as large as they are.
_BESIDE = 1.01


@dataclass(frozen=True)
class FinishedFile:
    """A file that could be shipped."""

    name: str
    target: str
    """"cpu-fp32" or "cpu-int8"."""
    module: nn.Module
    """The PyTorch model that it was exported from."""
    size_bytes: int


def find_overruns(
    files: Sequence[FinishedFile],
    takes: InputSpec | Tensor,
    budgets: Sequence[Budget],
    reporter: Reporter,
) -> dict[str, str]:
    """Return the names of files that take more than the budgets allow, with what they take.

    Latency is what the table says, as when the network was cut.

    Args:
        files: The parent's float file, of which budgets may be shares, then the others.
        takes: As for :func:`pollard.compress.shrink.costs_of`.
        budgets: What a file may take.
        reporter: Told of operators that have to be timed.
    """
    if not budgets:
        return {}
    costs = [
        {**costs_of(one.module, takes, one.target, reporter), "size": float(one.size_bytes)}
        for one in files
    ]
    found: dict[str, str] = {}
    for one, taken in zip(files[1:], costs[1:], strict=True):
        told = []
        for budget in budgets:
            name, limit = budget.resource, budget.limit(costs[0][budget.resource])
            if taken[name] > limit * (1.0 if name == "size" else _BESIDE):
                by = " by the table" if name == "latency" else ""
                told.append(
                    f"{name} {amount(name, taken[name])}{by} where {budget.text} allows "
                    f"{amount(name, limit)}"
                )
        if told:
            found[one.name] = f"{one.name} takes {', '.join(told)}"
    return found
