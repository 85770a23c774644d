"""What judging a served model costs over judging its bundle: `python -m bench.evaluation`.

Starts `pollard up`, packs and pushes a network of the zoo, and judges the same images in process
(`pollard eval BUNDLE`) and over the network (`pollard eval MODEL --server`), A B B A, 16 images a
call. Both decode every image and compute every answer; the figures must be the same. Weights are
random, for time does not depend on them.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from PIL import Image

from bench.environment import environment, heading
from bench.peers.fetch import ROOT
from bench.process import pollard_command
from pollard.client import ModelsClient
from pollard.compress import packing
from pollard.compress.evaluation import evaluate
from pollard.compress.models import save_state
from pollard.compress.zoo import find

_CLASSES = 10
_ALLOWED = 1.2


def _images(folder: Path, count: int, size: int) -> None:
    """Write JPEG files of blurred noise, the same every time."""
    chance = np.random.default_rng(0)
    for index in range(count):
        small = Image.fromarray(chance.integers(0, 256, (8, 8, 3), np.uint8))
        path = folder / str(index % _CLASSES) / f"{index}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        small.resize((size, size), Image.Resampling.BICUBIC).save(path, quality=90)


def _start(folder: Path) -> tuple[subprocess.Popen[bytes], dict[str, Any]]:
    ready = folder / "ready.json"
    command = [*pollard_command(), "up", "--port-base", "0", "--data-dir", str(folder / "data")]
    with (folder / "log.txt").open("wb") as log:
        process = subprocess.Popen(
            [*command, "--ready-file", str(ready), "--stop-with-parent"], stdout=log, stderr=log
        )
    until = time.monotonic() + 60
    while not ready.exists():
        if process.poll() is not None or time.monotonic() > until:
            process.terminate()
            raise RuntimeError((folder / "log.txt").read_text(errors="replace")[-3000:])
        time.sleep(0.1)
    services: dict[str, Any] = json.loads(ready.read_text())["services"]
    return process, services


def measure(network: str, count: int, rounds: int, folder: Path) -> dict[str, Any]:
    """Return the seconds of each evaluation, and whether all say the same."""
    entry = find(network)
    _images(folder / "images", count, max(entry.spec.height, entry.spec.short_side))
    torch.manual_seed(0)
    module = entry.build(_CLASSES)
    with torch.no_grad():
        # Statistics of what flows through it.
        module(torch.randn(16, entry.spec.channels, entry.spec.height, entry.spec.width))
    save_state(module, folder / "weights.safetensors")
    (folder / "labels.txt").write_text("".join(f"{i}\n" for i in range(_CLASSES)))
    bundle = folder / "bundle"
    packing.pack(
        network, folder / "labels.txt", bundle, weights=str(folder / "weights.safetensors")
    )
    process, services = _start(folder)
    try:
        with ModelsClient(services["models"]["address"]) as models:
            models.push(bundle, "judged", alias="production")
        address = services["preprocess"]["address"]
        data = folder / "images"

        def judge(where: str) -> tuple[float, Any]:
            started = time.perf_counter()
            if where == "served":
                found = evaluate("judged", data, server=address, part="all")
            else:
                found = evaluate(str(bundle), data, part="all")
            return time.perf_counter() - started, found.to_json()["confusion"]

        seconds: dict[str, list[float]] = {"here": [], "served": []}
        told = [judge(where)[1] for where in seconds]
        for turn in range(rounds):
            for where in list(seconds) if turn % 2 == 0 else list(reversed(seconds)):
                taken, confusion = judge(where)
                seconds[where].append(taken)
                told.append(confusion)
    finally:
        process.terminate()
        process.wait(30)
    return {
        "network": network,
        "images": count,
        "seconds": seconds,
        "same": all(each == told[0] for each in told),
    }


def main(
    network: Annotated[str, typer.Option(help="Of the zoo.")] = "resnet20-cifar",
    images: Annotated[int, typer.Option(help="Images to judge.")] = 640,
    rounds: Annotated[int, typer.Option(help="Evaluations of each kind.")] = 4,
    out: Annotated[Path, typer.Option(help="Folder for the result.")] = ROOT / "bench/results",
) -> None:
    """Exit with 1 where the figures differ or the served model costs too much."""
    before = environment()
    with tempfile.TemporaryDirectory(prefix="pollard-evaluation-") as folder:
        found = measure(network, images, rounds, Path(folder))
    here, served = (np.array(found["seconds"][where]) for where in ("here", "served"))
    ratios = served / here
    ratio = float(np.median(ratios))
    text = "\n".join(
        [
            "# Judging a served model",
            "",
            heading(before),
            "",
            f"{network}, {images} images, 16 a call, {rounds} rounds in turns; the figures are "
            f"{'the same' if found['same'] else 'NOT the same'}.",
            "",
            "| in process, s | served, s | ratio (least–most) | allowed |",
            "|--:|--:|--:|--:|",
            f"| {np.median(here):.2f} | {np.median(served):.2f} | {ratio:.2f} "
            f"({ratios.min():.2f}–{ratios.max():.2f}) | {_ALLOWED} |",
            "",
        ]
    )
    print(text)
    out.mkdir(parents=True, exist_ok=True)
    file = out / f"evaluation-{time.strftime('%Y-%m-%d')}"
    file.with_suffix(".md").write_text(text, encoding="utf-8")
    content = {"environment": before, "ratio": ratio, **found}
    file.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")
    if not found["same"] or ratio > _ALLOWED:
        raise SystemExit(1)


if __name__ == "__main__":
    typer.run(main)
