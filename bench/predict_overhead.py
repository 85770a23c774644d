"""What `Predict` adds to the network's own time at one caller: `python -m bench.predict_overhead`.

In turns, request by request in one process: the ONNX file run here, the same tensor sent to the
inference service, the JPEG decoded and transformed here by a plain Pillow pipeline, and the JPEG
sent to `Predict`. So whatever else the machine does meets all of them alike. Cheap networks show
what the noise of a large one hides.
"""

from __future__ import annotations

import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import grpc
import numpy as np
import onnxruntime
import typer

from bench.environment import environment, heading
from bench.images import plain_pillow
from bench.photographs import MODELS, Suite, photograph, serve
from bench.statistics import interval
from pollard.inference import grpc_service_pb2 as pb
from pollard.inference import grpc_service_pb2_grpc as pb_grpc
from pollard.preprocess.v1 import preprocess_service_pb2 as preprocess_pb
from pollard.vision.v1 import vision_service_pb2 as vision_pb
from pollard.vision.v1 import vision_service_pb2_grpc as vision_grpc

_CHUNKS = 10
"""Medians of so many stretches give the interval."""


def _once_served(ask: Callable[[], Any]) -> None:
    """Ask until there is an answer: a push is over before every server knows of it."""
    until = time.monotonic() + 60
    while True:
        try:
            ask()
            return
        except grpc.RpcError:
            if time.monotonic() > until:
                raise
        time.sleep(0.2)


def _in_turns(asks: dict[str, Callable[[], Any]], seconds: float) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in asks}
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        for name, ask in asks.items():
            begin = time.perf_counter()
            ask()
            times[name].append((time.perf_counter() - begin) * 1e3)
    return times


def _measure(suite: Suite, name: str, model: Path, content: bytes, seconds: float) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    pixels = plain_pillow(content)[np.newaxis]
    question = vision_pb.PredictRequest(
        model=preprocess_pb.ModelSelector(model=name), image=preprocess_pb.Image(content=content)
    )
    tensor = pb.ModelInferRequest(model_name=name)
    tensor.inputs.add(name="image", datatype="UINT8", shape=pixels.shape)
    tensor.raw_input_contents.append(pixels.tobytes())
    with (
        grpc.insecure_channel(suite.addresses["preprocess"]) as ours,
        grpc.insecure_channel(suite.addresses["inference"]) as inference,
    ):
        vision = vision_grpc.VisionServiceStub(ours)  # type: ignore[no-untyped-call]
        direct = pb_grpc.GRPCInferenceServiceStub(inference)  # type: ignore[no-untyped-call]
        parts: list[tuple[float, float, float]] = []

        def predict() -> None:
            timings = vision.Predict(question, timeout=30).timings
            parts.append(
                (
                    timings.preprocess.ToMicroseconds() / 1e3,
                    timings.inference.ToMicroseconds() / 1e3,
                    timings.postprocess.ToMicroseconds() / 1e3,
                )
            )

        asks: dict[str, Callable[[], Any]] = {
            "network": lambda: session.run(None, {"image": pixels}),
            "infer": lambda: direct.ModelInfer(tensor, timeout=30),
            "pillow": lambda: plain_pillow(content),
            "predict": predict,
        }
        for ask in asks.values():
            _once_served(ask)
        _in_turns(asks, 1.0)
        parts.clear()
        times = _in_turns(asks, seconds)
    found: dict[str, Any] = {each: statistics.median(values) for each, values in times.items()}
    found["parts"] = [statistics.median(column) for column in zip(*parts, strict=True)]
    ends = np.linspace(0, len(times["predict"]), _CHUNKS + 1).astype(int)
    added = [
        statistics.median(times["predict"][a:b]) - statistics.median(times["network"][a:b])
        for a, b in itertools.pairwise(ends)
    ]
    found["added"] = str(interval(added))
    found["requests"] = len(times["predict"])
    return found


def main(
    seconds: Annotated[float, typer.Option(help="For each model.")] = 20.0,
    models: Annotated[str, typer.Option(help="Which, by comma.")] = ",".join(MODELS),
    out: Annotated[Path | None, typer.Option(help="Folder for the result.")] = None,
) -> None:
    """Measure, print, and keep the result where a folder is named."""
    before = environment()
    content = photograph(500, 375)
    files = {name: MODELS[name][1]() for name in models.split(",")}
    with tempfile.TemporaryDirectory() as folder, serve(files, Path(folder)) as suite:
        found = {
            name: _measure(suite, name, path, content, seconds) for name, path in files.items()
        }
    text = _words(before, found, len(content))
    print(text)
    if out is not None:
        file = out / f"predict-overhead-{time.strftime('%Y-%m-%d')}"
        file.with_suffix(".md").write_text(text)
        file.with_suffix(".json").write_text(
            json.dumps({"environment": before, "found": found}, indent=1) + "\n"
        )


def _words(before: dict[str, object], found: dict[str, Any], size: int) -> str:
    lines = [
        *("# What Predict adds to the network", "", heading(before), ""),
        f"JPEG of 500 × 375 pixels, {size} bytes; one caller; medians in milliseconds of requests "
        "made in turns. Added: `Predict` less the network alone, with the 95 % interval of "
        f"{_CHUNKS} stretches; the last columns are what `Predict` itself says of its parts.",
        "",
        "| network | requests | alone, 1 thread | by ModelInfer | Pillow alone | Predict | added | "
        "preprocess | inference | answer |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, row in found.items():
        alone, infer, pillow, predict = (
            f"{row[each]:.2f}" for each in ("network", "infer", "pillow", "predict")
        )
        parts = " | ".join(f"{part:.2f}" for part in row["parts"])
        lines.append(
            f"| {MODELS[name][0]} | {row['requests']} | {alone} | {infer} | {pillow} | "
            f"{predict} | {row['added']} | {parts} |"
        )
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    typer.run(main)
