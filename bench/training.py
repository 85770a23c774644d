"""Time of a training step by `pollard train` against a plain PyTorch loop, the same augmentation.

    python -m bench.training [NAME …] [--threads 2] [--rounds 4] [--out bench/results/training.json]

The plain loop keeps its images in memory as well, moves and mirrors them as tensors, and knows
nothing of checkpoints, means of weights, processes or frozen layers. Both are timed in turns on
the same noise, over whole steps. "plain, channels last" tells what of the difference is the order
of the numbers in memory, which the plain loop may choose as well.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from bench.environment import environment, heading
from pollard.compress.data import Dataset, Part
from pollard.compress.spec import InputSpec
from pollard.compress.training import FitConfig, fit
from pollard.compress.zoo import find

RESULTS = Path("bench/results/training.json")
_BATCH, _STEPS, _WARMUP = 128, 6, 1


class _Clock:
    """Notes when each step of a fit ends."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def step(self, step: int, loss: float, learning_rate: float) -> None:
        self.ends.append(time.perf_counter())

    def epoch(self, epoch: int, loss: float, score: float, best: bool) -> None:
        pass


def by_pollard(module: nn.Module, spec: InputSpec, data: Dataset) -> list[float]:
    """Return seconds of each step after the first."""
    clock = _Clock()
    config = FitConfig(1, _BATCH, 0.01, 5e-4, "sgd", schedule="cosine")
    fit(module, data, spec, config, observer=clock)
    return [float(taken) for taken in np.diff(clock.ends)]


def by_plain_loop(
    module: nn.Module, spec: InputSpec, data: Dataset, order: torch.memory_format
) -> list[float]:
    """Return seconds of each step after the first, without anything of Pollard."""
    module.to(memory_format=order)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(
        module.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4, nesterov=True
    )
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, _STEPS)
    mean = torch.tensor(spec.mean).view(1, -1, 1, 1)
    std = torch.tensor(spec.std).view(1, -1, 1, 1)
    images = torch.from_numpy(data.train.images).permute(0, 3, 1, 2)
    labels = torch.from_numpy(data.train.labels)
    module.train()
    ends: list[float] = []
    shuffled = torch.randperm(len(images))
    for start in range(0, len(images), _BATCH):
        chosen = shuffled[start : start + _BATCH]
        inputs = (_augmented(images[chosen].float() / 255, spec) - mean) / std
        loss = functional.cross_entropy(module(inputs), labels[chosen])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        rates.step()
        loss.item()
        ends.append(time.perf_counter())
    return [float(taken) for taken in np.diff(ends)]


def _augmented(images: Tensor, spec: InputSpec) -> Tensor:
    """Move by an eighth and mirror every other, as `pollard train` does with such images."""
    reach = spec.height // 8
    padded = functional.pad(images, (reach,) * 4)
    corners = torch.randint(0, 2 * reach + 1, (len(images), 2)).tolist()
    moved = torch.stack(
        [padded[i, :, y : y + spec.height, x : x + spec.width] for i, (y, x) in enumerate(corners)]
    )
    mirrored = torch.rand(len(images)) < 0.5
    moved[mirrored] = moved[mirrored].flip(3)
    return moved


def measure(name: str, rounds: int) -> dict[str, Any]:
    """Return the medians of a step in milliseconds, and their ratios."""
    entry = find(name)
    spec = entry.spec
    generator = np.random.default_rng(0)

    def part(count: int) -> Part:
        pixels: NDArray[np.uint8] = generator.integers(0, 256, (count, *spec.shape), np.uint8)
        return Part("noise", pixels, generator.integers(0, entry.classes, count))

    # One image to choose on: its time falls between two fits, not into a step.
    data = Dataset("noise", [str(i) for i in range(entry.classes)], part(_BATCH * (_STEPS + 1)),
                   part(1), part(1), "")  # fmt: skip
    torch.manual_seed(0)
    module = entry.build(entry.classes)
    ways: dict[str, Callable[[nn.Module], list[float]]] = {
        "pollard": lambda net: by_pollard(net, spec, data),
        "plain": lambda net: by_plain_loop(net, spec, data, torch.contiguous_format),
        "plain, channels last": lambda net: by_plain_loop(net, spec, data, torch.channels_last),
    }
    taken: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(rounds):
        names = list(ways) if turn % 2 == 0 else list(reversed(ways))
        for way in names:
            steps = ways[way](copy.deepcopy(module))[_WARMUP:]
            taken[way].append(1000 * float(np.median(steps)))
    ratios = {
        way: [own / other for own, other in zip(taken["pollard"], taken[way], strict=True)]
        for way in ways
        if way != "pollard"
    }
    return {
        "name": name,
        "batch": _BATCH,
        "rounds": rounds,
        "steps_of_a_round": _STEPS - _WARMUP,
        "milliseconds": taken,
        "ratio": {
            way: {"median": float(np.median(r)), "least": min(r), "most": max(r)}
            for way, r in ratios.items()
        },
    }


def render(found: list[dict[str, Any]], threads: int, said: dict[str, object]) -> str:
    """Return the figures as Markdown."""
    lines = [
        "# Time of a training step",
        "",
        f"Made by `python -m bench.training`; batch {_BATCH}, {threads} thread(s); median of the "
        "rounds' medians, interleaved. Ratios are of neighbouring rounds: median (least–most).",
        "",
        "| network | pollard train | plain loop | ratio | plain, channels last | ratio |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for one in found:
        cells = [one["name"], f"{np.median(one['milliseconds']['pollard']):.0f} ms"]
        for way in ("plain", "plain, channels last"):
            ratio = one["ratio"][way]
            cells += [
                f"{np.median(one['milliseconds'][way]):.0f} ms",
                f"{ratio['median']:.2f} ({ratio['least']:.2f}–{ratio['most']:.2f})",
            ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", heading(said), ""])


def main() -> None:
    """Measure, and write `FILE.json` and `FILE.md`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=["resnet20-cifar"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    said = environment()
    torch.set_num_threads(given.threads)
    found = [measure(name, given.rounds) for name in given.names]
    content = {"threads": given.threads, "environment": said, "networks": found}
    given.out.write_text(json.dumps(content, indent=2) + "\n")
    text = render(found, given.threads, said)
    given.out.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
