"""The trials of a search: what they start from, what each does, and the stage they make up.

They cut by one table of latencies, measured before the first of them begins: while they run
they compete for the processor.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pollard.compress import verify
from pollard.compress.candidates import build
from pollard.compress.codec import decode, encode
from pollard.compress.data import Dataset, Part
from pollard.compress.latency import LatencyTable
from pollard.compress.models import LoadedModel, load_model, resolve
from pollard.compress.quantize import QuantizeConfig
from pollard.compress.recipe import Recipe
from pollard.compress.run_stages import Run, fit_config
from pollard.compress.search import TRIAL_SHARE, Found, Outcome, Point, search
from pollard.compress.shrink import measure_tables, shrink, shrink_config
from pollard.compress.stages import read_json, scratch, write_json
from pollard.compress.trials import Processes, Trials
from pollard.compress.truth import TaskName, Truth

# Images that trials are judged by.
_JUDGED = 2000

_ROUNDS = 20


Pixels = dict[str, tuple[NDArray[np.uint8], NDArray[Any]]]
"""Part → its images and their labels."""


@dataclass(frozen=True)
class Setting:
    """What every trial starts from; goes to other processes."""

    recipe: Recipe
    """With every default filled in."""
    classes: list[str]
    digest: str
    task: TaskName
    truths: dict[str, list[Truth]]
    """Part → what is true of its images where that is no class."""


@dataclass
class _Prepared:
    """What a process has loaded."""

    setting: Setting
    parent: LoadedModel
    data: Dataset


_prepared: list[_Prepared] = []


def search_stage(run: Run) -> Found:
    """Search as the recipe of ``run`` says, or take what was found earlier."""
    recipe = run.recipe

    def make(folder: Path) -> None:
        # Alone, before trials compete for the processor; and the same for all of them.
        config = shrink_config(_middle(recipe))
        measure_tables(run.parent.module, run.parent.spec, config, run.reporter)
        setting, pixels = _setting(run)
        with tempfile.TemporaryDirectory(prefix="pollard-search-") as images:
            found = search(
                recipe.search,
                recipe.seed,
                recipe.max_drop,
                scratch(folder) / "trials.db",
                _runs(run, setting, pixels, Path(images)),
                reporter=run.reporter,
            )
        write_json(folder / "found.json", encode(found))

    fields = ("search", "seed", "max_drop", "target", "vnni", "keep_whole", "calibration_images")
    inputs = {name: getattr(recipe, name) for name in fields}
    inputs["fit"] = fit_config(recipe, run.parent)
    if recipe.max_time is not None:
        inputs["max_time"] = recipe.max_time
    return run.stages.run(
        "search", inputs, make, lambda folder: decode(Found, read_json(folder / "found.json"))
    ).value


def _runs(run: Run, setting: Setting, pixels: Pixels, folder: Path) -> Trials:
    """Return what runs the trials: processes here, or a Ray cluster."""
    if run.ray:
        from pollard.compress.cluster_trials import ClusterTrials, pack

        tables = [LatencyTable(target).path for target in shrink_config(run.recipe).targets]
        return ClusterTrials(run.ray, pack(setting, pixels, tables), run.recipe.search)
    _save(pixels, folder)
    workers = min(run.recipe.search, max(1, run.machine.cores))
    return Processes(evaluate, workers, partial(prepare, setting, folder))


def _middle(recipe: Recipe) -> Recipe:
    return Point(0.5, "l2", True).apply(recipe)


def _setting(run: Run) -> tuple[Setting, Pixels]:
    data = run.data
    short = max(2 * (run.recipe.batch_size or 2), round(TRIAL_SHARE * len(data.train)))
    truths: dict[str, list[Truth]] = {}
    pixels: Pixels = {}
    # The parts are shuffled: their beginnings are samples of them.
    for part, count in ((data.train, short), (data.choose, _JUDGED)):
        name = part.name.rpartition("/")[2]
        pixels[name] = part.images[:count], part.labels[:count]
        truths[name] = list(part.truths[:count])
    # A copy: what a specification has worked out for itself does not go to other processes.
    spec = replace(run.parent.spec)
    recipe = replace(run.recipe, spec=spec)
    return Setting(recipe, data.classes, data.digest, data.task, truths), pixels


def _save(pixels: Pixels, folder: Path) -> None:
    for name, (images, labels) in pixels.items():
        np.save(folder / f"{name}-images.npy", images)
        np.save(folder / f"{name}-labels.npy", labels)


def prepare(setting: Setting, folder: Path) -> None:
    """Load in a new process what its trials need; images are shared with the other processes."""
    pixels = {
        name: (
            np.load(folder / f"{name}-images.npy", mmap_mode="c"),
            np.load(folder / f"{name}-labels.npy"),
        )
        for name in setting.truths
    }
    prepare_here(setting, pixels)


def prepare_here(setting: Setting, pixels: Pixels) -> None:
    """Load what the trials of this process need.

    Raises:
        CompressionError: the model or its weights cannot be had.
    """
    torch.set_num_threads(1)
    recipe = setting.recipe
    source = resolve(recipe.model, recipe.spec)
    parent = load_model(source, recipe.weights, classes=len(setting.classes))
    train, choose = (
        Part(f"search/{name}", *pixels[name], setting.task, setting.truths[name])
        for name in ("train", "choose")
    )
    # Nothing here may look at the held-out part.
    data = Dataset("search", setting.classes, train, choose, choose, setting.digest)
    _prepared[:] = [_Prepared(setting, parent, data)]


def evaluate(point: Point) -> Outcome:
    """Cut to a point, recover shortly, and measure, in a process that is prepared.

    Raises:
        CompressionError: the point cannot be reached.
    """
    (have,) = _prepared
    started = time.monotonic()
    recipe, parent, data = point.apply(have.setting.recipe), have.parent, have.data
    config = replace(shrink_config(recipe), steps=1)
    fit = replace(fit_config(recipe, parent), epochs=1)
    pruned, _ = shrink(parent.module, data, parent.spec, config, fit)
    quantize = None
    if recipe.target == "cpu-int8":
        quantize = QuantizeConfig(min(256, recipe.calibration_images), not recipe.vnni)
    module = parent.module if pruned is None else pruned.module
    kind = "parent" if pruned is None else "pruned"
    with tempfile.TemporaryDirectory(prefix="pollard-trial-") as folder:
        built = build("parent", parent.module, parent.spec, Path(folder))
        more = build(kind, module, parent.spec, Path(folder), data.train, quantize)
        built += [c for c in more if c.name != built[0].name]
        found = verify.measure(built, data.choose, data, rounds=_ROUNDS)
        best = min(found[1:] or found, key=_share)
        return Outcome(
            best.candidate.name,
            _share(best),
            best.drop.points,
            best.candidate.macs,
            best.candidate.size_bytes,
            time.monotonic() - started,
        )


def _share(measured: verify.Measured) -> float:
    """Return the latency as a share of that of the parent's float file."""
    return 1 / measured.speedup.estimate if measured.speedup is not None else 1.0
