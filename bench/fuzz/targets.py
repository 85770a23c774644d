"""What is fuzzed: a function that takes any bytes, and bytes to begin with.

A target may raise the errors that are documented for what it calls; anything else is a finding.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from pollard.bundle.v1 import bundle_pb2
from pollard.runtime import archive, graph_scan, images
from pollard.runtime.bundle import parse_manifest, write_bundle
from pollard.runtime.errors import ImageInvalid, RuntimeFault
from pollard.runtime.transforms import (
    Pipeline,
    center_crop,
    decode,
    flip,
    normalize,
    pad,
    resize,
    rotate,
)
from pollard.services.common.errors import InvalidRequest, ServiceError
from pollard.services.inference import config
from pollard.services.inference.frontends import framing
from pollard.services.models.part import Part, committed_bytes


@dataclass(frozen=True)
class Target:
    """One thing that is fuzzed."""

    run: Callable[[bytes], None]
    seeds: Callable[[], Sequence[bytes]]


_LIMITS = images.ImageLimits(max_pixels=4_000_000)
"""Smaller than a server's, so that every input is worked on within seconds."""

_PIPELINES = [
    [decode(), resize(32, 24)],
    [decode(gray=True), resize(0, 40, mode=bundle_pb2.RESIZE_MODE_SHORT_SIDE), center_crop(32, 32)],
    [decode(icc=True), resize(48, 48, mode=bundle_pb2.RESIZE_MODE_LETTERBOX, fill=[1, 2, 3])],
    [decode(reduced_scale=True), resize(20, 20), flip(horizontal=True), rotate(1), pad(1, 2, 3, 4)],
    [
        decode(background=[9, 9, 9]),
        resize(16, 16),
        normalize([0.5] * 3, [0.5] * 3, layout="NCHW"),
    ],
]


def _image(data: bytes) -> None:
    if not data:
        return
    pipeline = Pipeline(_PIPELINES[data[0] % len(_PIPELINES)], _LIMITS)
    try:
        result = pipeline.apply(data[1:])
    except ImageInvalid:
        return
    assert pipeline.output_shape is None or result.array.shape == pipeline.output_shape
    assert result.array.dtype == pipeline.dtype


def _image_seeds() -> list[bytes]:
    y, x = np.mgrid[0:30, 0:40]
    pixels = np.stack([x * 6 % 256, y * 8 % 256, (x + y) * 3 % 256], axis=2).astype(np.uint8)
    photograph = Image.fromarray(pixels)
    exif = Image.Exif()
    exif[0x0112] = 6
    made = []
    for mode, kind, options in (
        ("RGB", "JPEG", {"exif": exif}),
        ("RGB", "JPEG", {"progressive": True}),
        ("CMYK", "JPEG", {}),
        ("L", "JPEG", {}),
        ("RGB", "PNG", {}),
        ("RGBA", "PNG", {}),
        ("P", "PNG", {}),
        ("1", "PNG", {}),
        ("RGB", "WEBP", {}),
        ("RGB", "GIF", {}),
        ("RGB", "BMP", {}),
        ("RGB", "TIFF", {"compression": "tiff_lzw"}),
        ("1", "TIFF", {"compression": "group4"}),
        *((("RGB", "AVIF", {}),) if "AVIF" in images.FORMATS else ()),
    ):
        file = io.BytesIO()
        photograph.convert(mode).save(file, kind, **options)  # type: ignore[arg-type]
        made.append(file.getvalue())
    return [bytes([step]) + each for step, each in enumerate(made)]


def _manifest(data: bytes) -> None:
    try:
        parse_manifest(data)
    except RuntimeFault:
        return


def _small_manifest() -> bundle_pb2.Manifest:
    manifest = bundle_pb2.Manifest(schema_version=1, name="m", task=bundle_pb2.TASK_CLASSIFICATION)
    manifest.inputs.add(
        name="image", data_type=bundle_pb2.DATA_TYPE_UINT8, shape=[-1, 8, 8, 3], layout="NHWC"
    )
    manifest.outputs.add(name="scores", data_type=bundle_pb2.DATA_TYPE_FP32, shape=[-1, 3])
    manifest.preprocess.extend([decode(), resize(8, 8)])
    manifest.postprocess.classification.output = "scores"
    manifest.variants.add(name="cpu-fp32", target="cpu-fp32", model_file="model.onnx")
    return manifest


def _bundle_tar() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        bundle = write_bundle(Path(folder) / "b", _small_manifest(), {"model.onnx": b"weights"})
        file = io.BytesIO()
        archive.pack(bundle, file)
        return file.getvalue()


def _manifest_seeds() -> list[bytes]:
    tar = _bundle_tar()
    begin = tar.index(b'{\n  "schema_version"')
    written = tar[begin : tar.index(b"\0", begin)]
    return [written, json.dumps(json.loads(written)).encode(), b"{}"]


def _archive(data: bytes) -> None:
    with tempfile.TemporaryDirectory(dir=_SCRATCH) as folder:
        root = Path(folder)
        try:
            archive.unpack(io.BytesIO(data), root / "in" / "b")
        except RuntimeFault:
            assert not (root / "in" / "b").exists()
        outside = [path for path in root.iterdir() if path.name != "in"]
        assert not outside, outside


