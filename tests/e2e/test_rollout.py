"""A revision is rolled out in steps by real services, and taken back when it is bad."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from pollard.client import (
    AsyncInferenceClient,
    AsyncModelsClient,
    AsyncVisionClient,
    FailedPrecondition,
    RequestFailed,
)
from pollard.client.types import Rollout
from pollard.runtime.bundle import Bundle

BundleMaker = Callable[..., Bundle]

GOOD = 205
"""A model made by `often_failing` fails when the first pixel is this or more: one in five."""


def often_failing(model: bytes) -> bytes:
    """A model that answers the same, and fails in onnxruntime for one image in five."""
    made = onnx.load_from_string(model)
    graph = made.graph
    for node in graph.node:
        if node.output[0] == "scores":
            node.output[0] = "plain"
    graph.initializer.extend(
        [
            numpy_helper.from_array(np.zeros((GOOD, 1), np.float32), "table"),
            numpy_helper.from_array(np.array(0, np.int64), "first"),
        ]
    )
    graph.node.extend(
        [
            helper.make_node("Cast", ["flat"], ["numbers"], to=TensorProto.INT64),
            helper.make_node("Gather", ["numbers", "first"], ["index"], axis=1),
            helper.make_node("Gather", ["table", "index"], ["zero"], axis=0),
            helper.make_node("Add", ["plain", "zero"], ["scores"]),
        ]
    )
    onnx.checker.check_model(made)
    return made.SerializeToString()


def slow(model: bytes) -> bytes:
    """A model that answers the same after many times the work."""
    made = onnx.load_from_string(model)
    graph = made.graph
    for node in graph.node:
        if node.output[0] == "scores":
            node.output[0] = "plain"
    generator = np.random.default_rng(0)

    def weights(rows: int, columns: int, name: str) -> None:
        values = generator.normal(0, rows**-0.5, (rows, columns)).astype(np.float32)
        graph.initializer.append(numpy_helper.from_array(values, name))

    last, size = "flat", 64
    for layer in range(12):
        weights(size, 1024, f"w{layer}")
        graph.node.append(helper.make_node("MatMul", [last, f"w{layer}"], [f"h{layer}"]))
        last, size = f"h{layer}", 1024
    graph.initializer.append(numpy_helper.from_array(np.zeros((1024, 3), np.float32), "nothing"))
    graph.node.append(helper.make_node("MatMul", [last, "nothing"], ["zero"]))
    graph.node.append(helper.make_node("Add", ["plain", "zero"], ["scores"]))
    onnx.checker.check_model(made)
    return made.SerializeToString()


@pytest.fixture
def slow_bundle(
    make_bundle: BundleMaker,
    make_linear_model: Callable[..., bytes],
    make_golden: Callable[..., bytes],
) -> Bundle:
    plain = make_linear_model(seed=23)
    files = {"cpu-fp32/model.onnx": slow(plain), "cpu-fp32/golden.npz": make_golden(plain)}
    return make_bundle(seed=23, files=files)


@pytest.fixture
def failing_bundle(
    make_bundle: BundleMaker,
    make_linear_model: Callable[..., bytes],
    make_golden: Callable[..., bytes],
) -> Bundle:
    """Its golden images are such that it loads."""

    def fails(seed: int) -> bool:
        images = np.random.default_rng(seed).integers(0, 256, (2, 8, 8, 1), dtype=np.uint8)
        return bool((images[:, 0, 0, 0] >= GOOD).any())

    seed = next(seed for seed in range(100) if not fails(seed))
    plain = make_linear_model(seed=22)
    return make_bundle(
        seed=22,
        files={
            "cpu-fp32/model.onnx": often_failing(plain),
            "cpu-fp32/golden.npz": make_golden(plain, seed=seed),
        },
    )


async def ended(models: AsyncModelsClient, model: str, number: int) -> Rollout:
    async with asyncio.timeout(120):
        while (found := await models.rollout(model, number)).end_time is None:
            await asyncio.sleep(0.05)
    return found


class Clients:
    """Clients that send random images until they are stopped."""

    def __init__(self, up: Any, model: str) -> None:
        self._inference = up.address("inference")
        self._model = model
        self.answered: Counter[int] = Counter()
        self.failed: list[str] = []
        self._stopped = False
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Clients:
        self._tasks = [asyncio.create_task(self._run(seed)) for seed in range(4)]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._stopped = True
        await asyncio.gather(*self._tasks)

    async def _run(self, seed: int) -> None:
        chance = np.random.default_rng(seed)
        async with AsyncInferenceClient(self._inference) as client:
            while not self._stopped:
                image = chance.integers(0, 256, (1, 8, 8, 1), dtype=np.uint8)
                try:
                    answer = await client.infer(self._model, {"image": image})
                except RequestFailed as error:
                    self.failed.append(str(error))
                else:
                    self.answered[answer.version] += 1


@pytest.mark.long
async def test_a_good_revision_is_promoted_and_no_request_fails(
    up: Any, make_bundle: BundleMaker
) -> None:
    async with AsyncModelsClient(up.address("models")) as models:
        await models.push(make_bundle(seed=20).path, "rolled", alias="production")
        await models.push(make_bundle(seed=21).path, "rolled")
        async with Clients(up, "rolled") as clients:
            # Generous about latency: a busy machine is not what is tested.
            started = await models.start_rollout(
                "rolled", 2, steps=[20, 50, 100], hold=0.5, min_requests=50, max_p99_ratio=1000
            )
            found = await ended(models, "rolled", started.number)
            assert (found.state, found.error) == ("PROMOTED", "")
            await models.wait_alias("rolled", "production", 2)
        assert clients.failed == []
        assert clients.answered[1] > 0
        assert clients.answered[2] >= 100


async def test_a_revision_that_fails_one_in_five_is_taken_back(
    up: Any, make_bundle: BundleMaker, failing_bundle: Bundle
) -> None:
    async with AsyncModelsClient(up.address("models")) as models:
        await models.push(make_bundle(seed=20).path, "spoilt", alias="production")
        await models.push(failing_bundle.path, "spoilt")
        async with Clients(up, "spoilt") as clients:
            began = time.monotonic()
            started = await models.start_rollout("spoilt", 2, steps=[5, 100], max_p99_ratio=1000)
            found = await ended(models, "spoilt", started.number)
            print(f"taken back after {time.monotonic() - began:.2f} s, {clients.answered}")
        assert found.state == "ROLLED_BACK"
        assert found.error.startswith("gate max_error_rate: ")
        assert clients.failed
        assert clients.answered[1] > clients.answered[2]
        assert (await models.alias("spoilt")).revision == 1
        with pytest.raises(FailedPrecondition, match="has ended"):
            await models.promote_rollout("spoilt", started.number)


@pytest.mark.long
async def test_a_revision_that_takes_many_times_as_long_is_taken_back(
    up: Any, make_bundle: BundleMaker, slow_bundle: Bundle
) -> None:
    async with AsyncModelsClient(up.address("models")) as models:
        await models.push(make_bundle(seed=20).path, "tardy", alias="production")
        await models.push(slow_bundle.path, "tardy")
        async with Clients(up, "tardy") as clients:
            began = time.monotonic()
            started = await models.start_rollout("tardy", 2, steps=[10, 100])
            found = await ended(models, "tardy", started.number)
            print(f"taken back after {time.monotonic() - began:.2f} s, {clients.answered}")
        assert found.state == "ROLLED_BACK"
        assert found.error.startswith("gate max_p99_ratio: the p")
        assert clients.failed == []
        assert (await models.alias("tardy")).revision == 1


@pytest.mark.long
async def test_a_revision_whose_shadows_answer_otherwise_never_answers_anybody(
    up: Any, make_bundle: BundleMaker
) -> None:
    async with AsyncModelsClient(up.address("models")) as models:
        await models.push(make_bundle(seed=20).path, "shadowed", alias="production")
        await models.push(make_bundle(seed=21).path, "shadowed")
        # The same model in another bundle: it agrees in everything.
        same = make_bundle(seed=20, edit=lambda manifest: setattr(manifest, "name", "again"))
        await models.push(same.path, "shadowed")
        async with Clients(up, "shadowed") as clients:
            how: dict[str, Any] = {
                "steps": [50, 100],
                "hold": 0.5,
                "min_requests": 20,
                "max_p99_ratio": 1000,
                "shadow_percent": 100,
                "min_agreement": 0.95,
            }
            started = await models.start_rollout("shadowed", 2, **how)
            assert (started.state, started.step) == ("SHADOW", -1)
            found = await ended(models, "shadowed", started.number)
            assert (found.state, found.step) == ("ROLLED_BACK", -1)
            assert found.error.startswith("gate min_agreement: revision 2 gives the answer")
            assert 2 not in clients.answered
            started = await models.start_rollout("shadowed", 3, **how)
            found = await ended(models, "shadowed", started.number)
            assert (found.state, found.error) == ("PROMOTED", "")
            assert found.evidence is not None
            assert found.evidence.shadow is not None
            assert found.evidence.shadow.agreed == found.evidence.shadow.items
        assert clients.failed == []


async def test_a_key_gets_the_same_revision_from_both_services(
    up: Any, make_bundle: BundleMaker, make_samples: Callable[[int], list[Any]]
) -> None:
    sample = make_samples(1)[0]
    async with (
        AsyncModelsClient(up.address("models")) as models,
        AsyncVisionClient(up.address("preprocess")) as vision,
        AsyncInferenceClient(up.address("inference")) as inference,
    ):
        await models.push(make_bundle(seed=20).path, "stuck", alias="production")
        await models.push(make_bundle(seed=21).path, "stuck")
        started = await models.start_rollout("stuck", 2, steps=[50, 100])
        await models.pause_rollout("stuck", started.number)
        await models.resume_rollout("stuck", started.number)
        async with asyncio.timeout(60):
            while (
                len(
                    {
                        (await inference.infer("stuck", {"image": sample.tensor})).version
                        for _ in range(20)
                    }
                )
                < 2
            ):
                await asyncio.sleep(0.1)
            while (
                len({(await vision.predict(sample.png, "stuck")).revision for _ in range(20)}) < 2
            ):
                await asyncio.sleep(0.1)
        chosen = {}
        for number in range(20):
            key = f"client-{number}"
            seen = {
                (await vision.predict(sample.png, "stuck", sticky_key=key)).revision
                for _ in range(3)
            }
            assert len(seen) == 1
            chosen[key] = seen.pop()
        assert set(chosen.values()) == {1, 2}
        by_inference = {
            key: (await inference.infer("stuck", {"image": sample.tensor}, sticky_key=key)).version
            for key in chosen
        }
        assert by_inference == chosen
        await models.abort_rollout("stuck", started.number)
