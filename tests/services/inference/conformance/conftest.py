"""A server over a repository, in a process of its own, and Triton's clients to it."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from onnx import TensorProto, helper, numpy_helper
from tritonclient.utils import InferenceServerException

PROGRAM = """
import json, sys
from pollard.services.inference.settings import InferenceSettings
settings = InferenceSettings.load({"port": 0, **json.loads(sys.argv[1])})
settings.prepare_process()
from pollard.services.inference.main import run
sys.exit(run(settings))
"""


def model(nodes, inputs, outputs, initializers=()) -> bytes:
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info(name, kind, shape) for name, kind, shape in inputs],
        [helper.make_tensor_value_info(name, kind, shape) for name, kind, shape in outputs],
        [numpy_helper.from_array(value, name) for name, value in initializers],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(made)
    return made.SerializeToString()


def adder(constant: float, *, shape: tuple = ("n", 4), weights: int = 0) -> bytes:
    """Adds `constant` to x."""
    nodes = [helper.make_node("Add", ["x", "c"], ["y"])]
    initializers = [("c", np.float32([constant]))]
    if weights:
        nodes = [
            helper.make_node("ReduceSum", ["ballast"], ["zero"], keepdims=0),
            helper.make_node("Add", ["x", "c"], ["sum"]),
            helper.make_node("Add", ["sum", "zero"], ["y"]),
        ]
        initializers.append(("ballast", np.zeros(weights, np.float32)))
    float_ = TensorProto.FLOAT
    return model(nodes, [("x", float_, shape)], [("y", float_, shape)], initializers)


def echo(kind: int) -> bytes:
    return model(
        [helper.make_node("Identity", ["x"], ["y"])],
        [("x", kind, ["n", 2])],
        [("y", kind, ["n", 2])],
    )


def pair() -> bytes:
    """Two inputs, two outputs: a + b and a - b, of float and of int."""
    return model(
        [
            helper.make_node("Cast", ["b"], ["wide"], to=TensorProto.FLOAT),
            helper.make_node("Add", ["a", "wide"], ["sum"]),
            helper.make_node("Sub", ["a", "wide"], ["rest"]),
            helper.make_node("Cast", ["rest"], ["difference"], to=TensorProto.INT64),
        ],
        [("a", TensorProto.FLOAT, ["n", 2]), ("b", TensorProto.INT32, ["n", 2])],
        [("sum", TensorProto.FLOAT, ["n", 2]), ("difference", TensorProto.INT64, ["n", 2])],
    )


def slow(steps: int) -> bytes:
    """Adds 0 to x, after multiplying a 256 × 256 matrix `steps` times."""
    body = helper.make_graph(
        [
            helper.make_node("MatMul", ["m_in", "eye"], ["m_out"]),
            helper.make_node("Identity", ["go_in"], ["go_out"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("go_in", TensorProto.BOOL, []),
            helper.make_tensor_value_info("m_in", TensorProto.FLOAT, [256, 256]),
        ],
        [
            helper.make_tensor_value_info("go_out", TensorProto.BOOL, []),
            helper.make_tensor_value_info("m_out", TensorProto.FLOAT, [256, 256]),
        ],
    )
    return model(
        [
            helper.make_node("Loop", ["count", "go", "zeros"], ["m"], body=body),
            helper.make_node("Slice", ["m", "start", "end"], ["corner"]),
            helper.make_node("Add", ["x", "corner"], ["y"]),
        ],
        [("x", TensorProto.FLOAT, ["n", 4])],
        [("y", TensorProto.FLOAT, ["n", 4])],
        [
            ("eye", np.eye(256, dtype=np.float32)),
            ("zeros", np.zeros((256, 256), np.float32)),
            ("count", np.int64(steps)),
            ("go", np.bool_(True)),
            ("start", np.int64([0, 0])),
            ("end", np.int64([1, 1])),
        ],
    )


TYPES = {
    "BOOL": TensorProto.BOOL,
    "UINT8": TensorProto.UINT8,
    "UINT16": TensorProto.UINT16,
    "UINT32": TensorProto.UINT32,
    "UINT64": TensorProto.UINT64,
    "INT8": TensorProto.INT8,
    "INT16": TensorProto.INT16,
    "INT32": TensorProto.INT32,
    "INT64": TensorProto.INT64,
    "FP16": TensorProto.FLOAT16,
    "FP32": TensorProto.FLOAT,
    "FP64": TensorProto.DOUBLE,
    "BF16": TensorProto.BFLOAT16,
    "BYTES": TensorProto.STRING,
}


def put(root: Path, name: str, versions: dict[int, bytes], config: str = "", **files: str) -> Path:
    """Write a model into a repository."""
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    if config:
        (folder / "config.pbtxt").write_text(config)
    for file, text in files.items():
        (folder / file.replace("__", ".")).write_text(text)
    for version, content in versions.items():
        path = folder / str(version) / "model.onnx"
        path.parent.mkdir(exist_ok=True)
        # As a careful operator does: whole or not at all.
        path.with_suffix(".new").write_bytes(content)
        path.with_suffix(".new").rename(path)
    return folder


@pytest.fixture(scope="session")
def zoo() -> dict[str, Callable[..., object]]:
    """The functions that make models and put them into a repository."""
    return {"adder": adder, "echo": echo, "pair": pair, "slow": slow, "put": put}


@contextlib.contextmanager
def serving(repository: Path, **settings: object) -> Iterator[str]:
    """Run a server over `repository` as a process of its own; give its address when it is ready."""
    given = {
        "repository": str(repository),
        "memory_headroom_bytes": 0,
        "measure": False,
        # On a busy machine several requests of the slow models take more than the usual 30 s.
        "max_request_seconds": 120,
        **settings,
    }
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, json.dumps(given)],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    lines: queue.Queue[str] = queue.Queue()

    def read() -> None:
        assert process.stderr is not None
        for line in process.stderr:
            lines.put(line)
        lines.put("")

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    address, seen = "", []
    try:
        while True:
            line = lines.get(timeout=150)
            seen.append(line)
            assert line, "the server ended: " + "".join(seen)
            if "listening" in line:
                address = line.split("address=")[1].split()[0]
            if "models=" in line:
                break
        yield address
        assert process.poll() is None, "the server ended"
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            assert process.wait(30) == 0
        finally:
            process.kill()
            process.wait()
            reader.join(5)
            assert process.stderr is not None
            process.stderr.close()


@pytest.fixture(scope="session")
def serve() -> Callable[..., contextlib.AbstractContextManager[str]]:
    """`serving`, for tests that need a server of their own."""
    return serving


@pytest.fixture(scope="session")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("repository")
    put(
        root,
        "adder",
        {1: adder(1), 2: adder(2)},
        """
        name: "adder"  max_batch_size: 8  version_policy { all {} }
        output { name: "y" data_type: TYPE_FP32 dims: 4 label_filename: "labels.txt" }
        """,
        labels__txt="zero\none\ntwo\n",
    )
    put(root, "pair", {1: pair()})
    put(root, "flat", {1: adder(1, shape=(3,))})
    put(root, "free", {1: adder(1)}, "max_batch_size: 0")
    put(
        root,
        "slow",
        {1: slow(300)},
        "max_batch_size: 1  instance_group { count: 1 kind: KIND_CPU }",
    )
    put(
        root,
        "slower",
        {1: slow(3000)},
        """
        max_batch_size: 1  instance_group { count: 1 kind: KIND_CPU }
        dynamic_batching {
          priority_levels: 2  default_priority_level: 2
          default_queue_policy { max_queue_size: 3 allow_timeout_override: true }
        }
        """,
    )
    put(root, "broken", {1: b"no model"})
    for name, kind in TYPES.items():
        put(root, f"echo_{name.lower()}", {1: echo(kind)})
    return root


@pytest.fixture(scope="session")
def address(repository: Path) -> Iterator[str]:
    settings = {"model_control": "explicit", "load_model": ["*"], "shared_memory": True}
    with serving(repository, **settings) as address:
        yield address


@pytest.fixture
def client(address: str) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(address) as client:
        yield client


def tensor(name: str, values: np.ndarray, datatype: str) -> triton.InferInput:
    made = triton.InferInput(name, list(values.shape), datatype)
    made.set_data_from_numpy(values)
    return made


def x(values: object = None) -> triton.InferInput:
    """The input of the adder."""
    array = np.zeros((1, 4), np.float32) if values is None else np.float32(values)
    return tensor("x", array, "FP32")


@pytest.fixture(scope="session")
def inputs() -> dict[str, Callable[..., triton.InferInput]]:
    """`tensor` and `x`."""
    return {"tensor": tensor, "x": x}


async def _sync(address: str, call: dict) -> triton.InferResult:
    with triton.InferenceServerClient(address) as client:
        return client.infer(client_timeout=30, **call)


async def _asyncio(address: str, call: dict) -> triton.InferResult:
    async with triton_aio.InferenceServerClient(address) as client:
        return await client.infer(client_timeout=30, **call)


async def _stream(address: str, call: dict, headers: dict | None = None) -> triton.InferResult:
    answers: queue.Queue = queue.Queue()
    with triton.InferenceServerClient(address) as client:
        client.start_stream(lambda result, error: answers.put((result, error)), headers=headers)
        client.async_stream_infer(**call)
        result, error = answers.get(timeout=30)
        if error is not None and not headers:
            # The stream is left open: the next request on it is served.
            client.async_stream_infer("adder", [x()])
            after, nothing = answers.get(timeout=30)
            assert nothing is None
            assert after.as_numpy("y").shape == (1, 4)
        client.stop_stream()
    if error is not None:
        raise error
    return result


async def _strict_stream(address: str, call: dict) -> triton.InferResult:
    return await _stream(address, call, {"triton_grpc_error": "true"})


@pytest.fixture(params=["sync", "asyncio", "stream", "strict stream"])
def infer(request: pytest.FixtureRequest, address: str):
    """Sends one request over one of the protocol's ways; the tests that use it run over each."""
    send = {
        "sync": _sync,
        "asyncio": _asyncio,
        "stream": _stream,
        "strict stream": _strict_stream,
    }[request.param]

    async def call(**arguments: object) -> triton.InferResult:
        try:
            return await send(address, arguments)
        except InferenceServerException as error:
            # In a stream that stays open there is only the message.
            error.has_status = request.param != "stream"
            raise

    return call
