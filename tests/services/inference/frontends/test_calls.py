"""Health as the front ends without grpcio's server tell it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from grpc_health.v1 import health_pb2

from pollard.services.inference.engine import Engine
from pollard.services.inference.frontends.calls import Headers, ServerCalls
from pollard.services.inference.methods import ProtocolMethods
from pollard.services.inference.shared_memory import SharedMemory

KIND = health_pb2.HealthCheckResponse


@pytest.fixture
async def calls() -> AsyncIterator[ServerCalls]:
    engine, shared = Engine(), SharedMemory(enabled=False)
    # Health asks nobody what models there are.
    yield ServerCalls(engine, ProtocolMethods(engine, None, shared), shared)
    await engine.close()


class Watcher:
    """A client that watches, and is told only when it asks for more."""

    def __init__(self, calls: ServerCalls, service: str = "") -> None:
        async def requests() -> AsyncIterator[bytes]:
            yield health_pb2.HealthCheckRequest(service=service).SerializeToString()
            await asyncio.Event().wait()

        self._answers = calls.streams["/grpc.health.v1.Health/Watch"](requests(), Headers())

    async def next(self) -> int | None:
        """Return the next state; None at the end."""
        async with asyncio.timeout(20):
            data = await anext(self._answers, None)
        return None if data is None else KIND.FromString(data).status


async def test_what_changes_while_an_answer_is_on_its_way_is_told_after_it(calls) -> None:
    calls.set_serving(True)
    watcher = Watcher(calls)
    # The stream rests where its answer was handed over, and both come before it goes on.
    assert await watcher.next() == KIND.SERVING
    calls.set_serving(False)
    calls.stopping.set()
    assert await watcher.next() == KIND.NOT_SERVING
    assert await watcher.next() is None


async def test_a_watcher_that_waits_hears_each_change_and_the_end(calls) -> None:
    calls.set_serving(False)
    watcher = Watcher(calls, "inference.GRPCInferenceService")
    assert await watcher.next() == KIND.NOT_SERVING
    for serving, state in ((True, KIND.SERVING), (False, KIND.NOT_SERVING)):
        waiting = asyncio.ensure_future(watcher.next())
        await asyncio.sleep(0)
        calls.set_serving(serving)
        if not serving:
            calls.stopping.set()
        assert await waiting == state
    assert await watcher.next() is None


async def test_the_state_is_told_once_however_often_it_is_set(calls) -> None:
    calls.set_serving(True)
    watcher = Watcher(calls)
    assert await watcher.next() == KIND.SERVING
    waiting = asyncio.ensure_future(watcher.next())
    for _ in range(3):
        await asyncio.sleep(0)
        calls.set_serving(True)
    assert not waiting.done()
    calls.set_serving(False)
    assert await waiting == KIND.NOT_SERVING


async def test_a_service_that_is_not_there_is_unknown(calls) -> None:
    calls.set_serving(True)
    assert await Watcher(calls, "nobody").next() == KIND.SERVICE_UNKNOWN
