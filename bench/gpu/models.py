"""The files that are measured, made here: networks with random weights that pass signals on.

What they answer has no meaning, but their activations have the size of a trained network's, so
that float16 is put to the test.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from bench.gpu.setup import Setup, Table, say

RECIPE = "3"
"""Raised when files are made differently, so that those of before are made again."""

PRUNED_SHARE = 0.6
"""Share of the multiply-accumulates that the pruned network lacks."""

PRUNED_ROUNDING = (32, 16, 8)
"""Widths of the pruned network are multiples of the first of these that reaches the share."""

_WORKERS = 8


def run(setup: Setup) -> None:
    """Make every file, several at a time, those of the image model first."""
    from pollard.compress.zoo import ENTRIES

    name = setup.sizes.image_model
    names = (
        []
        if not setup.with_zoo
        else list(setup.only_zoo or (sorted(ENTRIES) if not setup.tiny else ("small-cnn-28", name)))
    )
    setup.keep("zoo", names)
    jobs: dict[str, tuple[Callable[..., dict[str, Any]], tuple[Any, ...]]] = {
        "parent": (make_parent, (name, 0, setup.models)),
        "pruned": (make_pruned, (name, setup.models)),
        "other": (make_other, (name, setup.models)),
        **{f"zoo/{each}": (make_zoo, (each, setup.models)) for each in names},
    }
    workers = max(1, min(_WORKERS, (os.cpu_count() or 2) // 2))
    made: dict[str, Any] = {}
    failed: dict[str, str] = {}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        waiting = {pool.submit(_kept, setup.models, job, *call): job for job, call in jobs.items()}
        for done in as_completed(waiting):
            job = waiting[done]
            try:
                made[job] = done.result()
            except Exception as error:
                failed[job] = f"{type(error).__name__}: {error}"
                say(f"{job} failed: {failed[job]}")
            else:
                say(f"{job}: {made[job]}")
            setup.keep("made", made)
            setup.keep("failed", failed)
    if failed:
        raise SystemExit(1)


def _kept(
    folder: Path, job: str, make: Callable[..., dict[str, Any]], arguments: tuple[Any, ...]
) -> dict[str, Any]:
    """Make the files of a job, unless they are there from before."""
    import json

    stamp = folder / f"{job.replace('/', '-')}.json"
    if stamp.exists():
        kept: dict[str, Any] = json.loads(stamp.read_text())
        if kept.get("recipe") == RECIPE:
            return kept
    import torch

    torch.set_num_threads(2)
    started = time.perf_counter()
    told = {**make(*arguments), "seconds": round(time.perf_counter() - started, 1)}
    told["recipe"] = RECIPE
    stamp.write_text(json.dumps(told))
    return told


def build(name: str, seed: int) -> tuple[Any, Any]:
    """Return a network and what it takes; of the zoo, or this benchmark's own ResNet-50."""
    import torch

    from pollard.compress.spec import InputSpec
    from pollard.compress.zoo import ENTRIES

    torch.manual_seed(seed)
    if name in ENTRIES:
        entry = ENTRIES[name]
        module, spec = entry.build(entry.classes), entry.spec
    elif name == "resnet50":
        from bench.models import resnet50_module

        spec = InputSpec(224, 224, 3, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        module = resnet50_module()
    else:
        raise ValueError(f"there is no network {name!r}")
    return enliven(module, spec), spec


def enliven(module: Any, spec: Any) -> Any:
    """Give a network weights that keep the size of signals, and batch norms that fit them."""
    import torch
    from torch import nn

    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.momentum = None  # the mean of all batches, which is one
    with torch.no_grad():
        module.train()(pixels(spec, 8))
    return module.eval()


def pixels(spec: Any, count: int) -> Any:
    """Return synthetic images as the network proper takes them."""
    import torch

    from pollard.compress.export import probe_images

    images = torch.from_numpy(probe_images(spec, count)).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (spec.mean, spec.std))
    return (images - mean) / std


def make_parent(name: str, seed: int, folder: Path) -> dict[str, Any]:
    """Write the parent: uint8 in float32 and float16, and float16 with a float32 input."""
    from pollard.compress import export, half
    from pollard.compress.macs import total_macs

    module, spec = build(name, seed)
    core = export.export_core(module, spec)
    whole = export.attach_pixels(core, spec)
    _write(folder / "parent-fp32.onnx", whole)
    _write(folder / "parent-fp16.onnx", half.to_float16(whole))
    _write(folder / "parent-float-fp16.onnx", half.to_float16(core))
    return {"macs": total_macs(module, spec)}


def make_other(name: str, folder: Path) -> dict[str, Any]:
    """Write the parent with other weights, for swaps."""
    from pollard.compress import export, half

    module, spec = build(name, 1)
    _write(
        folder / "other-fp16.onnx",
        half.to_float16(export.attach_pixels(export.export_core(module, spec), spec)),
    )
    return {}


def make_pruned(name: str, folder: Path) -> dict[str, Any]:
    """Write the parent without a share of its multiply-accumulates, widths in whole blocks."""
    from pollard.compress import export, half
    from pollard.compress.prune import prune

    module, spec = build(name, 0)
    pruned = prune(module, spec, PRUNED_SHARE, rounding=PRUNED_ROUNDING)
    whole = export.attach_pixels(export.export_core(pruned.module, spec), spec)
    _write(folder / "pruned-fp32.onnx", whole)
    _write(folder / "pruned-fp16.onnx", half.to_float16(whole))
    return {
        "macs": pruned.macs_after,
        "removed": round(pruned.removed, 3),
        "multiples_of": pruned.rounding,
    }


def make_zoo(name: str, folder: Path) -> dict[str, Any]:
    """Write a network of the zoo in float32 and float16, with the answers that it should give."""
    import numpy as np
    import torch

    from pollard.compress import export, half
    from pollard.runtime.sessions import open_session

    module, spec = build(name, 0)
    whole = export.attach_pixels(export.export_core(module, spec), spec)
    (folder / "zoo").mkdir(exist_ok=True)
    _write(folder / f"zoo/{name}-fp32.onnx", whole)
    converted = half.to_float16(whole)
    _write(folder / f"zoo/{name}-fp16.onnx", converted)
    images = export.probe_images(spec, 8)
    with torch.no_grad():
        answers = module(pixels(spec, 8))
    emulated = open_session(export.serialize(half.emulated(converted)))
    rounded = emulated.run({"image": images})["logits"]
    np.savez(folder / f"zoo/{name}.npz", images=images, logits=answers.numpy(), rounded=rounded)
    return {}


def _write(path: Path, model: Any) -> None:
    from pollard.compress.export import serialize

    partial = path.with_name(path.name + ".part")
    partial.write_bytes(serialize(model))
    partial.replace(path)


def tables(data: dict[str, Any]) -> list[Table]:
    """Return what was made."""
    rows: list[tuple[object, ...]] = [
        (job, told.get("macs", ""), told.get("removed", ""), told["seconds"])
        for job, told in data.get("made", {}).items()
    ]
    rows += [(job, "", "", why) for job, why in data.get("failed", {}).items()]
    return [Table("Models", ("files", "MACs", "removed", "seconds"), rows)]
