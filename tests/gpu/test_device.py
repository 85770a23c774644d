"""The GPU path on a GPU: right answers, buffers, graphs, memory and errors."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from pollard.runtime import cuda
from pollard.runtime.cuda import CudaOptions
from pollard.runtime.errors import DeviceFault, DeviceMemoryShort, ProviderMissing
from pollard.runtime.machine import Machine
from pollard.runtime.sessions import Session, open_session

_PROBLEMS = cuda.problems()

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(bool(_PROBLEMS), reason=f"no GPU: {'; '.join(_PROBLEMS)}"),
]

SIZE, CHANNELS, CLASSES = 32, 32, 10
LARGEST = 16


def network(seed: int = 0) -> bytes:
    """A small convolutional network: uint8 NHWC in, cast and transposed by the graph."""
    generator = np.random.default_rng(seed)

    def weights(name: str, *shape: int) -> TensorProto:
        scale = np.prod(shape[1:]) ** -0.5
        array = generator.normal(0, scale, shape).astype(np.float32)
        return numpy_helper.from_array(array, name)

    nodes = [
        helper.make_node("Cast", ["image"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["float", "scale"], ["scaled"]),
        helper.make_node("Transpose", ["scaled"], ["nchw"], perm=[0, 3, 1, 2]),
        helper.make_node("Conv", ["nchw", "w1"], ["a1"], kernel_shape=[3, 3], pads=[1] * 4),
        helper.make_node("Relu", ["a1"], ["r1"]),
        helper.make_node(
            "Conv", ["r1", "w2"], ["a2"], kernel_shape=[3, 3], pads=[1] * 4, strides=[2, 2]
        ),
        helper.make_node("Relu", ["a2"], ["r2"]),
        helper.make_node("GlobalAveragePool", ["r2"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["flat"]),
        helper.make_node("Gemm", ["flat", "w3"], ["scores"], transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "network",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["n", SIZE, SIZE, 3])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["n", CLASSES])],
        [
            numpy_helper.from_array(np.float32(1 / 255), "scale"),
            weights("w1", CHANNELS, 3, 3, 3),
            weights("w2", 2 * CHANNELS, CHANNELS, 3, 3),
            weights("w3", CLASSES, 2 * CHANNELS),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    return model.SerializeToString()


def images(rows: int, seed: int = 0) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    return {"image": generator.integers(0, 256, (rows, SIZE, SIZE, 3), np.uint8)}


def on_gpu(model: bytes | None = None, *, largest: int = LARGEST, **options: object):
    session = open_session(
        model or network(), target="cuda-fp16", cuda=CudaOptions(**{"tf32": False, **options})
    )
    if largest:
        assert session.batch_up_to(largest)[-1] == largest
    return session


@pytest.fixture(scope="module")
def processor() -> Session:
    return open_session(network())


def close_to(actual: np.ndarray, wanted: np.ndarray, tolerance: float = 1e-3) -> None:
    assert np.isfinite(actual).all()
    np.testing.assert_allclose(actual, wanted, rtol=0, atol=tolerance * np.abs(wanted).max())


@pytest.mark.parametrize("nhwc", [True, False])
@pytest.mark.parametrize("search", ["HEURISTIC", "EXHAUSTIVE", "DEFAULT"])
def test_answers_are_those_of_the_processor(processor, nhwc: bool, search: str) -> None:
    session = on_gpu(prefer_nhwc=nhwc, conv_search=search)
    for rows in (1, 3, 16, 5):
        close_to(session.run(images(rows))["scores"], processor.run(images(rows))["scores"])
    assert session.raw.get_providers()[0] == "CUDAExecutionProvider"
    session.close()


def test_plain_runs_of_any_size(processor) -> None:
    session = on_gpu(largest=0)
    for rows in (1, 7, 20):
        close_to(session.run(images(rows))["scores"], processor.run(images(rows))["scores"])
    session.close()


def test_padding_leaves_no_trace(processor) -> None:
    session = on_gpu()
    session.warm(images, (1, 2, 4, 8, 16))
    session.run({"image": np.full((16, SIZE, SIZE, 3), 255, np.uint8)})
    for rows in range(1, 17):
        given = images(rows, seed=rows)
        answer = session.run(given)["scores"]
        assert answer.shape == (rows, CLASSES)
        close_to(answer, processor.run(given)["scores"])
    session.close()


def test_requests_joined_in_place(processor) -> None:
    session = on_gpu()
    parts = [images(rows, seed=rows) for rows in (1, 4, 2, 6)]
    joined = {"image": np.concatenate([part["image"] for part in parts])}
    close_to(session.run_parts(parts)["scores"], processor.run(joined)["scores"])
    session.close()


def test_graphs_are_replayed_with_what_comes_now(processor) -> None:
    session = on_gpu(graphs=True)
    assert session.instances[0].graphs
    session.warm(images, (1, 2, 4, 8, 16))
    assert session.instances[0].graph_problem == ""
    for turn in range(40):
        given = images(1 + turn % 16, seed=turn)
        close_to(session.run(given)["scores"], processor.run(given)["scores"])
    # Larger than the largest: without a graph, in the same session.
    close_to(session.run(images(20))["scores"], processor.run(images(20))["scores"])
    session.close()


@pytest.mark.parametrize("graphs", [False, True])
def test_many_threads_on_two_instances(processor, graphs: bool) -> None:
    session = on_gpu(instances=2, graphs=graphs)
    session.warm(images, (1, 2, 4, 8, 16))
    given = [images(1 + number % 16, seed=number) for number in range(16)]
    wanted = [processor.run(each)["scores"] for each in given]
    problems: list[BaseException] = []

    def work(first: int) -> None:
        try:
            for turn in range(30):
                number = (first + turn) % len(given)
                close_to(session.run(given[number])["scores"], wanted[number])
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert problems == []
    session.close()


def test_a_graph_is_recorded_while_another_model_runs(processor) -> None:
    busy = on_gpu(graphs=True, instances=2)
    busy.warm(images, (1, 4))
    stop = threading.Event()
    problems: list[BaseException] = []

    def work() -> None:
        try:
            while not stop.is_set():
                busy.run(images(3))
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        other = on_gpu(network(1), graphs=True)
        other.warm(images, (1, 2, 4, 8, 16))
        wanted = open_session(network(1)).run(images(4))["scores"]
        close_to(other.run(images(4))["scores"], wanted)
        other.close()
    finally:
        stop.set()
        for thread in threads:
            thread.join(60)
    assert problems == []
    busy.close()


def test_memory_comes_back() -> None:
    def once() -> None:
        session = on_gpu(instances=2)
        session.warm(images, (1, 16))
        session.close()
        del session
        gc.collect()

    once()
    before = cuda.memory()[0]
    for _ in range(5):
        once()
    assert before - cuda.memory()[0] < 64 << 20


def test_a_gpu_that_is_not_there() -> None:
    count = len(cuda.devices())
    with pytest.raises(ProviderMissing, match=f"there is no GPU {count}"):
        on_gpu(device_id=count)


def test_a_limit_that_is_too_small() -> None:
    def load() -> None:
        on_gpu(memory_limit_bytes=4 << 20, largest=256).warm(images, (256,))

    with pytest.raises(DeviceMemoryShort, match="has not enough free memory"):
        load()
    # That was that session's affair.
    on_gpu().run(images(2))


def test_a_hidden_gpu_is_told_as_such() -> None:
    code = "from pollard.runtime import cuda; print(cuda.problems())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**_environment(), "CUDA_VISIBLE_DEVICES": ""},
    )
    assert "shows no GPU" in done.stdout


def test_this_machine_offers_cuda() -> None:
    machine = Machine.detect()
    assert "cuda-fp16" in machine.with_provider("auto").targets
    assert machine.with_provider("cuda").targets == ("cuda-fp16",)
    assert "cuda-fp16" not in machine.with_provider("cpu").targets
    assert all(device.total_bytes > 1 << 30 for device in cuda.devices())


def test_calls_of_the_runtime_that_fail_say_why() -> None:
    with pytest.raises(DeviceFault, match="invalid device ordinal"):
        cuda.memory(99)
    assert cuda.memory()[0] > 0


def _environment() -> dict[str, str]:
    import os

    root = Path(__file__).parents[2]
    sources = [str(root / part / "src") for part in ("protos/python", "runtime", "services")]
    return {**os.environ, "PYTHONPATH": ":".join([*sources, os.environ.get("PYTHONPATH", "")])}


_SHARE = """
import ctypes, sys
from pollard.runtime import cuda
runtime = cuda.Runtime.get()
pointer, handle = ctypes.c_void_p(), cuda.IpcHandle()
runtime.call("cudaSetDevice", 0)
runtime.call("cudaMalloc", ctypes.byref(pointer), 1 << 20)
data = bytes(range(256))
runtime.call("cudaMemcpy", pointer, data, len(data), cuda.HOST_TO_DEVICE)
runtime.call("cudaIpcGetMemHandle", ctypes.byref(handle), pointer)
print(bytes(handle).hex(), flush=True)
sys.stdin.readline()
back = ctypes.create_string_buffer(256)
runtime.call("cudaMemcpy", back, pointer, 256, cuda.DEVICE_TO_HOST)
print(back.raw.hex(), flush=True)
"""


def test_memory_that_another_process_shares() -> None:
    from pollard.runtime.cuda_memory import HANDLE_BYTES, CudaMemory

    with subprocess.Popen(
        [sys.executable, "-c", _SHARE],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=_environment(),
    ) as client:
        assert client.stdin is not None
        assert client.stdout is not None
        handle = bytes.fromhex(client.stdout.readline())
        assert len(handle) == HANDLE_BYTES
        memory = CudaMemory()
        address, size = memory.open(handle, 0)
        assert size >= 1 << 20
        assert memory.read(address + 10, 5, 0) == bytes(range(10, 15))
        memory.write(address + 100, b"hello", 0)
        memory.close(address, 0)
        client.stdin.write("go on\n")
        client.stdin.flush()
        seen = bytes.fromhex(client.stdout.readline())
        assert seen[100:105] == b"hello"
        assert seen[:100] == bytes(range(100))
    with pytest.raises(DeviceFault):
        memory.open(b"x" * HANDLE_BYTES, 0)
