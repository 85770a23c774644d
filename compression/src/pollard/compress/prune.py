"""Remove whole channels, coupled layers together, until a share of the MACs is gone.

Torch-Pruning's dependency graph says which channels hang together; which of them
go, and how many of each group, is decided here. Every group is narrowed by the
same share, and its width is rounded to what the processor's kernels like: a
convolution of 12 channels is slower than one of 16.
"""

from __future__ import annotations

import copy
import itertools
import warnings
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

from pollard.compress.errors import PruneFailed
from pollard.compress.macs import COUNTED, example_input, layer_costs, total_macs
from pollard.compress.shortcuts import rewrite_shortcuts
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

    @property
    def removed(self) -> float:
        """Share of the MACs that is gone."""
        return 1 - self.macs_after / self.macs_before


@dataclass
class _Group:
    """A prunable group while the widths are chosen."""

    root: nn.Module
    name: str
    layers: list[str]
    width: int
    importance: Tensor
    # Channels of the root that go together, such as a value and its gate.
    units: list[list[int]]
    # Layer → channels that it loses per channel of the group (more than one
    # behind a flattening).
    outputs: dict[str, float]
    inputs: dict[str, float]
    kept: int = 0


def prune(
    module: nn.Module,
    spec: InputSpec | Tensor,
    ratio: float,
    *,
    keep_whole: tuple[str, ...] = (),
    rounding: tuple[int, ...] = ROUNDING,
) -> Pruned:
    """Return a narrower copy of ``module`` from which ``ratio`` of the MACs is gone.

    Args:
        module: The parent; it is not changed.
        spec: What it takes, or an example of it.
        ratio: Share of the MACs to remove, above 0 and below 1; at least so
            much is removed, and as little more as the rounding allows.
        keep_whole: Names of layers whose outputs stay as they are, beside
            those that the model's own outputs hang on.
        rounding: Multiples that are tried for the widths, in this order.

    Raises:
        PruneFailed: the model cannot be traced, nothing in it can be pruned,
            or the ratio cannot be reached.
    """
    if not 0 < ratio < 1:
        raise PruneFailed(f"the pruning ratio is {ratio}; it must lie between 0 and 1")
    macs_before = total_macs(module, spec)
    work = copy.deepcopy(module).eval()
    example = example_input(spec)
    with torch.no_grad():
        output = work(example)
    if not isinstance(output, Tensor):
        raise PruneFailed(f"the model must give one tensor, it gives {type(output).__name__}")
    output_shape = output.shape
    rewritten = rewrite_shortcuts(work, example)
    # The graph is built from gradients: frozen parameters would silently stay whole.
    frozen = {name for name, p in work.named_parameters() if not p.requires_grad}
    for parameter in work.parameters():
        parameter.requires_grad_(True)
    graph = _dependencies(work, example)
    groups, left_whole = _groups(graph, work, keep_whole)
    if not groups:
        raise PruneFailed(
            "nothing in this model can be pruned: "
            + "; ".join(f"{name}: {why}" for name, why in left_whole.items())
        )
    costs = {
        cost.name: (cost.macs, cost.in_channels, cost.out_channels)
        for cost in layer_costs(work, spec)
    }
    multiple = _choose_widths(groups, costs, macs_before, ratio, rounding)
    plans = [GroupPlan(g.name, g.layers, g.width, g.kept) for g in groups]
    channels = _remove(graph, work, groups)
    for name, parameter in work.named_parameters():
        parameter.requires_grad_(name not in frozen)
    try:
        with torch.no_grad():
            after = work(example)
    except RuntimeError as error:
        raise PruneFailed(f"the pruned model does not run: {error}") from error
    if after.shape != output_shape:
        raise PruneFailed(
            f"pruning changed the output from {list(output_shape)} to {list(after.shape)}"
        )
    macs_after = total_macs(work, spec)
    return Pruned(work, plans, multiple, macs_before, macs_after, rewritten, left_whole, channels)


def _remove(graph: Any, module: nn.Module, groups: list[_Group]) -> dict[str, list[int]]:
    """Take out the least important channels; return what each layer kept."""
    names = {layer: name for name, layer in module.named_modules()}
    channels: dict[str, list[int]] = {}
    with torch.no_grad():
        for group in groups:
            if group.kept == group.width:
                continue
            order = torch.argsort(group.importance, stable=True)
            doomed = order[: group.width - group.kept].tolist()
            indices = sorted(index for unit in doomed for index in group.units[unit])
            fresh = graph.get_pruning_group(group.root, _out_pruner(graph, group.root), indices)
            for dep, gone in fresh:
                name = names.get(dep.target.module)
                if name is None or not graph.is_out_channel_pruning_fn(dep.handler):
                    continue
                count = graph.get_out_channels(dep.target.module)
                if count is None:
                    continue
                lost, before = set(gone), channels.get(name, list(range(count)))
                channels[name] = [kept for at, kept in enumerate(before) if at not in lost]
            fresh.prune(record_history=False)
    return channels


