"""A fleet on hosts of its own, under load: power cuts, pulled cables, growth, rollouts, a restart
of the database. Clients send again what they send again by themselves, and no request fails."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from pollard.client import AsyncInferenceClient, AsyncModelsClient, PollardError, RetryPolicy
from pollard.client.load import Load, Traffic
from pollard.client.types import Rollout, Server
from pollard.runtime.bundle import Bundle
from pollard.runtime.reference import Reference

pytestmark = pytest.mark.timeout(400)

BundleMaker = Callable[..., Bundle]
PATIENCE_SECONDS = 90

ASK = """
import sys, numpy
from pollard.client import InferenceClient
with InferenceClient(sys.argv[1]) as client:
    print(client.infer(sys.argv[2], {"image": numpy.zeros((1, 8, 8, 1), numpy.uint8)}).version)
"""
ASKING = (sys.executable, "-c", ASK)
"""Prints which revision a server serves, for hosts that can be asked from inside only."""


@pytest.fixture
def samples(make_samples: Callable[[int], Any]) -> Any:
    return make_samples(8)


@asynccontextmanager
async def managers(installation: Any) -> AsyncIterator[AsyncModelsClient]:
    async with AsyncModelsClient(",".join(installation.managers)) as models:
        yield models


@asynccontextmanager
async def load(
    installation: Any, model: str, bundles: list[Bundle], samples: Any
) -> AsyncIterator[Traffic]:
    """Clients of images and tensors, by Envoy and by themselves; no request may fail."""
    envoy = (installation.address, installation.address)
    hosts = [host.address for host in installation.serving]
    servers = (
        ",".join(f"{host}:8011" for host in hosts[:2]),
        ",".join(f"{host}:8001" for host in hosts),
    )
    loads = [
        Load(
            model=model,
            vision=vision,
            inference=inference,
            samples=samples,
            references={n: Reference(bundle, samples) for n, bundle in enumerate(bundles, 1)},
            clients=clients,
            pause=0.05,
            timeout=30,
            retry=RetryPolicy(),
        )
        for clients, (vision, inference) in ((3, envoy), (2, servers))
    ]
    running = [asyncio.create_task(asking.run()) for asking in loads]
    traffic = loads[0].traffic
    try:
        await answered(traffic, 30)
        yield traffic
        # What was done must have left all well.
        for asking in loads:
            await answered(asking.traffic, 30)
    finally:
        for asking in loads:
            asking.finish()
        await asyncio.gather(*running)
    for asking in loads:
        assert asking.traffic.bad == 0, asking.traffic.problems


async def answered(traffic: Traffic, more: int) -> None:
    until = traffic.total + more
    async with asyncio.timeout(PATIENCE_SECONDS):
        while traffic.total < until:
            await asyncio.sleep(0.02)


async def in_rotation(installation: Any, servers: int) -> None:
    await asyncio.to_thread(
        installation.until, lambda: installation.well("inference") == servers, f"{servers} servers"
    )


async def fleet_until(
    models: AsyncModelsClient, holds: Callable[[dict[str, Server]], bool]
) -> dict[str, Server]:
    async with asyncio.timeout(PATIENCE_SECONDS):
        while True:
            try:
                found = {server.server_id: server for server in await models.servers()}
            except PollardError:
                found = {}  # the manager that was asked is gone; the next is asked
            if found and holds(found):
                return found
            await asyncio.sleep(0.05)


def runs(server: Server, model: str, revision: int) -> bool:
    return server.connected and any(
        (each.model, each.revision, each.state) == (model, revision, "READY")
        for each in server.revisions
    )


async def served_by(host: Any, model: str, sample: Any) -> int:
    """Ask the inference server of a host itself which revision it serves."""
    async with AsyncInferenceClient(f"{host.address}:8001", timeout=10) as client:
        return (await client.infer(model, {"image": sample.tensor})).version


async def ended(models: AsyncModelsClient, model: str, number: int) -> Rollout:
    async with asyncio.timeout(PATIENCE_SECONDS):
        while True:
            try:
                found = await models.rollout(model, number)
            except PollardError:
                found = None
            if found is not None and found.end_time is not None:
                return found
            await asyncio.sleep(0.05)


async def judged_by_all(models: AsyncModelsClient, model: str, number: int) -> None:
    """Wait until a rollout has seen more requests than any server alone has had since then."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        while True:
            found = await models.rollout(model, number)
            had = [
                each.succeeded
                for server in await models.servers()
                for each in server.revisions
                if server.kind == "INFERENCE"
                and (each.model, each.revision) == (model, found.revision)
            ]
            if found.evidence is not None and found.evidence.revision.requests > max(had) > 0:
                return
            assert found.end_time is None
            await asyncio.sleep(0.05)


