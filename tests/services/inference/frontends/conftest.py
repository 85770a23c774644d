"""A server over a repository, as a process of its own, for each front end."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from pollard.inference import grpc_service_pb2 as pb
from pollard.inference import grpc_service_pb2_grpc as pb_grpc

FRONTS = [
    "core",
    pytest.param(
        "envoy",
        marks=pytest.mark.skipif(
            importlib.util.find_spec("pyvoy") is None, reason="the extra [envoy] is not installed"
        ),
    ),
]

PROGRAM = """
import json, sys
from pathlib import Path
from pollard.services.inference.settings import InferenceSettings
settings = InferenceSettings.load({
    "port": 0, "repository": Path(sys.argv[1]), "frontend": sys.argv[2],
    "max_message_bytes": 1 << 20, "memory_headroom_bytes": 0, "measure": False,
    **json.loads(sys.argv[3]),
})
settings.prepare_process()
from pollard.services.inference.main import run
sys.exit(run(settings))
"""


def product(size: int) -> bytes:
    """x [n, 1] + 0, after a product of two square matrices that cannot be folded away."""
    nodes = [
        helper.make_node("Mul", ["m", "x"], ["mx"]),
        helper.make_node("MatMul", ["mx", "m"], ["p"]),
        helper.make_node("ReduceSum", ["p"], ["sum"], keepdims=0),
        helper.make_node("Mul", ["sum", "zero"], ["nothing"]),
        helper.make_node("Add", ["x", "nothing"], ["y"]),
    ]
    return model(nodes, {"m": np.ones((size, size), np.float32), "zero": np.float32(0)})


def steps() -> bytes:
    """x [1, 1] + 0, after a product of matrices of 256 x 256, done 20 + x times.

    Also a warm-up with zeros takes its time, so that the engine does not hold it for a small model.
    """
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
    nodes = [
        helper.make_node("ReduceSum", ["x"], ["sum"], keepdims=0),
        helper.make_node("Add", ["sum", "twenty"], ["times"]),
        helper.make_node("Cast", ["times"], ["count"], to=TensorProto.INT64),
        helper.make_node("Loop", ["count", "go", "zeros"], ["m"], body=body),
        helper.make_node("Slice", ["m", "start", "end"], ["corner"]),
        helper.make_node("Add", ["x", "corner"], ["y"]),
    ]
    initializers = {
        "twenty": np.float32(20),
        "eye": np.eye(256, dtype=np.float32),
        "zeros": np.zeros((256, 256), np.float32),
        "go": np.bool_(True),
        "start": np.int64([0, 0]),
        "end": np.int64([1, 1]),
    }
    return model(nodes, initializers)


def model(nodes, initializers) -> bytes:
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 1])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 1])],
        [numpy_helper.from_array(value, name) for name, value in initializers.items()],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return made.SerializeToString()


@contextlib.contextmanager
def serving(
    repository: Path, front: str, log: list[str] | None = None, **settings: object
) -> Iterator[tuple[subprocess.Popen, str]]:
    for name, content in (("quick", product(4)), ("slow", product(1500)), ("steps", steps())):
        folder = repository / name / "1"
        folder.mkdir(parents=True)
        (folder / "model.onnx").write_bytes(content)
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(repository), front, json.dumps(settings)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    lines: queue.Queue[str] = queue.Queue()
    log = [] if log is None else log

    def read() -> None:
        for line in process.stdout:
            log.append(line)
            lines.put(line)
        lines.put("")

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    address, seen = "", []
    try:
        while not address or "models=" not in seen[-1]:
            seen.append(lines.get(timeout=120))
            assert seen[-1], "the server ended: " + "".join(seen)
            if "listening" in seen[-1]:
                address = seen[-1].split("address=")[1].split()[0]
        yield process, address
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        process.wait(30)
        reader.join(10)
        process.stdout.close()
        assert "unexpected error" not in "".join(log)
        assert "Traceback" not in "".join(log), "".join(log)


Serving = Callable[..., contextlib.AbstractContextManager[tuple[subprocess.Popen, str]]]


@pytest.fixture(scope="session")
def serve() -> Serving:
    """`serving`, for tests that need a server of their own."""
    return serving


@pytest.fixture(params=FRONTS)
def front(request: pytest.FixtureRequest) -> str:
    """Each front end that is not grpcio's server."""
    return request.param


@pytest.fixture(scope="module", params=FRONTS)
def running(request, tmp_path_factory) -> Iterator[tuple[str, subprocess.Popen, str]]:
    """A server that the tests of a module share, by each front end: its name, the process and the
    address."""
    with serving(tmp_path_factory.mktemp("repository"), request.param) as (process, address):
        yield request.param, process, address
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0


@pytest.fixture(scope="module")
def server(running) -> str:
    """Address of the shared server."""
    return running[2]


@pytest.fixture
def channel(server) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server) as channel:
        yield channel


def request_of(model: str = "quick", value: float = 1.0) -> pb.ModelInferRequest:
    request = pb.ModelInferRequest(model_name=model)
    request.inputs.add(name="x", datatype="FP32", shape=[1, 1])
    request.raw_input_contents.append(np.float32(value).tobytes())
    return request


@pytest.fixture(scope="session")
def ask() -> Callable[..., pb.ModelInferRequest]:
    """Returns a function that makes a request to a model, "quick" if none is named."""
    return request_of


def runs(stub: pb_grpc.GRPCInferenceServiceStub, model: str) -> int:
    (stats,) = stub.ModelStatistics(pb.ModelStatisticsRequest(name=model)).model_stats
    return stats.execution_count


@pytest.fixture(scope="session")
def runs_of() -> Callable[[pb_grpc.GRPCInferenceServiceStub, str], int]:
    """Returns a function that says how often a model was run."""
    return runs


def all_that_goes(taken: list, count: int) -> None:
    """Wait until a stream has taken `count` requests, or flow control holds its client back."""
    known = 0
    while len(taken) < count and (not taken or len(taken) > known):
        known = len(taken)
        time.sleep(0.3)


@pytest.fixture(scope="session")
def sent() -> Callable[[list, int], None]:
    """`all_that_goes`."""
    return all_that_goes