def _dependencies(module: nn.Module, example: Tensor) -> Any:
    try:
        with warnings.catch_warnings():
            # Torch-Pruning warns of parameters outside of layers; those stay whole.
            warnings.simplefilter("ignore")
            return tp.DependencyGraph().build_dependency(module, example, verbose=False)
    except Exception as error:  # whatever the model's forward raises while traced
        raise PruneFailed(f"the model cannot be traced for pruning: {error}") from error


def _out_pruner(graph: Any, module: nn.Module) -> Any:
    return graph.get_pruner_of_module(module).prune_out_channels


def _groups(
    graph: Any, module: nn.Module, keep_whole: tuple[str, ...]
) -> tuple[list[_Group], dict[str, str]]:
    names = {layer: name for name, layer in module.named_modules()}
    unknown = sorted(set(keep_whole) - set(names.values()))
    if unknown:
        raise PruneFailed(f"the model has no layers {', '.join(unknown)} to keep whole")
    importance = tp.importance.GroupMagnitudeImportance(p=2)
    groups: list[_Group] = []
    left: dict[str, str] = {}
    for found in graph.get_all_groups(ignored_layers=[], root_module_types=list(COUNTED)):
        root = found[0].dep.target.module
        width = len(found[0].idxs)
        outputs: dict[str, float] = defaultdict(float)
        inputs: dict[str, float] = defaultdict(float)
        why = ""
        for dep, idxs in found:
            target = dep.target.module
            is_output = graph.is_out_channel_pruning_fn(dep.handler)
            if is_output and not dep.target.outputs:
                why = "the model's output hangs on it"
            if isinstance(target, nn.Parameter) and target.numel() != max(target.shape, default=1):
                why = why or "a bare parameter hangs on it"
            name = names.get(target)
            if name is None:
                continue
            if not _followed(graph, target, is_output, idxs):
                why = why or f"its channels cannot be followed to {name}"
            if not isinstance(target, COUNTED):
                continue
            if name in keep_whole and is_output:
                why = "it was named to stay whole"
            grouped = getattr(target, "groups", 1)
            if grouped > 1 and grouped != getattr(target, "in_channels", 0):
                why = f"{name} is a grouped convolution"
            (outputs if is_output else inputs)[name] += len(idxs)
        layers = sorted(outputs)
        if why:
            left.update(dict.fromkeys(layers, why))
            continue
        score = importance(found)
        units = _units(graph, root, found)
        if score is None or len(score) != width or not units:
            left.update(dict.fromkeys(layers, "its channels cannot be ranked"))
            continue
        score = torch.stack([score.detach()[unit].sum() for unit in units])
        count = len(units)
        groups.append(
            _Group(
                root,
                names[root],
                layers,
                count,
                score,
                units,
                {name: each / count for name, each in outputs.items()},
                {name: each / count for name, each in inputs.items()},
                count,
            )
        )
    return groups, left


def _followed(graph: Any, layer: nn.Module, is_output: bool, idxs: list[int]) -> bool:
    """Whether a group's indices in ``layer`` are what a traced reshape left of them.

    Concatenation, splitting and flattening keep their order. A shuffle of the
    channels does not, and Torch-Pruning numbers them wrongly behind it.
    """
    count = (graph.get_out_channels if is_output else graph.get_in_channels)(layer)
    ascending = all(a < b for a, b in itertools.pairwise(idxs))
    return ascending and (count is None or not idxs or idxs[-1] < count)


def _units(graph: Any, root: nn.Module, found: Any) -> list[list[int]]:
    """Return which channels of ``root`` go together; nothing if that is irregular."""
    width = len(found[0].idxs)
    if not any("Split" in str(dep.target.name) for dep, _ in found):
        return [[index] for index in range(width)]
    pruner = _out_pruner(graph, root)
    units: list[list[int]] = []
    seen: set[int] = set()
    for index in range(width):
        if index in seen:
            continue
        unit = {index}
        for dep, idxs in graph.get_pruning_group(root, pruner, [index]):
            if dep.target.module is root and graph.is_out_channel_pruning_fn(dep.handler):
                unit.update(idxs)
        if unit & seen:
            return []
        seen |= unit
        units.append(sorted(unit))
    return units if len({len(unit) for unit in units}) == 1 else []


def _estimate(groups: list[_Group], costs: dict[str, tuple[int, int, int]]) -> int:
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


def _choose_widths(
    groups: list[_Group],
    costs: dict[str, tuple[int, int, int]],
    macs_before: int,
    ratio: float,
    rounding: tuple[int, ...],
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
            "channel left everywhere. Ask for less"
        )
    for group, kept in zip(groups, best[2], strict=True):
        group.kept = kept
    return best[1]


def _uniform_share(
    groups: list[_Group], costs: dict[str, tuple[int, int, int]], wanted: float
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
    groups: list[_Group], costs: dict[str, tuple[int, int, int]], share: float
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
    groups: list[_Group],
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

    def slack(group: _Group) -> float:
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
