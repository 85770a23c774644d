"""An inference server at three times its capacity: `python -m bench.overload`.

Requests come at an even rate, whether or not earlier ones were answered, each with a deadline.
What the server cannot answer in time it should refuse at once; what it accepts it should answer.
"""

from __future__ import annotations

import asyncio
import collections
import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

import grpc
import numpy as np
import typer

from bench.environment import environment, heading
from bench.models import MODELS, BuiltModel
from bench.peers.fetch import ROOT
from bench.pollard_server import start_pollard
from pollard.inference import grpc_service_pb2 as pb

_METHOD = "/inference.GRPCInferenceService/ModelInfer"

_CHANNELS = 4


@dataclass
class Overload:
    """What became of the requests to one server."""

    frontend: str
    capacity: float
    """Requests a second that it answers to callers who wait."""
    sent: int = 0
    answered: int = 0
    outcomes: dict[str, int] = field(default_factory=dict)
    """Requests that were not answered, by status."""
    answer_p99_ms: float = 0.0
    refusal_p50_ms: float = 0.0
    refusal_p99_ms: float = 0.0
    goodput: float = 0.0
    """Answered in time, a second, over the capacity."""
    memory_ratio: float = 0.0
    """Resident memory after it over before it."""
    recovered_ms: float = 0.0
    """Time of the first request after it."""


def _request(model: BuiltModel) -> bytes:
    request = pb.ModelInferRequest(model_name=model.name)
    request.inputs.add(name=model.input, datatype="FP32", shape=[1, *model.input_shape])
    request.raw_input_contents.append(np.zeros((1, *model.input_shape), np.float32).tobytes())
    data: bytes = request.SerializeToString()
    return data


async def _overload(
    frontend: str, model: BuiltModel, *, seconds: float, deadline: float, times: float
) -> Overload:
    request = _request(model)
    with start_pollard([model], "--frontend", frontend, name=f"overload-{frontend}") as server:
        channels = [
            grpc.aio.insecure_channel(server.address, [("grpc.use_local_subchannel_pool", 1)])
            for _ in range(_CHANNELS)
        ]
        calls = [channel.unary_unary(_METHOD) for channel in channels]
        try:
            seen = Overload(frontend, await _capacity(calls, request))
            memory = server.memory_bytes()
            answers: list[float] = []
            refusals: list[float] = []
            outcomes: collections.Counter[str] = collections.Counter()

            async def one(number: int) -> None:
                started = time.perf_counter()
                try:
                    await calls[number % _CHANNELS](request, timeout=deadline)
                except grpc.aio.AioRpcError as error:
                    took = time.perf_counter() - started
                    outcomes[error.code().name] += 1
                    if error.code() == grpc.StatusCode.UNAVAILABLE:
                        refusals.append(took)
                else:
                    answers.append(time.perf_counter() - started)

            rate = times * seen.capacity
            started, tasks = time.perf_counter(), set()
            while (now := time.perf_counter() - started) < seconds:
                while seen.sent < now * rate:
                    task = asyncio.create_task(one(seen.sent))
                    tasks.add(task)
                    task.add_done_callback(tasks.discard)
                    seen.sent += 1
                await asyncio.sleep(0.002)
            # Every call ends: none outlives its deadline by more than a moment.
            await asyncio.wait_for(asyncio.gather(*tasks), deadline + 10)
            elapsed = time.perf_counter() - started
            again = time.perf_counter()
            await calls[0](request, timeout=10)
            seen.recovered_ms = 1e3 * (time.perf_counter() - again)
        finally:
            for channel in channels:
                await channel.close()
        seen.memory_ratio = server.memory_bytes() / memory
    seen.answered, seen.outcomes = len(answers), dict(outcomes)
    seen.goodput = seen.answered / elapsed / seen.capacity
    seen.answer_p99_ms = 1e3 * float(np.percentile(answers or [0.0], 99))
    seen.refusal_p50_ms = 1e3 * float(np.percentile(refusals or [0.0], 50))
    seen.refusal_p99_ms = 1e3 * float(np.percentile(refusals or [0.0], 99))
    return seen


async def _capacity(
    calls: list[grpc.aio.UnaryUnaryMultiCallable], request: bytes, seconds: float = 4.0
) -> float:
    answered, until = 0, time.perf_counter() + seconds

    async def caller(number: int) -> None:
        nonlocal answered
        while time.perf_counter() < until:
            await calls[number % _CHANNELS](request, timeout=30)
            answered += 1

    await asyncio.gather(*(caller(number) for number in range(2 * _CHANNELS)))
    return answered / seconds


def _line(seen: Overload) -> str:
    others = ", ".join(f"{count:,} {name}" for name, count in sorted(seen.outcomes.items()))
    return (
        f"- {seen.frontend}: capacity {seen.capacity:,.0f}/s; {seen.sent:,} sent, "
        f"{seen.answered:,} answered ({seen.goodput:.2f} × the capacity), p99 "
        f"{seen.answer_p99_ms:,.0f} ms; {others or 'none refused'}; refused after "
        f"{seen.refusal_p50_ms:,.1f} ms (p50), {seen.refusal_p99_ms:,.1f} ms (p99); memory "
        f"{seen.memory_ratio:.2f} ×; the next request took {seen.recovered_ms:,.1f} ms."
    )


def main(
    frontend: Annotated[str, typer.Option(help="Front ends, separated by commas.")] = "grpcio,core",
    model: Annotated[str, typer.Option(help="Model to serve.")] = "resnet56",
    seconds: Annotated[float, typer.Option(help="How long, for each.")] = 60.0,
    deadline_ms: Annotated[float, typer.Option(help="Deadline of a request.")] = 250.0,
    times: Annotated[float, typer.Option(help="Rate over the capacity.")] = 3.0,
    out: Annotated[Path, typer.Option(help="Folder for the result.")] = ROOT / "bench/results",
    note: Annotated[str, typer.Option(help="What else the machine did meanwhile.")] = "",
) -> None:
    """Send more than a server can answer and tell what became of it."""
    before, built = environment(), MODELS[model]()
    results = []
    for front in frontend.split(","):
        results.append(
            asyncio.run(
                _overload(front, built, seconds=seconds, deadline=deadline_ms / 1e3, times=times)
            )
        )
        print(_line(results[-1]), flush=True)
    text = [
        "# Overload",
        "",
        heading(before),
        *([note] if note else []),
        "",
        f"{built.title}; {times:g} times the capacity for {seconds:g} s, each request with a "
        f"deadline of {deadline_ms:g} ms. The generator is a Python process on the same machine, "
        "which takes a good part of it and is late itself when it has no core: the capacity is "
        "what it can have answered.",
        "",
        *map(_line, results),
        "",
    ]
    file = out / f"overload-{time.strftime('%Y-%m-%d')}"
    file.with_suffix(".md").write_text("\n".join(text))
    content = {"environment": before, "note": note, "results": [asdict(each) for each in results]}
    file.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
