"""Batches and streams: answers in order, errors of their own, nothing left behind."""

import asyncio
import os
import signal

import grpc
import pytest

from pollard.preprocess.v1 import preprocess_service_pb2 as preprocess_pb
from pollard.runtime.transforms import Pipeline
from pollard.services.preprocess.streams import in_order
from pollard.vision.v1 import vision_service_pb2 as vision_pb

INVALID = grpc.StatusCode.INVALID_ARGUMENT.value[0]


def selector(model="linear", **choice) -> preprocess_pb.ModelSelector:
    return preprocess_pb.ModelSelector(model=model, **choice)


def image(content: bytes) -> preprocess_pb.Image:
    return preprocess_pb.Image(content=content)


def labels(response: vision_pb.PredictResponse) -> list[int]:
    return [label.index for label in response.classification.labels]


async def items(*values):
    for value in values:
        yield value


async def until(condition) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


async def test_results_come_in_order_however_long_each_takes():
    async def work(item: int) -> int:
        await asyncio.sleep(0.02 if item % 3 == 0 else 0)
        return item * 10

    results = [result async for result in in_order(items(*range(20)), work, limit=4)]
    assert results == [item * 10 for item in range(20)]


async def test_no_more_items_are_taken_than_may_be_in_work():
    taken = []

    async def source():
        for item in range(20):
            taken.append(item)
            yield item

    async def work(item: int) -> int:
        return item

    stream = in_order(source(), work, limit=4)
    assert await anext(stream) == 0
    for _ in range(100):  # turns of the loop: no time counts
        await asyncio.sleep(0)
    # The first has been handed over, not taken: its place is not free yet.
    assert len(taken) == 4
    assert await anext(stream) == 1
    for _ in range(100):
        await asyncio.sleep(0)
    assert len(taken) == 5
    await stream.aclose()


async def test_closing_cancels_what_is_in_work():
    cancelled = []

    async def work(item: int) -> int:
        try:
            await asyncio.sleep(60 if item else 0)
        except asyncio.CancelledError:
            cancelled.append(item)
            raise
        return item

    stream = in_order(items(0, 1, 2), work)
    assert await anext(stream) == 0
    await stream.aclose()
    assert sorted(cancelled) == [1, 2]


async def test_an_error_of_the_source_comes_after_the_answers_before_it():
    async def source():
        yield 1
        raise ValueError("no more")

    async def work(item: int) -> int:
        return item

    stream = in_order(source(), work)
    assert await anext(stream) == 1
    with pytest.raises(ValueError, match="no more"):
        await anext(stream)


async def test_batch_answers_each_image_and_gives_bad_ones_their_own_error(
    suite, make_picture, offline
):
    pictures = [make_picture(seed) for seed in range(20)]
    request = vision_pb.PredictBatchRequest(
        model=selector(),
        images=[
            *map(image, pictures[:3]),
            image(b"no image"),
            preprocess_pb.Image(),
            preprocess_pb.Image(uri="http://127.0.0.1/x.png"),
            image(pictures[0][:-60]),
            *map(image, pictures[3:]),
        ],
    )
    results = (await suite.vision.PredictBatch(request)).results
    errors = [result.error for result in results[3:7]]
    assert [error.reason for error in errors] == [
        "IMAGE_UNSUPPORTED",
        "REQUEST_INVALID",
        "URI_REFUSED",
        "IMAGE_DAMAGED",
    ]
    assert {error.code for error in errors} == {INVALID}
    good = [*results[:3], *results[7:]]
    for picture, result in zip(pictures, good, strict=True):
        expected = offline(suite.bundle, picture)
        assert labels(result.response) == [best.class_index for best in expected]
        assert (result.response.model, result.response.revision) == ("linear", 1)


@pytest.mark.parametrize("count", [0, 257])
async def test_batch_of_too_few_or_too_many(suite, count):
    request = vision_pb.PredictBatchRequest(model=selector(), images=[image(b"x")] * count)
    with pytest.raises(grpc.aio.AioRpcError, match="send 1 to 256") as caught:
        await suite.vision.PredictBatch(request)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT


async def test_batch_for_an_unknown_model_fails_as_a_whole(suite, make_picture):
    request = vision_pb.PredictBatchRequest(model=selector("no"), images=[image(make_picture())])
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await suite.vision.PredictBatch(request)
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND


