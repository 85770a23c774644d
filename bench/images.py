"""Images in, answers out: `python -m bench.images`.

Four questions, each in one run: what `Predict` adds to the engine's own time at one caller; how
many images a second a decode worker transforms against plain Pillow and OpenCV loops; how many
`Predict` answers against Triton with a preprocessing model and the same ONNX file in an ensemble,
both in its Python backend; and how much memory an image of 100 megapixels takes.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import grpc
import numpy as np
import onnx
import onnxruntime
import psutil
import typer
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from bench.environment import environment, heading
from bench.models import resnet50
from bench.peers.fetch import BUILD, ROOT, PeerMissing, fetch
from bench.peers.triton_images import start_ensemble
from bench.process import ServerProcess, pollard_command
from bench.statistics import Interval, control, interval, ratios
from pollard.bundle.v1 import bundle_pb2
from pollard.client import ModelsClient
from pollard.inference import grpc_service_pb2 as pb
from pollard.inference import grpc_service_pb2_grpc as pb_grpc
from pollard.preprocess.v1 import preprocess_service_pb2 as preprocess_pb
from pollard.runtime.bundle import write_bundle
from pollard.runtime.transforms import Pipeline, center_crop, decode, resize
from pollard.services.preprocess.decode_pool import DecodePool
from pollard.services.preprocess.worker import WorkerLimits
from pollard.vision.v1 import vision_service_pb2 as vision_pb
from pollard.vision.v1 import vision_service_pb2_grpc as vision_grpc

_SIDE, _SHORT = 224, 256
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

PILLOW_STEPS = [
    decode(exif=False),
    resize(0, _SHORT, mode=bundle_pb2.RESIZE_MODE_SHORT_SIDE),
    center_crop(_SIDE, _SIDE),
]
OPENCV_STEPS = [
    decode(exif=False),
    resize(
        0,
        _SHORT,
        mode=bundle_pb2.RESIZE_MODE_SHORT_SIDE,
        interpolation=bundle_pb2.INTERPOLATION_OPENCV_AREA,
    ),
    center_crop(_SIDE, _SIDE),
]


def photograph(width: int, height: int, seed: int = 0) -> bytes:
    """Return a JPEG with edges and noise, about as large as a photograph's."""
    generator = np.random.default_rng(seed)
    small = generator.integers(0, 256, (height // 20 + 1, width // 20 + 1, 3), np.uint8)
    image = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
    noise = generator.normal(0, 6, (height, width, 3))
    pixels = np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=90)
    return file.getvalue()


def _with_pixels(path: Path) -> Path:
    """Return the ResNet-50 of the other benchmarks with uint8 pixels as its input."""
    model = onnx.load(path)
    mean = (np.array(_MEAN, np.float32) * 255).reshape(1, 3, 1, 1)
    scale = (1 / (np.array(_STD, np.float32) * 255)).reshape(1, 3, 1, 1)
    first = model.graph.input[0].name
    model.graph.initializer.extend(
        [numpy_helper.from_array(mean, "mean"), numpy_helper.from_array(scale, "scale")]
    )
    made = [
        helper.make_node("Transpose", ["image"], ["nchw"], perm=[0, 3, 1, 2]),
        helper.make_node("Cast", ["nchw"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Sub", ["floats", "mean"], ["centred"]),
        helper.make_node("Mul", ["centred", "scale"], [first]),
    ]
    nodes = [*made, *model.graph.node]
    del model.graph.node[:], model.graph.input[:]
    model.graph.node.extend(nodes)
    model.graph.input.append(
        helper.make_tensor_value_info("image", TensorProto.UINT8, ["batch", _SIDE, _SIDE, 3])
    )
    written = path.with_name("pixels.onnx")
    onnx.save(model, written)
    return written


@dataclass
class Suite:
    """`pollard up` with the model in production."""

    process: subprocess.Popen[bytes]
    addresses: dict[str, str]
    pids: dict[str, int]


@contextlib.contextmanager
def _pollard(model: Path, folder: Path) -> Iterator[Suite]:
    manifest = bundle_pb2.Manifest(
        schema_version=1, name="photographs", task=bundle_pb2.TASK_CLASSIFICATION
    )
    manifest.inputs.add(
        name="image", data_type=bundle_pb2.DATA_TYPE_UINT8, shape=[-1, _SIDE, _SIDE, 3]
    )
    manifest.outputs.add(name="logits", data_type=bundle_pb2.DATA_TYPE_FP32, shape=[-1, 1000])
    manifest.preprocess.extend(PILLOW_STEPS)
    manifest.postprocess.classification.output = "logits"
    manifest.variants.add(
        name="cpu-int8", target="cpu-int8", model_file="model.onnx", max_batch_size=8
    )
    bundle = write_bundle(folder / "bundle", manifest, {"model.onnx": model})
    ready = folder / "ready.json"
    with (BUILD / "images-pollard.log").open("wb") as log:
        process = subprocess.Popen(
            [
                *(*pollard_command(), "up", "--port-base", "0", "--stop-with-parent"),
                *("--data-dir", str(folder / "data"), "--ready-file", str(ready)),
            ],
            stdout=log,
            stderr=log,
        )
    try:
        until = time.monotonic() + 90
        while not ready.exists():
            if process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"pollard up did not become ready; see {log.name}")
            time.sleep(0.1)
        services = json.loads(ready.read_text())["services"]
        with ModelsClient(services["models"]["address"], timeout=120) as models:
            models.push(bundle.path, "photographs", alias="production")
        yield Suite(
            process,
            {name: str(each["address"]) for name, each in services.items()},
            {name: int(each["pid"]) for name, each in services.items()},
        )
    finally:
        process.terminate()
        process.wait(30)


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
    suite: Suite, triton: ServerProcess | None, content: bytes, rounds: int, seconds: float
) -> dict[str, Any]:
    question = vision_pb.PredictRequest(
        model=preprocess_pb.ModelSelector(model="photographs"),
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
            asked = pb.ModelInferRequest(model_name="photographs")
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


def _engine_ms(model: Path, seconds: float) -> float:
    """Return the median time of the ONNX file alone, one thread, in milliseconds."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    image = np.zeros((1, _SIDE, _SIDE, 3), np.uint8)
    times = []
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        begin = time.perf_counter()
        session.run(None, {"image": image})
        times.append(time.perf_counter() - begin)
    return statistics.median(times) * 1e3


def _pillow(content: bytes) -> np.ndarray:
    image = Image.open(io.BytesIO(content)).convert("RGB")
    width, height = image.size
    size = (_SHORT, int(_SHORT * height / width))
    if width > height:
        size = (int(_SHORT * width / height), _SHORT)
    image = image.resize(size, Image.Resampling.BILINEAR)
    left, top = round((image.width - _SIDE) / 2), round((image.height - _SIDE) / 2)
    return np.ascontiguousarray(image.crop((left, top, left + _SIDE, top + _SIDE)))


def _opencv(content: bytes) -> np.ndarray:
    import cv2

    image = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)
    height, width = image.shape[:2]
    size = (_SHORT, int(_SHORT * height / width))
    if width > height:
        size = (int(_SHORT * width / height), _SHORT)
    image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    left, top = round((size[0] - _SIDE) / 2), round((size[1] - _SIDE) / 2)
    return np.ascontiguousarray(
        cv2.cvtColor(image[top : top + _SIDE, left : left + _SIDE], cv2.COLOR_BGR2RGB)
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
            ("Pillow", PILLOW_STEPS, _pillow),
            ("OpenCV", OPENCV_STEPS, _opencv),
        ):
            pipeline = Pipeline(steps)
            packed = bundle_pb2.Manifest(preprocess=steps).SerializeToString()
            rates: dict[str, list[list[float]]] = {"plain": [], "pipeline": [], "worker": []}
            for _ in range(rounds):
                order = ["plain", "pipeline", "worker"]
                row: dict[str, list[float]] = {each: [] for each in order}
                for each in (*order, *reversed(order)):
                    if each == "worker":
                        rate = await _pool_rate(pool, packed, content, seconds)
                    else:
                        run = plain if each == "plain" else pipeline.apply
                        rate = _rate(run, content, seconds)
                    row[each].append(rate)
                for each, pair in row.items():
                    rates[each].append(pair)
            found[name] = rates
    finally:
        await pool.close()
    return found


def _memory(suite: Suite, megapixels: int) -> dict[str, Any]:
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
                    model=preprocess_pb.ModelSelector(model="photographs"),
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
    lines += [
        f"JPEG of {result['image']}, ResNet-50 int8 with uint8 input; {result['rounds']} rounds.",
        "",
        f"**What Predict adds at one caller**: p50 {result['predict_p50_ms']:.2f} ms, the ONNX "
        f"file alone {result['engine_ms']:.2f} ms: {result['added_ms']:.2f} ms more.",
        "",
        "**Decoding and transforming, one core**, images a second over those of a plain loop of "
        "the same calls:",
        "",
        "| steps | plain loop | in process | decode worker and the way to it | plain loop twice |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, rates in result["preprocessing"].items():
        plain = statistics.median([rate for pair in rates["plain"] for rate in pair])
        lines.append(
            f"| {name} | {plain:.0f} /s | {ratios(rates['pipeline'], rates['plain'])} | "
            f"{ratios(rates['worker'], rates['plain'])} | {control(rates['plain'])} |"
        )
    lines += ["", "**Predict over Triton's ensemble**, Python backend for both of its models:", ""]
    lines += [
        "| callers | Pollard | Triton | throughput | p50 | p99 | Triton twice |",
        "|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for callers, rows in result["against"].items():
        if "Triton" not in rows:
            lines.append(f"| {callers} | {_median(rows['Pollard']):.1f} /s | – | – | – | – | – |")
            continue
        ours, theirs = rows["Pollard"], rows["Triton"]
        lines.append(
            f"| {callers} | {_median(ours):.1f} /s | {_median(theirs):.1f} /s | "
            f"{ratios(_rates(ours), _rates(theirs))} | {_latency(ours, theirs, 0.5)} | "
            f"{_latency(ours, theirs, 0.99)} | {control(_rates(theirs))} |"
        )
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


def main(
    rounds: Annotated[int, typer.Option(help="Rounds of A B B A.")] = 7,
    seconds: Annotated[float, typer.Option(help="Length of one measurement.")] = 2.0,
    image: Annotated[Path | None, typer.Option(help="A JPEG; by default one made here.")] = None,
    alone: Annotated[bool, typer.Option("--alone", help="Without Triton.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for the result.")] = ROOT / "bench/results",
) -> None:
    """Measure images, print and keep the result."""
    before = environment()
    content = image.read_bytes() if image is not None else photograph(500, 375)
    with Image.open(io.BytesIO(content)) as opened:
        words = f"{opened.width} × {opened.height} pixels, {len(content)} bytes"
    model = _with_pixels(resnet50().onnx)
    result: dict[str, Any] = {"environment": before, "image": words, "rounds": rounds}
    result["preprocessing"] = asyncio.run(_preprocessing(content, rounds, seconds / 2))
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        suite = stack.enter_context(_pollard(model, Path(folder)))
        triton = None
        if not alone:
            try:
                triton = stack.enter_context(start_ensemble(fetch(), model))
            except PeerMissing as error:
                print(f"without Triton: {error}", file=sys.stderr)
        result["against"] = asyncio.run(_against(suite, triton, content, rounds, seconds))
        result["engine_ms"] = _engine_ms(model, 5)
        once = [load for pair in result["against"]["1"]["Pollard"] for load in pair]
        result["predict_p50_ms"] = statistics.median([load.quantile(0.5) for load in once])
        result["added_ms"] = result["predict_p50_ms"] - result["engine_ms"]
        result["memory"] = [_memory(suite, size) for size in (24, 36, 100)]
    text = _words(result)
    print(text)
    file = out / f"images-{time.strftime('%Y-%m-%d')}"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.with_suffix(".md").write_text(text)
    result["against"] = {
        callers: {
            name: [
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
            for name, pairs in rows.items()
        }
        for callers, rows in result["against"].items()
    }
    file.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
