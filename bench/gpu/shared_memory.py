"""Tensors in shared memory of the host and of the GPU against the bytes in the request."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any, Protocol

import grpc
import numpy as np

from bench.gpu.callers import Load, measure
from bench.gpu.serving import answers, flags, make_bundle, servers
from bench.gpu.sessions import Array, make_session, random_feeds
from bench.gpu.setup import Setup, Table, ratio, say
from pollard.inference import grpc_service_pb2 as pb
from pollard.inference import grpc_service_pb2_grpc

_IN_FLIGHT = 4
_KINDS = {"uint8": "UINT8", "float32": "FP32"}
_CLOSE = 0.05
"""Difference from the same model on the CPU, relative to the answers' range."""


class _Region(Protocol):
    """Memory for a request's input, and behind it for its answer."""

    name: str

    def register(self, stub: Any, size: int) -> None:
        """Tell the server of it."""

    def read(self, offset: int, size: int) -> bytes:
        """Return what the server has put there."""


def run(setup: Setup) -> None:
    """Send a large batch and a single image each way, and compare the answers with the CPU's."""
    sizes = setup.sizes
    file = setup.models / "parent-float-fp16.onnx"
    session = make_session(file, "cpu")
    bundle = make_bundle(setup, "image", file, sizes.request_batch)
    told = [*flags(setup, 1), "--frontend", "core", "--shared-memory"]
    rows: list[dict[str, Any]] = []
    with servers(setup, {"image": bundle}, {"shared": told}) as running:
        address = running["shared"].address
        for batch in (1, sizes.request_batch):
            feeds = random_feeds(session, batch)
            ((name, array),) = feeds.items()
            ((output, wanted),) = answers(session, feeds).items()
            for way in ("in the request", "shared, host", "shared, GPU"):
                if way == "shared, GPU" and setup.provider != "cuda":
                    continue
                if setup.left < sizes.load_seconds + 3:
                    say("the time is used up")
                    return
                row: dict[str, Any] = {"way": way, "batch": batch}
                rows.append(row)
                with (
                    _region(way, array, wanted.nbytes) as region,
                    grpc.insecure_channel(
                        address, [("grpc.max_receive_message_length", -1)]
                    ) as channel,
                ):
                    stub = grpc_service_pb2_grpc.GRPCInferenceServiceStub(channel)
                    if region is not None:
                        region.register(stub, array.nbytes + wanted.nbytes)
                    request = _request(name, array, output, wanted.nbytes, region)
                    row["difference"] = _difference(stub.ModelInfer(request), region, array, wanted)
                    path = setup.work / "shared.request"
                    path.write_bytes(request.SerializeToString())
                    load = Load((address,), path, 2, _IN_FLIGHT, batch)
                    row |= measure(load, setup.work / "seen", sizes.load_seconds)
                    if region is not None:
                        stub.SystemSharedMemoryUnregister(pb.SystemSharedMemoryUnregisterRequest())
                        stub.CudaSharedMemoryUnregister(pb.CudaSharedMemoryUnregisterRequest())
                setup.keep("shared", rows)
                say(", ".join(f"{key} {value}" for key, value in row.items()))
    bad = [row["way"] for row in rows if not row["difference"] <= _CLOSE]
    if bad:
        raise SystemExit(f"answers differ from the CPU's: {', '.join(bad)}")


def _request(
    name: str, array: Array, output: str, size: int, region: _Region | None
) -> pb.ModelInferRequest:
    request = pb.ModelInferRequest(model_name="image")
    sent = request.inputs.add(name=name, datatype=_KINDS[str(array.dtype)], shape=array.shape)
    if region is None:
        request.raw_input_contents.append(np.ascontiguousarray(array).tobytes())
        return request
    asked = request.outputs.add(name=output)
    for tensor, offset, count in ((sent, 0, array.nbytes), (asked, array.nbytes, size)):
        tensor.parameters["shared_memory_region"].string_param = region.name
        tensor.parameters["shared_memory_byte_size"].int64_param = count
        tensor.parameters["shared_memory_offset"].int64_param = offset
    return request


