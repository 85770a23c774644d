"""The thread that polls grpcio's core outlives whatever goes wrong with a request."""

from __future__ import annotations

import asyncio

import grpc
import numpy as np
import pytest

from pollard.inference import grpc_service_pb2_grpc as pb_grpc
from pollard.services.inference import protocol
from pollard.services.inference.frontends.core_calls import InferCall
from pollard.services.inference.protocol import PreparedRequest
from pollard.services.inference.revision import LoadedRevision
from pollard.services.inference.workers import Workers

POLLING, WORKER = "on the polling thread", "by a worker"


@pytest.fixture
async def served(request, manager, start_server, make_bundle):
    """A stub of a server over the core that runs "adder" as the test says, and its revision."""
    manager.want("adder", {1: make_bundle(1.0)}, {"production": {1: 1}})
    manager.send()
    inline = 1e9 if request.param == POLLING else 0.0
    server = await start_server(manager.address, frontend="core", inline_microseconds=inline)
    assert (await manager.answer()).HasField("ack")
    async with grpc.aio.insecure_channel(server.address) as channel:
        yield pb_grpc.GRPCInferenceServiceStub(channel), server.engine.resolve("adder")


def break_once(monkeypatch, where, name: str) -> None:
    """Let a function fail the first time that it is called."""
    right = getattr(where, name)
    calls = iter([True])

    def wrong(*arguments, **options):
        if next(calls, False):
            raise RuntimeError("a bug")
        return right(*arguments, **options)

    monkeypatch.setattr(where, name, wrong)


@pytest.mark.parametrize(
    ("served", "where", "name"),
    [
        (POLLING, protocol, "parse"),
        (POLLING, protocol, "prepare"),
        (POLLING, LoadedRevision, "work"),
        (POLLING, LoadedRevision, "runs_inline"),
        (POLLING, LoadedRevision, "run_here"),
        (POLLING, PreparedRequest, "answer"),
        (WORKER, LoadedRevision, "wait_seconds"),
        (WORKER, LoadedRevision, "submit"),
        (WORKER, Workers, "submit"),
        (WORKER, PreparedRequest, "answer"),
    ],
    indirect=["served"],
)
async def test_who_meets_a_bug_hears_of_it_and_the_next_is_served(
    served, tensor_request, monkeypatch, where, name
) -> None:
    stub, revision = served
    break_once(monkeypatch, where, name)
    outcomes = await asyncio.gather(
        *(stub.ModelInfer(tensor_request(), timeout=20) for _ in range(4)), return_exceptions=True
    )
    # Those that were run together share what goes wrong.
    failed = [outcome for outcome in outcomes if isinstance(outcome, Exception)]
    assert failed
    for error in failed:
        assert error.code() == grpc.StatusCode.INTERNAL
        assert "request id" in error.details()
    assert await value_of(stub, tensor_request()) == 1.0
    assert revision.in_flight == 0


@pytest.mark.parametrize("served", [POLLING], indirect=True)
async def test_a_bug_before_the_request_is_read_costs_only_its_caller(
    served, tensor_request, monkeypatch
) -> None:
    stub, _ = served
    break_once(monkeypatch, InferCall, "start")
    # Nobody is left who could answer: its own deadline ends it.
    with pytest.raises(grpc.aio.AioRpcError):
        await stub.ModelInfer(tensor_request(), timeout=1)
    assert await value_of(stub, tensor_request()) == 1.0


async def value_of(stub, request) -> float:
    response = await stub.ModelInfer(request, timeout=20)
    return float(np.frombuffer(response.raw_output_contents[0], np.float32)[0])
