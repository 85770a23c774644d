"""The stages of one compression run: what each is made from, makes, and leaves.

profile → prune → recover → export → verify; report, bundle and signature are written with
the bundle itself, whole or not at all.
"""

from __future__ import annotations

import hashlib
import inspect
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

import pollard.compress
import pollard.runtime.bundle
from pollard.compress import accelerator, bundling, half, verify
from pollard.compress.budget import parse_budgets
from pollard.compress.candidates import Candidate, Tuning, build, build_half
from pollard.compress.codec import decode, encode
from pollard.compress.cut_files import load_cut, recover_stage, save_cut
from pollard.compress.data import Dataset, Part
from pollard.compress.devices import CUDA, Device
from pollard.compress.errors import GateRefused, UsageInvalid
from pollard.compress.export import try_export
from pollard.compress.latency import LatencyTable, default_folder
from pollard.compress.models import LoadedModel
from pollard.compress.overruns import FinishedFile, find_overruns
from pollard.compress.profile import TargetProfile, profile_file
from pollard.compress.progress import Reporter
from pollard.compress.prune import ROUNDING, Pruned, prune
from pollard.compress.quantize import QuantizeConfig
from pollard.compress.recipe import Recipe
from pollard.compress.shrink import loss_gradients, shrink, shrink_config
from pollard.compress.stages import Stages, read_json, write_json
from pollard.compress.training import FitConfig, History
from pollard.compress.tuning import chosen_by, make_tuning, quantize_config
from pollard.compress.verify import Measured
from pollard.runtime.digests import sha256_file
from pollard.runtime.machine import Machine

_FILES = "candidates.json"


