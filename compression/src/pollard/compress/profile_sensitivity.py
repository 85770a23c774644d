"""How much of a network's answers each of its parts carries: what a profile says with data.

Each part is changed by itself, without any training: half of a group of channels is taken
away, a residual block left out, a dense layer given a lower rank, a layer computed in 8
bits. Batch norms are measured anew, and the answers compared with the network's own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pollard.compress.blocks import find_blocks
from pollard.compress.codec import decode, encode
from pollard.compress.data import Dataset
from pollard.compress.dense import find_dense
from pollard.compress.errors import PruneFailed
from pollard.compress.evaluate import predict_part, torch_predictor
from pollard.compress.fake_quantize import fake_weight
from pollard.compress.groups import analyse
from pollard.compress.models import LoadedModel
from pollard.compress.progress import Reporter
from pollard.compress.recipe import Recipe
from pollard.compress.run_stages import open_stages
from pollard.compress.sensitivity import measure_sensitivities
from pollard.compress.spec import InputSpec
from pollard.compress.stages import read_json, write_json
from pollard.compress.tasks import task_of
from pollard.runtime.machine import Machine

_QUANTIZABLE = (nn.Conv2d, nn.Linear)


@dataclass(frozen=True)
class Part:
    """A part of a network, and what changing it alone does."""

    kind: str
    """"channels", "block", "dense" or "8 bits"."""
    name: str
    change: str
    """What was done, such as "64 → 32 channels"."""
    loss: float
    """How far the answers move, in nats an image."""


@dataclass(frozen=True)
class PartSensitivities:
    """What :func:`profile_sensitivity` found, the most sensitive of each kind first."""

    images: int
    """On how many images of the choosing part."""
    parts: list[Part]
    not_pruned: str = ""
    """Why no channels are among the parts; empty where they are."""

    def to_json(self) -> dict[str, Any]:
        """Return the content for the profile's file."""
        content: dict[str, Any] = encode(self)
        return content


def profile_sensitivity(
    loaded: LoadedModel,
    data: Dataset,
    reference: str,
    *,
    images: int = 256,
    folder: Path | None = None,
    fresh: bool = False,
    reporter: Reporter | None = None,
) -> PartSensitivities:
    """Measure every part, or take what an earlier run has measured.

    Args:
        loaded: The network; it is not changed.
        data: Batch norms are measured on its training images, losses on its choosing ones.
        reference: What the data were loaded from; a recipe is not complete without.
        images: How many of each are used.
        folder: Where finished measurements are kept; the user's cache when None.
        fresh: Measure anew.
        reporter: Told of progress.

    Raises:
        CacheUnusable, DiskFull: what was found cannot be kept.
    """
    reporter = reporter or Reporter()
    machine = Machine.detect()
    recipe = Recipe(
        loaded.source.reference,
        reference,
        "",
        threads=torch.get_num_threads(),
        device="cpu",
        spec=loaded.spec,
    )
    stages = open_stages(recipe, loaded, data, machine, folder, fresh=fresh, reporter=reporter)
    reduce_range = not machine.has_vnni

    def make(made: Path) -> None:
        found = measure(loaded.module, data, loaded.spec, images, reduce_range, reporter)
        write_json(made / "sensitivity.json", found.to_json())

    inputs = {"images": images, "reduce_range": reduce_range}
    return stages.run(
        "sensitivity",
        inputs,
        make,
        lambda made: decode(PartSensitivities, read_json(made / "sensitivity.json")),
    ).value


