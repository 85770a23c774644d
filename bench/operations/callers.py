"""Callers who each wait for an answer before they ask again, in this process."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

import grpc
import numpy as np

from bench.models import BuiltModel
from bench.process import ServerProcess
from pollard.inference import grpc_service_pb2 as pb

METHOD = "/inference.GRPCInferenceService/ModelInfer"

_CHANNELS = 4


@dataclass(frozen=True)
class Run:
    """Some seconds of requests to one server."""

    per_second: float
    p50_ms: float
    p99_ms: float
    cpu_ms_each: float
    """Processor time of the server for one request."""
    failed: int = 0


def request_of(model: BuiltModel) -> bytes:
    """Return a request for one row of zeros."""
    request = pb.ModelInferRequest(model_name=model.name)
    request.inputs.add(name=model.input, datatype="FP32", shape=[1, *model.input_shape])
    request.raw_input_contents.append(np.zeros((1, *model.input_shape), np.float32).tobytes())
    data: bytes = request.SerializeToString()
    return data


def channels_to(
    address: str, credentials: grpc.ChannelCredentials | None = None, count: int = _CHANNELS
) -> list[grpc.aio.Channel]:
    """Open channels, each with a connection of its own."""
    options = [("grpc.use_local_subchannel_pool", 1)]
    if credentials is None:
        return [grpc.aio.insecure_channel(address, options) for _ in range(count)]
    return [grpc.aio.secure_channel(address, credentials, options) for _ in range(count)]


async def ask(
    channels: Sequence[grpc.aio.Channel],
    request: bytes,
    *,
    callers: int,
    seconds: float,
    metadata: tuple[tuple[str, str], ...] = (),
) -> tuple[list[float], int]:
    """Ask for some seconds; return how long the answers took, in seconds, and how many failed."""
    calls = [channel.unary_unary(METHOD) for channel in channels]
    until, took, failed = time.perf_counter() + seconds, list[float](), 0

    async def caller(number: int) -> None:
        nonlocal failed
        while (began := time.perf_counter()) < until:
            try:
                await calls[number % len(calls)](request, timeout=30, metadata=metadata)
            except grpc.aio.AioRpcError:
                failed += 1
            else:
                took.append(time.perf_counter() - began)

    await asyncio.gather(*(caller(number) for number in range(callers)))
    return took, failed


async def run(
    server: ServerProcess,
    channels: Sequence[grpc.aio.Channel],
    request: bytes,
    *,
    callers: int,
    seconds: float,
    metadata: tuple[tuple[str, str], ...] = (),
) -> Run:
    """Ask a server for some seconds, and look at its processor time."""
    cpu, began = server.cpu_seconds(), time.perf_counter()
    took, failed = await ask(channels, request, callers=callers, seconds=seconds, metadata=metadata)
    wall, cpu = time.perf_counter() - began, server.cpu_seconds() - cpu
    return Run(
        len(took) / wall,
        1e3 * float(np.percentile(took, 50)),
        1e3 * float(np.percentile(took, 99)),
        1e3 * cpu / max(1, len(took)),
        failed,
    )
