"""Images over gRPC: right answers, and words for everything that is wrong."""

import asyncio
import contextlib
import os
import signal
import sys

import grpc
import numpy as np
import onnxruntime
import psutil
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from pollard.bundle.v1 import bundle_pb2
from pollard.preprocess.v1 import preprocess_service_pb2 as preprocess_pb
from pollard.runtime.postprocess import classify
from pollard.runtime.transforms import Pipeline, center_crop, decode, five_crop, resize
from pollard.services.common.errors import StartupError
from pollard.services.preprocess.main import build_server
from pollard.services.preprocess.settings import PreprocessSettings
from pollard.vision.v1 import vision_service_pb2 as vision_pb

INVALID = grpc.StatusCode.INVALID_ARGUMENT


def selector(model="linear", **choice) -> preprocess_pb.ModelSelector:
    return preprocess_pb.ModelSelector(model=model, **choice)


def question(content: bytes, model=None, **options) -> vision_pb.PredictRequest:
    return vision_pb.PredictRequest(
        model=model or selector(),
        image=preprocess_pb.Image(content=content),
        options=vision_pb.PredictOptions(**options),
    )


def images(*contents: bytes, model=None) -> preprocess_pb.TransformRequest:
    return preprocess_pb.TransformRequest(
        model=model or selector(),
        images=[preprocess_pb.Image(content=content) for content in contents],
    )


def batch(*contents: bytes, model=None, **options) -> vision_pb.PredictBatchRequest:
    return vision_pb.PredictBatchRequest(
        model=model or selector(),
        images=[preprocess_pb.Image(content=content) for content in contents],
        options=vision_pb.PredictOptions(**options),
    )


async def refused(call, code: grpc.StatusCode) -> error_details_pb2.ErrorInfo:
    """Check the status of a failing call; return its one ErrorInfo."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    assert caught.value.code() == code, caught.value
    status = rpc_status.from_call(caught.value)
    info = error_details_pb2.ErrorInfo()
    assert len(status.details) == 1
    assert status.details[0].Unpack(info)
    info.metadata["message"] = caught.value.details()
    return info


def labels(response: vision_pb.PredictResponse) -> list[tuple[int, str]]:
    return [(label.index, label.label) for label in response.classification.labels]


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
async def test_predict_gives_the_models_answer(suite, make_picture, offline, kind):
    for seed in range(5):
        picture = make_picture(seed, kind=kind)
        response = await suite.vision.Predict(question(picture, top_k=3))
        expected = offline(suite.bundle, picture, 3)
        assert labels(response) == [(best.class_index, best.label) for best in expected]
        scores = [label.score for label in response.classification.labels]
        assert scores == pytest.approx([best.score for best in expected], abs=1e-5)
        assert (response.model, response.revision) == ("linear", 1)
        for part in ("preprocess", "inference", "postprocess"):
            assert getattr(response.timings, part).ToNanoseconds() > 0


async def test_top_k(suite, make_picture):
    assert len(labels(await suite.vision.Predict(question(make_picture(), top_k=1)))) == 1
    assert len(labels(await suite.vision.Predict(question(make_picture(), top_k=99)))) == 3
    assert len(labels(await suite.vision.Predict(question(make_picture())))) == 3


async def test_transform_gives_one_batch_and_the_geometries(suite, make_picture):
    pictures = [make_picture(1), make_picture(2, width=30, height=90, kind="JPEG")]
    response = await suite.preprocess.Transform(images(*pictures))
    pipeline = Pipeline(suite.bundle.manifest.preprocess)
    expected = np.stack([pipeline.apply(picture).array for picture in pictures])
    assert (response.model, response.revision) == ("linear", 1)
    assert (response.tensor.name, response.tensor.datatype) == ("image", "UINT8")
    assert list(response.tensor.shape) == [2, 8, 8, 3]
    assert response.tensor.content == expected.tobytes()
    assert [(g.width, g.height) for g in response.geometries] == [(60, 40), (30, 90)]
    assert response.geometries[1].scale_x == pytest.approx(8 / 30)
    assert response.geometries[1].scale_y == pytest.approx(8 / 90)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda picture: b"", "IMAGE_EMPTY"),
        (lambda picture: b"this is no image at all", "IMAGE_UNSUPPORTED"),
        (lambda picture: b"%PDF-1.7" + picture, "IMAGE_UNSUPPORTED"),
        (lambda picture: picture[: len(picture) // 2], "IMAGE_DAMAGED"),
        (lambda picture: picture[:20], "IMAGE_DAMAGED"),
        (lambda picture: b"\xff\xd8\xff" + os.urandom(500), "IMAGE_DAMAGED"),
        (lambda picture: picture + b"\0" * (32 * 1024**2), "IMAGE_TOO_LARGE"),
    ],
)
async def test_a_bad_image_is_refused_with_the_reason(suite, make_picture, make, reason):
    content = make(make_picture(kind="JPEG"))
    info = await refused(suite.vision.Predict(question(content)), INVALID)
    assert info.reason == reason
    assert info.metadata["image_index"] == "0"
    info = await refused(suite.preprocess.Transform(images(make_picture(), content)), INVALID)
    assert info.reason == reason
    assert info.metadata["image_index"] == "1"
    assert info.metadata["message"].startswith("image 1: ")
    await suite.vision.Predict(question(make_picture()))


async def test_unknown_names_are_not_found_with_what_there_is(suite, make_picture):
    for model, words in [
        (selector("nobody"), "models are linear"),
        (selector(revision=9), "revisions are 1"),
        (selector(alias="canary"), "aliases are production"),
    ]:
        for call in (
            suite.vision.Predict(question(make_picture(), model)),
            suite.preprocess.Transform(images(make_picture(), model=model)),
        ):
            info = await refused(call, grpc.StatusCode.NOT_FOUND)
            assert info.reason == "REVISION_UNKNOWN"
            assert words in info.metadata["message"]


async def test_requests_that_lack_something(suite, make_picture):
    predict, transform = suite.vision.Predict, suite.preprocess.Transform
    uri = preprocess_pb.Image(uri="http://127.0.0.1/secret.png")
    for call, words in [
        (predict(vision_pb.PredictRequest(model=selector())), "no content"),
        (predict(vision_pb.PredictRequest(model=selector(), image=uri)), "fetches no URIs"),
        (predict(question(make_picture(), selector(""))), "model.model is empty"),
        (predict(question(make_picture(), selector(revision=-1))), "count from 1"),
        (transform(images()), "0 images; send 1 to 256"),
        (transform(images(*[b"x"] * 257)), "257 images"),
    ]:
        info = await refused(call, INVALID)
        assert words in info.metadata["message"]


def averaged(bundle, steps, picture: bytes, *, mirrored: bool = False) -> list[float]:
    """Return the scores by class, averaged over the views of an image, without any server."""
    views = Pipeline(steps).apply(picture).batch
    if mirrored:
        views = np.concatenate([views, views[:, :, ::-1]])
    session = onnxruntime.InferenceSession(
        bundle.model_path(bundle.manifest.variants[0]), providers=["CPUExecutionProvider"]
    )
    rows = [session.run(["scores"], {"image": view[None]})[0] for view in views]
    by_view = [classify({"scores": row}, bundle.manifest, (), 99) for row in rows]
    ranked = [{best.class_index: best.score for best in view} for view in by_view]
    return [float(np.mean([view[index] for view in ranked])) for index in range(len(ranked[0]))]


def by_class(response: vision_pb.PredictResponse) -> list[float]:
    found = {label.index: label.score for label in response.classification.labels}
    return [found[index] for index in range(len(found))]


async def test_flip_averages_over_the_image_and_its_mirror_image(suite, make_picture):
    picture = make_picture()
    flip = vision_pb.AUGMENTATION_FLIP
    response = await suite.vision.Predict(question(picture, top_k=99, augmentation=flip))
    steps = suite.bundle.manifest.preprocess
    expected = averaged(suite.bundle, steps, picture, mirrored=True)
    # The scores are far apart; the small ones tell which views they are the mean of.
    assert by_class(response) == pytest.approx(expected, rel=1e-2, abs=0)
    assert expected != pytest.approx(averaged(suite.bundle, steps, picture), rel=1e-1, abs=0)
    (result,) = (
        await suite.vision.PredictBatch(batch(picture, top_k=99, augmentation=flip))
    ).results
    assert by_class(result.response) == pytest.approx(expected, abs=1e-5)


async def test_five_crops_take_the_place_of_the_centre_crop(
    suite, manager, make_bundle, make_picture
):
    def crop(manifest: bundle_pb2.Manifest) -> None:
        del manifest.preprocess[:]
        manifest.preprocess.extend([decode(), resize(12, 12), center_crop(8, 8)])

    bundle = make_bundle(size=8, channels=3, edit=crop)
    await serve(suite, manager, bundle, "cropped")
    picture = make_picture()
    five = vision_pb.AUGMENTATION_FIVE_CROP
    response = await suite.vision.Predict(
        question(picture, selector("cropped"), top_k=99, augmentation=five)
    )
    expected = averaged(bundle, [decode(), resize(12, 12), five_crop(8, 8)], picture)
    assert by_class(response) == pytest.approx(expected, rel=1e-2, abs=0)
    info = await refused(
        suite.vision.Predict(question(picture, augmentation=five)),
        grpc.StatusCode.FAILED_PRECONDITION,
    )
    assert info.reason == "NOT_AUGMENTABLE"
    info = await refused(suite.vision.Predict(question(picture, augmentation=9)), INVALID)
    assert "augmentation 9" in info.metadata["message"]


async def test_a_batch_that_does_not_fit_into_a_message_is_refused_before_it_is_made(
    manager, make_bundle, start_preprocess, make_picture
):
    bundle = make_bundle(size=64, channels=3)
    version = manager.set(2, {1: bundle}, {"production": {1: 1}})
    replica = await start_preprocess(max_message_bytes=256 * 1024)
    await manager.acknowledged(version, "preprocess-1")
    await replica.preprocess.Transform(images(*[make_picture()] * 10))
    info = await refused(
        replica.preprocess.Transform(images(*[make_picture()] * 17)),
        grpc.StatusCode.RESOURCE_EXHAUSTED,
    )
    assert "fewer images" in info.metadata["message"]


async def test_a_request_ends_at_its_deadline_and_the_next_is_served(
    suite, make_picture, slow_picture
):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await suite.vision.Predict(question(slow_picture), timeout=0.1)
    assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    await suite.vision.Predict(question(make_picture()))


async def test_no_request_takes_longer_than_the_longest(
    manager, make_bundle, start_preprocess, make_picture
):
    version = manager.set(2, {1: make_bundle(channels=3)}, {"production": {1: 1}})
    replica = await start_preprocess(max_request_seconds=0.5)
    await manager.acknowledged(version, "preprocess-1")
    (pid,) = replica.server.pool.pids
    os.kill(pid, signal.SIGSTOP)
    info = await refused(
        replica.preprocess.Transform(images(make_picture())), grpc.StatusCode.DEADLINE_EXCEEDED
    )
    assert info.reason == "REQUEST_EXPIRED"
    assert "0.5 s" in info.metadata["message"]


async def test_a_hanging_decoder_ends_the_request_not_the_server(
    manager, make_bundle, start_preprocess, make_picture
):
    version = manager.set(2, {1: make_bundle(channels=3)}, {"production": {1: 1}})
    replica = await start_preprocess(decode_timeout_seconds=0.4)
    await manager.acknowledged(version, "preprocess-1")
    (pid,) = replica.server.pool.pids
    os.kill(pid, signal.SIGSTOP)
    info = await refused(
        replica.preprocess.Transform(images(make_picture())), grpc.StatusCode.DEADLINE_EXCEEDED
    )
    assert info.reason == "DECODE_TIMEOUT"
    await replica.preprocess.Transform(images(make_picture()))


async def test_a_worker_killed_in_the_middle_costs_no_request(suite, make_picture, offline):
    (pid,) = suite.server.pool.pids
    os.kill(pid, signal.SIGSTOP)
    request = asyncio.create_task(_predict(suite, make_picture(5)))
    await _in_work(suite)
    os.kill(pid, signal.SIGKILL)
    assert labels(await request)[0][0] == offline(suite.bundle, make_picture(5))[0].class_index


async def _in_work(suite) -> None:
    async with asyncio.timeout(20):
        while not suite.server.pool.in_work:
            await asyncio.sleep(0.01)


async def _predict(suite, content):
    return await suite.vision.Predict(question(content))


async def test_a_model_that_takes_no_images(suite, manager, make_bundle, make_picture):
    def strip(manifest: bundle_pb2.Manifest) -> None:
        manifest.task = bundle_pb2.TASK_RAW
        del manifest.preprocess[:]
        manifest.postprocess.ClearField("classification")

    raw = make_bundle(edit=strip)
    version = manager.set(2, {1: raw}, {"production": {1: 1}}, model="tensors")
    await manager.acknowledged(version, "preprocess-1")
    info = await refused(
        suite.vision.Predict(question(make_picture(), selector("tensors"))),
        grpc.StatusCode.FAILED_PRECONDITION,
    )
    assert info.reason == "MODEL_TAKES_NO_IMAGES"
    await suite.vision.Predict(question(make_picture()))


async def serve(suite, manager, bundle, model: str) -> None:
    """Serve one more model on both servers of the suite."""
    version = manager.set(1, {1: bundle}, {"production": {1: 1}}, model=model)
    await manager.acknowledged(version, "inference-1")
    version = manager.set(2, {1: bundle}, {"production": {1: 1}}, model=model)
    await manager.acknowledged(version, "preprocess-1")


async def test_an_embedding_comes_along_when_asked_for(suite, manager, make_bundle, make_picture):
    def embed(manifest: bundle_pb2.Manifest) -> None:
        manifest.postprocess.classification.embedding_output = "scores"

    await serve(suite, manager, make_bundle(channels=3, edit=embed), "embedding")
    request = question(make_picture(), selector("embedding"), embedding=True, top_k=1)
    answer = (await suite.vision.Predict(request)).classification
    best = max(answer.embedding.values)
    assert len(answer.embedding.values) == 3
    assert list(answer.embedding.values).index(best) == answer.labels[0].index
    request.options.embedding = False
    answer = (await suite.vision.Predict(request)).classification
    assert not answer.HasField("embedding")


async def test_a_manifest_that_describes_no_answer(suite, manager, make_bundle, make_picture):
    bundle = make_bundle(channels=3, edit=lambda manifest: manifest.ClearField("postprocess"))
    await serve(suite, manager, bundle, "silent")
    info = await refused(
        suite.vision.Predict(question(make_picture(), selector("silent"))),
        grpc.StatusCode.UNIMPLEMENTED,
    )
    assert "does not say how its outputs become an answer" in info.metadata["message"]


async def test_a_caller_that_hangs_up_leaves_nothing_behind(suite, make_picture):
    (pid,) = suite.server.pool.pids
    os.kill(pid, signal.SIGSTOP)
    call = suite.vision.Predict(question(make_picture()))
    request = asyncio.create_task(_settled(call))
    await _in_work(suite)
    call.cancel()
    await request
    os.kill(pid, signal.SIGCONT)
    await suite.vision.Predict(question(make_picture()))
    assert suite.server.pool.pids == [pid]
    assert suite.server.pool.in_work == 0


async def _settled(call) -> None:
    with contextlib.suppress(asyncio.CancelledError):
        await call


async def test_no_inference_server_is_unavailable(
    manager, make_bundle, start_preprocess, make_picture
):
    version = manager.set(2, {1: make_bundle(channels=3)}, {"production": {1: 1}})
    replica = await start_preprocess()
    await manager.acknowledged(version, "preprocess-1")
    info = await refused(
        replica.vision.Predict(question(make_picture())), grpc.StatusCode.UNAVAILABLE
    )
    assert info.reason == "INFERENCE_UNAVAILABLE"


async def test_health_waits_for_a_state(manager, make_bundle, start_preprocess):
    replica = await start_preprocess()
    health = health_pb2_grpc.HealthStub(replica.channel)
    names = ["", "pollard.preprocess.v1.PreprocessService", "pollard.vision.v1.VisionService"]
    for name in names:
        state = await health.Check(health_pb2.HealthCheckRequest(service=name))
        assert state.status == health_pb2.HealthCheckResponse.NOT_SERVING
    manager.set(2, {1: make_bundle()}, {"production": {1: 1}})
    async with asyncio.timeout(20):
        for name in names:
            async for state in health.Watch(health_pb2.HealthCheckRequest(service=name)):
                if state.status == health_pb2.HealthCheckResponse.SERVING:
                    break


async def test_an_open_address_needs_to_be_meant(tmp_path):
    settings = PreprocessSettings.load({"host": "0.0.0.0", "port": 0, "cache_dir": tmp_path})
    with pytest.raises(StartupError, match="--insecure"):
        build_server(settings)


async def test_a_port_in_use_is_a_clear_error(start_preprocess):
    replica = await start_preprocess()
    port = int(replica.server.address.rpartition(":")[2])
    with pytest.raises(StartupError, match="in use"):
        await start_preprocess("preprocess-2", port=port)


async def test_images_are_neither_logged_nor_written(suite, make_picture, tmp_path, capfd):
    marker = b"a marked picture that nobody may keep"
    picture = make_picture(3) + marker
    await suite.vision.Predict(question(picture))
    await refused(suite.vision.Predict(question(picture[:200] + marker)), INVALID)
    (pid,) = suite.server.pool.pids
    os.kill(pid, signal.SIGSTOP)
    request = asyncio.create_task(_predict(suite, picture))
    await _in_work(suite)
    os.kill(pid, signal.SIGKILL)
    await request
    out, err = capfd.readouterr()
    for text in (out, err):
        assert marker.decode() not in text
    for file in tmp_path.rglob("*"):
        if file.is_file():
            assert marker not in file.read_bytes()


async def test_the_service_and_its_workers_are_small(manager, make_bundle, tmp_path):
    # A process of its own: this one holds the whole test suite.
    version = manager.set(2, {1: make_bundle()}, {"production": {1: 1}})
    program = (
        "from pollard.services.preprocess.main import run\n"
        "from pollard.services.preprocess.settings import PreprocessSettings\n"
        f"settings = PreprocessSettings.load(dict(port=0, manager={manager.address!r},\n"
        f"    cache_dir={str(tmp_path / 'own')!r}, server_id='own', decode_workers=2))\n"
        "raise SystemExit(run(settings))\n"
    )
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", program)
    try:
        await manager.acknowledged(version, "own")
        parent = psutil.Process(process.pid)
        family = [parent, *parent.children(recursive=True)]
        assert len(family) == 3
        assert sum(member.memory_info().rss for member in family) < 300 * 1024**2
    finally:
        process.send_signal(signal.SIGTERM)
        assert await process.wait() == 0
    assert not psutil.wait_procs(family, timeout=10)[1]
