"""Batches and streams of the sync and the asyncio client: order, errors of single images, ends."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import grpc
import pytest

from pollard.client import (
    AsyncVisionClient,
    InvalidArgument,
    NotFound,
    Prediction,
    Transformed,
    VisionClient,
)
from pollard.preprocess.v1 import preprocess_service_pb2
from pollard.vision.v1 import vision_service_pb2

INVALID = grpc.StatusCode.INVALID_ARGUMENT.value[0]


def put_answer(result: Any, content: bytes) -> None:
    if content == b"bad":
        result.error.code, result.error.message, result.error.reason = INVALID, "no", "IMAGE_X"
    else:
        result.response.model, result.response.revision = content.decode(), 1


def predict_stream(requests: Any, context: grpc.ServicerContext) -> Any:
    for request in requests:
        response = vision_service_pb2.PredictStreamResponse(id=request.id)
        put_answer(response.result, request.image.content)
        yield response


@pytest.fixture(params=[False, True], ids=["sync", "asyncio"])
def stream(request: pytest.FixtureRequest, address: str) -> Any:
    """Returns a function that gives at most `take` answers of a stream as a list."""

    def run_sync(method: str, images: Any, take: int) -> list[Any]:
        with VisionClient(address) as client:
            answers = getattr(client, method)(images, "m")
            return [answer for _, answer in zip(range(take), answers, strict=False)]

    async def run_async(method: str, images: Any, take: int) -> list[Any]:
        async def source() -> Any:
            for image in images:
                yield image

        results: list[Any] = []
        async with AsyncVisionClient(address) as client:
            async for answer in getattr(client, method)(source(), "m"):
                results.append(answer)
                if len(results) == take:
                    break
        return results

    def run(method: str, images: Any, take: int = 1000) -> list[Any]:
        if request.param:
            return asyncio.run(run_async(method, images, take))
        return run_sync(method, images, take)

    return run


def test_batch_holds_answers_and_errors_in_order(runner: Any, address: str, scripted: Any) -> None:
    def answer(request: Any, context: grpc.ServicerContext) -> Any:
        response = vision_service_pb2.PredictBatchResponse()
        for image in request.images:
            put_answer(response.results.add(), image.content)
        assert (request.options.top_k, request.model.alias) == (2, "canary")
        assert request.options.augmentation == vision_service_pb2.AUGMENTATION_FLIP
        return response

    scripted.on("PredictBatch", answer)
    first, second, third = runner.call(
        *("vision", address, "predict_batch", [b"a", b"bad", b"c"], "m"),
        alias="canary",
        top_k=2,
        augmentation="flip",
    )
    assert (first.model, third.model) == ("a", "c")
    assert isinstance(second, InvalidArgument)
    assert (second.message, second.reason) == ("no", "IMAGE_X")
    assert second.method.endswith("/PredictBatch")


def test_predict_stream_yields_answers_and_errors_in_order(stream: Any, scripted: Any) -> None:
    scripted.on("PredictStream", predict_stream)
    answers = stream("predict_stream", [b"a", b"bad", *[b"c"] * 50])
    assert isinstance(answers[0], Prediction)
    assert isinstance(answers[1], InvalidArgument)
    assert [answer.model for answer in answers[2:]] == ["c"] * 50


def test_transform_stream(stream: Any, scripted: Any) -> None:
    def answer(requests: Any, context: grpc.ServicerContext) -> Any:
        for request in requests:
            response = preprocess_service_pb2.TransformStreamResponse()
            if request.image.content == b"bad":
                response.error.code = INVALID
            else:
                response.response.revision = 4
                response.response.geometries.add(width=6, height=4, transposed=True)
                tensor = response.response.tensor
                tensor.datatype, tensor.content = "UINT8", b"\1\2"
                tensor.shape.extend([1, 2])
            yield response

    scripted.on("TransformStream", answer)
    good, bad = stream("transform_stream", [b"a", b"bad"])
    assert isinstance(good, Transformed)
    assert good.tensor.tolist() == [[1, 2]]
    assert (good.geometries[0].width, good.geometries[0].transposed) == (6, True)
    assert isinstance(bad, InvalidArgument)


def test_a_stream_that_fails_raises_its_status(stream: Any, scripted: Any, abort_with: Any) -> None:
    def answer(requests: Any, context: grpc.ServicerContext) -> Any:
        abort_with(context, grpc.StatusCode.NOT_FOUND, "no such model")
        yield

    scripted.on("PredictStream", answer)
    with pytest.raises(NotFound, match="no such model"):
        stream("predict_stream", [b"a"])


def test_an_image_that_cannot_be_read_ends_the_stream_with_its_error(
    stream: Any, scripted: Any, tmp_path: Path
) -> None:
    scripted.on("PredictStream", predict_stream)
    with pytest.raises(FileNotFoundError):
        stream("predict_stream", [b"a", tmp_path / "missing.png", b"b"])


def test_a_stream_may_be_left_early(stream: Any, scripted: Any) -> None:
    ended = threading.Event()

    def answer(requests: Any, context: grpc.ServicerContext) -> Any:
        context.add_callback(ended.set)
        yield from predict_stream(requests, context)

    def endless() -> Any:
        while not ended.is_set():
            yield b"a"

    scripted.on("PredictStream", answer)
    assert len(stream("predict_stream", endless(), take=3)) == 3
    assert ended.wait(20)


def test_an_augmentation_that_is_none_is_refused_before_anything_is_sent(
    runner: Any, address: str, scripted: Any
) -> None:
    with pytest.raises(ValueError, match="five_crop"):
        runner.call("vision", address, "predict", b"a", "m", augmentation="rotate")
    assert scripted.calls == []