def _difference(answer: Any, region: _Region | None, array: Array, wanted: Array) -> float:
    if region is None:
        raw = answer.raw_output_contents[0]
    else:
        raw = region.read(array.nbytes, wanted.nbytes)
    got = np.frombuffer(raw, wanted.dtype).reshape(wanted.shape)
    return round(float(np.abs(got - wanted).max()) / (float(np.ptp(wanted)) or 1.0), 5)


@contextlib.contextmanager
def _region(way: str, array: Array, room: int) -> Iterator[_Region | None]:
    """Make memory that holds an input, with room for the answer; none where it is not shared."""
    data = np.ascontiguousarray(array).tobytes()
    if way == "in the request":
        yield None
    elif way == "shared, host":
        memory = SharedMemory(create=True, size=len(data) + room)
        try:
            memory.buf[: len(data)] = data
            yield _OfHost(memory)
        finally:
            memory.close()
            memory.unlink()
    else:
        with _of_gpu(data, room) as region:
            yield region


class _OfHost:
    def __init__(self, memory: SharedMemory) -> None:
        self.name, self._memory = "bench-host", memory

    def register(self, stub: Any, size: int) -> None:
        key = f"/{Path(self._memory.name).name}"
        stub.SystemSharedMemoryRegister(
            pb.SystemSharedMemoryRegisterRequest(name=self.name, key=key, byte_size=size)
        )

    def read(self, offset: int, size: int) -> bytes:
        return bytes(self._memory.buf[offset : offset + size])


class _OfGpu:
    def __init__(self, runtime: Any, pointer: ctypes.c_void_p, handle: bytes) -> None:
        self.name = "bench-gpu"
        self._runtime, self._pointer, self._handle = runtime, pointer, handle

    def register(self, stub: Any, size: int) -> None:
        stub.CudaSharedMemoryRegister(
            pb.CudaSharedMemoryRegisterRequest(
                name=self.name, raw_handle=self._handle, device_id=0, byte_size=size
            )
        )

    def read(self, offset: int, size: int) -> bytes:
        from pollard.runtime import cuda

        back = ctypes.create_string_buffer(size)
        start = ctypes.c_void_p((self._pointer.value or 0) + offset)
        self._runtime.call("cudaMemcpy", back, start, size, cuda.DEVICE_TO_HOST)
        return back.raw


@contextlib.contextmanager
def _of_gpu(data: bytes, room: int) -> Iterator[_OfGpu]:
    from pollard.runtime import cuda

    runtime = cuda.Runtime.get()
    pointer, handle = ctypes.c_void_p(), cuda.IpcHandle()
    runtime.call("cudaSetDevice", 0)
    runtime.call("cudaMalloc", ctypes.byref(pointer), len(data) + room)
    try:
        runtime.call("cudaMemcpy", pointer, data, len(data), cuda.HOST_TO_DEVICE)
        runtime.call("cudaIpcGetMemHandle", ctypes.byref(handle), pointer)
        yield _OfGpu(runtime, pointer, bytes(handle))
    finally:
        runtime.call("cudaFree", pointer)


def tables(data: dict[str, Any]) -> list[Table]:
    """Return images a second each way, and against the bytes in the request."""
    rows = data.get("shared", [])
    plain = {
        row["batch"]: row.get("images_per_second") for row in rows if row["way"] == "in the request"
    }
    return [
        Table(
            "Tensors in shared memory, float32 images, float16 inside",
            ("tensors", "batch", "images/s", "p50, p99 in ms", "failed", "against the request",
             "difference from the CPU"),
            [
                (
                    row["way"],
                    row["batch"],
                    f"{row['images_per_second']:,.0f}",
                    f"{row['p50_ms']:.1f}, {row['p99_ms']:.1f}",
                    row["failed"],
                    ratio(row["images_per_second"], plain[row["batch"]]),
                    f"{row['difference']:.1e}",
                )
                for row in rows
                if "images_per_second" in row
            ],
        )
    ]  # fmt: skip