@dataclass
class Run:
    """One run, in stages."""

    recipe: Recipe
    """With every default filled in."""
    parent: LoadedModel
    data: Dataset
    machine: Machine
    stages: Stages
    reporter: Reporter
    device: Device
    """What the files are judged on."""
    ray: str = ""
    """Address of the Ray cluster that runs the trials of a search; here without one."""

    def prune_and_recover(self) -> tuple[Pruned | None, History | None]:
        """Return the smaller model and its training; nothing where nothing is cut."""
        recipe, parent = self.recipe, self.parent
        if not recipe.prunes:
            return None, None
        fit = fit_config(recipe, parent)
        if recipe.budget:
            found = shrink(
                parent.module, self.data, parent.spec, shrink_config(recipe), fit,
                reporter=self.reporter, stages=self.stages,
            )  # fmt: skip
            if found[0] is None:
                self.reporter.say(f"Nothing needs to be cut for {', '.join(recipe.budget)}")
            return found
        asked = {
            "prune": recipe.prune,
            "keep_whole": recipe.keep_whole,
            "importance": recipe.importance,
            "rounding": self._rounding,
            "factorize": recipe.factorize,
        }
        cut = self.stages.run("prune", asked, self._prune, lambda f: load_cut(parent.module, f))
        inputs = {"of": cut.key}
        done = recover_stage(
            self.stages, cut.folder, inputs, parent.module, self.data, parent.spec, fit,
            self.reporter,
        )  # fmt: skip
        return done.value.pruned, done.value.history

    def _prune(self, folder: Path) -> None:
        recipe, parent = self.recipe, self.parent
        try_export(parent.module, parent.spec)  # before recovery, which may take hours
        with self.reporter.step("Pruning", 1):
            cut = prune(
                parent.module,
                parent.spec,
                recipe.prune,
                keep_whole=recipe.keep_whole,
                rounding=self._rounding,
                importance=recipe.importance,
                gradients=loss_gradients(self.data, parent.spec),
                factorize=recipe.factorize or 0.0,
                tables=tables_for(recipe),
            )
        save_cut(cut, folder)

    @property
    def _rounding(self) -> tuple[int, ...]:
        return half.MULTIPLES if self.recipe.target == CUDA else ROUNDING

    def build(self, pruned: Pruned | None) -> list[Candidate]:
        """Return the files that compete; the first is the parent's in float."""
        config = quantize_config(self.recipe)
        modules = {"parent": self.parent.module}
        if pruned is not None:
            modules["pruned"] = pruned.module
        if config is None and pruned is None and self.recipe.target != CUDA:
            raise UsageInvalid(
                "target cpu-fp32 with prune 0 leaves nothing to do; use pollard bundle"
            )
        built: list[Candidate] = []
        for kind, module in modules.items():
            built += self._export(kind, module, config)
        return built

    def _export(
        self, kind: str, module: nn.Module, config: QuantizeConfig | None
    ) -> list[Candidate]:
        spec = self.parent.spec
        in_half = self.recipe.target == CUDA

        def make(folder: Path) -> None:
            if in_half:
                images = self.recipe.calibration_images
                made = build_half(kind, module, spec, folder, self.data.train, images)
                # The pruned one in float32 is for the CPU, and does not compete here.
                made = [c for c in made if c.target == CUDA or kind == "parent"]
            else:
                made = build(
                    kind, module, spec, folder, self.data.train, config, self._tuning(config),
                    self.reporter,
                )  # fmt: skip
            told = [
                {"file": c.path.name, **encode(c, skip=("path", "module", "spec"))} for c in made
            ]
            write_json(folder / _FILES, told)

        def load(folder: Path) -> list[Candidate]:
            return [
                decode(
                    Candidate, told, path=folder / str(told.pop("file")), module=module, spec=spec
                )
                for told in read_json(folder / _FILES)
            ]

        inputs: dict[str, object] = {"kind": kind, "weights": module_digest(module)}
        if in_half:
            inputs |= {"half": half.HEADROOM, "images": self.recipe.calibration_images}
        if config is not None:
            # What files are chosen by goes in, the gate, too: layers stay float for it.
            inputs |= {"quantize": config, **chosen_by(self.recipe)}
            if self.recipe.max_time is not None:
                inputs["max_time"] = self.recipe.max_time
        return self.stages.run("export", inputs, make, load).value

    def _tuning(self, config: QuantizeConfig | None) -> Tuning | None:
        if config is None:
            return None
        return make_tuning(self.recipe, self.parent, self.data, self.reporter)

    def choose(
        self, built: Sequence[Candidate], overruns: Mapping[str, str], rounds: int
    ) -> tuple[list[Measured], Measured]:
        """Measure all candidates on the choosing part and return the one to ship, too.

        Args:
            built: From :meth:`build`.
            overruns: From :meth:`overruns`.
            rounds: Turns of the interleaved timing.

        Raises:
            GateRefused: none may be shipped.
        """
        measured = self._measure("Measuring candidates", built, self.data.choose, rounds)
        with self._measured_anew_if_refused():
            return measured, verify.select(measured, self.recipe.max_drop, overruns)

    def overruns(self, built: Sequence[Candidate], budgets: Sequence[str]) -> dict[str, str]:
        """Return the candidates that take more than the budgets allow, and what they take."""
        files = [FinishedFile(c.name, c.target, c.module, c.size_bytes) for c in built]
        return find_overruns(files, self.parent.spec, parse_budgets(budgets), self.reporter)

    def confirm(
        self, parent: Candidate, picked: Candidate, rounds: int
    ) -> tuple[Measured, Measured]:
        """Measure parent and choice on the held-out part.

        Raises:
            GateRefused: it does not hold there.
        """
        files = [parent, picked]
        found = self._measure("Confirming the choice", files, self.data.held_out, rounds)
        with self._measured_anew_if_refused():
            verify.confirm(found[0], found[1], self.recipe.max_drop)
        return found[0], found[1]

    def _measure(
        self, title: str, files: Sequence[Candidate], part: Part, rounds: int
    ) -> list[Measured]:
        def make(folder: Path) -> None:
            with self.reporter.step(title, 1):
                found = verify.measure(files, part, self.data, self.device, rounds=rounds)
            write_json(
                folder / "measured.json", [encode(one, skip=("candidate",)) for one in found]
            )

        def load(folder: Path) -> list[Measured]:
            told = read_json(folder / "measured.json")
            return [decode(Measured, t, candidate=c) for t, c in zip(told, files, strict=True)]

        digests = {c.name: [sha256_file(c.path), module_digest(c.module)] for c in files}
        inputs = {"part": part.name, "files": digests, "rounds": rounds, "on": self.device}
        return self.stages.run("verify", inputs, make, load).value

    def profile(self, candidate: Candidate) -> TargetProfile:
        """Say where the time of a file goes."""

        def make(folder: Path) -> None:
            table = LatencyTable(candidate.target, machine=self.machine)
            found = profile_file(
                candidate.module, candidate.spec, candidate.path, table, reporter=self.reporter
            )
            write_json(folder / "profile.json", encode(found))

        inputs = {"file": sha256_file(candidate.path), "weights": module_digest(candidate.module)}
        return self.stages.run(
            "profile", inputs, make, lambda f: decode(TargetProfile, read_json(f / "profile.json"))
        ).value

    def _measured_anew_if_refused(self) -> _Forget:
        return _Forget(self.stages)


