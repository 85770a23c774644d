"""Remove whole channels, coupled layers together, until a share of the MACs is gone.

Torch-Pruning's dependency graph says which channels hang together; which of them
go, and how many of each group, is decided here. Every group is narrowed by the
same share, and its width is rounded to what the processor's kernels like: a
convolution of 12 channels is slower than one of 16.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from pollard.compress.dense import DensePlan, factorize_by_energy
from pollard.compress.errors import PruneFailed
from pollard.compress.groups import Gradients, Group, analyse
from pollard.compress.latency import LatencyTable
from pollard.compress.macs import layer_costs, total_macs
from pollard.compress.recipe import Importance
from pollard.compress.spec import InputSpec

# Multiples tried for the widths, the best for the kernels first. On AVX-512 both
# the float and the 8-bit convolutions work in blocks of 16 channels.
ROUNDING = (16, 8, 4, 2, 1)

# How far beyond the wanted share a coarse rounding may shoot before a finer one is tried.
_OVERSHOOT = 0.06


@dataclass(frozen=True)
class GroupPlan:
    """One group of channels that can only go together."""

    name: str
    """Layer whose outputs they are."""
    layers: list[str]
    """Every layer that loses outputs with them."""
    width: int
    """Channels before; those that are tied to each other count as one."""
    kept: int
    """Channels after."""


@dataclass(frozen=True)
class Pruned:
    """A narrowed model and how it came about."""

    module: nn.Module
    groups: list[GroupPlan]
    rounding: int
    """Widths are multiples of this where they changed."""
    macs_before: int
    macs_after: int
    rewritten: list[str]
    """Shortcuts that became convolutions."""
    left_whole: dict[str, str]
    """Layers that were not narrowed, each with the reason."""
    channels: dict[str, list[int]]
    """Layer that lost outputs → indices of those that it kept, in the parent's numbering."""
    blocks: list[str] = field(default_factory=list)
    """Residual blocks that were removed."""
    search: dict[str, Any] | None = None
    """How a budget was met, for the report; None where a share of the MACs was asked for."""
    dense: list[DensePlan] = field(default_factory=list)
    """Dense layers that were factorised, and why others were not; empty where it was not
    asked for."""

    @property
    def removed(self) -> float:
        """Share of the MACs that is gone."""
        return 1 - self.macs_after / self.macs_before


def prune(
    module: nn.Module,
    spec: InputSpec | Tensor,
    ratio: float,
    *,
    keep_whole: tuple[str, ...] = (),
    rounding: tuple[int, ...] = ROUNDING,
    importance: Importance = "l2",
    gradients: Gradients | None = None,
    factorize: float = 0.0,
    tables: Sequence[LatencyTable] = (),
) -> Pruned:
    """Return a narrower copy of ``module`` from which ``ratio`` of the MACs is gone.

    Args:
        module: The parent; it is not changed.
        spec: What it takes, or an example of it.
        ratio: Share of the MACs to remove, above 0 and below 1; at least so
            much is removed, and as little more as the rounding allows. 0, too, where
            ``factorize`` is given.
        keep_whole: Names of layers whose outputs stay as they are, beside
            those that the model's own outputs hang on.
        rounding: Multiples that are tried for the widths, in this order.
        importance: How channels are ranked, as for :func:`pollard.compress.groups.analyse`.
        gradients: As for it.
        factorize: Share of their squared weights that dense layers keep when they are
            factorised, after the narrowing; 0 leaves them as they are.
        tables: Latencies that tell whether a factorised layer is faster, as for
            :func:`pollard.compress.dense.factorize_by_energy`.

    Raises:
        PruneFailed: the model cannot be traced, nothing in it can be pruned,
            or the ratio cannot be reached.
    """
    if ratio == 0 and factorize:
        module = copy.deepcopy(module)
        before = total_macs(module, spec)
        dense = factorize_by_energy(module, spec, factorize, keep_whole=keep_whole, tables=tables)
        after = total_macs(module, spec)
        return Pruned(module, [], 0, before, after, [], {}, {}, dense=dense)
    if not 0 < ratio < 1:
        raise PruneFailed(f"the pruning ratio is {ratio}; it must lie between 0 and 1")
    found = analyse(module, spec, keep_whole=keep_whole, importance=importance, gradients=gradients)
    groups = found.groups
    costs = {
        cost.name: (cost.macs, cost.in_channels, cost.out_channels)
        for cost in layer_costs(found.module, spec)
    }
    multiple = _choose_widths(groups, costs, found.macs, ratio, rounding, found.left_whole)
    plans = [GroupPlan(g.name, g.layers, g.width, g.kept) for g in groups]
    channels = found.cut()
    dense = []
    if factorize:
        dense = factorize_by_energy(
            found.module, spec, factorize, keep_whole=keep_whole, tables=tables
        )
    return Pruned(
        found.module,
        plans,
        multiple,
        found.macs,
        total_macs(found.module, spec),
        found.rewritten,
        found.left_whole,
        channels,
        dense=dense,
    )


