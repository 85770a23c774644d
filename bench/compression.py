"""What compression costs in accuracy and gains in time: `python -m bench.compression`.

Works from two trained CIFAR-10 parents that have seen all of `train/`. Every choice is made on one
class-balanced half of `test/`; figures come from the other half, which is touched once at the end.
Quantization by itself chooses nothing, and is judged on all of `test/`. Latencies are those of
onnxruntime with one thread for one image, interleaved with the parent.

Each cell is a file in `--work`; a run that is stopped, by `--max-time` or otherwise, goes on where
it was. `--render` writes the results that are there.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import nn

from bench.compression_tables import render
from bench.environment import environment
from bench.peers.fetch import ROOT
from pollard.compress.blocks import find_blocks
from pollard.compress.budget import parse_budgets
from pollard.compress.candidates import Candidate, build
from pollard.compress.channel_map import load_pruned, save_pruned
from pollard.compress.checkpoint import Checkpoint
from pollard.compress.data import Dataset, Part, load_data
from pollard.compress.groups import analyse
from pollard.compress.macs import total_macs
from pollard.compress.models import LoadedModel, load_model
from pollard.compress.progress import Reporter, Step
from pollard.compress.prune import Pruned, prune
from pollard.compress.quantize import QuantizeConfig
from pollard.compress.recover import recover
from pollard.compress.sensitivity import measure_sensitivities
from pollard.compress.shrink import ShrinkConfig, apply, parent_costs, pick
from pollard.compress.training import FitConfig
from pollard.compress.verify import Measured, measure
from pollard.runtime.bundle import write_durably
from pollard.runtime.machine import Machine
from pollard.runtime.measure import interleaved, ratio
from pollard.runtime.sessions import open_session

_DATA = "cifar10-jpeg.zip"
_ROUNDS = 150
_SEEDS = (0, 1, 2)
_METHODS = ("latency", "uniform", "macs")

# Of the parent's float latency: what all three kinds of pruning are brought to.
_EQUAL = 0.5

# Cell → budgets and targets of the cut.
_BUDGETS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "pruned-resnet56": (("macs=0.5", "latency=0.526"), ("cpu-fp32",)),
    "together-resnet56": (("latency=0.25",), ("cpu-int8", "cpu-fp32")),
    "pruned-resnet20": (("macs=0.5", "latency=0.526"), ("cpu-fp32",)),
}


class _TimeUp(Exception):
    """The time given by `--max-time` is over."""


@dataclass
class _Deadline(Reporter):
    """Prints what begins, and ends the work when its time is over."""

    end: float

    @contextmanager
    def step(self, title: str, total: int) -> Iterator[Step]:
        typer.echo(f"  {title}, {total}")
        yield self

    def advance(self, count: int = 1, note: str = "") -> None:
        if time.monotonic() > self.end:
            raise _TimeUp

    def say(self, message: str) -> None:
        typer.echo(f"  {message}")


@dataclass
class _Bench:
    """Parents, data, and what has been found."""

    source: Path
    work: Path
    images: int
    epochs: float
    reporter: _Deadline

    @cached_property
    def data(self) -> Dataset:
        spec = self.parent("resnet20").spec
        return load_data(
            self.source / _DATA, spec, max_train_images=self.images, reporter=self.reporter
        )

    def parent(self, name: str) -> LoadedModel:
        weights = self.source / "weights" / f"{name}-cifar10-jpeg.pt"
        return load_model(f"zoo:{name}-cifar", weights, classes=10)

    @cached_property
    def whole_test(self) -> Part:
        """All of `test/`, for what chooses nothing."""
        halves = (self.data.choose, self.data.held_out)
        return Part(
            "cifar10-jpeg/test",
            np.concatenate([half.images for half in halves]),
            np.concatenate([half.labels for half in halves]),
        )

    @cached_property
    def quantization(self) -> QuantizeConfig:
        return QuantizeConfig(512, reduce_range=not Machine.detect().has_vnni)

    def files(
        self, name: str, kind: str, module: nn.Module, spec: Any, *, eight_bits: bool = True
    ) -> list[Candidate]:
        folder = self.work / "files" / name
        folder.mkdir(parents=True, exist_ok=True)
        config = self.quantization if eight_bits else None
        return build(kind, module, spec, folder, self.data.train, config)

    # Quantization by itself.

    def quantized(self, net: str) -> dict[str, Any]:
        parent = self.parent(net)
        built = self.files(f"ptq-{net}", "parent", parent.module, parent.spec)
        found = measure(built, self.whole_test, self.data, rounds=_ROUNDS)
        return {"reduced_range": self.quantization.reduce_range, "files": _told(found)}

    # Cut for a budget, recover, and perhaps quantize.

    def shrunk(self, cell: str) -> dict[str, Any]:
        net = cell.partition("-")[2]
        budgets, targets = _BUDGETS[cell]
        parent = self.parent(net)
        config = ShrinkConfig(parse_budgets(budgets), targets)
        cut = self._cut(cell, lambda: self._for_budget(parent, config))
        return {"budgets": list(budgets), "targets": list(targets), **self._recovered(cell, cut, 0)}

    # Three ways to one latency.

    def equal(self, method: str, seed: int) -> dict[str, Any]:
        name = f"equal-resnet20-{method}"
        cut = self._cut(name, lambda: self._equally_fast(method))
        # Compared in float, and with nothing left to choose.
        return self._recovered(name, cut, seed, eight_bits=False)

    def _equally_fast(self, method: str) -> Pruned:
        parent = self.parent("resnet20")
        if method == "latency":
            budgets = parse_budgets([f"latency={_EQUAL}"])
            return self._for_budget(parent, ShrinkConfig(budgets, ("cpu-fp32",)))
        reference = parent_costs(parent.module, parent.spec, self.reporter)
        limit = _EQUAL * reference["latency"]
        if method == "macs":
            return self._by_macs(parent, reference, limit)
        for share in np.arange(0.3, 0.9, 0.02):
            found = prune(parent.module, parent.spec, float(share))
            if parent_costs(found.module, parent.spec, self.reporter)["latency"] <= limit:
                return found
        raise RuntimeError("no uniform pruning is so fast")

    def _by_macs(self, parent: LoadedModel, reference: dict[str, float], limit: float) -> Pruned:
        prunable, losses = self._sensitivities(parent)
        for share in np.arange(0.8, 0.05, -0.02):
            config = ShrinkConfig(parse_budgets([f"macs={share:.2f}"]), ("cpu-fp32",))
            _, picked = pick(prunable, losses, parent.spec, config, reference, 1.0, self.reporter)
            if picked.after["latency"] <= limit:
                return apply(prunable, picked)
        raise RuntimeError("no pruning by MACs is so fast")

    def _for_budget(self, parent: LoadedModel, config: ShrinkConfig) -> Pruned:
        reference = parent_costs(parent.module, parent.spec, self.reporter)
        prunable, losses = self._sensitivities(parent)
        _, picked = pick(prunable, losses, parent.spec, config, reference, 1.0, self.reporter)
        return apply(prunable, picked)

    def _sensitivities(self, parent: LoadedModel) -> tuple[Any, Any]:
        prunable = analyse(parent.module, parent.spec)
        blocks = find_blocks(prunable.module, parent.spec)
        losses = measure_sensitivities(
            prunable, blocks, self.data, parent.spec, parent.module, reporter=self.reporter
        )
        return prunable, losses

    def _cut(self, name: str, make: Callable[[], Pruned]) -> dict[str, Any]:
        """Cut once; what is kept is read by every seed."""
        folder = self.work / "cuts" / name
        if not (folder / "cut.json").is_file():
            made = make()
            save_pruned(made.module, folder, made.channels)
            told = {
                "blocks": made.blocks,
                "widths": {g.name: [g.width, g.kept] for g in made.groups if g.kept < g.width},
            }
            _write(folder / "cut.json", told)
        return {"folder": folder, **json.loads((folder / "cut.json").read_text())}

    def _recovered(
        self, name: str, cut: Mapping[str, Any], seed: int, *, eight_bits: bool = True
    ) -> dict[str, Any]:
        net = next(part for part in name.split("-") if part.startswith("resnet"))
        parent = self.parent(net)
        module = load_pruned(self.parent(net).module, cut["folder"])
        defaults = parent.source.training
        fit = FitConfig(
            max(1, round(self.epochs)),
            defaults.batch_size,
            defaults.recover_learning_rate,
            defaults.weight_decay,
            defaults.optimizer,
            seed,
            0.7,
        )
        path = self.work / "checkpoints" / f"{name}-{seed}.pt"
        checkpoint = Checkpoint(path, json.dumps(asdict(fit)) + self.data.digest)
        history = recover(
            module, parent.module, self.data, parent.spec, fit,
            reporter=self.reporter, checkpoint=checkpoint,
        )  # fmt: skip
        checkpoint.remove()
        save_pruned(module, self.work / "recovered" / f"{name}-{seed}")
        built = [
            file
            for kind, one in (("parent", parent.module), ("pruned", module))
            for file in self.files(f"{name}-{seed}", kind, one, parent.spec, eight_bits=eight_bits)
        ]
        chosen = measure(built, self.data.choose, self.data, rounds=30) if eight_bits else []
        found = measure(built, self.data.held_out, self.data, rounds=_ROUNDS)
        return {
            "seed": seed,
            "epochs": fit.epochs,
            "train_images": len(self.data.train),
            "blocks": cut["blocks"],
            "widths": cut["widths"],
            "macs": [total_macs(m, parent.spec) for m in (parent.module, module)],
            "history": asdict(history),
            "choosing": _told(chosen),
            "files": _told(found),
        }


def _told(measured: list[Measured]) -> list[dict[str, Any]]:
    return [one.to_json() for one in measured]


def _write(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_durably(path, (json.dumps(content, indent=1) + "\n").encode())


def _time_again(work: Path, names: list[str]) -> None:
    """Time the files of cells once more, on a machine that should be quiet by now."""
    image = np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3), np.uint8)
    for name in names:
        folder = work / "files" / (name if name.startswith("ptq-") else _with_seed(name))
        kinds = [f"{k}-{t}" for k in ("parent", "pruned") for t in ("fp32", "int8")]
        paths = {kind: folder / f"{kind}.onnx" for kind in kinds}
        sessions = {k: open_session(path) for k, path in paths.items() if path.is_file()}
        calls = [
            lambda s=session: s.raw.run(None, {s.inputs[0].name: image})
            for session in sessions.values()
        ]
        turns = interleaved(calls, rounds=_ROUNDS)
        used = _processor_time(calls)
        told = {
            kind: {
                "p50_us": float(np.median(times)),
                "speedup": asdict(ratio(turns[0], times)),
                "processor_us": float(np.median(cpu)),
                "processor_speedup": asdict(ratio(used[0], cpu)),
            }
            for kind, times, cpu in zip(sessions, turns, used, strict=True)
        }
        where = environment()
        _write(work / "timings" / f"{name}.json", {"files": told, "environment": where})
        typer.echo(f"{name}: { ({k: round(t['p50_us'], 1) for k, t in told.items()}) }")


def _processor_time(calls: Sequence[Callable[[], object]]) -> list[np.ndarray]:
    """Return what each call takes of its thread, interleaved; others do not count."""
    found: list[list[float]] = [[] for _ in calls]
    for turn in range(_ROUNDS):
        for index in range(len(calls)) if turn % 2 == 0 else reversed(range(len(calls))):
            started = time.thread_time_ns()
            for _ in range(4):
                calls[index]()
            found[index].append((time.thread_time_ns() - started) / 4000)
    return [np.array(times) for times in found]


def _with_seed(name: str) -> str:
    return name.replace("-seed", "-") if "-seed" in name else f"{name}-0"


def _read_cell(work: Path, name: str) -> dict[str, Any]:
    """Return a cell, with the later timing if there is one."""
    cell: dict[str, Any] = json.loads((work / "cells" / f"{name}.json").read_text())
    later = work / "timings" / f"{name}.json"
    if later.is_file():
        again = json.loads(later.read_text())
        cell["timed"] = again["environment"]
        for file in cell["files"]:
            found = again["files"][file["name"]]
            file["latency"][0]["p50_us"] = found["p50_us"]
            file["speedup"] = found["speedup"]
            file["processor_us"] = found["processor_us"]
            file["processor_speedup"] = found["processor_speedup"]
    return cell


def _cells(bench: _Bench) -> dict[str, Callable[[], dict[str, Any]]]:
    cells: dict[str, Callable[[], dict[str, Any]]] = {
        f"ptq-{net}": lambda net=net: bench.quantized(net)  # type: ignore[misc]
        for net in ("resnet20", "resnet56")
    }
    for seed in _SEEDS:
        for method in _METHODS:
            cells[f"equal-resnet20-{method}-seed{seed}"] = lambda m=method, s=seed: bench.equal(
                m, s
            )  # type: ignore[misc]
    for cell in _BUDGETS:
        cells[cell] = lambda cell=cell: bench.shrunk(cell)  # type: ignore[misc]
    return cells


def main(
    source: Annotated[
        Path, typer.Option("--data", help=f"Folder with {_DATA} and weights/NET-cifar10-jpeg.pt.")
    ],
    work: Annotated[
        Path, typer.Option("--work", help="Cells, checkpoints and files are kept here.")
    ] = ROOT / "build" / "bench" / "compression",
    only: Annotated[
        list[str] | None, typer.Option("--only", help="Cells that begin with this; repeatable.")
    ] = None,
    images: Annotated[int, typer.Option(help="Training images, balanced by class.")] = 10_000,
    epochs: Annotated[int, typer.Option(min=1, help="Epochs of recovery over them.")] = 2,
    max_time: Annotated[float, typer.Option("--max-time", help="Minutes; then it stops.")] = 60.0,
    threads: Annotated[int, typer.Option(help="PyTorch's.")] = 2,
    show: Annotated[bool, typer.Option("--render", help="Only write what is there.")] = False,
    again: Annotated[
        bool, typer.Option("--time-again", help="Only time the files of finished cells again.")
    ] = False,
) -> None:
    """Fill the cells that are missing, then write the table."""
    torch.set_num_threads(threads)
    reporter = _Deadline(time.monotonic() + 60 * max_time)
    bench = _Bench(source, work, images, epochs, reporter)
    cells = _cells(bench)
    folder = work / "cells"
    for name, cell in cells.items():
        path = folder / f"{name}.json"
        wanted = not only or name.startswith(tuple(only))
        if show or again or not wanted or path.is_file():
            continue
        typer.echo(f"{time.strftime('%H:%M:%S')} {name}")
        started = time.monotonic()
        where = environment()
        try:
            reporter.advance()
            found = cell()
        except _TimeUp:
            typer.echo("the time is over; run it again to go on")
            break
        _write(path, {**found, "seconds": time.monotonic() - started, "environment": where})
    names = [name for name in cells if (folder / f"{name}.json").is_file()]
    if again:
        _time_again(work, names)
    done = {name: _read_cell(work, name) for name in names}
    if not done:
        raise typer.Exit(1)
    stem = ROOT / "bench" / "results" / f"compression-{time.strftime('%Y-%m-%d', time.gmtime())}"
    content = {"cells": done, "missing": [name for name in cells if name not in done]}
    _write(stem.with_suffix(".json"), content)
    stem.with_suffix(".md").write_text(render(content), encoding="utf-8")
    typer.echo(f"{stem.with_suffix('.md')}: {len(done)} of {len(cells)} cells")


if __name__ == "__main__":
    typer.run(main)