class _Forget:
    """Forgets the last stage on a refusal: the next run may find a less busy machine."""

    def __init__(self, stages: Stages) -> None:
        self._stages = stages

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and issubclass(kind, GateRefused):
            self._stages.forget(self._stages.done[-1])


def stages_folder() -> Path:
    """Return where finished stages are kept: beside the tables of latencies."""
    return default_folder().with_name("stages")


def open_stages(
    recipe: Recipe,
    parent: LoadedModel,
    data: Dataset,
    machine: Machine,
    folder: Path | None,
    *,
    fresh: bool,
    reporter: Reporter,
) -> Stages:
    """Return the stages of a run; what all of them depend on is in their keys."""
    base = {
        "tools": bundling.tool_versions(),
        "pollard": sources_digest(),
        "processor": machine.processor,
        "cpu_features": sorted(f for f in machine.cpu_features if f.startswith("avx")),
        "threads": recipe.threads,
        "trained_on": accelerator.describe(torch.device(recipe.device)),
        "data": data.digest,
        "model": parent.source.reference,
        "model_code": code_digest(parent.module),
        "weights": parent.weights_digest,
        "takes": parent.spec,
    }
    return Stages(folder or stages_folder(), base, fresh, reporter)


def tables_for(recipe: Recipe) -> list[LatencyTable]:
    """Return the latencies of the targets that files may have; of a GPU's there are none."""
    if recipe.target == CUDA:
        return []
    return [LatencyTable(target) for target in shrink_config(recipe).targets]


def fit_config(recipe: Recipe, parent: LoadedModel) -> FitConfig:
    """Return how a recipe wants its model recovered."""
    defaults = parent.source.training
    return FitConfig(
        epochs=recipe.epochs or 0,
        batch_size=recipe.batch_size or defaults.batch_size,
        learning_rate=recipe.learning_rate or defaults.recover_learning_rate,
        weight_decay=defaults.weight_decay,
        optimizer=defaults.optimizer,
        seed=recipe.seed,
        distill_weight=recipe.distill_weight,
        distill_temperature=recipe.distill_temperature,
    )


def module_digest(module: nn.Module) -> str:
    """Return a digest of a module's structure and weights."""
    found = hashlib.sha256(repr(module).encode())
    for name, value in module.state_dict().items():
        found.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        found.update(value.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


def code_digest(module: nn.Module) -> str:
    """Return a digest of the files that define a module's own classes."""
    files: set[Path] = set()
    for kind in {type(part) for part in module.modules()}:
        home = sys.modules.get(kind.__module__)
        path = inspect.getsourcefile(home) if home is not None else None
        if path is not None and not kind.__module__.startswith("torch."):
            files.add(Path(path))
    return _digest_of(sorted(path for path in files if path.is_file()))


def sources_digest() -> str:
    """Return a digest of Pollard's own code, so that another version makes its own stages."""
    homes = [Path(pollard.compress.__file__).parent, Path(pollard.runtime.bundle.__file__).parent]
    return _digest_of(sorted(path for home in homes for path in home.rglob("*.py")))


def _digest_of(paths: Sequence[Path]) -> str:
    return hashlib.sha256("".join(sha256_file(path) for path in paths).encode()).hexdigest()
