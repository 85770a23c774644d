"""The trials of a search in their own processes, and the stage that they make up."""

from __future__ import annotations

import os
import tempfile
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from pollard.compress import verify
from pollard.compress.candidates import build
from pollard.compress.codec import decode, encode
from pollard.compress.data import Dataset, Part
from pollard.compress.models import LoadedModel, load_model, resolve
from pollard.compress.quantize import QuantizeConfig
from pollard.compress.recipe import Recipe
from pollard.compress.run_stages import Run, fit_config
from pollard.compress.search import TRIAL_SHARE, Found, Outcome, Point, search
from pollard.compress.shrink import shrink, shrink_config
from pollard.compress.stages import read_json, scratch, write_json
from pollard.compress.truth import TaskName, Truth

# Images that trials are judged by.
_JUDGED = 2000

_ROUNDS = 20


@dataclass(frozen=True)
class Setting:
    """What every trial starts from; goes to other processes."""

    recipe: Recipe
    """With every default filled in."""
    classes: list[str]
    images: Path
    """Folder of the decoded images, an array for each part."""
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
        workers = min(recipe.search, max(1, run.machine.cores))
        with tempfile.TemporaryDirectory(prefix="pollard-search-") as images:
            setting = _setting(run, Path(images))
            found = search(
                recipe.search,
                recipe.seed,
                recipe.max_drop,
                scratch(folder) / "trials.db",
                evaluate,
                workers=workers,
                initializer=partial(prepare, setting),
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


def _setting(run: Run, folder: Path) -> Setting:
    data = run.data
    short = max(2 * (run.recipe.batch_size or 2), round(TRIAL_SHARE * len(data.train)))
    truths: dict[str, list[Truth]] = {}
    # The parts are shuffled: their beginnings are samples of them.
    for part, count in ((data.train, short), (data.choose, _JUDGED)):
        name = part.name.rpartition("/")[2]
        np.save(folder / f"{name}-images.npy", part.images[:count])
        np.save(folder / f"{name}-labels.npy", part.labels[:count])
        truths[name] = list(part.truths[:count])
    # A copy: what a specification has worked out for itself does not go to other processes.
    spec = replace(run.parent.spec)
    recipe = replace(run.recipe, spec=spec)
    return Setting(recipe, data.classes, folder, data.digest, data.task, truths)


def prepare(setting: Setting) -> None:
    """Load in a new process what its trials need."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    torch.set_num_threads(1)
    recipe = setting.recipe
    source = resolve(recipe.model, recipe.spec)
    parent = load_model(source, recipe.weights, classes=len(setting.classes))
    train, choose = (
        Part(
            f"search/{name}",
            np.load(setting.images / f"{name}-images.npy", mmap_mode="c"),
            np.load(setting.images / f"{name}-labels.npy"),
            setting.task,
            setting.truths[name],
        )
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
