"""`pollard up --replicas 2`: both answer, swaps reach both, and one may die."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import grpc
import pytest

from pollard.client import AsyncModelsClient
from pollard.client.load import IMAGE, TENSOR, Load
from pollard.inference import grpc_service_pb2 as pb
from pollard.inference import grpc_service_pb2_grpc as pb_grpc
from pollard.runtime.bundle import Bundle
from pollard.runtime.reference import Reference


@pytest.mark.long
async def test_replicas_share_the_images_and_cover_for_each_other(
    start_up: Callable[..., Any],
    make_bundle: Callable[..., Bundle],
    make_samples: Callable[[int], Any],
) -> None:
    up = start_up("--replicas", "2")
    samples = make_samples(16)
    bundles = [make_bundle(seed=80 + number) for number in range(2)]
    async with AsyncModelsClient(up.address("models")) as models:
        await models.push(bundles[0].path, "shared", alias="production")
        await models.push(bundles[1].path, "shared")
        load = Load(
            model="shared",
            vision=up.address("preprocess"),
            inference=up.address("inference"),
            samples=samples,
            references={n: Reference(bundle, samples) for n, bundle in enumerate(bundles, 1)},
            clients=3,
            pause=0.02,
            kinds=(IMAGE,),
        )
        load.traffic.serving = 0
        running = asyncio.create_task(load.run())
        try:
            for revision in (2, 1):
                await models.set_alias("shared", "production", revision)
                # Round robin: each of them answers every other image.
                counts = [await _until_used(up, name, revision) for name in _REPLICAS]
                assert all(counts)
            killed = up.kill("inference-2")
            await asyncio.to_thread(up.wait_ready, after=killed)
            await _until_used(up, "inference-2", 1)
        finally:
            load.finish()
            await running
    assert load.traffic.problems == []
    assert {item.revision for item in load.traffic.answered} == {1, 2}
    assert up.stop() == 0


@pytest.mark.long
async def test_a_client_with_one_channel_uses_all_replicas_through_the_balancer(
    start_up: Callable[..., Any],
    make_bundle: Callable[..., Bundle],
    make_samples: Callable[[int], Any],
) -> None:
    pytest.importorskip("envoy")
    up = start_up("--replicas", "2", "--balance")
    samples = make_samples(16)
    bundle = make_bundle(seed=82)
    async with AsyncModelsClient(up.address("models")) as models:
        await models.push(bundle.path, "shared", alias="production")
    clients = 2
    load = Load(
        model="shared",
        vision=up.address("preprocess"),
        inference=up.address("balancer"),
        samples=samples,
        references={1: Reference(bundle, samples)},
        clients=clients,
        pause=0.02,
        kinds=(TENSOR,),
    )
    load.traffic.serving = 1
    running = asyncio.create_task(load.run())
    try:
        for name in _REPLICAS:
            await _until_used(up, name, 1)
        up.kill("inference")
        answered = len(load.traffic.answered)
        # The other one goes on alone; what the killed one had in hand may be lost.
        async with asyncio.timeout(60):
            while len(load.traffic.answered) < answered + 50:
                await asyncio.sleep(0.05)
    finally:
        load.finish()
        await running
    assert all(item.revision == 1 for item in load.traffic.answered)
    # Each may lose what was in hand, and what it sent before the balancer saw the connection end.
    assert len(load.traffic.problems) <= 2 * clients
    assert up.stop() == 0


_REPLICAS = ("inference", "inference-2")


async def _until_used(up: Any, name: str, revision: int) -> int:
    """Wait until a replica has answered requests for a revision, and return how many."""
    async with asyncio.timeout(60), grpc.aio.insecure_channel(up.address(name)) as channel:
        stub = pb_grpc.GRPCInferenceServiceStub(channel)
        request = pb.ModelStatisticsRequest(name="shared", version=str(revision))
        while True:
            try:
                answer = await stub.ModelStatistics(request, timeout=10)
            except grpc.aio.AioRpcError:
                # Not loaded yet.
                answer = pb.ModelStatisticsResponse()
            if answer.model_stats and answer.model_stats[0].inference_count:
                return int(answer.model_stats[0].inference_count)
            await asyncio.sleep(0.1)
