"""Photographs, the models that take them as uint8 pixels, and `pollard up` serving these."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from bench.models import mobilenet_v2, resnet50, small_cnn_224
from bench.peers.fetch import BUILD
from bench.process import pollard_command
from pollard.bundle.v1 import bundle_pb2
from pollard.client import ModelsClient
from pollard.runtime.bundle import write_bundle
from pollard.runtime.transforms import center_crop, decode, resize

SIDE, SHORT = 224, 256
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLASSES = 1000

PILLOW_STEPS = [
    decode(exif=False),
    resize(0, SHORT, mode=bundle_pb2.RESIZE_MODE_SHORT_SIDE),
    center_crop(SIDE, SIDE),
]
OPENCV_STEPS = [
    decode(exif=False),
    resize(
        0,
        SHORT,
        mode=bundle_pb2.RESIZE_MODE_SHORT_SIDE,
        interpolation=bundle_pb2.INTERPOLATION_OPENCV_AREA,
    ),
    center_crop(SIDE, SIDE),
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
    """Return a model of the other benchmarks with uint8 pixels as its input."""
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
        helper.make_tensor_value_info("image", TensorProto.UINT8, ["batch", SIDE, SIDE, 3])
    )
    written = path.with_name("pixels.onnx")
    onnx.save(model, written)
    return written


def _least() -> Path:
    """Return a model that takes next to no time: one pixel in 784 and a dense layer."""
    weights = np.random.default_rng(0).standard_normal((192, CLASSES)).astype(np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("Slice", ["image", "zero", "end", "axes", "step"], ["few"]),
            helper.make_node("Cast", ["few"], ["floats"], to=TensorProto.FLOAT),
            helper.make_node("Flatten", ["floats"], ["row"]),
            helper.make_node("MatMul", ["row", "weights"], ["logits"]),
        ],
        "least",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["batch", SIDE, SIDE, 3])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", CLASSES])],
        [
            numpy_helper.from_array(weights, "weights"),
            numpy_helper.from_array(np.array([0, 0], np.int64), "zero"),
            numpy_helper.from_array(np.array([SIDE, SIDE], np.int64), "end"),
            numpy_helper.from_array(np.array([1, 2], np.int64), "axes"),
            numpy_helper.from_array(np.array([28, 28], np.int64), "step"),
        ],
    )
    path = BUILD / "models" / "least.onnx"
    path.parent.mkdir(parents=True, exist_ok=True)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, path)
    return path


MODELS: dict[str, tuple[str, Callable[[], Path]]] = {
    "least": ("next to no network", _least),
    "small-cnn": ("small CNN int8", lambda: _with_pixels(small_cnn_224().onnx)),
    "mobilenet": ("MobileNetV2 int8", lambda: _with_pixels(mobilenet_v2().onnx)),
    "resnet50": ("ResNet-50 int8", lambda: _with_pixels(resnet50().onnx)),
}
"""By name: what it is called, and what builds its ONNX file, uint8 [batch, 224, 224, 3] as
"image" to float32 [batch, 1000] as "logits"."""


@dataclass
class Suite:
    """`pollard up` with the models in production."""

    process: subprocess.Popen[bytes]
    addresses: dict[str, str]
    pids: dict[str, int]


@contextlib.contextmanager
def serve(models: Mapping[str, Path], folder: Path) -> Iterator[Suite]:
    """Run `pollard up` with its data in ``folder``, and these models in production.

    Raises:
        RuntimeError: it did not become ready.
    """
    ready = folder / "ready.json"
    with (BUILD / "images-pollard.log").open("wb") as log:
        process = subprocess.Popen(
            [
                *(*pollard_command(), "up", "--port-base", "0", "--stop-with-parent"),
                *("--data-dir", str(folder / "data"), "--ready-file", str(ready)),
                *("--start-timeout", "170"),
            ],
            stdout=log,
            stderr=log,
        )
    try:
        until = time.monotonic() + 180
        while not ready.exists():
            if process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"pollard up did not become ready; see {log.name}")
            time.sleep(0.1)
        services = json.loads(ready.read_text())["services"]
        with ModelsClient(services["models"]["address"], timeout=120) as client:
            for name, model in models.items():
                bundle = write_bundle(folder / name, _manifest(name), {"model.onnx": model})
                client.push(bundle.path, name, alias="production")
        yield Suite(
            process,
            {name: str(each["address"]) for name, each in services.items()},
            {name: int(each["pid"]) for name, each in services.items()},
        )
    finally:
        process.terminate()
        process.wait(30)


def _manifest(name: str) -> bundle_pb2.Manifest:
    manifest = bundle_pb2.Manifest(schema_version=1, name=name, task=bundle_pb2.TASK_CLASSIFICATION)
    manifest.inputs.add(
        name="image", data_type=bundle_pb2.DATA_TYPE_UINT8, shape=[-1, SIDE, SIDE, 3]
    )
    manifest.outputs.add(name="logits", data_type=bundle_pb2.DATA_TYPE_FP32, shape=[-1, CLASSES])
    manifest.preprocess.extend(PILLOW_STEPS)
    manifest.postprocess.classification.output = "logits"
    manifest.variants.add(
        name="cpu-int8", target="cpu-int8", model_file="model.onnx", max_batch_size=8
    )
    return manifest
