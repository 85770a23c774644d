"""Images are copied where revisions prepare them differently; failures of preprocessing count."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import grpc
import pytest

from pollard.bundle.v1 import bundle_pb2
from pollard.models.v1 import fleet_service_pb2 as fleet_pb
from pollard.preprocess.v1 import preprocess_service_pb2 as preprocess_pb
from pollard.vision.v1 import vision_service_pb2 as vision_pb

INFERENCE, PREPROCESS = fleet_pb.SERVER_KIND_INFERENCE, fleet_pb.SERVER_KIND_PREPROCESS

SHADOW = fleet_pb.Shadow(
    revision=2, base_revision=1, share_ppm=1_000_000, output="scores", transform_again=True
)


def question(content: bytes, **choice: Any) -> vision_pb.PredictRequest:
    return vision_pb.PredictRequest(
        model=preprocess_pb.ModelSelector(model="linear", **choice),
        image=preprocess_pb.Image(content=content),
    )


def counters(replica: Any, revision: int) -> fleet_pb.Counters:
    found: fleet_pb.Counters = {s.revision: s for s in replica.server.member.statuses()}[
        revision
    ].counters
    return found


async def eventually(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


async def serve(suite: Any, manager: Any, second: Any, shadow: fleet_pb.Shadow | None) -> None:
    revisions = {1: suite.bundle, 2: second}
    routes = {"production": {1: 1}}
    version = manager.set(INFERENCE, revisions, routes, shadow=shadow)
    await manager.acknowledged(version, "inference-1")
    version = manager.set(PREPROCESS, revisions, routes, shadow=shadow)
    await manager.acknowledged(version, "preprocess-1")


def mirrored(manifest: bundle_pb2.Manifest) -> None:
    manifest.preprocess.add().flip.CopyFrom(bundle_pb2.Flip(horizontal=True))


async def test_an_image_is_prepared_again_by_the_steps_of_the_shadow(
    suite: Any, manager: Any, make_bundle: Any, make_picture: Any, offline: Any
) -> None:
    """Only the steps differ, so that wrong pixels would agree in everything."""
    second = make_bundle(size=8, channels=3, edit=mirrored)
    await serve(suite, manager, second, SHADOW)
    known: dict[bool, list[bytes]] = {True: [], False: []}
    for seed in range(400):
        if len(known[True]) >= 4 and len(known[False]) >= 4:
            break
        picture = make_picture(seed)
        first, other = (
            offline(bundle, picture)[0].class_index for bundle in (suite.bundle, second)
        )
        known[first == other].append(picture)
    asked = [(picture, agrees) for agrees in known for picture in known[agrees][:4]]
    assert len(asked) == 8
    expected = compared = 0
    for sent, (picture, agrees) in enumerate(asked, start=1):
        answer = await suite.vision.Predict(question(picture), timeout=20)
        assert answer.revision == 1

        def looked_at(sent: int = sent) -> bool:
            shadow = counters(suite, 2).shadow
            return bool(shadow.compared + shadow.dropped == sent)

        await eventually(looked_at)
        if counters(suite, 2).shadow.compared > compared:
            compared += 1
            expected += agrees
    shadow = counters(suite, 2).shadow
    assert shadow.compared > 0
    assert (shadow.items, shadow.agreed, shadow.failed) == (shadow.compared, expected, 0)
    # The images of the base revision count as such, and copies as no requests.
    assert counters(suite, 1).succeeded == len(asked)
    assert (counters(suite, 2).succeeded, counters(suite, 2).failed) == (0, 0)
    by_inference = {s.revision: s for s in suite.inference.member.statuses()}
    assert by_inference[2].counters.succeeded == 0
    assert not by_inference[2].counters.HasField("shadow")


async def test_a_shadow_whose_steps_fail_is_counted_and_answers_nobody(
    suite: Any, manager: Any, make_bundle: Any, make_picture: Any
) -> None:
    second = make_bundle(size=8, channels=3, edit=crops_too_much)
    await serve(suite, manager, second, SHADOW)
    await suite.vision.Predict(question(make_picture(1)), timeout=20)
    await eventually(lambda: counters(suite, 2).shadow.failed == 1)


async def test_a_shadow_whose_revision_is_not_here_holds_up_nothing_and_begins_once_it_is(
    suite: Any, manager: Any, make_bundle: Any, make_picture: Any, capsys: Any
) -> None:
    second = make_bundle(size=8, channels=3, edit=mirrored)
    routes = {"production": {1: 1}}
    version = manager.set(INFERENCE, {1: suite.bundle, 2: second}, routes, shadow=SHADOW)
    await manager.acknowledged(version, "inference-1")
    version = manager.set(PREPROCESS, {1: suite.bundle}, routes, shadow=SHADOW)
    await manager.acknowledged(version, "preprocess-1")
    answer = await suite.vision.Predict(question(make_picture(1)), timeout=20)
    assert answer.revision == 1
    assert {status.revision for status in suite.server.member.statuses()} == {1}
    await serve(suite, manager, second, SHADOW)
    await suite.vision.Predict(question(make_picture(1)), timeout=20)

    def looked_at() -> bool:
        shadow = counters(suite, 2).shadow
        return bool(shadow.compared + shadow.dropped == 1)

    await eventually(looked_at)
    assert "Traceback" not in "".join(capsys.readouterr())  # nor did a copy of nothing fail


def crops_too_much(manifest: bundle_pb2.Manifest) -> None:
    resize = manifest.preprocess[1].resize
    manifest.preprocess[1].center_crop.CopyFrom(bundle_pb2.CenterCrop(width=200, height=200))
    manifest.preprocess.add().resize.CopyFrom(
        bundle_pb2.Resize(
            mode=bundle_pb2.RESIZE_MODE_EXACT,
            width=8,
            height=8,
            interpolation=resize.interpolation or bundle_pb2.INTERPOLATION_BILINEAR,
        )
    )


async def test_images_that_only_this_revision_cannot_prepare_are_its_failures(
    suite: Any, manager: Any, make_bundle: Any, make_picture: Any
) -> None:
    await serve(suite, manager, make_bundle(size=8, channels=3, edit=crops_too_much), None)
    picture = make_picture(1)
    await suite.vision.Predict(question(picture, revision=1), timeout=20)
    with pytest.raises(grpc.aio.AioRpcError, match="too small"):
        await suite.vision.Predict(question(picture, revision=2), timeout=20)
    # What is no image is the client's doing.
    with pytest.raises(grpc.aio.AioRpcError):
        await suite.vision.Predict(question(b"no image", revision=2), timeout=20)
    assert (counters(suite, 1).succeeded, counters(suite, 1).failed) == (1, 0)
    assert (counters(suite, 2).succeeded, counters(suite, 2).failed) == (0, 1)