async def test_batch_whose_revision_no_server_has_any_more_fails_as_a_whole(
    suite, manager, make_picture
):
    bundle = suite.bundle
    manager.set(2, {1: bundle, 7: bundle}, {"production": {7: 1}})
    await manager.acknowledged(manager.version, "preprocess-1")
    request = vision_pb.PredictBatchRequest(model=selector(), images=[image(make_picture())] * 3)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await suite.vision.PredictBatch(request)
    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE


async def test_predict_stream_answers_in_order_and_goes_on_after_bad_images(
    suite, make_picture, offline
):
    pictures = [make_picture(seed) for seed in range(40)]
    pictures[0] = pictures[11] = pictures[39] = b"no image"

    async def requests():
        for index, picture in enumerate(pictures):
            first = {"model": selector(), "options": vision_pb.PredictOptions(top_k=2)}
            yield vision_pb.PredictStreamRequest(
                image=image(picture), id=str(index), **(first if index == 0 else {})
            )

    answers = [answer async for answer in suite.vision.PredictStream(requests())]
    assert [answer.id for answer in answers] == [str(index) for index in range(40)]
    for picture, answer in zip(pictures, answers, strict=True):
        if picture == b"no image":
            assert answer.result.error.reason == "IMAGE_UNSUPPORTED"
        else:
            expected = offline(suite.bundle, picture, 2)
            assert labels(answer.result.response) == [best.class_index for best in expected]


async def test_a_stream_may_change_model_and_options(suite, make_picture):
    picture = image(make_picture())
    call = suite.vision.PredictStream(
        items(
            vision_pb.PredictStreamRequest(model=selector(), image=picture),
            vision_pb.PredictStreamRequest(model=selector("nobody"), image=picture),
            vision_pb.PredictStreamRequest(image=picture),
            vision_pb.PredictStreamRequest(
                model=selector(revision=1),
                image=picture,
                options=vision_pb.PredictOptions(top_k=1),
            ),
            vision_pb.PredictStreamRequest(image=picture),
        )
    )
    results = [answer.result async for answer in call]
    assert [result.error.reason for result in results[1:3]] == ["REVISION_UNKNOWN"] * 2
    assert [len(labels(results[i].response)) for i in (0, 3, 4)] == [3, 1, 1]


async def test_a_stream_begins_with_the_model(suite, make_picture):
    picture = image(make_picture())
    for call in (
        suite.vision.PredictStream(items(vision_pb.PredictStreamRequest(image=picture))),
        suite.preprocess.TransformStream(
            items(preprocess_pb.TransformStreamRequest(image=picture))
        ),
    ):
        with pytest.raises(grpc.aio.AioRpcError, match="must name the model") as caught:
            await call.read()
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT


async def test_transform_stream_gives_a_batch_of_one_for_each_image(suite, make_picture):
    pictures = [make_picture(seed) for seed in range(10)]
    pictures[4] = b""

    def request(index: int, content: bytes) -> preprocess_pb.TransformStreamRequest:
        return preprocess_pb.TransformStreamRequest(
            model=selector() if index == 0 else None, image=image(content), id=f"n{index}"
        )

    stream = items(*(request(index, content) for index, content in enumerate(pictures)))
    answers = [answer async for answer in suite.preprocess.TransformStream(stream)]
    pipeline = Pipeline(suite.bundle.manifest.preprocess)
    assert [answer.id for answer in answers] == [f"n{index}" for index in range(10)]
    assert answers[4].error.reason == "IMAGE_EMPTY"
    for picture, answer in zip(pictures, answers, strict=True):
        if picture:
            assert list(answer.response.tensor.shape) == [1, 8, 8, 3]
            assert answer.response.tensor.content == pipeline.apply(picture).array.tobytes()
            assert len(answer.response.geometries) == 1


async def test_a_stream_that_is_cancelled_leaves_nothing_behind(suite, make_picture):
    (pid,) = suite.server.pool.pids
    os.kill(pid, signal.SIGSTOP)
    picture = image(make_picture())

    async def requests():
        while True:
            yield vision_pb.PredictStreamRequest(model=selector(), image=picture)

    call = suite.vision.PredictStream(requests())
    await until(lambda: suite.server.pool.in_work)
    call.cancel()
    os.kill(pid, signal.SIGCONT)
    await until(lambda: not suite.server.pool.in_work)
    request = vision_pb.PredictRequest(model=selector(), image=picture)
    assert (await suite.vision.Predict(request)).revision == 1
    assert suite.server.pool.pids == [pid]
