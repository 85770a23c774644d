"""The whole way: parent → prune → recover → export → quantize → verify → report → bundle."""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pollard.compress import bundling, report, verify
from pollard.compress.budget import parse_budgets
from pollard.compress.candidates import Candidate, build
from pollard.compress.data import Dataset, load_data
from pollard.compress.errors import GateRefused, UsageInvalid
from pollard.compress.latency import LatencyTable
from pollard.compress.macs import layer_costs
from pollard.compress.models import LoadedModel, Source, load_model, resolve
from pollard.compress.profile import TargetProfile, profile_file
from pollard.compress.progress import Reporter
from pollard.compress.prune import Pruned, prune
from pollard.compress.quantize import QuantizeConfig
from pollard.compress.recipe import Recipe
from pollard.compress.recover import recover
from pollard.compress.shrink import ShrinkConfig, loss_gradients, shrink
from pollard.compress.training import FitConfig, History
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
    reporter: Reporter | None = None,
) -> CompressionResult:
    """Compress a trained parent and write the fastest bundle that holds the gate.

    Args:
        recipe: What to do.
        out: Directory of the bundle; it appears complete or not at all.
        force: Replace a bundle that is there.
        reporter: Told of progress.

    Raises:
        UsageInvalid: something impossible is asked for.
        GateRefused: nothing holds the gate and is faster than the parent.
        CompressionError: any other failure; see :mod:`pollard.compress.errors`.
    """
    reporter = reporter or Reporter()
    out = Path(out)
    started = time.monotonic()
    bundling.check_output(out, force=force)
    source = resolve(recipe.model, recipe.spec)
    require_weights(recipe.weights, source)
    machine = Machine.detect()
    recipe = _fill_in(recipe, source, machine)
    with torch_threads(recipe.threads), bundling.staging(out, force=force) as stage:
        data, parent = _load(recipe, source, reporter)
        pruned, history = _prune_and_recover(recipe, parent, data, reporter)
        built = _build_all(recipe, parent, pruned, data, stage, reporter)
        with reporter.step("Measuring candidates", 1):
            measured = verify.measure(built, data.choose, data, rounds=_ROUNDS_CHOOSE)
        picked = verify.select(measured, recipe.max_drop)
        with reporter.step("Confirming the choice", 1):
            final = verify.measure(
                [built[0], picked.candidate], data.held_out, data, rounds=_ROUNDS_CONFIRM
            )
        parent_final, chosen = final
        verify.confirm(parent_final, chosen, recipe.max_drop)
        profiles = _profiles([parent_final, chosen], machine, reporter)
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
                parent=parent_final,
                chosen=chosen,
                candidates=measured,
                dropped=verify.explain_dropped(measured, picked, recipe.max_drop),
                pruned=pruned,
                history=history,
                layers_before=layer_costs(parent.module, source.spec),
                layers_after=layer_costs(chosen.candidate.module, source.spec),
                profiles=profiles,
                seconds=time.monotonic() - started,
            )
        )
        bundle = _write(stage, chosen, parent_final, recipe, source, data, parent, content, machine)
    module = copy.deepcopy(chosen.candidate.module).requires_grad_(True)
    return CompressionResult(
        Bundle(out, (out / "manifest.json").read_bytes()),
        parent_final,
        chosen,
        measured,
        {**content, "bundle": str(out), "digest": bundle.digest},
        module,
    )


