"""A suite with two servers of each kind: a swap reaches all of them before anybody relies on it."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pollard.client import AsyncModelsClient, ModelsClient
from pollard.client.load import IMAGE, TENSOR, Load
from pollard.runtime.bundle import Bundle
from pollard.runtime.reference import Reference

BundleMaker = Callable[..., Bundle]


@pytest.fixture(scope="module")
def replicas(
    up: Any, tmp_path_factory: pytest.TempPathFactory, keep_port: Callable[[], int]
) -> Iterator[dict[str, str]]:
    """A second inference and a second preprocess server beside those of `up`; their addresses."""
    directory: Path = tmp_path_factory.mktemp("replicas")
    addresses, processes = {}, []
    for service in ("inference", "preprocess"):
        port = keep_port()
        addresses[service] = f"127.0.0.1:{port}"
        with (directory / f"{service}.log").open("wb") as log:
            processes.append(
                subprocess.Popen(
                    [
                        *(sys.executable, "-m", "pollard.client.cli", "serve", service),
                        *("--port", str(port), "--manager", up.address("models")),
                        *("--cache-dir", str(directory / service)),
                    ],
                    stdout=log,
                    stderr=log,
                )
            )
    try:
        with ModelsClient(up.address("models")) as models:
            for _ in range(600):
                servers = models.servers()
                if sum(server.connected for server in servers) == 4:
                    break
                assert all(process.poll() is None for process in processes)
                time.sleep(0.1)
        assert {server.address for server in servers} >= set(addresses.values())
        yield addresses
    finally:
        for process in processes:
            process.terminate()
        assert [process.wait(timeout=60) for process in processes] == [0, 0]


@pytest.mark.parametrize(
    ("model", "sizes", "kinds"),
    [("alike", (8, 8), (IMAGE, TENSOR)), ("resized", (8, 20), (IMAGE,))],
)
async def test_a_swap_across_all_servers_drops_and_mixes_nothing(
    up: Any,
    replicas: dict[str, str],
    make_bundle: BundleMaker,
    make_samples: Callable[[int], Any],
    more_answers: Callable[[Load], Awaitable[None]],
    model: str,
    sizes: tuple[int, int],
    kinds: tuple[str, ...],
) -> None:
    samples = make_samples(32)
    bundles = [make_bundle(seed=70 + number, size=size) for number, size in enumerate(sizes)]
    references = {number: Reference(bundle, samples) for number, bundle in enumerate(bundles, 1)}
    async with AsyncModelsClient(up.address("models")) as models:
        await models.push(bundles[0].path, model, alias="production")
        await models.push(bundles[1].path, model)
        loads = [
            Load(
                model=model,
                vision=vision,
                inference=inference,
                samples=samples,
                references=references,
                clients=2,
                pause=0.02,
                kinds=kinds,
            )
            for vision, inference in (
                (up.address("preprocess"), up.address("inference")),
                (replicas["preprocess"], replicas["inference"]),
            )
        ]
        for load in loads:
            load.traffic.serving = 1
        clients = [asyncio.create_task(load.run()) for load in loads]
        try:
            for revision in (2, 1, 2, 1, 2):
                for load in loads:
                    load.traffic.serving = 0
                await models.set_alias(model, "production", revision, allow_signature_change=True)
                for load in loads:
                    load.traffic.serving = revision
                await asyncio.gather(*(more_answers(load) for load in loads))
        finally:
            for load in loads:
                load.finish()
            await asyncio.gather(*clients)
    for load in loads:
        assert load.traffic.problems == []
        assert {item.revision for item in load.traffic.answered} == {1, 2}
