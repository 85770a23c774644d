"""Remove whole residual blocks: what a network gains by being less deep.

A block that adds to its input can be left out where it leaves the shape as it is.
Latency falls by as much as the block takes, which narrowing by the same share of the
MACs does not reach.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from pollard.compress.errors import PruneFailed
from pollard.compress.export import attach_pixels, export_core, probe_images, serialize
from pollard.compress.macs import COUNTED, example_input
from pollard.compress.spec import InputSpec
from pollard.runtime.measure import interleaved
from pollard.runtime.sessions import open_session

# Points that the recalibrated accuracy may fall before "auto" stops: recovery wins most
# of that back, and the gate judges afterwards.
AUTO_DROP_POINTS = 10.0


@dataclass(frozen=True)
class BlockScore:
    """What leaving one block out gains and costs, before any training."""

    name: str
    saved_us: float
    """Latency that goes with it, float, one image, one thread; blocks of one shape
    are measured once."""
    drop_points: float
    """Accuracy lost, with batch norms recalibrated."""

    @property
    def worth(self) -> float:
        """Microseconds for a point; a tenth of a point is noise."""
        return self.saved_us / max(0.1, self.drop_points)


@dataclass(frozen=True)
class Shallower:
    """A model with fewer blocks."""

    module: nn.Module
    removed: list[str]
    """In the order in which they went."""
    scores: list[BlockScore]
    """Of every block that could go, the best first."""


def find_blocks(module: nn.Module, spec: InputSpec | Tensor) -> list[str]:
    """Return the names of the residual blocks that can be left out.

    They are recognised by what they do: members of a sequence that keep their
    input's shape, run once, and pass a positive input through unchanged when all
    their convolutions and norms are silent.
    """
    candidates = {
        f"{name}.{child_name}" if name else child_name: child
        for name, parent in module.named_modules()
        if isinstance(parent, nn.Sequential)
        for child_name, child in parent.named_children()
        if any(isinstance(layer, COUNTED) for layer in child.modules())
        and not isinstance(child, COUNTED)
    }
    shapes: dict[str, list[torch.Size]] = {name: [] for name in candidates}
    hooks = []
    for name, child in candidates.items():

        def record(
            _: nn.Module, inputs: tuple[Tensor, ...], output: Tensor, name: str = name
        ) -> None:
            same = len(inputs) == 1 and isinstance(output, Tensor)
            shapes[name].append(
                inputs[0].shape if same and inputs[0].shape == output.shape else torch.Size()
            )

        hooks.append(child.register_forward_hook(record))
    was_training = module.training
    module.eval()
    with torch.no_grad():
        module(example_input(spec))
    module.train(was_training)
    for hook in hooks:
        hook.remove()
    return [
        name
        for name, child in candidates.items()
        if len(shapes[name]) == 1 and shapes[name][0] and _adds(child, shapes[name][0])
    ]


def _adds(block: nn.Module, shape: torch.Size) -> bool:
    silent = copy.deepcopy(block).eval()
    with torch.no_grad():
        for parameter in silent.parameters():
            parameter.zero_()
        probe = torch.rand(shape, generator=torch.Generator().manual_seed(0))
        return bool(torch.equal(silent(probe), probe))


def remove_blocks(
    module: nn.Module,
    spec: InputSpec,
    count: int | None,
    recalibrate: Callable[[nn.Module], None],
    accuracy: Callable[[nn.Module], float],
) -> Shallower:
    """Return a copy without ``count`` blocks, those that gain most for what they cost.

    Args:
        module: The parent; it is not changed.
        spec: What it takes.
        count: How many; None removes blocks until the recalibrated accuracy is
            `AUTO_DROP_POINTS` below the parent's.
        recalibrate: Measures the batch norms of a module anew, in place.
        accuracy: Of a module on the choosing part, 0 to 1.

    Raises:
        PruneFailed: fewer than ``count`` blocks can go.
    """
    names = find_blocks(module, spec)
    if not names or (count is not None and count > len(names)):
        raise PruneFailed(
            f"{len(names)} residual blocks can be removed, {count or 'some'} are asked for: blocks "
            "must be members of a Sequential that keep their input's shape"
        )
    parent_accuracy = accuracy(module)
    saved = _saved_us(module, spec, names)
    scores: list[BlockScore] = []
    for name in names:
        trial = without(module, [name])
        recalibrate(trial)
        drop = 100 * (parent_accuracy - accuracy(trial))
        scores.append(BlockScore(name, saved[name], drop))
    scores.sort(key=lambda score: score.worth, reverse=True)
    ranked = [score.name for score in scores]
    if count is not None:
        result = without(module, ranked[:count])
        recalibrate(result)
        return Shallower(result, ranked[:count], scores)
    result = copy.deepcopy(module)
    removed: list[str] = []
    for name in ranked:
        trial = without(module, [*removed, name])
        recalibrate(trial)
        if 100 * (parent_accuracy - accuracy(trial)) > AUTO_DROP_POINTS:
            break
        result, removed = trial, [*removed, name]
    return Shallower(result, removed, scores)


def without(module: nn.Module, names: list[str]) -> nn.Module:
    """Return a copy of ``module`` in which the blocks pass their input through."""
    work = copy.deepcopy(module)
    for name in names:
        owner, _, attribute = name.rpartition(".")
        setattr(work.get_submodule(owner), attribute, nn.Identity())
    return work


def _saved_us(module: nn.Module, spec: InputSpec, names: list[str]) -> dict[str, float]:
    """Measure, interleaved, what each kind of block takes in onnxruntime."""
    kinds: dict[str, str] = {}
    for name in names:
        block = module.get_submodule(name)
        kinds[name] = repr(block)
    first = {kind: name for name, kind in reversed(kinds.items())}
    models = [module, *(without(module, [name]) for name in first.values())]
    image = probe_images(spec, 1)
    calls = []
    for model in models:
        raw = serialize(attach_pixels(export_core(model, spec), spec))
        session = open_session(raw)
        feeds = {session.inputs[0].name: image}
        calls.append(lambda s=session, f=feeds: s.raw.run(None, f))
    turns = interleaved(calls, rounds=80)
    # Never nothing: noise must not turn the order of the accuracies around.
    gains = [max(0.1, float(np.median(turns[0] - times))) for times in turns[1:]]
    by_kind = dict(zip(first, gains, strict=True))
    return {name: by_kind[kind] for name, kind in kinds.items()}
