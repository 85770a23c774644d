"""Malformed requests to the inference server: `python -m bench.fuzz_inference --requests 100000`.

Valid requests are damaged in one to three ways – sizes, shapes, types, names, parameters, places in
shared memory, single bytes – and sent by several callers at once, alone and on streams. The server
must answer each with a status that the protocol knows, go on serving, and not grow. Exits with 1 if
it does not.
"""

from __future__ import annotations

import asyncio
import collections
import random
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import grpc
import numpy as np
import onnx
import typer
from onnx import TensorProto, helper, numpy_helper

from bench.process import ServerProcess, free_port, pollard_command
from pollard.inference import grpc_service_pb2 as pb

_SERVICE = "/inference.GRPCInferenceService/"

_REGION_BYTES = 4096

_NUMBERS = (0, 1, -1, 2, 3, 4, 15, 17, 2**31, 2**32, 2**62, 2**63 - 1, -(2**63))

_ALLOWED = {
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.ALREADY_EXISTS,
    grpc.StatusCode.INTERNAL,  # Only with the words that follow.
}

_INTERNAL_WORDS = ("shared memory", "failed to poll")

_ROUNDS = 10
"""Memory is compared between the ends of the second and of the last of so many rounds."""

_GROWTH = 1.10

_CALLERS = 16

_Unary = Any
"""`grpc.aio.UnaryUnaryMultiCallable[bytes, bytes]`, which takes no parameters when it is run."""


def _repository(root: Path) -> None:
    def put(
        name: str,
        nodes: list[onnx.NodeProto],
        inputs: list[tuple[str, int, list[str | int]]],
        outputs: list[tuple[str, int, list[str | int]]],
    ) -> None:
        graph = helper.make_graph(
            nodes,
            name,
            [helper.make_tensor_value_info(*tensor) for tensor in inputs],
            [helper.make_tensor_value_info(*tensor) for tensor in outputs],
            [numpy_helper.from_array(np.ones(1, np.float32), "one")] if name == "adder" else [],
        )
        made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
        folder = root / name / "1"
        folder.mkdir(parents=True)
        (folder / "model.onnx").write_bytes(made.SerializeToString())

    rows: list[str | int] = ["n", 4]
    float_, text = TensorProto.FLOAT, TensorProto.STRING
    add = helper.make_node("Add", ["x", "one"], ["y"])
    put("adder", [add], [("x", float_, rows)], [("y", float_, rows)])
    same = helper.make_node("Identity", ["x"], ["y"])
    for name, kind in (
        ("texts", text),
        ("bits", TensorProto.BFLOAT16),
        ("flags", TensorProto.BOOL),
    ):
        put(name, [same], [("x", kind, rows)], [("y", kind, rows)])
    both = helper.make_node("Add", ["a", "b"], ["y"])
    put("pair", [both], [("a", float_, rows), ("b", float_, rows)], [("y", float_, rows)])


def _valid(draw: random.Random) -> pb.ModelInferRequest:
    name = draw.choice(("adder", "adder", "texts", "bits", "flags", "pair"))
    batch = draw.randint(1, 4)
    request = pb.ModelInferRequest(model_name=name, id=str(draw.randint(0, 999)))
    kind, size = {"texts": ("BYTES", 5), "bits": ("BF16", 2), "flags": ("BOOL", 1)}.get(
        name, ("FP32", 4)
    )
    element = b"\1\0\0\0a" if kind == "BYTES" else b"\1" * size
    for tensor_name in ("a", "b") if name == "pair" else ("x",):
        tensor = request.inputs.add(name=tensor_name, datatype=kind, shape=[batch, 4])
        if draw.random() < 0.2:
            tensor.parameters["shared_memory_region"].string_param = "region"
            tensor.parameters["shared_memory_byte_size"].int64_param = len(element) * batch * 4
            tensor.parameters["shared_memory_offset"].int64_param = draw.randint(0, 64)
        else:
            request.raw_input_contents.append(element * batch * 4)
    if draw.random() < 0.5:
        output = request.outputs.add(name="y")
        if draw.random() < 0.4:
            output.parameters["shared_memory_region"].string_param = "region"
            output.parameters["shared_memory_byte_size"].int64_param = 256
        elif draw.random() < 0.3:
            output.parameters["classification"].int64_param = 2
    return request


def _damage_shape(request: pb.ModelInferRequest, draw: random.Random) -> None:
    for tensor in request.inputs:
        shape = list(tensor.shape)
        shape.insert(draw.randint(0, len(shape)), draw.choice(_NUMBERS))
        tensor.shape[:] = draw.sample(shape, draw.randint(0, len(shape)))


def _damage_size(request: pb.ModelInferRequest, draw: random.Random) -> None:
    for tensor in request.inputs:
        if tensor.shape:
            tensor.shape[draw.randrange(len(tensor.shape))] = draw.choice(_NUMBERS)


