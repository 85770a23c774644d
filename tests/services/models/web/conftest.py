"""The page of a real manager, over real HTTP; and bundles whose answers can be drawn."""

from __future__ import annotations

import io
import re
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from yarl import URL

from pollard.bundle.v1 import bundle_pb2
from pollard.runtime.bundle import Bundle, write_bundle

SIDE = 32
LABELS = b"red\ngreen\nblue\n"


@dataclass
class Answered:
    """What the page answered."""

    status: int
    text: str
    headers: Any


@dataclass
class Visitor:
    """A browser without a screen: it keeps its cookie and fills in forms."""

    url: str
    session: aiohttp.ClientSession
    origin: bool = True
    """Whether it says where a form comes from."""
    headers: dict[str, str] = field(default_factory=dict)

    async def get(self, path: str, **headers: str) -> Answered:
        # As it is: nothing is taken out of the path on the way.
        async with self.session.get(
            URL(self.url + path, encoded=True),
            headers=self.headers | headers,
            allow_redirects=False,
        ) as answer:
            return Answered(answer.status, await answer.text(), answer.headers)

    async def csrf(self) -> str:
        """What the forms of this visitor carry."""
        found = re.search(
            r'name="csrf" value="([0-9a-f]{64})"', (await self.get("/models/m/revisions/2")).text
        )
        assert found
        return found[1]

    async def post(
        self, path: str, headers: dict[str, str] | None = None, **fields: str
    ) -> Answered:
        if "csrf" not in fields:
            fields["csrf"] = await self.csrf()
        sent = {"Origin": self.url} if self.origin else {}
        async with self.session.post(
            self.url + path,
            data=fields,
            headers=self.headers | sent | (headers or {}),
            allow_redirects=False,
        ) as answer:
            return Answered(answer.status, await answer.text(), answer.headers)

    async def etag(self, path: str, action: str) -> str:
        """The etag in a form of a page."""
        text = (await self.get(path)).text
        form = re.search(rf'action="{re.escape(action)}"[^>]*>(.*?)</form>', text, re.S)
        assert form, text
        found = re.search(r'name="etag" value="([^"]*)"', form[1])
        assert found
        return found[1]


@pytest.fixture
async def visit() -> AsyncIterator[Callable[[Any], Visitor]]:
    """Returns a function that makes a visitor of a suite's page."""
    sessions: list[aiohttp.ClientSession] = []

    def make(suite: Any) -> Visitor:
        # The page is reached by an address, of which cookies are not kept otherwise.
        jar = aiohttp.CookieJar(unsafe=True)
        sessions.append(aiohttp.ClientSession(cookie_jar=jar))
        return Visitor(suite.service.http.url, sessions[-1])

    yield make
    for session in sessions:
        await session.close()


def _graph(nodes: list[Any], outputs: dict[str, list[int]], constants: list[Any]) -> bytes:
    image = helper.make_tensor_value_info("image", TensorProto.UINT8, ["batch", SIDE, SIDE, 3])
    made = helper.make_model(
        helper.make_graph(
            [
                helper.make_node("Cast", ["image"], ["float"], to=TensorProto.FLOAT),
                helper.make_node("Transpose", ["float"], ["planes"], perm=[0, 3, 1, 2]),
                *nodes,
            ],
            "colours",
            [image],
            [
                helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", *shape])
                for name, shape in outputs.items()
            ],
            constants,
        ),
        opset_imports=[helper.make_opsetid("", 18)],
    )
    made.ir_version = 10
    onnx.checker.check_model(made)
    return made.SerializeToString()


def classifier(order: tuple[int, int, int]) -> bytes:
    """The mean colour, its channels in some order."""
    return _graph(
        [
            helper.make_node("GlobalAveragePool", ["planes"], ["means"]),
            helper.make_node("Flatten", ["means"], ["flat"]),
            helper.make_node("Gather", ["flat", "order"], ["turned"], axis=1),
            helper.make_node("Div", ["turned", "scale"], ["scores"]),
        ],
        {"scores": [3]},
        [
            numpy_helper.from_array(np.array(order, np.int64), "order"),
            numpy_helper.from_array(np.array(50, np.float32), "scale"),
        ],
    )


