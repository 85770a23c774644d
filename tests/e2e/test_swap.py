"""Revisions are swapped across the suite while clients ask, and no request notices."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from pollard.client import AsyncModelsClient
from pollard.client.load import IMAGE, TENSOR, Load
from pollard.runtime.bundle import Bundle
from pollard.runtime.reference import Reference, Sample, telling

BundleMaker = Callable[..., Bundle]


def _load(
    up: Any,
    model: str,
    samples: list[Sample],
    references: dict[int, Reference],
    kinds: tuple[str, ...] = (IMAGE, TENSOR),
) -> Load:
    return Load(
        kinds=kinds,
        model=model,
        vision=up.address("preprocess"),
        inference=up.address("inference"),
        samples=samples,
        references=references,
        clients=4,
        pause=0.02,
    )


async def test_no_request_fails_or_gets_another_revisions_answer(
    up: Any,
    make_bundle: BundleMaker,
    make_samples: Callable[[int], list[Sample]],
    more_answers: Callable[[Load], Awaitable[None]],
) -> None:
    samples = make_samples(32)
    bundles = [make_bundle(seed=seed) for seed in (11, 12, 13)]
    references = {number: Reference(bundle, samples) for number, bundle in enumerate(bundles, 1)}
    assert telling(references[1], references[2]) > len(samples) // 2
    async with AsyncModelsClient(up.address("models")) as models:
        await models.push(bundles[0].path, "swapped", alias="production")
        load = _load(up, "swapped", samples, references)
        load.traffic.serving = 1
        clients = asyncio.create_task(load.run())
        try:
            for bundle in bundles[1:]:
                await models.push(bundle.path, "swapped")
            for revision in (2, 3, 1, 2, 1, 3):
                load.traffic.serving = 0
                await models.set_alias("swapped", "production", revision)
                load.traffic.serving = revision
                await more_answers(load)
        finally:
            load.finish()
            await clients
    assert load.traffic.problems == []
    assert {item.revision for item in load.traffic.answered} == {1, 2, 3}


async def test_preprocessing_travels_with_the_revision(
    up: Any,
    make_bundle: BundleMaker,
    make_samples: Callable[[int], list[Sample]],
    more_answers: Callable[[Load], Awaitable[None]],
) -> None:
    """Two revisions of different input size: no image meets the steps of the other one."""
    samples = make_samples(32)
    bundles = [make_bundle(seed=14, size=8), make_bundle(seed=15, size=20)]
    references = {number: Reference(bundle, samples) for number, bundle in enumerate(bundles, 1)}
    async with AsyncModelsClient(up.address("models")) as models:
        await models.push(bundles[0].path, "resized", alias="production")
        await models.push(bundles[1].path, "resized")
        load = _load(up, "resized", samples, references, kinds=(IMAGE,))
        load.traffic.serving = 1
        clients = asyncio.create_task(load.run())
        try:
            for revision in (2, 1, 2, 1, 2):
                load.traffic.serving = 0
                await models.set_alias(
                    "resized", "production", revision, allow_signature_change=True
                )
                load.traffic.serving = revision
                await more_answers(load)
        finally:
            load.finish()
            await clients
    assert load.traffic.problems == []
    assert {item.revision for item in load.traffic.answered} == {1, 2}


async def test_an_answer_that_is_another_revisions_would_be_found(
    up: Any,
    make_bundle: BundleMaker,
    make_samples: Callable[[int], list[Sample]],
    more_answers: Callable[[Load], Awaitable[None]],
) -> None:
    samples = make_samples(8)
    served, other = make_bundle(seed=21), make_bundle(seed=22)
    async with AsyncModelsClient(up.address("models")) as models:
        await models.push(served.path, "told-apart", alias="production")
    load = _load(up, "told-apart", samples, {1: Reference(other, samples)})
    clients = asyncio.create_task(load.run())
    await more_answers(load)
    load.finish()
    await clients
    assert load.traffic.answered
    assert load.traffic.wrong == len(load.traffic.answered)


async def test_a_refused_revision_changes_nothing(
    up: Any,
    make_bundle: BundleMaker,
    make_samples: Callable[[int], list[Sample]],
    more_answers: Callable[[Load], Awaitable[None]],
) -> None:
    """The golden outputs of the second revision are not those of its model."""
    import pytest

    from pollard.client import AliasSwitchFailed

    samples = make_samples(8)
    good, lying = make_bundle(seed=31), make_bundle(seed=32)
    # Golden outputs of another model: everything is consistent but the numbers.
    golden = (good.path / "cpu-fp32" / "golden.npz").read_bytes()
    model = (lying.path / "cpu-fp32" / "model.onnx").read_bytes()
    lying = make_bundle(
        seed=31, files={"cpu-fp32/model.onnx": model, "cpu-fp32/golden.npz": golden}
    )
    references = {1: Reference(good, samples)}
    async with AsyncModelsClient(up.address("models")) as models:
        await models.push(good.path, "refused", alias="production")
        load = _load(up, "refused", samples, references)
        load.traffic.serving = 1
        clients = asyncio.create_task(load.run())
        try:
            await models.push(lying.path, "refused")
            with pytest.raises(AliasSwitchFailed, match="golden") as caught:
                await models.set_alias("refused", "production", 2)
            assert caught.value.serving == 1
            assert caught.value.failures[0].server_id.startswith("inference-")
            await more_answers(load)
        finally:
            load.finish()
            await clients
        alias = await models.alias("refused")
    assert (alias.revision, alias.state) == (1, "FAILED")
    assert load.traffic.problems == []