def _damage_raw(request: pb.ModelInferRequest, draw: random.Random) -> None:
    for index, data in enumerate(request.raw_input_contents):
        cut = bytearray(data[: draw.randint(0, len(data))] + draw.randbytes(draw.randint(0, 8)))
        if cut:
            # Lengths of texts are where damage hurts.
            cut[draw.randrange(len(cut))] = draw.choice((0, 1, 0x7F, 0x80, 0xFF))
        request.raw_input_contents[index] = bytes(cut)


def _damage_count(request: pb.ModelInferRequest, draw: random.Random) -> None:
    if draw.random() < 0.5:
        request.raw_input_contents.append(draw.randbytes(draw.randint(0, 64)))
    elif request.raw_input_contents:
        del request.raw_input_contents[-1]


def _damage_contents(request: pb.ModelInferRequest, draw: random.Random) -> None:
    if draw.random() < 0.5:
        del request.raw_input_contents[:]
    for tensor in request.inputs:
        field = draw.choice(("fp32_contents", "int_contents", "uint64_contents", "bool_contents"))
        getattr(tensor.contents, field).extend([1] * draw.randint(0, 20))


def _damage_names(request: pb.ModelInferRequest, draw: random.Random) -> None:
    name = draw.choice(("", "x", "a", "y", "nobody", "ü" * 5000, "\0", "x\n"))
    what = draw.randrange(5)
    if what == 0:
        request.model_name = name
    elif what == 1:
        request.model_version = draw.choice(("0", "1", "2", "-1", "9" * 40, "new", name))
    elif what == 2 and request.inputs:
        request.inputs[0].name = name
    elif what == 3 and request.inputs:
        request.inputs.append(request.inputs[0])
    else:
        request.outputs.add(name=name)


def _damage_type(request: pb.ModelInferRequest, draw: random.Random) -> None:
    for tensor in request.inputs:
        tensor.datatype = draw.choice(("FP32", "BYTES", "BF16", "BOOL", "INT64", "", "FP9"))


def _damage_parameters(request: pb.ModelInferRequest, draw: random.Random) -> None:
    places = [request.parameters, *(tensor.parameters for tensor in request.inputs)]
    places += [output.parameters for output in request.outputs]
    name = draw.choice(
        (
            "shared_memory_region",
            "shared_memory_byte_size",
            "shared_memory_offset",
            "classification",
            "timeout",
            "priority",
            "triton_x",
        )
    )
    value = draw.choice(places)[name]
    what = draw.randrange(5)
    if what == 0:
        value.int64_param = draw.choice(_NUMBERS)
    elif what == 1:
        value.uint64_param = 2**64 - 1
    elif what == 2:
        value.string_param = draw.choice(("region", "nobody", ""))
    elif what == 3:
        value.bool_param = True
    else:
        value.double_param = float("nan")


_DAMAGES: tuple[Callable[[pb.ModelInferRequest, random.Random], None], ...] = (
    _damage_shape,
    _damage_size,
    _damage_raw,
    _damage_count,
    _damage_contents,
    _damage_names,
    _damage_type,
    _damage_parameters,
)


def _damaged(draw: random.Random) -> bytes:
    request = _valid(draw)
    for damage in draw.sample(_DAMAGES, draw.randint(1, 3)):
        damage(request, draw)
    data = bytearray(request.SerializeToString())
    if draw.random() < 0.1 and data:
        for _ in range(draw.randint(1, 4)):
            data[draw.randrange(len(data))] = draw.randrange(256)
    return bytes(data)


