"""The demo, step by step."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import sys
import tempfile
import time
from collections.abc import Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from pollard.client import AsyncModelsClient, PollardError
from pollard.client.load import Load
from pollard.compress.demo.errors import DemoFailed
from pollard.compress.demo.processes import Suite, run_command, running_services, tail
from pollard.compress.demo.summary import Run, Swap, figures, show, write_json
from pollard.runtime.bundle import Bundle
from pollard.runtime.reference import Reference, Sample, make_samples, telling

MODEL = "digits"
ALIAS = "production"
NETWORK = "zoo:small-cnn-28"
DATA = "digits"
MAX_DROP_POINTS = 1.0


@dataclass(frozen=True)
class DemoOptions:
    """What the demo can be told."""

    json_file: Path | None = None
    """Where to write the figures."""
    out: Path = Path("pollard-demo")
    """Where weights, bundles and reports are left."""
    seconds: float = 12.0
    """How long requests are sent."""
    swaps: int = 5
    """How often the served revision is swapped."""
    clients: int = 8
    """Concurrent clients."""
    prune: float = 0.8
    """Share of the MACs to remove."""
    epochs: int | None = None
    """Epochs of training; None for the model's default."""
    reuse: bool = False
    """Use the bundles that are there."""


def run_demo(options: DemoOptions) -> int:
    """Run the demo; return the exit code: 0, or 1 when anything at all went wrong."""
    console = Console(file=sys.stdout, highlight=False)
    try:
        return asyncio.run(_interruptible(_demo(console, options)))
    except (DemoFailed, PollardError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except asyncio.CancelledError:
        print("error: interrupted; all processes have been stopped", file=sys.stderr)
        return 130


async def _interruptible(demo: Coroutine[Any, Any, int]) -> int:
    """Run a coroutine that Ctrl-C and SIGTERM cancel, so that it can clean up."""
    task = asyncio.create_task(demo)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        with contextlib.suppress(NotImplementedError):
            loop.add_signal_handler(number, task.cancel)
    return await task


async def _demo(console: Console, options: DemoOptions) -> int:
    started = time.monotonic()
    options.out.mkdir(parents=True, exist_ok=True)
    parent, compressed = options.out / "parent", options.out / "compressed"
    if not (options.reuse and _is_bundle(parent) and _is_bundle(compressed)):
        await _make_bundles(console, options, parent, compressed)

    samples = await asyncio.to_thread(_held_out_samples)
    references = {1: Reference(Bundle.open(parent), samples)}
    references[2] = Reference(Bundle.open(compressed), samples)
    with tempfile.TemporaryDirectory(prefix="pollard-demo-") as directory:
        # Short enough that a revision is really freed, and loaded again by a later swap.
        drain = min(30.0, options.seconds / (options.swaps + 1) / 2)
        async with running_services(Path(directory), drain_seconds=drain) as suite:
            console.print(
                f"\nServices: inference {suite.inference}, preprocess {suite.vision}, "
                f"models {suite.models}",
                soft_wrap=True,
            )
            load, swaps, seconds = await _swap_under_load(
                console, options, suite, samples, references, (parent, compressed)
            )
    run = Run(
        traffic=load.traffic,
        swaps=swaps,
        seconds=seconds,
        report=json.loads((compressed / "report.json").read_text()),
        report_page=(compressed / "report.html").absolute(),
        references=references,
        telling=telling(references[1], references[2]),
    )
    show(console, run, options.clients)
    if options.json_file is not None:
        write_json(options.json_file, figures(run))
        console.print(f"Figures: {options.json_file}", markup=False, soft_wrap=True)
    console.print(f"The demo took {time.monotonic() - started:.0f} s.")
    if run.telling < len(samples) // 2:
        raise DemoFailed(
            "the revisions' answers are too alike to tell which one answered; compress harder"
        )
    return 0 if run.passed else 1


async def _make_bundles(
    console: Console, options: DemoOptions, parent: Path, compressed: Path
) -> None:
    weights = str(options.out / "parent.safetensors")
    data = ("--data", DATA, "--force")
    train = ["train", NETWORK.removeprefix("zoo:"), *data, "--out", weights]
    if options.epochs is not None:
        train += ["--epochs", str(options.epochs)]
    await run_command(console, train)
    model = (NETWORK, "--weights", weights, *data)
    await run_command(console, ["bundle", *model, "--out", str(parent)])
    await run_command(
        console,
        [
            "compress",
            *model,
            *("--target", "cpu-int8", "--prune", str(options.prune)),
            *("--max-drop", str(MAX_DROP_POINTS), "--out", str(compressed)),
        ],
    )


def _is_bundle(directory: Path) -> bool:
    return (directory / "manifest.json").is_file() and (directory / "report.json").is_file()


def _held_out_samples() -> list[Sample]:
    """Load the images that no weight was fitted to and no choice was made on."""
    from pollard.compress.data import load_data
    from pollard.compress.zoo.registry import find

    spec = find(NETWORK.removeprefix("zoo:")).spec
    part = load_data(DATA, spec).held_out
    return make_samples(part.images, part.labels)


async def _swap_under_load(
    console: Console,
    options: DemoOptions,
    suite: Suite,
    samples: list[Sample],
    references: dict[int, Reference],
    bundles: tuple[Path, Path],
) -> tuple[Load, list[Swap], float]:
    """Push the parent, send requests, push the compressed model and swap there and back."""
    load = Load(
        model=MODEL,
        vision=suite.vision,
        inference=suite.inference,
        samples=samples,
        references=references,
        clients=options.clients,
    )
    swaps: list[Swap] = []
    async with AsyncModelsClient(suite.models) as models:
        await models.push(bundles[0], MODEL, alias=ALIAS)
        console.print(f"Revision 1 (parent) serves; {options.clients} clients begin.")
        load.traffic.serving = 1
        started = time.monotonic()
        clients = asyncio.create_task(load.run())
        try:
            await models.push(bundles[1], MODEL)
            for number in range(options.swaps):
                # The swaps lie evenly within the time, with as much of it before the first as
                # after the last.
                share = (number + 1) / (options.swaps + 1)
                await _sleep_until(started + options.seconds * share)
                swaps.append(await _swap(console, models, load, 1 + (number + 1) % 2))
            await _sleep_until(started + options.seconds)
        except PollardError as error:
            raise DemoFailed(f"the swap failed: {error}\n{tail(suite.log)}") from error
        finally:
            load.finish()
            await clients
        seconds = time.monotonic() - started
    return load, swaps, seconds


async def _swap(console: Console, models: AsyncModelsClient, load: Load, revision: int) -> Swap:
    load.traffic.serving = 0
    started = time.monotonic()
    await models.set_alias(MODEL, ALIAS, revision)
    ended = time.monotonic()
    load.traffic.serving = revision
    console.print(
        f"Swapped to revision {revision} in {(ended - started) * 1e3:.0f} ms; "
        f"{load.traffic.total} requests so far, {load.traffic.failed} failed."
    )
    return Swap(revision, started, ended)


async def _sleep_until(moment: float) -> None:
    await asyncio.sleep(max(0.0, moment - time.monotonic()))
