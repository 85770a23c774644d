"""The whole way: parent → prune → recover → export → quantize → verify → report → bundle."""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pollard.compress import accelerator, bundling, kept_weights, report, verify
from pollard.compress.candidates import build
from pollard.compress.data import Dataset, load_data
from pollard.compress.devices import CUDA, Device, find_device
from pollard.compress.errors import GateRefused, UsageInvalid
from pollard.compress.macs import layer_costs
from pollard.compress.models import LoadedModel, Source, device_for, load_model, resolve
from pollard.compress.progress import Reporter
from pollard.compress.recipe import Recipe
from pollard.compress.run_stages import Run, open_stages
from pollard.compress.stages import Stages
from pollard.compress.verify import Measured
from pollard.runtime.bundle import Bundle
from pollard.runtime.machine import Machine

# Turns of the interleaved timing: fewer to choose, more for what is reported.
_ROUNDS_CHOOSE = 40
_ROUNDS_CONFIRM = 80


@dataclass(frozen=True)
class CompressionResult:
    """What a run gave."""

    bundle: Bundle
    parent: Measured
    """The parent's float file on the held-out part."""
    chosen: Measured
    """What was shipped, on the held-out part."""
    candidates: list[Measured]
    """Everything that was considered, on the choosing part."""
    report: dict[str, Any]
    """Content of report.json."""
    module: nn.Module = field(repr=False)
    """The shipped model in PyTorch, float and still trainable."""
    stages: Stages = field(repr=False)
    """What was made for it, and what was there already."""
    signed_by: str = ""
    """Fingerprint of the key; empty when it is not signed."""


@dataclass(frozen=True)
class BundleResult:
    """A parent packed as it is."""

    bundle: Bundle
    measured: Measured
    """On the held-out part."""
    report: dict[str, Any]


@contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """Let PyTorch use ``count`` threads for a while; leave it as it is for None."""
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def compress(
    recipe: Recipe,
    out: Path | str,
    *,
    force: bool = False,
    cache: Path | None = None,
    fresh: bool = False,
    sign: Callable[[Path], str] | None = None,
    reporter: Reporter | None = None,
    ray: str = "",
) -> CompressionResult:
    """Compress a trained parent and write the fastest bundle that holds the gate.

    Every stage is kept by what it was made from: a run that was stopped at any moment is
    gone on with by calling this again with the same arguments.

    Args:
        recipe: What to do.
        out: Directory of the bundle; it appears complete or not at all.
        force: Replace a bundle that is there.
        cache: Where finished stages are kept; in the user's cache when None.
        fresh: Make every stage anew, whatever is kept.
        sign: Signs the bundle before it appears, and returns the key's fingerprint.
        reporter: Told of progress.
        ray: Address of a Ray cluster that runs the trials of a search, or "local"; here, without
            one. What comes out depends on it as little as on the number of cores.

    Raises:
        UsageInvalid: something impossible is asked for.
        DeviceUnusable: PyTorch cannot compute on the device that is asked for.
        GateRefused: nothing holds the gate and is faster than the parent.
        CompressionError: any other failure; see :mod:`pollard.compress.errors`.
    """
    reporter = reporter or Reporter()
    out = Path(out)
    started = time.monotonic()
    bundling.check_output(out, force=force)
    if ray:
        if not recipe.search:
            raise UsageInvalid("--ray runs the trials of a search: give --search N, too")
        from pollard.compress.cluster import load_ray

        load_ray()  # before any work
    source = resolve(recipe.model, recipe.spec)
    require_weights(recipe.weights, source)
    if recipe.prunes:
        source.require_pytorch("pruning")
    machine = Machine.detect()
    recipe = _fill_in(recipe, source, machine, reporter)
    reporter.allow(None if recipe.max_time is None else 60 * recipe.max_time)
    device = find_device(recipe.target, machine)
    if device.why_not:
        reporter.say(
            f"No GPU to judge {recipe.target} on ({device.why_not}). Accuracy is measured with "
            "float16 emulated on the processor; nothing is timed, and whether the file is faster "
            "on a GPU is not known"
        )
    place = torch.device(recipe.device)
    with (
        accelerator.on(place),
        torch_threads(recipe.threads),
        bundling.staging(out, force=force) as stage,
    ):
        data, parent = _load(recipe, source, reporter)
        accelerator.tell(place, reporter)
        stages = open_stages(recipe, parent, data, machine, cache, fresh=fresh, reporter=reporter)
        run = Run(recipe, parent, data, machine, stages, reporter, device, ray)
        found = None
        if recipe.search:
            from pollard.compress.search_trials import search_stage

            found = search_stage(run)
            chosen_point = found.trials[found.chosen].point
            reporter.say(f"Search: compressing to {chosen_point.latency:.0%} of the latency")
            run.recipe = chosen_point.apply(recipe)
        pruned, history = run.prune_and_recover()
        built = run.build(pruned)
        # A point that a search has found is no promise to anyone.
        overruns = run.overruns(built, recipe.budget)
        measured, picked = run.choose(built, overruns, _ROUNDS_CHOOSE)
        parent_final, chosen = run.confirm(built[0], picked.candidate, _ROUNDS_CONFIRM)
        warnings = [
            w for w in (verify.seen_before(measured[0].accuracy, parent_final.accuracy),) if w
        ]
        for warning in warnings:
            reporter.say(f"Warning: {warning}")
        # Operators are timed on processors.
        timed = recipe.target != CUDA and source.file is None
        profiled = (built[0], picked.candidate) if timed else ()
        profiles = {c.name: run.profile(c) for c in profiled}
        earlier = sum(done.seconds for done in stages.done if done.reused)
        content = report.describe_compression(
            report.Compression(
                recipe=recipe.public(),
                name=source.name,
                source=source.reference,
                target=recipe.target,
                max_drop=recipe.max_drop,
                seed=recipe.seed,
                data=data,
                parent_digest=parent.weights_digest,
                machine=machine,
                device=device,
                parent=parent_final,
                chosen=chosen,
                candidates=measured,
                dropped=verify.explain_dropped(measured, picked, recipe.max_drop, overruns),
                overruns=overruns,
                pruned=pruned,
                history=history,
                layers_before=layer_costs(parent.module, source.spec),
                layers_after=layer_costs(chosen.candidate.module, source.spec),
                profiles=profiles,
                stages=stages.done,
                search=found,
                warnings=warnings,
                seconds=time.monotonic() - started + earlier,
            )
        )
        bundle = _write(
            stage, chosen, parent_final, recipe, source, data, parent, content, machine, device
        )
        signed = sign(stage / bundling.BUNDLE) if sign is not None else ""
        module = copy.deepcopy(chosen.candidate.module).requires_grad_(True)
    stages.trim()
    return CompressionResult(
        Bundle(out, (out / "manifest.json").read_bytes()),
        parent_final,
        chosen,
        measured,
        {**content, "bundle": str(out), "digest": bundle.digest},
        module,
        stages,
        signed,
    )


