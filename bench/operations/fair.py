"""A modest client beside a greedy one, each with a token of its own."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from dataclasses import asdict
from typing import Any

import grpc
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from bench.models import BuiltModel
from bench.operations.callers import METHOD, Run, channels_to, request_of, run
from bench.peers.fetch import BUILD, ROOT
from bench.pollard_server import start_pollard
from bench.process import ServerProcess
from pollard.models.v1 import fleet_service_pb2 as fleet_pb
from pollard.models.v1 import token_service_pb2 as token_pb
from pollard.services.common.auth.tokens import digest_of, id_of, make_token

_MORE = 10.0
"""The greedy client offers so many times the capacity."""

_SIZE = 256


def busy_model(products: int = 60) -> BuiltModel:
    """Return a model that takes its time on a core and next to nothing on the wire."""
    folder = BUILD / "models" / f"busy{products}"
    path = folder / "model.onnx"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        weights = np.random.default_rng(0).standard_normal((_SIZE, _SIZE)).astype(np.float32)
        weights /= _SIZE**0.5
        nodes = [helper.make_node("Mul", ["x", "w"], ["h0"])]
        nodes += [
            helper.make_node("MatMul", [f"h{number}", "w"], [f"h{number + 1}"])
            for number in range(products)
        ]
        nodes += [helper.make_node("ReduceMean", [f"h{products}"], ["y"], axes=[2], keepdims=0)]
        graph = helper.make_graph(
            nodes,
            "busy",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 1, _SIZE])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", _SIZE])],
            [numpy_helper.from_array(weights, "w")],
        )
        made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
        onnx.save(made, path)
    return BuiltModel(
        f"busy{products}", "busy", path, "cpu-fp32", "x", "y", (1, _SIZE), (_SIZE,), max_batch=1
    )


def fair(rounds: int, seconds: float, limits: tuple[str, ...]) -> dict[str, Any]:
    """Measure the modest client alone and beside the greedy one, in turns.

    Args:
        rounds: Each alone, beside, beside, alone.
        seconds: Of each of the four.
        limits: Options of the server that limit every caller.
    """
    model = busy_model()
    tokens = {name: make_token() for name in ("modest", "greedy")}
    access = fleet_pb.AccessList(
        version=1,
        tokens=[
            fleet_pb.AccessToken(
                token_id=id_of(token),
                display_name=name,
                sha256=digest_of(token),
                role=token_pb.ROLE_PREDICTOR,
            )
            for name, token in tokens.items()
        ],
    )
    with start_pollard(
        [model], "--tokens", *limits, name="operations-fair", access=access
    ) as server:
        return asyncio.run(_fair(server, model, tokens, rounds, seconds)) | {
            "limits": " ".join(limits)
        }


async def _fair(
    server: ServerProcess,
    model: BuiltModel,
    tokens: dict[str, str],
    rounds: int,
    seconds: float,
) -> dict[str, Any]:
    request = request_of(model)
    metadata = {name: (("authorization", f"Bearer {token}"),) for name, token in tokens.items()}
    channels = channels_to(server.address, count=1)

    async def modest(for_seconds: float) -> Run:
        return await run(
            server,
            channels,
            request,
            callers=1,
            seconds=for_seconds,
            metadata=metadata["modest"],
        )

    try:
        alone = await modest(3.0)
        # What one caller after another gets of two cores, at most.
        capacity = 2 * alone.per_second
        found: dict[str, list[list[dict[str, Any]]]] = {"alone": [], "beside": []}
        greedy: list[dict[str, Any]] = []
        for _ in range(rounds):
            pairs: dict[str, list[dict[str, Any]]] = {"alone": [], "beside": []}
            for name in ("alone", "beside", "beside", "alone"):
                if name == "alone":
                    pairs[name].append(asdict(await modest(seconds)))
                    continue
                neighbour = subprocess.Popen(
                    [
                        # It stands for another machine, and should take nothing from this one.
                        *("nice", "-n", "19", sys.executable),
                        *("-m", "bench.operations.fair", server.address),
                        *(model.name, tokens["greedy"], str(_MORE * capacity), str(seconds + 3)),
                    ],
                    stdout=subprocess.PIPE,
                    text=True,
                    cwd=ROOT,
                )
                assert neighbour.stdout is not None
                await asyncio.to_thread(neighbour.stdout.readline)  # It has begun.
                pairs[name].append(asdict(await modest(seconds)))
                said = await asyncio.to_thread(neighbour.communicate)
                greedy.append(json.loads(said[0]))
            for name, pair in pairs.items():
                found[name].append(pair)
    finally:
        for channel in channels:
            await channel.close()
    return {"capacity": capacity, "runs": found, "greedy": greedy}


async def _be_greedy(address: str, token: str, rate: float, seconds: float) -> None:
    """Send at an even rate, whatever comes of it; tell what did."""
    request = request_of(busy_model())
    channels = channels_to(address, count=2)
    calls = [channel.unary_unary(METHOD) for channel in channels]
    metadata = (("authorization", f"Bearer {token}"),)
    outcomes: dict[str, int] = {}
    tasks: set[asyncio.Task[None]] = set()

    async def one(number: int) -> None:
        try:
            await calls[number % len(calls)](request, timeout=2.0, metadata=metadata)
            name = "OK"
        except grpc.aio.AioRpcError as error:
            name = error.code().name
        outcomes[name] = outcomes.get(name, 0) + 1

    print("begun", flush=True)
    sent, began = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - began) < seconds:
        while sent < elapsed * rate:
            task = asyncio.create_task(one(sent))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            sent += 1
        await asyncio.sleep(0.002)
    await asyncio.gather(*tasks)
    print(json.dumps({"offered_per_second": sent / elapsed, "outcomes": outcomes}))


if __name__ == "__main__":
    asyncio.run(_be_greedy(sys.argv[1], sys.argv[3], float(sys.argv[4]), float(sys.argv[5])))
