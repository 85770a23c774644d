"""What can be cut of a network: groups of channels that can only go together.

Torch-Pruning's dependency graph says which channels hang together, and which layers
stay whole because they cannot be followed; how much of each group goes is decided in
:mod:`pollard.compress.prune` and :mod:`pollard.compress.knapsack`.
"""

from __future__ import annotations

import copy
import itertools
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

from pollard.compress.errors import PruneFailed
from pollard.compress.macs import COUNTED, example_input, total_macs
from pollard.compress.recipe import Importance
from pollard.compress.shortcuts import rewrite_shortcuts
from pollard.compress.spec import InputSpec

Gradients = Callable[[nn.Module], None]
"""Adds the gradients of a loss to a module's parameters."""


@dataclass
class Group:
    """A group of channels that can only go together, while its width is chosen."""

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


@dataclass
class Prunable:
    """A copy of a model with everything that can be cut in it."""

    module: nn.Module
    groups: list[Group]
    left_whole: dict[str, str]
    """Layers that cannot be narrowed, each with the reason."""
    rewritten: list[str]
    """Shortcuts that became convolutions."""
    macs: int
    """Of the model as it was given."""
    _graph: Any = field(repr=False)
    _example: Tensor = field(repr=False)
    _shapes: list[torch.Size] = field(repr=False)
    _frozen: set[str] = field(repr=False)

    def doomed(self, group: Group, kept: int) -> dict[str, list[int]]:
        """Return layer → outputs that it loses when a group keeps its ``kept`` best channels."""
        names = {layer: name for name, layer in self.module.named_modules()}
        found: dict[str, list[int]] = {}
        for dep, gone in self._coupled(group, kept):
            name = names.get(dep.target.module)
            if name is not None and self._graph.is_out_channel_pruning_fn(dep.handler):
                found.setdefault(name, []).extend(gone)
        return found

    def cut(self) -> dict[str, list[int]]:
        """Narrow every group to its ``kept``; nothing else can be done with this afterwards.

        Returns:
            Layer that lost outputs → indices of those that it kept.

        Raises:
            PruneFailed: the narrowed model does not run, or answers in another shape.
        """
        channels = _remove(self, self.groups)
        for name, parameter in self.module.named_parameters():
            parameter.requires_grad_(name not in self._frozen)
        try:
            with torch.no_grad():
                after = self.module(self._example)
        except RuntimeError as error:
            raise PruneFailed(f"the pruned model does not run: {error}") from error
        for shape, now in zip(self._shapes, _shapes(after), strict=True):
            if shape != now:
                raise PruneFailed(f"pruning changed the output from {list(shape)} to {list(now)}")
        return channels

    def _coupled(self, group: Group, kept: int) -> Any:
        order = torch.argsort(group.importance, stable=True)
        gone = order[: group.width - kept].tolist()
        indices = sorted(index for unit in gone for index in group.units[unit])
        return self._graph.get_pruning_group(
            group.root, _out_pruner(self._graph, group.root), indices
        )


def analyse(
    module: nn.Module,
    spec: InputSpec | Tensor,
    *,
    keep_whole: tuple[str, ...] = (),
    importance: Importance = "l2",
    gradients: Gradients | None = None,
) -> Prunable:
    """Copy a model and find what can be cut.

    Args:
        module: The parent; it is not changed.
        spec: What it takes, or an example of it.
        keep_whole: Names of layers whose outputs stay as they are, beside those that
            the model's own outputs hang on.
        importance: How channels are ranked: by the size of all weights of a channel in
            its group ("l1", "l2"), by the scales of its batch norms ("bn"), or by how
            much the loss would change without them to first order ("taylor";
            Molchanov et al., 2019, summed over the group).
        gradients: Needed for "taylor".

    Raises:
        PruneFailed: the model cannot be traced, or nothing in it can be pruned.
    """
    macs = total_macs(module, spec)
    work = copy.deepcopy(module).eval()
    example = example_input(spec)
    with torch.no_grad():
        output = work(example)
    shapes = _shapes(output)
    rewritten = rewrite_shortcuts(work, example)
    # The graph is built from gradients: frozen parameters would silently stay whole.
    frozen = {name for name, p in work.named_parameters() if not p.requires_grad}
    for parameter in work.parameters():
        parameter.requires_grad_(True)
    graph = _dependencies(work, example)
    if importance == "taylor":
        if gradients is None:
            raise PruneFailed("importance taylor needs data: give gradients")
        gradients(work)
    groups, left_whole = _groups(graph, work, keep_whole, importance)
    work.zero_grad(set_to_none=True)
    if not groups:
        raise PruneFailed(
            "nothing in this model can be pruned: "
            + "; ".join(f"{name}: {why}" for name, why in left_whole.items())
        )
    return Prunable(work, groups, left_whole, rewritten, macs, graph, example, shapes, frozen)