def measure(
    module: nn.Module,
    data: Dataset,
    spec: InputSpec,
    images: int,
    reduce_range: bool,
    reporter: Reporter,
) -> PartSensitivities:
    """Measure every part.

    Args:
        module: It is not changed.
        data: As for :func:`profile_sensitivity`.
        spec: What the module takes.
        images: How many of each part of the data are used.
        reduce_range: Whether weights have 7 bits, as for processors without VNNI.
        reporter: Told of progress.
    """
    parts: list[Part] = []
    why = ""
    try:
        prunable = analyse(module, spec)
    except PruneFailed as error:
        why = str(error)
    else:
        blocks = find_blocks(prunable.module, spec)
        found = {layer.name: (layer, layer.ranks()) for layer in find_dense(module, spec)[0]}
        dense = {name: pair for name, pair in found.items() if pair[1]}
        losses = measure_sensitivities(
            prunable, blocks, data, spec, module, dense=dense, images=images, reporter=reporter
        )
        for group in prunable.groups:
            if rows := losses.groups.get(group.name):
                near = min(rows, key=lambda width: abs(width - group.width / 2))
                told = f"{group.width} → {near} channels"
                if len(group.layers) > 1:
                    told += f" of {len(group.layers)} layers"
                parts.append(Part("channels", group.name, told, rows[near]))
        parts += [Part("block", name, "left out", loss) for name, loss in losses.blocks.items()]
        for name, (_, ranks) in dense.items():
            rank = ranks[len(ranks) // 2]
            parts.append(Part("dense", name, f"rank {rank}", losses.dense[name][rank]))
    parts += _in_8_bits(module, data, spec, images, reduce_range, reporter)
    kinds = ("channels", "block", "dense", "8 bits")
    parts.sort(key=lambda part: (kinds.index(part.kind), -part.loss))
    return PartSensitivities(min(images, len(data.choose)), parts, why)


def _in_8_bits(
    module: nn.Module,
    data: Dataset,
    spec: InputSpec,
    images: int,
    reduce_range: bool,
    reporter: Reporter,
) -> list[Part]:
    """Compute one layer at a time with the weights and inputs that 8 bits leave it."""
    work = copy.deepcopy(module).eval()
    layers = {n: layer for n, layer in work.named_modules() if isinstance(layer, _QUANTIZABLE)}
    task, probe = task_of(data.task), data.choose.take(slice(images))
    ranges: dict[str, tuple[float, float]] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            low, high = ranges.get(name, (0.0, 0.0))
            seen = inputs[0].detach()
            ranges[name] = min(low, float(seen.min())), max(high, float(seen.max()))

        return hook

    hooks = [layer.register_forward_pre_hook(watch(n)) for n, layer in layers.items()]
    try:
        predict_part(torch_predictor(work, spec), data.train.take(slice(images)))
    finally:
        for handle in hooks:
            handle.remove()
    wanted = predict_part(torch_predictor(work, spec), probe)
    parts = []
    # Layers that did not run, or are called with bare weights, have no inputs to round.
    ran = {n: layer for n, layer in layers.items() if n in ranges}
    with reporter.step("Sensitivity to 8 bits", len(ran)) as step:
        for name, layer in ran.items():
            with _rounded(layer, ranges[name], 63 if reduce_range else 127):
                found = predict_part(torch_predictor(work, spec), probe)
            loss = max(0.0, task.divergence(wanted, found))
            parts.append(Part("8 bits", name, "weights and inputs", loss))
            step.advance(note=name)
    return parts


@contextmanager
def _rounded(layer: nn.Module, seen: tuple[float, float], most: int) -> Iterator[None]:
    """Let a layer compute with rounded weights and inputs for a while."""
    weight: Any = layer.weight
    original = weight.detach().clone()
    scale = (seen[1] - seen[0]) / 255 or 1.0
    zero = round(-seen[0] / scale)

    def inputs(_: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        places = torch.clamp(torch.round(given[0] / scale) + zero, 0, 255)
        return ((places - zero) * scale, *given[1:])

    handle = layer.register_forward_pre_hook(inputs)
    try:
        with torch.no_grad():
            weight.copy_(fake_weight(original, 0, most))
        yield
    finally:
        handle.remove()
        with torch.no_grad():
            weight.copy_(original)