def bundle_parent(
    recipe: Recipe,
    out: Path | str,
    *,
    force: bool = False,
    reporter: Reporter | None = None,
) -> BundleResult:
    """Pack a trained parent as it is, in float: verified and measured, without any gate.

    Args:
        recipe: Model, weights, data and seed are used.
        out: Directory of the bundle; it appears complete or not at all.
        force: Replace a bundle that is there.
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
    machine = Machine.detect()
    recipe = _fill_in(recipe, source, machine)
    with torch_threads(recipe.threads), bundling.staging(out, force=force) as stage:
        data, parent = _load(recipe, source, reporter)
        work = _work_folder(stage)
        with reporter.step("Exporting", 1):
            built = build("parent", parent.module, source.spec, work)
        with reporter.step("Measuring", 1):
            measured = verify.measure(built, data.held_out, data, rounds=_ROUNDS_CONFIRM)[0]
        content = report.describe_parent(
            report.Packing(
                recipe=recipe.public(),
                name=source.name,
                source=source.reference,
                seed=recipe.seed,
                data=data,
                parent_digest=parent.weights_digest,
                machine=machine,
                parent=measured,
                layers=layer_costs(parent.module, source.spec),
                seconds=time.monotonic() - started,
            )
        )
        bundle = _write(stage, measured, None, recipe, source, data, parent, content, machine)
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
    if weights:
        return
    if source.reference.startswith("zoo:"):
        raise UsageInvalid(
            f"{source.reference} has no weights yet, and random ones are worth nothing: train it "
            f"first (pollard train {source.reference} --data … --out parent.safetensors) and give "
            "--weights parent.safetensors"
        )
    raise UsageInvalid("give the trained parent's weights with --weights")


def _fill_in(recipe: Recipe, source: Source, machine: Machine) -> Recipe:
    """Replace every default that depends on the model or the machine by its value."""
    defaults = source.training
    return dataclasses.replace(
        recipe,
        model=source.reference,
        epochs=defaults.recover_epochs if recipe.epochs is None else recipe.epochs,
        batch_size=recipe.batch_size or defaults.batch_size,
        learning_rate=recipe.learning_rate or defaults.recover_learning_rate,
        vnni=machine.has_vnni if recipe.vnni is None else recipe.vnni,
        threads=recipe.threads or torch.get_num_threads(),
        spec=source.spec,
    )


def _load(recipe: Recipe, source: Source, reporter: Reporter) -> tuple[Dataset, LoadedModel]:
    data = load_data(
        recipe.data, source.spec, max_train_images=recipe.max_train_images, reporter=reporter
    )
    return data, load_model(source, recipe.weights, classes=len(data.classes))


def _prune_and_recover(
    recipe: Recipe, parent: LoadedModel, data: Dataset, reporter: Reporter
) -> tuple[Pruned | None, History | None]:
    if not recipe.prunes:
        return None, None
    spec, defaults = parent.spec, parent.source.training
    config = FitConfig(
        epochs=recipe.epochs or 0,
        batch_size=recipe.batch_size or defaults.batch_size,
        learning_rate=recipe.learning_rate or defaults.recover_learning_rate,
        weight_decay=defaults.weight_decay,
        optimizer=defaults.optimizer,
        seed=recipe.seed,
        distill_weight=recipe.distill_weight,
        distill_temperature=recipe.distill_temperature,
    )
    if recipe.budget:
        found = shrink(parent.module, data, spec, shrink_config(recipe), config, reporter=reporter)
        if found[0] is None:
            reporter.say(f"Nothing needs to be cut for {', '.join(recipe.budget)}")
        return found
    with reporter.step("Pruning", 1):
        pruned = prune(
            parent.module,
            spec,
            recipe.prune,
            keep_whole=recipe.keep_whole,
            importance=recipe.importance,
            gradients=loss_gradients(data, spec),
        )
    return pruned, recover(pruned.module, parent.module, data, spec, config, reporter=reporter)


def shrink_config(recipe: Recipe) -> ShrinkConfig:
    """Return how a recipe wants its budget met."""
    # With 8 bits allowed float files compete, too.
    targets = ("cpu-int8", "cpu-fp32") if recipe.target == "cpu-int8" else (recipe.target,)
    return ShrinkConfig(
        parse_budgets(recipe.budget),
        targets,
        recipe.prune_steps,
        recipe.importance,
        recipe.keep_whole,
        recipe.remove_blocks,
    )


def _build_all(
    recipe: Recipe,
    parent: LoadedModel,
    pruned: Pruned | None,
    data: Dataset,
    stage: Path,
    reporter: Reporter,
) -> list[Candidate]:
    config = None
    if recipe.target == "cpu-int8":
        config = QuantizeConfig(recipe.calibration_images, reduce_range=not recipe.vnni)
    modules = {"parent": parent.module}
    if pruned is not None:
        modules["pruned"] = pruned.module
    if config is None and pruned is None:
        raise UsageInvalid("target cpu-fp32 with prune 0 leaves nothing to do; use pollard bundle")
    built: list[Candidate] = []
    with reporter.step("Exporting and quantizing", len(modules)) as step:
        for kind, module in modules.items():
            built += build(kind, module, parent.spec, _work_folder(stage), data.train, config)
            step.advance()
    return built


def _profiles(
    measured: list[Measured], machine: Machine, reporter: Reporter
) -> dict[str, TargetProfile]:
    """Say where the time of these files goes, by name of the candidate."""
    found = {}
    for each in measured:
        candidate = each.candidate
        table = LatencyTable(candidate.target, machine=machine)
        found[candidate.name] = profile_file(
            candidate.module, candidate.spec, candidate.path, table, reporter=reporter
        )
    return found


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
) -> Bundle:
    origin = bundling.Origin(
        source.name, source.reference, recipe.to_json(), recipe.seed, data, parent.weights_digest
    )
    return bundling.assemble(
        stage / bundling.BUNDLE,
        chosen,
        parent_figures,
        origin,
        source.spec,
        report.render(content),
        machine,
    )


__all__ = [
    "BundleResult",
    "CompressionResult",
    "GateRefused",
    "Recipe",
    "bundle_parent",
    "compress",
]