@pytest.mark.long
async def test_a_host_that_loses_its_power_is_left_out_and_comes_back(
    installation: Any, make_bundle: BundleMaker, samples: Any
) -> None:
    bundle = make_bundle(seed=30)
    async with managers(installation) as models:
        await models.push(bundle.path, "powerless", alias="production")
        async with load(installation, "powerless", [bundle], samples) as traffic:
            # The first has all there is: a manager, an inference and a preprocess server.
            host = installation.serving[0]
            await asyncio.to_thread(installation.power_off, host)
            await in_rotation(installation, 2)
            await answered(traffic, 60)
            await asyncio.to_thread(installation.power_on, host)
            await in_rotation(installation, 3)
            await fleet_until(
                models, lambda found: runs(found[f"inference-{host.name}"], "powerless", 1)
            )


@pytest.mark.long
async def test_a_host_that_is_cut_off_serves_what_it_knows_and_catches_up(
    installation: Any, make_bundle: BundleMaker, samples: Any
) -> None:
    bundles = [make_bundle(seed=31), make_bundle(seed=32)]
    async with managers(installation) as models:
        await models.push(bundles[0].path, "parted", alias="production")
        await models.push(bundles[1].path, "parted")
        host = installation.serving[2]
        name = f"inference-{host.name}"
        async with load(installation, "parted", bundles, samples) as traffic:
            host.cut()
            await in_rotation(installation, 2)
            # The switch waits until it is known that the host is away, then goes on without it.
            await models.set_alias("parted", "production", 2)
            async with asyncio.timeout(PATIENCE_SECONDS):
                await models.wait_alias("parted", "production", 2)
            traffic.serving = 2
            await answered(traffic, 30)
            ask = [*ASKING, f"{host.address}:8001", "parted"]
            assert await asyncio.to_thread(host.run, *ask) == "1"
            traffic.serving = 0
            host.plug()
            await fleet_until(models, lambda found: runs(found[name], "parted", 2))
            await in_rotation(installation, 3)
            async with asyncio.timeout(PATIENCE_SECONDS):
                while await served_by(host, "parted", samples[0]) != 2:
                    await asyncio.sleep(0.05)
            traffic.serving = 2


@pytest.mark.long
async def test_a_fourth_host_takes_its_share(
    installation: Any, make_bundle: BundleMaker, samples: Any
) -> None:
    bundle = make_bundle(seed=33)
    async with managers(installation) as models:
        await models.push(bundle.path, "grown", alias="production")
        async with load(installation, "grown", [bundle], samples) as traffic:
            host = await asyncio.to_thread(installation.grow)
            await in_rotation(installation, 4)
            await answered(traffic, 100)

            def takes_part(found: dict[str, Server]) -> bool:
                joined = found.get(f"inference-{host.name}")
                return joined is not None and any(
                    each.model == "grown" and each.succeeded > 0 for each in joined.revisions
                )

            await fleet_until(models, takes_part)


@pytest.mark.long
async def test_a_rollout_is_judged_by_what_all_servers_count(
    installation: Any, make_bundle: BundleMaker, samples: Any
) -> None:
    bundles = [make_bundle(seed=34), make_bundle(seed=35)]
    async with managers(installation) as models:
        await models.push(bundles[0].path, "rolled", alias="production")
        await models.push(bundles[1].path, "rolled")
        async with load(installation, "rolled", bundles, samples) as traffic:
            # Generous about latency: what is tested is not how busy the machine is.
            began = await models.start_rollout(
                "rolled", 2, steps=[50, 100], hold=2, min_requests=90, max_p99_ratio=1000
            )
            await judged_by_all(models, "rolled", began.number)
            found = await ended(models, "rolled", began.number)
            assert (found.state, found.error) == ("PROMOTED", "")
            await models.wait_alias("rolled", "production", 2)
            traffic.serving = 2
            await answered(traffic, 30)
            traffic.serving = 0
            await models.rollback("rolled")
            await models.wait_alias("rolled", "production", 1)
            traffic.serving = 1


@pytest.mark.long
async def test_the_database_is_restarted(
    installation: Any, make_bundle: BundleMaker, samples: Any
) -> None:
    bundles = [make_bundle(seed=36), make_bundle(seed=37)]
    async with managers(installation) as models:
        await models.push(bundles[0].path, "based", alias="production")
        await models.push(bundles[1].path, "based")
        async with load(installation, "based", bundles, samples) as traffic:
            await asyncio.to_thread(installation.postgres.stop)
            await answered(traffic, 60)
            await asyncio.to_thread(installation.postgres.start)
            await fleet_until(
                models, lambda found: sum(server.connected for server in found.values()) >= 5
            )
            await models.set_alias("based", "production", 2)
            async with asyncio.timeout(PATIENCE_SECONDS):
                await models.wait_alias("based", "production", 2)
            traffic.serving = 2