def _shapes(output: object) -> list[torch.Size]:
    outputs = output if isinstance(output, tuple | list) else [output]
    shapes = [each.shape for each in outputs if isinstance(each, Tensor)]
    if not shapes or len(shapes) != len(outputs):
        raise PruneFailed(f"the model must give tensors, it gives {type(output).__name__}")
    return shapes


def compose(
    before: Mapping[str, list[int]], after: Mapping[str, list[int]]
) -> dict[str, list[int]]:
    """Join the kept channels of two cuts, in the numbering of the first parent."""
    joined = dict(before)
    for name, kept in after.items():
        earlier = joined.get(name)
        joined[name] = kept if earlier is None else [earlier[index] for index in kept]
    return joined


def _remove(prunable: Prunable, groups: list[Group]) -> dict[str, list[int]]:
    """Take out the least important channels; return what each layer kept."""
    graph = prunable._graph
    names = {layer: name for name, layer in prunable.module.named_modules()}
    channels: dict[str, list[int]] = {}
    with torch.no_grad():
        for group in groups:
            if group.kept == group.width:
                continue
            fresh = prunable._coupled(group, group.kept)
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
    graph: Any, module: nn.Module, keep_whole: tuple[str, ...], importance: Importance
) -> tuple[list[Group], dict[str, str]]:
    names = {layer: name for name, layer in module.named_modules()}
    unknown = sorted(set(keep_whole) - set(names.values()))
    if unknown:
        raise PruneFailed(f"the model has no layers {', '.join(unknown)} to keep whole")
    groups: list[Group] = []
    left: dict[str, str] = {}
    for found in graph.get_all_groups(ignored_layers=[], root_module_types=list(COUNTED)):
        root = found[0].dep.target.module
        width = len(found[0].idxs)
        outputs: dict[str, float] = defaultdict(float)
        inputs: dict[str, float] = defaultdict(float)
        why = ""
        splits = any("Split" in str(dep.target.name) for dep, _ in found)
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
            # Models split by halves, whatever is left: one half alone must not be narrowed.
            if splits and is_output and len(idxs) != graph.get_out_channels(target):
                why = why or f"the parts that {name} is split into would become uneven"
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
        score = _score(found, importance)
        units = _units(graph, root, found)
        if score is None or len(score) != width or not units:
            left.update(dict.fromkeys(layers, "its channels cannot be ranked"))
            continue
        score = torch.stack([score.detach()[unit].sum() for unit in units])
        count = len(units)
        groups.append(
            Group(
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


def _score(found: Any, importance: Importance) -> Tensor | None:
    measures = {
        "l1": lambda: tp.importance.GroupMagnitudeImportance(p=1),
        "l2": lambda: tp.importance.GroupMagnitudeImportance(p=2),
        "bn": tp.importance.BNScaleImportance,
        "taylor": tp.importance.GroupTaylorImportance,
    }
    score: Tensor | None = measures[importance]()(found)
    if score is None and importance == "bn":  # a group without batch norms
        score = measures["l2"]()(found)
    return score


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
