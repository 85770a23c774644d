"""What can be cut of a network: groups of channels that can only go together.

Torch-Pruning's dependency graph says which channels hang together, and which layers
stay whole because they cannot be followed; how much of each group goes is decided in
:mod:`pollard.compress.prune` and :mod:`pollard.compress.knapsack`.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch_pruning.dependency import graph as tp_graph
from torch_pruning.dependency import index_mapping as tp_mapping

from pollard.compress.errors import PruneFailed, first_line
from pollard.compress.macs import COUNTED, example_input, total_macs
from pollard.compress.recipe import Importance
from pollard.compress.shortcuts import rewrite_shortcuts
from pollard.compress.spec import InputSpec

Gradients = Callable[[nn.Module], None]
"""Adds the gradients of a loss to a module's parameters."""

# How far a search for channels that hang together goes: links between layers, and channels over
# all of them. A DenseNet of 121 layers has 198 links, a ShuffleNet of three units 1,294.
_MOST_LINKS = 3000
_MOST_INDICES = 1_000_000


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
        except Exception as error:  # whatever the model's forward raises
            raise PruneFailed(f"the pruned model does not run: {first_line(error)}") from error
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
    for name, why in _unbending(work, example, shapes, groups).items():
        group = next(group for group in groups if group.name == name)
        left_whole.update(dict.fromkeys(group.layers, why))
        groups.remove(group)
    if not groups:
        raise PruneFailed(
            "nothing in this model can be pruned: "
            + "; ".join(f"{name}: {why}" for name, why in left_whole.items())
            + ". With prune 0 it is only quantized"
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


class _TooTangled(PruneFailed):
    """The search for the channels that hang together does not end soon."""


class _BoundedGroup(tp_graph.Group):  # type: ignore[misc]
    """Channels that hang together, as far as they are found."""

    def __init__(self) -> None:
        super().__init__()
        self.indices = 0

    def add_dep(self, dep: Any, idxs: Any) -> None:
        self.indices += len(idxs)
        if len(self) >= _MOST_LINKS or self.indices > _MOST_INDICES:
            raise _TooTangled("its channels hang together in too many ways to follow")
        super().add_dep(dep=dep, idxs=idxs)


class _Graph(tp.DependencyGraph):  # type: ignore[misc]
    """A dependency graph whose searches end.

    Where parts of a split are added to each other and joined again, as in Res2Net, or
    flattened maps are multiplied, Torch-Pruning goes round and round with ever other indices.
    """

    def build_dependency(self, *args: Any, **kwargs: Any) -> Any:
        with _mended():
            return super().build_dependency(*args, **kwargs)

    def get_pruning_group(self, module: nn.Module, pruning_fn: Any, idxs: Any) -> Any:
        with _mended():
            return super().get_pruning_group(module, pruning_fn, idxs)


@contextlib.contextmanager
def _mended() -> Iterator[None]:
    """Have Torch-Pruning end its searches, and go on where several shuffles follow each other.

    Neither the class of groups nor how widths are told is a parameter of it: both are put back.
    """
    group, update = tp_graph.Group, tp_mapping.update_reshape_index_mapping

    def follow(graph: Any, node: Any) -> None:
        # A width that is not found is 0 there. Such a view is left alone, as others that cannot be
        # followed are; running the model shows what may be cut all the same.
        with contextlib.suppress(ZeroDivisionError):
            update(graph, node)

    tp_graph.Group, tp_mapping.update_reshape_index_mapping = _BoundedGroup, follow
    try:
        yield
    finally:
        tp_graph.Group, tp_mapping.update_reshape_index_mapping = group, update


def _dependencies(module: nn.Module, example: Tensor) -> Any:
    try:
        with warnings.catch_warnings():
            # Torch-Pruning warns of parameters outside of layers; those stay whole.
            warnings.simplefilter("ignore")
            return _Graph().build_dependency(module, example, verbose=False)
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
    for root, found in _found(graph):
        if isinstance(found, str):
            left[names[root]] = found
            continue
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
            if isinstance(target, nn.MultiheadAttention):
                why = why or f"{name} is attention of several heads"
            if _is_computed(target):
                why = why or (
                    f"the weights of {name} are computed (weight_norm, spectral_norm, …); "
                    "torch's remove_parametrizations or remove_weight_norm makes them plain"
                )
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
        if count == 1:
            left[names[root]] = "it has one channel"
            continue
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


def _found(graph: Any) -> Iterator[tuple[nn.Module, Any]]:
    """Yield each group with the layer that it starts at, or why it cannot be told."""
    seen: set[nn.Module] = set()
    for root in list(graph.module2node):
        if not isinstance(root, COUNTED) or root in seen:
            continue
        pruner = graph.get_pruner_of_module(root)
        width = None if pruner is None else pruner.get_out_channels(root)
        if width is None:
            continue
        try:
            found = graph.get_pruning_group(root, pruner.prune_out_channels, list(range(width)))
        except _TooTangled as error:
            yield root, str(error)
            continue
        except Exception:  # Torch-Pruning's own, where it has lost its way
            yield root, "its channels cannot be followed"
            continue
        seen.add(root)
        # A map of one channel that all channels of others are multiplied with, as in spatial
        # attention, says nothing of those.
        if width > 1:
            out_of = graph.is_out_channel_pruning_fn
            seen.update(dep.target.module for dep, _ in found if out_of(dep.handler))
        yield root, found


def _is_computed(layer: nn.Module) -> bool:
    """Whether weights are made anew from others whenever the layer runs."""
    return parametrize.is_parametrized(layer) or any(
        isinstance(hook, WeightNorm | SpectralNorm) for hook in layer._forward_pre_hooks.values()
    )


def _unbending(
    module: nn.Module, example: Tensor, shapes: list[torch.Size], groups: list[Group]
) -> dict[str, str]:
    """Return the groups without whose channels the model does not run, each with the reason.

    Numbers of channels that a model has in its code, in a split, a slice, a buffer or a layer of
    another kind, are in no graph: only running it shows them.
    """
    with torch.no_grad():
        module(example)  # what computed weights keep of the last run could not be copied else
    if not _refusal(module, example, shapes, groups):
        return {}
    found: dict[str, str] = {}
    for group in groups:
        if why := _refusal(module, example, shapes, [group]):
            found[group.name] = f"the model does not run with fewer of its channels: {why}"
    return found


def _refusal(
    module: nn.Module, example: Tensor, shapes: list[torch.Size], groups: list[Group]
) -> str:
    """Return why a copy does not run with half of the channels of ``groups``; empty if it does."""
    trial = copy.deepcopy(module)
    halves = [
        replace(group, root=trial.get_submodule(group.name), kept=group.width // 2)
        for group in groups
    ]
    graph = _dependencies(trial, example)
    try:
        _remove(Prunable(trial, halves, {}, [], 0, graph, example, shapes, set()), halves)
        # With gradients: some layers skip their checks, and do something else, without.
        after = _shapes(trial(example))
    except Exception as error:  # whatever the model's forward or its layers raise
        return first_line(error)
    return "" if after == shapes else f"it gives {after}, not {shapes}"


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
