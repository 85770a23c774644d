"""Training by the pipeline against a bare loop in PyTorch whose batch is on the device already.

The bare loop neither reads nor changes images and never asks what the loss is: what the device
can do. The pipeline takes bytes from the host's memory, shifts and mirrors them, and looks at
each loss.
"""

from __future__ import annotations

import time
from contextlib import nullcontext
from typing import Any

import numpy as np

from bench.gpu.models import build
from bench.gpu.setup import Setup, Table, ratio, say

_BATCH = {"full": 128, "tiny": 8}
_STEPS = {"full": 24, "tiny": 4}
_WARM = 4
"""Steps before the first that counts: convolutions look for their algorithms in them."""

_WANTED = 0.85


class _Clock:
    """Notes when each step has ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def step(self, step: int, loss: float, learning_rate: float) -> None:
        self.ends.append(time.perf_counter())

    def epoch(self, epoch: int, loss: float, score: float, best: bool) -> None: ...


def run(setup: Setup) -> None:
    """Measure both in turns, in float32 and in bfloat16."""
    from pollard.compress import accelerator

    size = "tiny" if setup.tiny else "full"
    batch, steps = _BATCH[size], _STEPS[size]
    device = accelerator.find(setup.provider)
    setup.keep("device", accelerator.describe(device))
    setup.keep("batch", batch)
    rows: list[dict[str, Any]] = []
    for bf16 in (False, True):
        row: dict[str, Any] = {
            "type": "bfloat16" if bf16 else "float32",
            "bare": [],
            "pipeline": [],
        }
        rows.append(row)
        for _ in range(setup.sizes.rounds):
            if setup.left < 5:
                say("the time is used up")
                return
            row["bare"].append(round(_bare(setup, device, batch, steps, bf16), 1))
            row["pipeline"].append(round(_pipeline(setup, device, batch, steps, bf16), 1))
            setup.keep("training", rows)
        say(f"images/s: {row}")


def _bare(setup: Setup, device: Any, batch: int, steps: int, bf16: bool) -> float:
    import torch

    module, spec = build(setup.sizes.image_model, 0)
    module = module.to(device, memory_format=torch.channels_last).train()
    inputs = torch.randn(batch, 3, spec.height, spec.width, device=device)
    inputs = inputs.contiguous(memory_format=torch.channels_last)
    labels = torch.zeros(batch, dtype=torch.int64, device=device)
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-4, momentum=0.9)
    for step in range(_WARM + steps):
        if step == _WARM:
            _wait(device)
            started = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext():
            outputs = module(inputs)
        loss = torch.nn.functional.cross_entropy(outputs.float(), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    _wait(device)
    return batch * steps / (time.perf_counter() - started)


def _pipeline(setup: Setup, device: Any, batch: int, steps: int, bf16: bool) -> float:
    from pollard.compress import accelerator, augmentation
    from pollard.compress.data import Dataset, Part
    from pollard.compress.training import FitConfig, fit

    module, spec = build(setup.sizes.image_model, 0)
    count = batch * (_WARM + steps)
    images = np.random.default_rng(0).integers(0, 256, (count, *spec.shape), np.uint8)
    train = Part("train", images, np.arange(count) % 10)
    few = train.take(slice(4))
    data = Dataset("random", [str(number) for number in range(1000)], train, few, few, "")
    config = FitConfig(
        1, batch, 1e-4, optimizer="sgd", bf16=bf16, augment=augmentation.parse("flip,shift=0.125")
    )
    clock = _Clock()
    with accelerator.on(device):
        fit(module, data, spec, config, observer=clock)
    ends = clock.ends[_WARM - 1 :]
    return batch * (len(ends) - 1) / (ends[-1] - ends[0])


def _wait(device: Any) -> None:
    import torch

    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def tables(data: dict[str, Any]) -> list[Table]:
    """Return images a second of both, and the ratio of the medians."""
    rows: list[tuple[object, ...]] = []
    for row in data.get("training", ()):
        bare, pipeline = (float(np.median(row[name] or [0])) for name in ("bare", "pipeline"))
        rows.append((row["type"], f"{bare:,.0f}", f"{pipeline:,.0f}", ratio(pipeline, bare)))
    return [
        Table(
            f"Training on {data.get('device')}, batch {data.get('batch')}, images/s",
            ("computed in", "bare loop", "pollard train", "ratio"),
            rows,
            f"Wanted: {_WANTED} × the bare loop, whose one batch is on the device already.",
        )
    ]
