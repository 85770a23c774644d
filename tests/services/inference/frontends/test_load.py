"""More than a server can answer, models that take their time, and clients that do not read."""

from __future__ import annotations

import asyncio
import collections
import threading
import time
from collections.abc import Iterator

import grpc
import numpy as np
import psutil
import pytest

from pollard.inference import grpc_service_pb2 as pb
from pollard.inference import grpc_service_pb2_grpc as pb_grpc

KEPT_BYTES = {"core": 48 << 20, "envoy": 224 << 20}
"""What may be kept of a client that does not read. Envoy takes in far more than the core, but not
without end either."""


@pytest.mark.parametrize("frontend", ["grpcio", "core"])
async def test_three_times_what_can_be_answered(
    manager, start_server, make_bundle, tensor_request, watch, frontend
) -> None:
    manager.want("adder", {1: make_bundle(1.0, max_batch_size=1)}, {"production": {1: 1}})
    manager.send()
    server = await start_server(
        manager.address, frontend=frontend, workers=1, inline_microseconds=0.0
    )
    assert (await manager.answer()).HasField("ack")
    revision = server.engine.resolve("adder")
    session = watch(revision._workers._session)
    right = session.run

    def run(feeds, outputs=None):
        time.sleep(0.05)
        return right(feeds, outputs)

    session.run = run
    revision._workers._session = session
    deadline = 4.0  # Enough for 80, or fewer, as sleeping takes a little longer.
    outcomes: collections.Counter[grpc.StatusCode] = collections.Counter()
    async with grpc.aio.insecure_channel(server.address) as channel:
        stub = pb_grpc.GRPCInferenceServiceStub(channel)
        for _ in range(3):
            await stub.ModelInfer(tensor_request(), timeout=60)

        async def one() -> None:
            try:
                await stub.ModelInfer(tensor_request(), timeout=deadline)
                outcomes[grpc.StatusCode.OK] += 1
            except grpc.aio.AioRpcError as error:
                outcomes[error.code()] += 1

        session.gate.clear()
        calls = [asyncio.ensure_future(one()) for _ in range(240)]
        # Nothing is answered yet: who is refused is refused without waiting for anybody.
        async with asyncio.timeout(60):
            while len(calls) - sum(outcomes.values()) > revision.in_flight:
                await asyncio.sleep(0.005)
        refused = outcomes[grpc.StatusCode.UNAVAILABLE]
        accepted = revision.in_flight
        session.gate.set()
        await asyncio.gather(*calls)
        assert refused > 140
        assert accepted > 0
        # Who was accepted is answered in time, but for the time that the machine takes from us.
        assert outcomes[grpc.StatusCode.OK] > accepted / 2
        assert set(outcomes) <= {
            grpc.StatusCode.OK,
            grpc.StatusCode.UNAVAILABLE,
            grpc.StatusCode.DEADLINE_EXCEEDED,
        }
        assert len(session.batches) == 3 + outcomes[grpc.StatusCode.OK]
        await stub.ModelInfer(tensor_request(), timeout=60)
    assert revision.in_flight == 0


def test_a_model_that_is_always_busy_does_not_starve_another(channel, ask, runs_of) -> None:
    stub = pb_grpc.GRPCInferenceServiceStub(channel)
    before = runs_of(stub, "steps")
    # Work for every worker of the slow one, and more that waits.
    slow = [stub.ModelInfer.future(ask("steps", 30), timeout=120) for _ in range(16)]
    quick = 0
    while not all(call.done() for call in slow):
        answer = stub.ModelInfer(ask("quick", 3.0), timeout=60)
        assert np.frombuffer(answer.raw_output_contents[0], np.float32) == [3.0]
        quick += 1
    assert runs_of(stub, "steps") - before > 1
    # Had they waited in one line, the quick one would have been answered once or twice.
    assert quick > 8


def memory_of(process) -> int:
    parent = psutil.Process(process.pid)
    return sum(each.memory_info().rss for each in (parent, *parent.children(recursive=True)))


def test_a_client_that_does_not_read_costs_little_and_nobody_else(running, ask, sent) -> None:
    front, process, address = running
    count, size = 8000, 50_000
    hold = threading.Event()
    taken: list[int] = []

    def requests():
        for number in range(count):
            request = ask(value=number)
            request.id = f"{number} {'a' * size}"
            taken.append(number)
            yield request
        hold.wait(120)

    with grpc.insecure_channel(address) as channel:
        stub = pb_grpc.GRPCInferenceServiceStub(channel)
        stub.ModelInfer(ask(), timeout=60)
        before = memory_of(process)
        answers = stub.ModelStreamInfer(requests(), timeout=170)
        sent(taken, count)
        # Flow control holds back what the client does not fetch, and so what it sends.
        assert len(taken) < count
        assert memory_of(process) - before < KEPT_BYTES[front]
        with grpc.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1)]) as other:
            for _ in range(20):
                pb_grpc.GRPCInferenceServiceStub(other).ModelInfer(ask(), timeout=60)
        # Once it reads, it goes on, and answers come in order.
        for number in range(500):
            answer = next(answers)
            assert not answer.error_message
            assert answer.infer_response.id.startswith(f"{number} ")
        hold.set()
        answers.cancel()


def flood_and_go(stub, ask, sent, count: int) -> None:
    """Send so many large requests on a stream, read one answer, and go."""
    taken: list[int] = []

    def requests() -> Iterator[pb.ModelInferRequest]:
        for number in range(count):
            request = ask()
            request.id = "a" * 100_000
            taken.append(number)
            yield request

    answers = stub.ModelStreamInfer(requests(), timeout=60)
    next(answers)
    sent(taken, count)
    answers.cancel()


@pytest.mark.long
def test_answers_are_not_kept_for_a_client_that_goes(running, ask, sent) -> None:
    front, process, address = running
    with grpc.insecure_channel(address) as channel:
        stub = pb_grpc.GRPCInferenceServiceStub(channel)
        stub.ModelInfer(ask(), timeout=60)
        before = memory_of(process)
        for _ in range(10):
            flood_and_go(stub, ask, sent, 1000)
        stub.ModelInfer(ask(), timeout=60)
        assert memory_of(process) - before < KEPT_BYTES[front]


def test_a_client_that_goes_is_no_error(tmp_path, serve, ask, sent) -> None:
    # The server's log is looked at when it has ended.
    with (
        serve(tmp_path, "grpcio") as (_, address),
        grpc.insecure_channel(address) as channel,
    ):
        stub = pb_grpc.GRPCInferenceServiceStub(channel)
        for _ in range(6):
            flood_and_go(stub, ask, sent, 300)
        stub.ModelInfer(ask(), timeout=60)


def test_requests_that_were_answered_are_not_kept(running, ask) -> None:
    front, process, address = running
    request = ask()
    request.id = "a" * 500_000
    with grpc.insecure_channel(address) as channel:
        stub = pb_grpc.GRPCInferenceServiceStub(channel)
        for _ in range(10):
            stub.ModelInfer(request, timeout=60)
        before = memory_of(process)
        # Ten times what may be kept, and too few objects for a garbage collection to come by.
        for _ in range(10 * KEPT_BYTES["core"] // 500_000):
            stub.ModelInfer(request, timeout=60)
        assert memory_of(process) - before < KEPT_BYTES[front]
