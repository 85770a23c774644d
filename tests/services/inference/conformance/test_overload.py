"""More requests than the server can answer in time."""

from __future__ import annotations

import asyncio
import collections
import time

import grpc
import pytest

from pollard.inference import grpc_service_pb2 as pb
from pollard.inference import grpc_service_pb2_grpc as pb_grpc


@pytest.mark.long
@pytest.mark.timeout(120)
async def test_what_could_not_be_answered_in_time_is_refused_at_once(serve, zoo, tmp_path) -> None:
    zoo["put"](
        tmp_path,
        "slow",
        {1: zoo["slow"](150)},
        "max_batch_size: 1  instance_group { count: 1 kind: KIND_CPU }",
    )
    request = pb.ModelInferRequest(model_name="slow", raw_input_contents=[bytes(16)])
    request.inputs.add(name="x", datatype="FP32", shape=[1, 4])
    outcomes: collections.Counter[grpc.StatusCode] = collections.Counter()
    with serve(tmp_path) as address:
        async with grpc.aio.insecure_channel(address) as channel:
            stub = pb_grpc.GRPCInferenceServiceStub(channel)

            async def one(seconds: float) -> None:
                try:
                    await stub.ModelInfer(request, timeout=seconds)
                    outcomes[grpc.StatusCode.OK] += 1
                except grpc.aio.AioRpcError as error:
                    outcomes[error.code()] += 1

            started = time.monotonic()
            for _ in range(20):
                await one(30)
            once = (time.monotonic() - started) / 20
            outcomes.clear()
            for _ in range(3):
                # Ten times as many as can be answered in time.
                await asyncio.gather(*(one(20 * once) for _ in range(200)))
            late = outcomes.pop(grpc.StatusCode.DEADLINE_EXCEEDED, 0)
            assert set(outcomes) == {grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE}
            # What was accepted may be late on a machine that others use too; the rest was refused
            # at once, and did not wait until its time was over.
            assert late + outcomes[grpc.StatusCode.OK] < outcomes[grpc.StatusCode.UNAVAILABLE]
            # Afterwards it is as before.
            await one(30)
            assert outcomes[grpc.StatusCode.OK] > 1