def detector() -> bytes:
    """A box for the upper half and one for the lower, scored by their mean red, green and blue."""
    half = SIDE // 2
    boxes = np.array([[[0, 0, SIDE, half], [0, half, SIDE, SIDE]]], np.float32)
    return _graph(
        [
            helper.make_node(
                "AveragePool", ["planes"], ["halves"], kernel_shape=[half, SIDE], strides=[half, 1]
            ),
            helper.make_node("Div", ["halves", "white"], ["shares"]),
            helper.make_node("Reshape", ["shares", "shape"], ["rows"]),
            helper.make_node("Transpose", ["rows"], ["scores"], perm=[0, 2, 1]),
            helper.make_node("Shape", ["image"], ["batch"], end=1),
            helper.make_node("Concat", ["batch", "one", "one"], ["times"], axis=0),
            helper.make_node("Tile", ["corners", "times"], ["boxes"]),
        ],
        {"boxes": [2, 4], "scores": [2, 3]},
        [
            numpy_helper.from_array(np.array(255, np.float32), "white"),
            numpy_helper.from_array(np.array([0, 3, -1], np.int64), "shape"),
            numpy_helper.from_array(np.array([1], np.int64), "one"),
            numpy_helper.from_array(boxes, "corners"),
        ],
    )


def segmenter() -> bytes:
    """Classes are the colours."""
    nodes = [helper.make_node("Identity", ["planes"], ["mask"])]
    return _graph(nodes, {"mask": [3, SIDE, SIDE]}, [])


def colours(path: Path, task: str, turned: bool = False, report: bytes = b"") -> Bundle:
    """A bundle that tells colours: a "classification", "detection" or "segmentation"."""
    manifest = bundle_pb2.Manifest(name="colours")
    manifest.task = bundle_pb2.Task.Value(f"TASK_{task.upper()}")
    post = manifest.postprocess
    post.labels_file = "labels.txt"
    if task == "classification":
        model, outputs = classifier((2, 1, 0) if turned else (0, 1, 2)), {"scores": [3]}
        post.classification.output = "scores"
        post.classification.activation = bundle_pb2.ACTIVATION_SOFTMAX
    elif task == "detection":
        model, outputs = detector(), {"boxes": [2, 4], "scores": [2, 3]}
        post.detection.boxes_output, post.detection.scores_output = "boxes", "scores"
        post.detection.score_threshold = 0.4 if turned else 0.9
        post.detection.iou_threshold = 0.5
    else:
        model, outputs = segmenter(), {"mask": [3, SIDE, SIDE]}
        post.segmentation.output = "mask"
        post.segmentation.palette.extend([200, 0, 0, 0, 200, 0, 0, 0, 200])
    manifest.inputs.add(
        name="image", data_type=bundle_pb2.DATA_TYPE_UINT8, shape=[-1, SIDE, SIDE, 3], layout="NHWC"
    )
    for name, shape in outputs.items():
        manifest.outputs.add(name=name, data_type=bundle_pb2.DATA_TYPE_FP32, shape=[-1, *shape])
    manifest.preprocess.add().decode.apply_exif_orientation = True
    manifest.preprocess.add().resize.CopyFrom(
        bundle_pb2.Resize(mode=bundle_pb2.RESIZE_MODE_EXACT, width=SIDE, height=SIDE)
    )
    variant = manifest.variants.add(
        name="cpu-fp32", target="cpu-fp32", model_file="model.onnx", max_batch_size=8
    )
    variant.requirements.opset = 18
    files: dict[str, bytes | Path] = {"model.onnx": model, "labels.txt": LABELS}
    if report:
        files["report.html"] = report
    return write_bundle(path, manifest, files)


@pytest.fixture(scope="session")
def make_colours() -> Callable[..., Bundle]:
    """:func:`colours`: a bundle that tells colours."""
    return colours


@pytest.fixture(scope="session")
def picture() -> bytes:
    """A PNG, 64 × 48: its upper half is red, its lower half blue."""
    pixels = np.zeros((48, 64, 3), np.uint8)
    pixels[:24, :, 0] = 250
    pixels[24:, :, 2] = 240
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()