def bundle_parent(
    recipe: Recipe,
    out: Path | str,
    *,
    force: bool = False,
    keep_weights: bool = False,
    reporter: Reporter | None = None,
) -> BundleResult:
    """Pack a trained parent as it is, in float: verified and measured, without any gate.

    Args:
        recipe: Model, weights, data and seed are used.
        out: Directory of the bundle; it appears complete or not at all.
        force: Replace a bundle that is there.
        keep_weights: Keep the network's weights in it, to train on.
        reporter: Told of progress.

    Raises:
        CompressionError: see :mod:`pollard.compress.errors`.
    """
    reporter = reporter or Reporter()
    out = Path(out)
    started = time.monotonic()
    bundling.check_output(out, force=force)
    source = resolve(recipe.model, recipe.spec)
    require_weights(recipe.weights, source)
    if keep_weights:
        source.require_pytorch("keeping weights to train on")
    machine = Machine.detect()
    # Little is computed in PyTorch: not worth a GPU's while.
    recipe = _fill_in(dataclasses.replace(recipe, device="cpu"), source, machine, reporter)
    device = find_device(recipe.target, machine)
    with torch_threads(recipe.threads), bundling.staging(out, force=force) as stage:
        data, parent = _load(recipe, source, reporter)
        work = _work_folder(stage)
        with reporter.step("Exporting", 1):
            built = build("parent", parent.module, source.spec, work)
        with reporter.step("Measuring", 1):
            measured = verify.measure(built, data.held_out, data, device, rounds=_ROUNDS_CONFIRM)[0]
        content = report.describe_parent(
            report.Packing(
                recipe=recipe.public(),
                name=source.name,
                source=source.reference,
                seed=recipe.seed,
                data=data,
                parent_digest=parent.weights_digest,
                machine=machine,
                device=device,
                parent=measured,
                layers=layer_costs(parent.module, source.spec),
                seconds=time.monotonic() - started,
            )
        )
        bundle = _write(
            stage, measured, None, recipe, source, data, parent, content, machine, device,
            kept_weights.files(parent.module, keep_weights),
        )  # fmt: skip
    return BundleResult(
        Bundle(out, (out / "manifest.json").read_bytes()),
        measured,
        {**content, "bundle": str(out), "digest": bundle.digest},
    )


def require_weights(weights: str, source: Source) -> None:
    """Check that the parent has been trained.

    Raises:
        UsageInvalid: no weights are given; the message says how to get some.
    """
    if weights or source.file is not None:
        return
    if source.reference.startswith("zoo:"):
        raise UsageInvalid(
            f"{source.reference} has no weights yet, and random ones are worth nothing: train it "
            f"first (pollard train {source.reference} --data … --out parent.safetensors) and give "
            "--weights parent.safetensors"
        )
    raise UsageInvalid("give the trained parent's weights with --weights")


def _fill_in(recipe: Recipe, source: Source, machine: Machine, reporter: Reporter) -> Recipe:
    """Replace every default that depends on the model or the machine by its value."""
    defaults = source.training
    return dataclasses.replace(
        recipe,
        model=source.reference,
        epochs=defaults.recover_epochs if recipe.epochs is None else recipe.epochs,
        batch_size=recipe.batch_size or defaults.batch_size,
        learning_rate=recipe.learning_rate or defaults.recover_learning_rate,
        qat_epochs=(
            max(1, round(defaults.recover_epochs / 4))
            if recipe.qat_epochs is None
            else recipe.qat_epochs
        ),
        vnni=machine.has_vnni if recipe.vnni is None else recipe.vnni,
        threads=recipe.threads or torch.get_num_threads(),
        device=str(device_for(source, recipe.device, reporter)),
        spec=source.spec,
    )


def _load(recipe: Recipe, source: Source, reporter: Reporter) -> tuple[Dataset, LoadedModel]:
    data = load_data(
        recipe.data, source.spec, task=source.task, max_train_images=recipe.max_train_images,
        reporter=reporter,
    )  # fmt: skip
    return data, load_model(source, recipe.weights, classes=len(data.classes))


def _work_folder(stage: Path) -> Path:
    folder = stage / "work"
    folder.mkdir(exist_ok=True)
    return folder


def _write(
    stage: Path,
    chosen: Measured,
    parent_figures: Measured | None,
    recipe: Recipe,
    source: Source,
    data: Dataset,
    parent: LoadedModel,
    content: dict[str, Any],
    machine: Machine,
    device: Device,
    extra: Mapping[str, bytes] | None = None,
) -> Bundle:
    origin = bundling.Origin(
        source.name,
        source.reference,
        recipe.to_json(),
        recipe.seed,
        data.classes,
        data.digest,
        parent.weights_digest,
        source.task,
    )
    return bundling.assemble(
        stage / bundling.BUNDLE,
        chosen,
        parent_figures,
        origin,
        source.spec,
        report.render(content),
        machine,
        device,
        extra,
    )


__all__ = [
    "BundleResult",
    "CompressionResult",
    "GateRefused",
    "Recipe",
    "bundle_parent",
    "compress",
]