def _upload(data: bytes) -> None:
    """A tar that arrives in two halves, with a death of the manager in between."""
    half = len(data) // 2
    with tempfile.TemporaryDirectory(dir=_SCRATCH) as folder:
        root = Path(folder)
        try:
            for start, end in ((0, half), (half, len(data))):
                part = Part(root / "in", max_files=100, max_total_bytes=1 << 24, hash_tar=True)
                try:
                    part.open()
                    assert part.size == start
                    part.append([data[start:end]])
                    assert committed_bytes(part.directory) == end
                finally:
                    part.close()
        except InvalidRequest:
            pass
        outside = [path for path in root.iterdir() if path.name != "in"]
        assert not outside, outside
        assert not [path for path in root.rglob("*") if path.is_symlink()]


def _graph(data: bytes) -> None:
    with tempfile.NamedTemporaryFile(dir=_SCRATCH) as file:
        file.write(data)
        file.flush()
        try:
            found = graph_scan.scan_graph(Path(file.name))
            graph_scan.check_external(found, "model.onnx", {"weights.bin": 10})
            graph_scan.check_opset(found, 18)
        except RuntimeFault:
            return


def _graph_seeds() -> list[bytes]:
    weights = np.arange(12, dtype=np.float32).reshape(3, 4)
    external = numpy_helper.from_array(weights, "outside")
    external.data_location = TensorProto.EXTERNAL
    external.ClearField("raw_data")
    for key, value in (("location", "weights.bin"), ("offset", "0"), ("length", "48")):
        external.external_data.add(key=key, value=value)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4])],
        [numpy_helper.from_array(weights, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    plain = model.SerializeToString()
    model.graph.initializer.append(external)
    return [plain, model.SerializeToString()]


def _config(data: bytes) -> None:
    text = data.decode("utf-8", "surrogateescape" if data[:1] == b"\0" else "replace")
    for parse in (config.parse_config, config.parse_json_config):
        try:
            parsed = parse(text, "m")
            config.check_config(parsed)
        except ServiceError:
            continue
    config.says_batch_size(text)


def _config_seeds() -> list[bytes]:
    text = """name: "m" platform: "onnxruntime_onnx" max_batch_size: 8
input [ { name: "x" data_type: TYPE_FP32 dims: [ -1, 3 ] } ]
output [ { name: "y" data_type: TYPE_FP32 dims: [ 4 ] label_filename: "labels.txt" } ]
instance_group [ { count: 2 kind: KIND_CPU } ]
dynamic_batching { preferred_batch_size: [ 4, 8 ] max_queue_delay_microseconds: 100
  priority_levels: 2 default_priority_level: 1
  default_queue_policy { max_queue_size: 8 timeout_action: DELAY } }
version_policy: { latest { num_versions: 2 } }
parameters { key: "intra_op_thread_count" value: { string_value: "2" } }
"""
    return [
        text.encode(),
        b'{"maxBatchSize": 4, "input": [{"name": "x", "dataType": "TYPE_INT8", "dims": ["4"]}]}',
    ]


def _framing(data: bytes) -> None:
    """The first byte chooses the encoding and how the rest is cut; the rest is the body."""
    if not data:
        return
    framing.seconds_of(data[1:12])
    framing.seconds_of(data[1:])
    encoding = (b"", b"gzip", b"deflate", data[1:5])[data[0] & 3]
    step = 1 + (data[0] >> 2)
    parts = [data[i : i + step] for i in range(1, len(data), step)] or [b""]

    def messages() -> framing.Messages:
        left = iter(range(len(parts)))

        async def receive() -> dict[str, object]:
            index = next(left, None)
            if index is None:
                return {"type": "http.disconnect"}
            more = index + 1 < len(parts)
            return {"type": "http.request", "body": parts[index], "more_body": more}

        return framing.Messages(receive, encoding, 64 * 1024)

    async def read() -> None:
        with contextlib.suppress(ServiceError, framing.CallerGone):
            async for message in messages().each():
                assert len(message) <= 64 * 1024
        with contextlib.suppress(ServiceError, framing.CallerGone):
            assert len(await messages().only()) <= 64 * 1024

    asyncio.run(read())


def _framing_seeds() -> list[bytes]:
    import gzip
    import zlib

    message = b"some message " * 5
    packed, flat = gzip.compress(message), zlib.compress(bytes(200_000))

    def with_flag(content: bytes) -> bytes:
        return b"\1" + len(content).to_bytes(4, "big") + content

    return [
        b"\xfc" + framing.frame(message),
        b"\x0c" + framing.frame(b"") + framing.frame(message),
        b"\xfd" + with_flag(packed),
        b"\xfe" + with_flag(flat),
        b"\0" + b"100m" + framing.frame(message),
        b"\0" + b"9" * 400 + b"H",
    ]


_SCRATCH = "/dev/shm" if Path("/dev/shm").is_dir() else None  # noqa: S108 - made by tempfile

TARGETS = {
    "images": Target(_image, _image_seeds),
    "manifest": Target(_manifest, _manifest_seeds),
    "archive": Target(_archive, lambda: [_bundle_tar()]),
    "upload": Target(_upload, lambda: [_bundle_tar()]),
    "graph": Target(_graph, _graph_seeds),
    "config": Target(_config, _config_seeds),
    "framing": Target(_framing, _framing_seeds),
}
"""By name: image files, manifest.json, bundle tars, ONNX files, config.pbtxt, gRPC messages."""