class _Fuzzer:
    def __init__(self, channel: grpc.aio.Channel, key: str) -> None:
        self._infer: _Unary = channel.unary_unary(_SERVICE + "ModelInfer")
        self._stream: Any = channel.stream_stream(_SERVICE + "ModelStreamInfer")
        self._register: _Unary = channel.unary_unary(_SERVICE + "SystemSharedMemoryRegister")
        self._unregister: _Unary = channel.unary_unary(_SERVICE + "SystemSharedMemoryUnregister")
        self._key = key
        self.outcomes: collections.Counter[str] = collections.Counter()
        self.surprises: list[str] = []

    async def caller(self, draw: random.Random, count: int) -> None:
        """Send `count` damaged requests, and a valid one now and then."""
        sent = 0
        while sent < count:
            if draw.random() < 0.02:
                await self.regions(draw)
            if draw.random() < 0.05:
                batch = [_damaged(draw) for _ in range(min(8, count - sent))]
                await self.stream(batch)
                sent += len(batch)
            else:
                await self.one(self._infer, _damaged(draw))
                sent += 1
            if draw.random() < 0.02:
                await self.valid()

    async def one(self, call: _Unary, data: bytes) -> None:
        """Send one request and look at its status."""
        status, words = grpc.StatusCode.OK, ""
        try:
            await call(data, timeout=60)
        except grpc.aio.AioRpcError as error:
            status, words = error.code(), error.details() or ""
        self.outcomes[status.name] += 1
        unknown = status == grpc.StatusCode.INTERNAL and not any(
            known in words for known in _INTERNAL_WORDS
        )
        if status not in _ALLOWED or unknown:
            self.surprises.append(f"{status.name}: {words} for {data[:200]!r}")

    async def stream(self, batch: list[bytes]) -> None:
        """Send requests on one stream; each must have its answer."""
        answers = 0
        call = self._stream(iter(batch), timeout=60)
        try:
            async for data in call:
                answers += 1
                message = pb.ModelStreamInferResponse.FromString(data).error_message
                self.outcomes["stream error" if message else "stream OK"] += 1
                if "internal error" in message:
                    self.surprises.append(message)
        except grpc.aio.AioRpcError as error:
            self.surprises.append(f"stream: {error.code().name} {error.details()}")
        if answers != len(batch):
            self.surprises.append(f"stream: {answers} answers to {len(batch)} requests")

    async def regions(self, draw: random.Random) -> None:
        """Register and forget regions, also the one that requests use."""
        name = draw.choice(("region", "other", ""))
        if draw.random() < 0.5:
            request = pb.SystemSharedMemoryUnregisterRequest(name=name or "other")
            await self.one(self._unregister, request.SerializeToString())
        size = draw.choice((0, 1, _REGION_BYTES, _REGION_BYTES + 1, 2**63, 2**64 - 1))
        wrong = pb.SystemSharedMemoryRegisterRequest(
            name=name, key=draw.choice((self._key, "..", "")), offset=size, byte_size=size
        )
        await self.one(self._register, wrong.SerializeToString())
        right = pb.SystemSharedMemoryRegisterRequest(
            name="region", key=self._key, byte_size=_REGION_BYTES
        )
        await self.one(self._register, right.SerializeToString())

    async def valid(self) -> None:
        """Send a request that must be served, and check its answer."""
        request = pb.ModelInferRequest(model_name="adder", raw_input_contents=[bytes(16)])
        request.inputs.add(name="x", datatype="FP32", shape=[1, 4])
        data = await self._infer(request.SerializeToString(), timeout=60)
        answer = np.frombuffer(pb.ModelInferResponse.FromString(data).raw_output_contents[0], "f4")
        if answer.tolist() != [1, 1, 1, 1]:
            self.surprises.append(f"a valid request was answered {answer}")
        self.outcomes["valid"] += 1


async def _fuzz(server: ServerProcess, key: str, requests: int, seed: int) -> int:
    memory: list[int] = []
    started = time.perf_counter()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        fuzzer = _Fuzzer(channel, key)
        for number in range(_ROUNDS):
            await asyncio.gather(
                *(
                    fuzzer.caller(
                        random.Random(seed * 1_000_003 + number * _CALLERS + caller),
                        requests // _ROUNDS // _CALLERS,
                    )
                    for caller in range(_CALLERS)
                )
            )
            memory.append(server.memory_bytes())
            print(f"round {number + 1}: {memory[-1] / 2**20:.0f} MiB resident", flush=True)
    seconds = time.perf_counter() - started
    growth = memory[-1] / memory[1]
    print(f"{sum(fuzzer.outcomes.values())} requests in {seconds:.0f} s: {dict(fuzzer.outcomes)}")
    print(f"memory at the end / after the second round: {growth:.3f}")
    for surprise in fuzzer.surprises[:10]:
        print("surprise:", surprise)
    return int(bool(fuzzer.surprises) or growth > _GROWTH)


def main(
    requests: Annotated[int, typer.Option(min=1600, help="Damaged requests to send.")] = 100_000,
    seed: Annotated[int, typer.Option(help="Another seed damages otherwise.")] = 0,
    frontend: Annotated[str, typer.Option(help="Front end: grpcio, core or envoy.")] = "grpcio",
) -> None:
    """Send damaged requests to an inference server and see whether it minds."""
    print(f"front end {frontend}, seed {seed}, {requests} damaged requests")
    folder = Path(tempfile.mkdtemp(prefix="pollard-fuzz-"))
    region = Path("/dev/shm") / f"pollard-fuzz-{uuid.uuid4().hex}"  # noqa: S108 - they are there
    region.write_bytes(b"\1\0\0\0a" * (_REGION_BYTES // 5) + b"\0")
    try:
        _repository(folder / "models")
        port = free_port()
        command = [*pollard_command(), "serve", "inference", "--port", str(port)]
        command += [
            "--repository",
            str(folder / "models"),
            "--shared-memory",
            "--frontend",
            frontend,
        ]
        with ServerProcess.start("pollard", command, port, folder / "log") as server:
            code = asyncio.run(_fuzz(server, region.name, requests, seed))
            if server.process.poll() is not None:
                print("the server has ended")
                code = 1
        unexpected = (folder / "log").read_text().count("unexpected error")
        print(f"unexpected errors in the log: {unexpected}")
    finally:
        region.unlink()
        shutil.rmtree(folder)
    raise typer.Exit(code or int(unexpected > 0))


if __name__ == "__main__":
    typer.run(main)