def _estimate(groups: list[Group], costs: dict[str, tuple[int, int, int]]) -> int:
    lost_in: dict[str, float] = defaultdict(float)
    lost_out: dict[str, float] = defaultdict(float)
    for group in groups:
        gone = group.width - group.kept
        for name, each in group.outputs.items():
            lost_out[name] += gone * each
        for name, each in group.inputs.items():
            lost_in[name] += gone * each
    total = 0.0
    for name, (macs, ins, outs) in costs.items():
        # A depthwise layer is listed with its outputs only, which are its inputs.
        total += macs * (1 - lost_in[name] / ins) * (1 - lost_out[name] / outs)
    return round(total)


def _whole(left_whole: Mapping[str, str]) -> str:
    """Say in a few words what cannot be narrowed."""
    by_reason: dict[str, list[str]] = defaultdict(list)
    for name, why in left_whole.items():
        by_reason[why].append(name)
    told = [
        f"{', '.join(names[:3])}{' and others' * (len(names) > 3)} ({why})"
        for why, names in list(by_reason.items())[:5]
    ]
    return f". What stays whole: {'; '.join(told)}" if told else ""


def _choose_widths(
    groups: list[Group],
    costs: dict[str, tuple[int, int, int]],
    macs_before: int,
    ratio: float,
    rounding: tuple[int, ...],
    left_whole: Mapping[str, str],
) -> int:
    wanted = (1 - ratio) * macs_before
    share = _uniform_share(groups, costs, wanted)
    best: tuple[float, int, list[int]] | None = None
    for multiple in rounding:
        if not _round_widths(groups, costs, wanted, share, multiple):
            continue
        removed = 1 - _estimate(groups, costs) / macs_before
        if best is None or removed < best[0] - 1e-9:
            best = (removed, multiple, [g.kept for g in groups])
        if removed <= ratio + _OVERSHOOT:
            best = (removed, multiple, [g.kept for g in groups])
            break
    if best is None:
        for group in groups:
            group.kept = 1
        most = 1 - _estimate(groups, costs) / macs_before
        raise PruneFailed(
            f"{ratio:.1%} of the MACs cannot be removed by narrowing; at most {most:.1%} with one "
            f"channel left everywhere. Ask for less{_whole(left_whole)}"
        )
    for group, kept in zip(groups, best[2], strict=True):
        group.kept = kept
    return best[1]


def _uniform_share(
    groups: list[Group], costs: dict[str, tuple[int, int, int]], wanted: float
) -> float:
    """Share of the channels to keep, the same everywhere, that leaves ``wanted`` MACs."""
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        if _estimate_share(groups, costs, middle) > wanted:
            high = middle
        else:
            low = middle
    return low


def _estimate_share(
    groups: list[Group], costs: dict[str, tuple[int, int, int]], share: float
) -> float:
    fractions: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for group in groups:
        for side, lost in ((0, group.inputs), (1, group.outputs)):
            for name, each in lost.items():
                fractions[name][side] += (1 - share) * group.width * each
    total = 0.0
    for name, (macs, ins, outs) in costs.items():
        total += macs * (1 - fractions[name][0] / ins) * (1 - fractions[name][1] / outs)
    return total


def _round_widths(
    groups: list[Group],
    costs: dict[str, tuple[int, int, int]],
    wanted: float,
    share: float,
    multiple: int,
) -> bool:
    """Set each group's width to a multiple; return whether ``wanted`` is reached."""
    for group in groups:
        ideal = group.width * share
        rounded = max(multiple, round(ideal / multiple) * multiple)
        group.kept = min(group.width, rounded)

    def slack(group: Group) -> float:
        return group.kept / max(1.0, group.width * share)

    # Too wide: narrow the group that is furthest above its share.
    while _estimate(groups, costs) > wanted:
        open_groups = [g for g in groups if g.kept > multiple]
        if not open_groups:
            return False
        widest = max(open_groups, key=slack)
        # An odd width first comes down to the grid.
        widest.kept = (widest.kept - 1) // multiple * multiple
    # Too narrow: give back what still fits, the most starved group first.
    for group in sorted(groups, key=slack):
        before = group.kept
        group.kept = min(group.width, before + multiple)
        if _estimate(groups, costs) > wanted:
            group.kept = before
    return True
