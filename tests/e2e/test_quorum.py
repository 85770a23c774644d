"""One of two inference servers cannot run a revision: with a quorum it goes out all the same."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pollard.client import AliasSwitchFailed, AsyncInferenceClient, AsyncModelsClient
from pollard.client.load import IMAGE, TENSOR, Load
from pollard.runtime.bundle import Bundle
from pollard.runtime.reference import Reference
from pollard.services.inference import main as inference_main
from pollard.services.inference.settings import InferenceSettings
from pollard.services.models import main as models_main
from pollard.services.models.settings import ModelsSettings
from pollard.services.preprocess import main as preprocess_main
from pollard.services.preprocess.settings import PreprocessSettings


class Suite:
    """A manager, the inference servers "big" and "small", and a preprocess server."""

    def __init__(self, manager: Any, big: Any, small: Any, preprocess: Any) -> None:
        self.manager, self.big, self.small, self.preprocess = manager, big, small, preprocess
        self.asked_of_small: list[str] = []
        resolve = small.engine.resolve

        def noting(model: str, version: str = "", *rest: Any, **more: Any) -> Any:
            self.asked_of_small.append(version)
            return resolve(model, version, *rest, **more)

        small.engine.resolve = noting

    def fill_small(self, full: bool) -> None:
        """Let the loader of "small" find all memory in use, or not."""
        loader = self.small.member._loader
        headroom = 1 << 60 if full else 0
        loader._options = replace(loader._options, memory_headroom_bytes=headroom)


@pytest.fixture
async def suite(tmp_path: Path) -> AsyncIterator[Suite]:
    async with AsyncExitStack() as stack:

        async def start(server: Any) -> Any:
            await server.start()
            stack.push_async_callback(server.stop, 1.0)
            return server

        manager = await start(
            models_main.build_server(
                ModelsSettings(
                    store=tmp_path / "store",
                    port=0,
                    drain_seconds=0.5,
                    server_lease_seconds=5.0,
                    report_interval_seconds=1.0,
                )
            )
        )
        inference = [
            await start(
                inference_main.build_server(
                    InferenceSettings.load(
                        {
                            "port": 0,
                            "manager": manager.address,
                            "server_id": name,
                            "cache_dir": tmp_path / name,
                            "memory_headroom_bytes": 0,
                            "measure": False,
                        }
                    )
                )
            )
            for name in ("big", "small")
        ]
        preprocess = await start(
            preprocess_main.build_server(
                PreprocessSettings.load(
                    {
                        "port": 0,
                        "manager": manager.address,
                        "server_id": "pre",
                        "cache_dir": tmp_path / "pre",
                        "decode_workers": 1,
                    }
                )
            )
        )
        yield Suite(manager, *inference, preprocess)


async def test_requests_go_to_the_servers_that_can(
    suite: Suite, make_bundle: Callable[..., Bundle], make_samples: Callable[[int], Any]
) -> None:
    samples = make_samples(16)
    bundles = [make_bundle(seed=90 + number) for number in range(2)]
    references = {number: Reference(bundle, samples) for number, bundle in enumerate(bundles, 1)}
    async with asyncio.timeout(120), AsyncModelsClient(suite.manager.address) as models:
        while sum(server.connected for server in await models.servers()) < 3:
            await asyncio.sleep(0.02)
        await models.push(bundles[0].path, "m", alias="production")
        await models.push(bundles[1].path, "m")
        suite.fill_small(True)
        with pytest.raises(AliasSwitchFailed, match=r"small: .*memory"):
            await models.set_alias("m", "production", 2)

        load = Load(
            model="m",
            vision=suite.preprocess.address,
            inference=suite.small.address,
            samples=samples,
            references=references,
            clients=2,
            pause=0.01,
            kinds=(IMAGE, TENSOR),
        )
        clients = asyncio.create_task(load.run())
        try:
            alias = await models.set_alias("m", "production", 2, quorum="50%")
            assert [failure.server_id for failure in alias.failures] == ["small"]
            assert "memory" in alias.failures[0].message
            # From here on images are answered by 2, and tensors sent to "small" still by 1.
            asked, answered = len(suite.asked_of_small), len(load.traffic.answered)
            while len(load.traffic.answered) < answered + 60:
                await asyncio.sleep(0.02)
            late = load.traffic.answered[answered + 4 :]
            assert {item.revision for item in late if item.kind == IMAGE} == {2}
            assert {item.revision for item in late if item.kind == TENSOR} == {1}
            # And "small" is never asked for a revision that it does not have.
            assert "2" not in suite.asked_of_small
            assert suite.asked_of_small[asked:]

            # Also when the old revision is freed elsewhere, "small" keeps what it serves.
            while 1 in suite.big.engine.table.models["m"].revisions:
                await asyncio.sleep(0.02)
            assert list(suite.small.engine.table.models["m"].revisions) == [1]
            answered = len(load.traffic.answered)
            while len(load.traffic.answered) < answered + 60:
                await asyncio.sleep(0.02)

            # Once it can, it joins in.
            suite.fill_small(False)
            await models.push(make_bundle(seed=99).path, "other", alias="production")
            while (await models.alias("m")).failures:
                await asyncio.sleep(0.02)
            async with AsyncInferenceClient(suite.small.address) as inference:
                result = await inference.infer("m", {"image": samples[0].tensor})
                assert result.version == 2
            while "2" not in suite.asked_of_small:
                await asyncio.sleep(0.02)
        finally:
            load.finish()
            await clients
    assert load.traffic.problems == []
    assert {item.revision for item in load.traffic.answered} == {1, 2}
