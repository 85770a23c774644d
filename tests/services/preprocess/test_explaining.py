"""Saliency maps over gRPC, of a model whose reasons are known."""

import asyncio
import io

import grpc
import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from PIL import Image

from pollard.client import AsyncVisionClient
from pollard.preprocess.v1 import preprocess_service_pb2 as preprocess_pb
from pollard.services.preprocess import explaining
from pollard.vision.v1 import vision_service_pb2 as vision_pb

INFERENCE, PREPROCESS = 1, 2
SIDE = 28


def question(content: bytes, **fields) -> vision_pb.ExplainRequest:
    return vision_pb.ExplainRequest(
        model=preprocess_pb.ModelSelector(model="quarters"),
        image=preprocess_pb.Image(content=content),
        **fields,
    )


def quarters(make_linear_model) -> bytes:
    """Class k is as likely as quarter k of the image is bright (upper left, upper right, …)."""
    model = onnx.load_from_string(make_linear_model(size=SIDE, channels=3, classes=4))
    weights = np.zeros((SIDE, SIDE, 3, 4), np.float32)
    half = SIDE // 2
    for index in range(4):
        top, left = index // 2 * half, index % 2 * half
        weights[top : top + half, left : left + half, :, index] = 1 / (half * half * 30)
    model.graph.initializer[0].CopyFrom(
        numpy_helper.from_array(weights.reshape(-1, 4), model.graph.initializer[0].name)
    )
    return model.SerializeToString()


@pytest.fixture
def bundle(make_bundle, make_linear_model, make_golden):
    model = quarters(make_linear_model)
    golden = make_golden(model, size=SIDE, channels=3)
    return make_bundle(
        size=SIDE,
        channels=3,
        classes=4,
        files={"cpu-fp32/model.onnx": model, "cpu-fp32/golden.npz": golden},
    )


@pytest.fixture
async def replica(manager, bundle, start_inference, start_preprocess):
    wanted = manager.set(INFERENCE, {1: bundle}, {"production": {1: 1}}, model="quarters")
    inference = await start_inference()
    await manager.acknowledged(wanted, "inference-1")
    manager.set(
        PREPROCESS,
        {1: bundle},
        {"production": {1: 1}},
        model="quarters",
        endpoints=(inference.address,),
    )
    replica = await start_preprocess(explain_masks=160)
    await manager.acknowledged(manager.version, "preprocess-1")
    return replica


@pytest.fixture
def picture() -> bytes:
    """200 × 100, bright at the lower left and, less so, at the upper right."""
    pixels = np.zeros((100, 200, 3), np.uint8)
    pixels[50:, :100] = 250
    pixels[:50, 100:] = 150
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def quarter_means(response: vision_pb.ExplainResponse) -> list[float]:
    values = np.array(response.values).reshape(response.height, response.width)
    rows, columns = response.height // 2, response.width // 2
    return [
        values[part].mean()
        for part in (
            np.s_[:rows, :columns],
            np.s_[:rows, columns:],
            np.s_[rows:, :columns],
            np.s_[rows:, columns:],
        )
    ]


async def test_the_best_class_is_explained_by_what_it_looks_at(replica, picture):
    response = await replica.vision.Explain(question(picture))
    assert (response.label.index, response.label.label) == (2, "class 2")
    assert (response.model, response.revision) == ("quarters", 1)
    assert (response.height, response.width) == (100, 200)
    assert min(response.values) == 0
    assert max(response.values) == 1
    assert int(np.argmax(quarter_means(response))) == 2
    assert not response.overlay_png
    again = await replica.vision.Explain(question(picture))
    assert again == response


async def test_another_class_has_other_reasons(replica, picture):
    response = await replica.vision.Explain(question(picture, class_index=1))
    assert response.label.index == 1
    assert int(np.argmax(quarter_means(response))) == 1
    with pytest.raises(grpc.aio.AioRpcError, match="has the classes 0 to 3") as raised:
        await replica.vision.Explain(question(picture, class_index=4))
    assert raised.value.code() == grpc.StatusCode.INVALID_ARGUMENT


async def test_the_map_is_painted_over_the_image(replica, picture):
    response = await replica.vision.Explain(question(picture, overlay=True))
    painted = np.asarray(Image.open(io.BytesIO(response.overlay_png)).convert("RGB")).astype(int)
    assert painted.shape == (100, 200, 3)
    # The brightest part of the picture is still the brightest of the painted one.
    assert painted[55:, :95].mean() > painted[55:, 105:].mean()


async def test_bad_requests_are_refused(replica):
    for request, words in (
        (question(b"no image"), "not an image"),
        (question(b""), "empty"),
        (vision_pb.ExplainRequest(), "model"),
    ):
        with pytest.raises(grpc.aio.AioRpcError, match=words) as raised:
            await replica.vision.Explain(request)
        assert raised.value.code() == grpc.StatusCode.INVALID_ARGUMENT


async def test_a_deadline_ends_it_and_the_next_one_is_served(replica, picture):
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await replica.vision.Explain(question(picture), timeout=0.02)
    assert raised.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    assert (await replica.vision.Explain(question(picture))).label.index == 2


async def test_too_many_at_once_are_told_to_come_again(replica, picture):
    calls = [
        asyncio.ensure_future(replica.vision.Explain(question(picture)))
        for _ in range(explaining.MAX_WAITING + 8)
    ]
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    refused = [each for each in outcomes if isinstance(each, grpc.aio.AioRpcError)]
    assert {each.code() for each in refused} == {grpc.StatusCode.UNAVAILABLE}
    assert len(refused) == 7
    assert "explanations wait already" in refused[0].details()


async def test_only_classifiers_are_explained(manager, replica, make_bundle, picture):
    def embed(manifest) -> None:
        manifest.task = 4
        manifest.postprocess.embedding.output = "scores"

    other = make_bundle(size=8, channels=3, edit=embed)
    wanted = manager.set(PREPROCESS, {1: other}, {"production": {1: 1}}, model="vectors")
    await manager.acknowledged(wanted, "preprocess-1")
    request = question(picture)
    request.model.model = "vectors"
    with pytest.raises(grpc.aio.AioRpcError, match="is no classifier") as raised:
        await replica.vision.Explain(request)
    assert raised.value.code() == grpc.StatusCode.FAILED_PRECONDITION


async def test_the_python_client_explains(replica, picture):
    async with AsyncVisionClient(replica.server.address) as client:
        explanation = await client.explain(picture, "quarters", class_index=2, overlay=True)
    assert explanation.label.index == 2
    assert explanation.values.shape == (100, 200)
    assert explanation.values.max() == 1
    assert Image.open(io.BytesIO(explanation.overlay_png)).size == (200, 100)
