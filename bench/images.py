"""Images in, answers out: `python -m bench.images`.

Three questions: how many images a second a decode worker transforms against plain Pillow and
OpenCV loops; how many `Predict` answers against Triton with a preprocessing model and the same
ONNX file in an ensemble, both in its Python backend; and how much memory an image of 100 megapixels
takes.
What `Predict` adds to the network's time is `bench.predict_overhead`.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import grpc
import numpy as np
import psutil
import typer
import uvloop
from PIL import Image

from bench.environment import environment, heading
from bench.peers.fetch import ROOT, PeerMissing, fetch
from bench.peers.triton_images import start_ensemble
from bench.photographs import (
    MODELS,
    OPENCV_STEPS,
    PILLOW_STEPS,
    SHORT,
    SIDE,
    Suite,
    photograph,
    serve,
)
from bench.process import ServerProcess
from bench.statistics import Interval, control, interval, ratios
from pollard.bundle.v1 import bundle_pb2
from pollard.inference import grpc_service_pb2 as pb
from pollard.inference import grpc_service_pb2_grpc as pb_grpc
from pollard.preprocess.v1 import preprocess_service_pb2 as preprocess_pb
from pollard.runtime.transforms import Pipeline
from pollard.services.preprocess.decode_pool import DecodePool
from pollard.services.preprocess.worker import WorkerLimits
from pollard.vision.v1 import vision_service_pb2 as vision_pb
from pollard.vision.v1 import vision_service_pb2_grpc as vision_grpc


@dataclass
class Load:
    """What callers that always wait for an answer have seen."""

    seconds: float
    latencies: list[float] = field(default_factory=list)

    @property
    def throughput(self) -> float:
        """Answers a second."""
        return len(self.latencies) / self.seconds

    def quantile(self, share: float) -> float:
        """Latency in milliseconds."""
        return float(np.quantile(self.latencies, share)) * 1e3


Ask = Callable[[], Any]


async def _drive(ask: Ask, callers: int, seconds: float) -> Load:
    load = Load(seconds)
    until = time.perf_counter() + seconds

    async def caller() -> None:
        while (begin := time.perf_counter()) < until:
            await ask()
            load.latencies.append(time.perf_counter() - begin)

    await asyncio.gather(*(caller() for _ in range(callers)))
    return load


async def _once_served(ask: Ask, seconds: float = 60) -> None:
    """Ask until there is an answer: a push is over before every server knows of it."""
    until = time.monotonic() + seconds
    while True:
        try:
            await ask()
            return
        except grpc.RpcError:
            if time.monotonic() > until:
                raise
        await asyncio.sleep(0.2)


async def _against(
    suite: Suite,
    triton: ServerProcess | None,
    name: str,
    content: bytes,
    rounds: int,
    seconds: float,
) -> dict[str, Any]:
    question = vision_pb.PredictRequest(
        model=preprocess_pb.ModelSelector(model=name),
        image=preprocess_pb.Image(content=content),
    )
    found: dict[str, Any] = {}
    async with contextlib.AsyncExitStack() as stack:
        ours = await stack.enter_async_context(
            grpc.aio.insecure_channel(suite.addresses["preprocess"])
        )
        vision = vision_grpc.VisionServiceStub(ours)  # type: ignore[no-untyped-call]
        asks: dict[str, Ask] = {"Pollard": lambda: vision.Predict(question, timeout=30)}
        if triton is not None:
            theirs = await stack.enter_async_context(grpc.aio.insecure_channel(triton.address))
            stub = pb_grpc.GRPCInferenceServiceStub(theirs)  # type: ignore[no-untyped-call]
            asked = pb.ModelInferRequest(model_name=name)
            asked.inputs.add(name="file", datatype="UINT8", shape=[1, len(content)])
            asked.raw_input_contents.append(content)
            asks["Triton"] = lambda: stub.ModelInfer(asked, timeout=30)
        for ask in asks.values():
            await _once_served(ask)
            await _drive(ask, 2, 2.0)
        for callers in (1, 4, 8):
            rows: dict[str, list[list[Load]]] = {name: [] for name in asks}
            for _ in range(rounds):
                pairs: dict[str, list[Load]] = {name: [] for name in asks}
                for name in (*asks, *reversed(asks)):
                    pairs[name].append(await _drive(asks[name], callers, seconds))
                for name, pair in pairs.items():
                    rows[name].append(pair)
            found[str(callers)] = rows
    return found


def plain_pillow(content: bytes) -> np.ndarray:
    """Return what `PILLOW_STEPS` give, by Pillow alone."""
    image = Image.open(io.BytesIO(content)).convert("RGB")
    width, height = image.size
    size = (SHORT, int(SHORT * height / width))
    if width > height:
        size = (int(SHORT * width / height), SHORT)
    image = image.resize(size, Image.Resampling.BILINEAR)
    left, top = round((image.width - SIDE) / 2), round((image.height - SIDE) / 2)
    return np.ascontiguousarray(image.crop((left, top, left + SIDE, top + SIDE)))


def _opencv(content: bytes) -> np.ndarray:
    import cv2

    image = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)
    height, width = image.shape[:2]
    size = (SHORT, int(SHORT * height / width))
    if width > height:
        size = (int(SHORT * width / height), SHORT)
    image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    left, top = round((size[0] - SIDE) / 2), round((size[1] - SIDE) / 2)
    return np.ascontiguousarray(
        cv2.cvtColor(image[top : top + SIDE, left : left + SIDE], cv2.COLOR_BGR2RGB)
    )


def _rate(run: Callable[[bytes], object], content: bytes, seconds: float) -> float:
    done = 0
    begin = time.perf_counter()
    while (now := time.perf_counter()) - begin < seconds:
        run(content)
        done += 1
    return done / (now - begin)


async def _pool_rate(pool: DecodePool, steps: bytes, content: bytes, seconds: float) -> float:
    load = await _drive(lambda: pool.transform(steps, content), 2, seconds)
    return load.throughput


async def _preprocessing(content: bytes, rounds: int, seconds: float) -> dict[str, Any]:
    import cv2

    cv2.setNumThreads(1)
    found: dict[str, Any] = {}
    pool = DecodePool(1, WorkerLimits())
    await pool.start()
    try:
        for name, steps, plain in (
            ("Pillow", PILLOW_STEPS, plain_pillow),
            ("OpenCV", OPENCV_STEPS, _opencv),
        ):
            pipeline = Pipeline(steps)
            packed = bundle_pb2.Manifest(preprocess=steps).SerializeToString()
            rates: dict[str, list[list[float]]] = {"plain": [], "pipeline": [], "worker": []}
            # Processor time for an image, in milliseconds.
            costs: dict[str, list[float]] = {"plain": [], "worker": [], "parent": []}
            worker = psutil.Process(pool.pids[0])
            for _ in range(rounds):
                order = ["plain", "pipeline", "worker"]
                row: dict[str, list[float]] = {each: [] for each in order}
                for each in (*order, *reversed(order)):
                    here, there = time.process_time(), _processor_seconds(worker)
                    if each == "worker":
                        rate = await _pool_rate(pool, packed, content, seconds)
                    else:
                        run = plain if each == "plain" else pipeline.apply
                        rate = _rate(run, content, seconds)
                    row[each].append(rate)
                    here, there = time.process_time() - here, _processor_seconds(worker) - there
                    images = rate * seconds / 1e3
                    if each == "worker":
                        costs["worker"].append(there / images)
                        costs["parent"].append(here / images)
                    elif each == "plain":
                        costs["plain"].append(here / images)
                for each, pair in row.items():
                    rates[each].append(pair)
            found[name] = rates | {"processor_ms": costs}
    finally:
        await pool.close()
    return found


def _processor_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def _memory(suite: Suite, name: str, megapixels: int) -> dict[str, Any]:
    """Send a large image and look at the memory of the preprocess server and its workers."""
    side = round((megapixels * 1e6) ** 0.5)
    file = io.BytesIO()
    Image.linear_gradient("L").resize((side, side)).convert("RGB").save(file, "JPEG", quality=85)
    root = psutil.Process(suite.pids["preprocess"])

    def now() -> int:
        total = 0
        for each in (root, *root.children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                total += each.memory_info().rss
        return total

    idle, most, over = now(), 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not over.wait(0.005):
            most = max(most, now())

    watcher = threading.Thread(target=watch)
    watcher.start()
    limit = 64 * 1024**2
    options = [("grpc.max_send_message_length", limit)]
    with grpc.insecure_channel(suite.addresses["preprocess"], options) as channel:
        stub = vision_grpc.VisionServiceStub(channel)  # type: ignore[no-untyped-call]
        try:
            stub.Predict(
                vision_pb.PredictRequest(
                    model=preprocess_pb.ModelSelector(model=name),
                    image=preprocess_pb.Image(content=file.getvalue()),
                ),
                timeout=60,
            )
            outcome = "answered"
        except grpc.RpcError as error:
            outcome = f"{error.code().name}: {error.details()}"
    over.set()
    watcher.join()
    return {
        "megapixels": megapixels,
        "file_bytes": len(file.getvalue()),
        "outcome": outcome,
        "above_idle_mb": max(0, most - idle) / 1e6,
    }


def _words(result: dict[str, Any]) -> str:
    lines = ["# Images in, answers out", "", heading(result["environment"]), ""]
    lines += [f"JPEG of {result['image']}; {result['rounds']} rounds of A B B A.", ""]
    if "preprocessing" in result:
        lines += [
            "**Decoding and transforming, one core**, images a second over those of a plain loop "
            "of the same calls; and processor time for an image in milliseconds:",
            "",
            "| steps | plain loop | in process | decode worker and the way to it | "
            "plain loop twice | plain loop | worker | its parent |",
            "|---|---:|---:|---:|---:|---:|---:|---:|",
        ]
    for name, rates in result.get("preprocessing", {}).items():
        plain = statistics.median([rate for pair in rates["plain"] for rate in pair])
        costs = [f"{statistics.median(each):.2f} ms" for each in rates["processor_ms"].values()]
        lines.append(
            f"| {name} | {plain:.0f} /s | {ratios(rates['pipeline'], rates['plain'])} | "
            f"{ratios(rates['worker'], rates['plain'])} | {control(rates['plain'])} | "
            f"{' | '.join(costs)} |"
        )
    if result["against"]:
        lines += [
            "",
            "**Predict over Triton's ensemble**, uint8 pixels in, Python backend for both of its "
            "models:",
            "",
            "| network | callers | Pollard | Triton | throughput | p50 | p99 | Triton twice |",
            "|---|---:|---:|---:|---:|---:|---:|---:|",
        ]
    for name, by_callers in result["against"].items():
        for callers, rows in by_callers.items():
            where = f"| {MODELS[name][0]} | {callers} | {_median(rows['Pollard']):.1f} /s "
            if "Triton" not in rows:
                lines.append(f"{where}| – | – | – | – | – |")
                continue
            ours, theirs = rows["Pollard"], rows["Triton"]
            lines.append(
                f"{where}| {_median(theirs):.1f} /s | "
                f"{ratios(_rates(ours), _rates(theirs))} | {_latency(ours, theirs, 0.5)} | "
                f"{_latency(ours, theirs, 0.99)} | {control(_rates(theirs))} |"
            )
    if result["memory"]:
        lines += [
            "",
            "**Large images**, memory of the preprocess server and its workers above idle:",
            "",
        ]
    for row in result["memory"]:
        lines.append(
            f"- {row['megapixels']} megapixels ({row['file_bytes'] / 1e6:.1f} MB): "
            f"{row['above_idle_mb']:.0f} MB; {row['outcome']}"
        )
    return "\n".join([*lines, ""])


def _rates(rows: list[list[Load]]) -> list[list[float]]:
    return [[load.throughput for load in pair] for pair in rows]


def _median(rows: list[list[Load]]) -> float:
    return statistics.median([load.throughput for pair in rows for load in pair])


def _latency(ours: list[list[Load]], theirs: list[list[Load]], share: float) -> Interval:
    return interval(
        [
            sum(load.quantile(share) for load in a) / sum(load.quantile(share) for load in b)
            for a, b in zip(ours, theirs, strict=True)
        ]
    )


def _figures(rows: dict[str, list[list[Load]]]) -> dict[str, Any]:
    return {
        server: [
            [
                {
                    "throughput": load.throughput,
                    "p50_ms": load.quantile(0.5),
                    "p99_ms": load.quantile(0.99),
                }
                for load in pair
            ]
            for pair in pairs
        ]
        for server, pairs in rows.items()
    }


def _served(
    result: dict[str, Any],
    names: list[str],
    content: bytes,
    rounds: int,
    seconds: float,
    peer: bool,
) -> None:
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        files = {name: MODELS[name][1]() for name in names}
        suite = stack.enter_context(serve(files, Path(folder)))
        triton = None
        if peer:
            try:
                triton = stack.enter_context(start_ensemble(fetch(), files))
            except PeerMissing as error:
                print(f"without Triton: {error}", file=sys.stderr)
        for name in names:
            result["against"][name] = asyncio.run(
                _against(suite, triton, name, content, rounds, seconds)
            )
        result["memory"] = [_memory(suite, names[0], size) for size in (24, 36, 100)]


def main(
    rounds: Annotated[int, typer.Option(help="Rounds of A B B A.")] = 7,
    seconds: Annotated[float, typer.Option(help="Length of one measurement.")] = 2.0,
    image: Annotated[Path | None, typer.Option(help="A JPEG; by default one made here.")] = None,
    alone: Annotated[bool, typer.Option("--alone", help="Without Triton.")] = False,
    models: Annotated[
        str, typer.Option(help="Networks by comma; empty for none.")
    ] = "small-cnn,mobilenet,resnet50",
    decoding: Annotated[bool, typer.Option(help="Measure decoding, too.")] = True,
    part: Annotated[str, typer.Option(help="Put behind the result's name.")] = "",
    out: Annotated[Path, typer.Option(help="Folder for the result.")] = ROOT / "bench/results",
) -> None:
    """Measure images, print and keep the result."""
    before = environment()
    content = image.read_bytes() if image is not None else photograph(500, 375)
    with Image.open(io.BytesIO(content)) as opened:
        words = f"{opened.width} × {opened.height} pixels, {len(content)} bytes"
    result: dict[str, Any] = {"environment": before, "image": words, "rounds": rounds}
    result |= {"against": {}, "memory": []}
    if decoding:
        result["preprocessing"] = uvloop.run(_preprocessing(content, rounds, seconds / 2))
    if models:
        _served(result, models.split(","), content, rounds, seconds, not alone)
    text = _words(result)
    print(text)
    file = out / f"images-{time.strftime('%Y-%m-%d')}{part and '-' + part}"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.with_suffix(".md").write_text(text)
    result["against"] = {
        name: {callers: _figures(rows) for callers, rows in by_callers.items()}
        for name, by_callers in result["against"].items()
    }
    file.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
