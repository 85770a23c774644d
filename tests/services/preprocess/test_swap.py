"""While revisions are switched, every answer is right for the revision that it names."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal

import grpc
import pytest

from pollard.models.v1 import fleet_service_pb2 as fleet_pb
from pollard.preprocess.v1 import preprocess_service_pb2 as preprocess_pb
from pollard.services.common import retries
from pollard.services.inference import sync
from pollard.services.preprocess.errors import RevisionGone, RevisionNotReady
from pollard.services.preprocess.prediction import by_one_revision
from pollard.services.preprocess.snapshot import (
    Current,
    Selector,
    ServedModel,
    ServedRevision,
    Snapshot,
)
from pollard.vision.v1 import vision_service_pb2 as vision_pb

INFERENCE, PREPROCESS = 1, 2
REPLICAS = ("preprocess-1", "preprocess-2")


def question(content: bytes, **choice) -> vision_pb.PredictRequest:
    return vision_pb.PredictRequest(
        model=preprocess_pb.ModelSelector(model="linear", **choice),
        image=preprocess_pb.Image(content=content),
    )


def answer(response: vision_pb.PredictResponse) -> list[tuple[int, float]]:
    return [(label.index, label.score) for label in response.classification.labels]


class Fleet:
    """One inference server and two preprocess replicas, switched as the manager does it."""

    def __init__(self, manager, bundles, inference, replicas) -> None:
        self.manager = manager
        self.bundles = bundles
        self.inference = inference
        self.replicas = replicas

    async def load(self, *numbers: int, production: int) -> None:
        revisions = {number: self.bundles[number] for number in numbers}
        routes = {"production": {production: 1}}
        version = self.manager.set(INFERENCE, revisions, routes)
        await self.manager.acknowledged(version, "inference-1")

    async def route(self, *numbers: int, production: int) -> None:
        version = self.announce(*numbers, production=production)
        await self.manager.acknowledged(version, *REPLICAS)

    def announce(self, *numbers: int, production: int) -> int:
        revisions = {number: self.bundles[number] for number in numbers}
        return self.manager.set(
            PREPROCESS,
            revisions,
            {"production": {production: 1}},
            endpoints=(self.inference.address,),
        )

    async def freed(self, number: int) -> None:
        """Wait until the inference server has let a revision go."""
        async with asyncio.timeout(20):
            while number in {status.revision for status in self.inference.member.statuses()}:
                await asyncio.sleep(0.01)

    async def swap(self, old: int, new: int, drain: float) -> None:
        """Make before break."""
        await self.load(old, new, production=old)
        await self.route(old, new, production=new)
        await self.load(old, new, production=new)
        # As long as a request that chose the old revision may still be on its way.
        await asyncio.sleep(drain)
        await self.route(new, production=new)
        await self.load(new, production=new)


@pytest.fixture
async def fleet(manager, make_bundle, start_inference, start_preprocess):
    # Another size, other colours and other answers: neither could stand in for the other.
    bundles = {
        1: make_bundle(size=8, channels=3, classes=5, seed=1),
        2: make_bundle(size=12, channels=1, classes=5, seed=2),
    }
    inference = await start_inference()
    replicas = [await start_preprocess(name) for name in REPLICAS]
    fleet = Fleet(manager, bundles, inference, replicas)
    await fleet.load(1, production=1)
    await fleet.route(1, production=1)
    return fleet


@pytest.fixture
def large_pictures(make_picture) -> list[bytes]:
    """9 megapixels each: slow enough to decode that a swap overtakes it."""
    return [make_picture(seed, width=3000, height=3000) for seed in range(3)]


async def test_every_answer_during_swaps_is_right_for_the_revision_that_it_names(
    fleet, make_picture, large_pictures, offline
):
    pictures = [*(make_picture(seed) for seed in range(6)), *large_pictures]
    expected = {
        number: [
            [(best.class_index, best.score) for best in offline(bundle, picture)]
            for picture in pictures
        ]
        for number, bundle in fleet.bundles.items()
    }
    stopping = asyncio.Event()
    answered = {1: 0, 2: 0}

    async def caller(replica, offset: int) -> None:
        turn = offset
        while not stopping.is_set():
            index = turn % len(pictures)
            turn += 1
            response = await replica.vision.Predict(question(pictures[index]), timeout=20)
            right = expected[response.revision][index]
            got = answer(response)
            assert [label for label, _ in got] == [label for label, _ in right]
            assert [score for _, score in got] == pytest.approx([s for _, s in right], abs=1e-5)
            answered[response.revision] += 1

    callers = [
        asyncio.create_task(caller(replica, offset))
        for offset, replica in enumerate([*fleet.replicas, *fleet.replicas])
    ]
    try:
        for old, new in [(1, 2), (2, 1), (1, 2)]:
            before = answered[new]
            await fleet.swap(old, new, drain=1.0)
            async with asyncio.timeout(20):
                while answered[new] < before + 10:
                    assert not any(task.done() for task in callers)
                    await asyncio.sleep(0.01)
    finally:
        stopping.set()
        await asyncio.gather(*callers)
    assert min(answered.values()) >= 10


@contextlib.asynccontextmanager
async def slow_decoding(replica, content: bytes):
    """A question whose image is being decoded for as long as the block lasts."""
    (worker,) = replica.server.pool.pids
    os.kill(worker, signal.SIGSTOP)
    request = asyncio.create_task(predict(replica, content))
    async with asyncio.timeout(20):
        while not replica.server.pool.in_work:
            await asyncio.sleep(0.01)
    yield request
    assert not request.done()
    os.kill(worker, signal.SIGCONT)
    await request


async def test_a_request_that_a_swap_overtakes_is_answered_by_the_revision_that_it_chose(
    fleet, make_picture, offline, monkeypatch
):
    monkeypatch.setattr(sync, "LINGER_SECONDS", 0.0)
    await fleet.load(1, 2, production=1)
    await fleet.route(1, 2, production=1)
    async with slow_decoding(fleet.replicas[0], make_picture()) as request:
        await fleet.route(2, production=2)
    response = request.result()
    assert response.revision == 1
    best = offline(fleet.bundles[1], make_picture())
    assert answer(response)[0] == (best[0].class_index, pytest.approx(best[0].score, abs=1e-5))


async def test_a_revision_that_is_gone_when_the_tensor_arrives_is_chosen_and_transformed_again(
    fleet, make_picture, offline, monkeypatch
):
    monkeypatch.setattr(sync, "LINGER_SECONDS", 0.0)
    await fleet.load(1, 2, production=1)
    await fleet.route(1, 2, production=1)
    async with slow_decoding(fleet.replicas[0], make_picture()) as request:
        # Not make before break: the old revision is freed while the image is being decoded.
        await fleet.route(1, 2, production=2)
        await fleet.load(2, production=2)
        await fleet.freed(1)
    response = request.result()
    assert response.revision == 2
    best = offline(fleet.bundles[2], make_picture())
    assert answer(response)[0] == (best[0].class_index, pytest.approx(best[0].score, abs=1e-5))


async def test_a_slow_request_that_meets_one_swap_after_another_is_answered_all_the_same(
    make_bundle,
):
    manifest = make_bundle().manifest
    revisions = {
        number: ServedRevision.build("m", number, "", 0, manifest, ()) for number in (1, 2)
    }

    def serving(number: int) -> Snapshot:
        model = ServedModel("m", revisions, {"production": ((number, 1),)})
        return Snapshot({"m": model})

    current, tried = Current(serving(1)), []

    async def overtaken(revision) -> int:
        tried.append(revision.revision)
        if len(tried) < 6:
            current.snapshot = serving(3 - revision.revision)
            raise RevisionGone
        return revision.revision

    assert await by_one_revision(current, Selector("m"), overtaken) == 2
    assert tried == [1, 2, 1, 2, 1, 2]

    async def lost(revision) -> int:
        tried.append(revision.revision)
        raise RevisionGone

    # Routes that lead to nothing are not followed for ever.
    tried.clear()
    with pytest.raises(RevisionNotReady, match="on no inference server now"):
        await by_one_revision(current, Selector("m"), lost)
    assert tried == [2, 2]


async def test_a_named_revision_that_is_gone_is_not_found(fleet, make_picture):
    await fleet.load(1, 2, production=1)
    await fleet.route(1, 2, production=2)
    await fleet.load(1, 2, production=2)
    await fleet.load(2, production=2)
    await fleet.freed(1)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await fleet.replicas[0].vision.Predict(question(make_picture(), revision=1))
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND
    assert "on no inference server" in caught.value.details()


async def test_images_are_answered_until_their_server_knows_what_the_inference_server_knows(
    fleet, make_picture
):
    """As after a restore of the manager: each server hears of it when it has come back."""
    await fleet.load(1, 2, production=1)
    await fleet.route(1, 2, production=1)
    await fleet.load(2, production=2)
    response = await fleet.replicas[0].vision.Predict(question(make_picture()), timeout=20)
    assert response.revision == 1
    await fleet.route(2, production=2)
    response = await fleet.replicas[0].vision.Predict(question(make_picture()), timeout=20)
    assert response.revision == 2


async def test_a_refused_state_leaves_the_routes_where_they_were(fleet, make_bundle, make_picture):
    def enlarge(manifest) -> None:
        manifest.preprocess[1].resize.width = 9

    fleet.bundles[3] = make_bundle(size=8, channels=3, edit=enlarge)
    version = fleet.announce(1, 3, production=3)
    nack = await fleet.manager.refused(version, "preprocess-1")
    assert "the steps give tensors of shape [-1, 8, 9, 3]" in nack.status.message
    response = await fleet.replicas[0].vision.Predict(question(make_picture()))
    assert response.revision == 1


async def test_what_is_reported_of_a_revision_names_its_bundle(fleet, make_bundle):
    """A manager that was restored from a backup gives numbers again."""

    def enlarge(manifest) -> None:
        manifest.preprocess[1].resize.width = 9

    def told() -> list[tuple[int, int, str]]:
        statuses = fleet.replicas[0].server.member.statuses()
        return [(status.revision, status.state, status.bundle_sha256) for status in statuses]

    assert told() == [(1, fleet_pb.REVISION_STATE_READY, fleet.bundles[1].digest)]
    wrong = fleet.bundles[1] = make_bundle(size=8, channels=3, edit=enlarge)
    version = fleet.announce(1, production=1)
    await fleet.manager.refused(version, "preprocess-1")
    assert told() == [(1, fleet_pb.REVISION_STATE_FAILED, wrong.digest)]
    fleet.bundles[1] = fleet.bundles[2]
    await fleet.route(1, production=1)
    assert told() == [(1, fleet_pb.REVISION_STATE_READY, fleet.bundles[2].digest)]


async def test_a_manifest_that_could_not_be_had_is_fetched_again_and_what_is_wrong_is_not(
    fleet, make_bundle, make_picture, monkeypatch
):
    monkeypatch.setattr(retries, "_FIRST_SECONDS", 0.05)
    monkeypatch.setattr(retries, "_LAST_SECONDS", 0.2)

    def enlarge(manifest) -> None:
        manifest.preprocess[1].resize.width = 9

    await fleet.load(1, 2, production=1)
    fleet.bundles[3] = make_bundle(size=8, channels=3, edit=enlarge)
    # The manager has lost it for now: what its method raises is no answer.
    lost = fleet.bundles[2].digest
    version = fleet.announce(1, 2, 3, production=2)
    bundle = fleet.manager.bundles.pop(lost)
    nack = await fleet.manager.refused(version, "preprocess-1")
    assert "; it is tried again in " in nack.status.message
    fleet.manager.bundles[lost] = bundle
    async with asyncio.timeout(20):
        while "linear/2: " in fleet.manager.nacks["preprocess-1"].status.message:
            await asyncio.sleep(0.01)
    nack = fleet.manager.nacks["preprocess-1"]
    assert "linear/3: " in nack.status.message
    assert "tried again" not in nack.status.message
    response = await fleet.replicas[0].vision.Predict(question(make_picture()))
    assert response.revision == 2


async def test_only_manifest_and_labels_are_fetched(fleet):
    await fleet.load(1, 2, production=1)
    fleet.manager.downloads.clear()
    await fleet.route(1, 2, production=2)
    assert set(fleet.manager.downloads) == {"manifest.json", "labels.txt"}


async def test_it_serves_on_and_restarts_without_the_manager(
    fleet, make_picture, start_preprocess, manager
):
    replica = fleet.replicas[0]
    before = await replica.vision.Predict(question(make_picture()))
    await manager.stop()
    assert answer(await replica.vision.Predict(question(make_picture()))) == answer(before)
    await replica.server.stop(0.0)
    again = await start_preprocess(REPLICAS[0])
    response = await again.vision.Predict(question(make_picture()))
    assert response.revision == 1
    assert answer(response) == answer(before)


async def test_what_is_damaged_in_the_cache_is_not_unknown_without_the_manager(
    fleet, make_picture, start_preprocess, manager
):
    """Whoever has several servers asks another one, and does not take it for gone."""
    replica = fleet.replicas[0]
    cache = replica.server.agent.cache
    await replica.server.stop(0.0)
    await manager.stop()
    for folder in cache.folders():
        (folder / "manifest.json").write_bytes(b"")
    again = await start_preprocess(REPLICAS[0])

    async def refused(**which) -> grpc.StatusCode:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await again.vision.Predict(question(make_picture(), **which), timeout=20)
        return caught.value.code()

    assert await refused() == grpc.StatusCode.UNAVAILABLE
    assert await refused(revision=1) == grpc.StatusCode.UNAVAILABLE
    assert await refused(alias="nobody") == grpc.StatusCode.NOT_FOUND
    assert await refused(revision=7) == grpc.StatusCode.NOT_FOUND


async def predict(replica, content: bytes) -> vision_pb.PredictResponse:
    return await replica.vision.Predict(question(content), timeout=30)


async def test_before_it_knows_what_to_serve_nothing_is_unknown(
    manager, start_preprocess, make_bundle, make_picture
):
    """A restarted server must not answer "no such model" only because nobody has told it yet."""
    replica = await start_preprocess()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await replica.vision.Predict(question(make_picture()), timeout=20)
    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
    assert "try again" in caught.value.details()
    version = manager.set(PREPROCESS, {1: make_bundle()}, {"production": {1: 1}}, model="other")
    await manager.acknowledged(version, "preprocess-1")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await replica.vision.Predict(question(make_picture()), timeout=20)
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND
