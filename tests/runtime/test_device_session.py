"""Instances, padded batches and errors of a device, with the processor in its place."""

from __future__ import annotations

import threading

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper

from pollard.runtime.device_errors import DeviceState, explain
from pollard.runtime.device_session import DeviceSession, Instance, buckets
from pollard.runtime.errors import DeviceFault, DeviceLost, DeviceMemoryShort
from pollard.runtime.sessions import TensorInfo, open_session
from pollard.runtime.staging import PageableStaging

LOST = "CUDA failure 719: unspecified launch failure ; GPU=0 ; hostname=h ; file=f ; line=1"
FULL = (
    "[ONNXRuntimeError] : 1 : FAIL : bfc_arena.cc:360 BFCArena::AllocateRawInternal Available "
    "memory of 0 is smaller than requested bytes of 9633792"
)


class Raw:
    """A real onnxruntime session that can be told to fail as a GPU's would."""

    def __init__(self, model: bytes) -> None:
        self._session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
        self.fails = ""
        self.bound: list[object] = []

    def __getattr__(self, name: str):
        return getattr(self._session, name)

    def run(self, *arguments):
        self._fail()
        return self._session.run(*arguments)

    def run_with_iobinding(self, binding, options=None):
        self._fail()
        self.bound.append(binding)
        self._session.run_with_iobinding(binding, options)

    def _fail(self) -> None:
        if self.fails:
            raise RuntimeError(self.fails)


def rows_model() -> bytes:
    """`y` = `x` as numbers, plus 1; `x` is uint8 [n, 3]."""
    nodes = [
        helper.make_node("Cast", ["x"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("Constant", [], ["one"], value_float=1.0),
        helper.make_node("Add", ["f", "one"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "rows",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, ["n", 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 3])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    return model.SerializeToString()


def make(model: bytes | None = None, *, instances: int = 1, states=None) -> DeviceSession:
    states = states or [DeviceState(0)] * instances
    return DeviceSession(
        [
            Instance(Raw(model or rows_model()), state, PageableStaging(), device="cpu")
            for state in states
        ],
        "cuda-fp16",
    )


def batch(rows: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (rows, 3), np.uint8)


def test_sizes_of_batches() -> None:
    assert [buckets(largest) for largest in (1, 2, 3, 8, 12)] == [
        (1,),
        (1, 2),
        (1, 2, 3),
        (1, 2, 4, 8),
        (1, 2, 4, 8, 12),
    ]


def test_batches_are_padded_and_answered_as_a_plain_run_would() -> None:
    session = make()
    plain = open_session(rows_model())
    assert session.batch_up_to(8) == (1, 2, 4, 8)
    for rows in (8, 3, 1, 5, 8, 7):
        feeds = {"x": batch(rows, rows)}
        answer = session.run(feeds)["y"]
        np.testing.assert_array_equal(answer, plain.run(feeds)["y"])
        assert answer.flags.owndata
    raw = session.instances[0].raw
    # One binding for each size, however often it is run.
    assert len({id(each) for each in raw.bound}) == 3
    assert len(raw.bound) == 6


def test_answers_are_not_overwritten_by_the_next_run() -> None:
    session = make()
    session.batch_up_to(4)
    first = session.run({"x": np.zeros((2, 3), np.uint8)})["y"]
    session.run({"x": np.full((4, 3), 9, np.uint8)})
    assert (first == 1).all()


def test_requests_are_joined_in_their_order() -> None:
    session = make()
    session.batch_up_to(8)
    parts = [{"x": batch(rows, rows)} for rows in (2, 1, 3)]
    joined = np.concatenate([part["x"] for part in parts])
    np.testing.assert_array_equal(session.run_parts(parts)["y"], joined.astype(np.float32) + 1)


def test_larger_batches_and_other_shapes_are_run_plainly() -> None:
    session = make()
    session.batch_up_to(2)
    np.testing.assert_array_equal(session.run({"x": batch(5)})["y"], batch(5) + np.float32(1))
    with pytest.raises(Exception, match="x"):
        session.run({"x": np.zeros((1, 4), np.uint8)})
    assert session.instances[0].raw.bound == []


def test_open_outputs_need_a_word_on_their_shape() -> None:
    session = make()
    session.outputs = (TensorInfo("y", "FP32", (-1, -1)),)
    assert session.batch_up_to(4) == ()
    assert session.batch_up_to(4, [TensorInfo("y", "FP32", (-1, 3))]) == (1, 2, 4)
    np.testing.assert_array_equal(session.run({"x": batch(3)})["y"], batch(3) + np.float32(1))


def test_a_wrong_word_on_shapes_is_found_when_warming() -> None:
    session = make()
    session.outputs = (TensorInfo("y", "FP32", (-1, -1)),)
    session.batch_up_to(4, [TensorInfo("y", "FP32", (-1, 7))])
    session.warm(lambda rows: {"x": batch(rows)}, (1, 4))
    assert not session.stages
    np.testing.assert_array_equal(session.run({"x": batch(3)})["y"], batch(3) + np.float32(1))


def test_warming_runs_every_size_on_every_instance() -> None:
    session = make(instances=2)
    session.warm(lambda rows: {"x": batch(rows)}, session.batch_up_to(4))
    assert [len(instance.raw.bound) for instance in session.instances] == [3, 3]


def test_many_threads_share_the_instances() -> None:
    session = make(instances=2)
    session.batch_up_to(8)
    wrong: list[int] = []

    def work(seed: int) -> None:
        for turn in range(50):
            given = batch(1 + (seed + turn) % 8, seed * 100 + turn)
            if not np.array_equal(session.run({"x": given})["y"], given + np.float32(1)):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_lost_device_fails_every_run_from_then_on() -> None:
    session = make(instances=2)
    session.batch_up_to(4)
    assert session.lost == ""
    for instance in session.instances:
        instance.raw.fails = LOST
    with pytest.raises(DeviceLost, match="unspecified launch failure"):
        session.run({"x": batch(1)})
    assert "719" in session.lost
    for instance in session.instances:
        instance.raw.fails = ""
    # The state is the process's: what worked again would be luck.
    with pytest.raises(DeviceLost, match="start the server again"):
        session.run({"x": batch(1)})


def test_of_two_devices_the_other_one_goes_on() -> None:
    session = make(states=[DeviceState(0), DeviceState(1)])
    session.instances[1].raw.fails = LOST
    lost = 0
    for _ in range(8):
        try:
            session.run({"x": batch(1)})
        except DeviceLost:
            lost += 1
    assert (lost, session.lost) == (1, "")


def test_a_full_device_is_not_a_lost_one() -> None:
    session = make()
    session.instances[0].raw.fails = FULL
    with pytest.raises(DeviceMemoryShort, match="GPU 0 has not enough free memory"):
        session.run({"x": batch(1)})
    assert session.lost == ""
    session.instances[0].raw.fails = ""
    session.run({"x": batch(1)})


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        (LOST, DeviceLost),
        ("CUDA failure 700: an illegal memory access was encountered", DeviceLost),
        ("CUDA failure 2: out of memory", DeviceMemoryShort),
        (FULL, DeviceMemoryShort),
        ("CUDNN failure 5000: CUDNN_STATUS_EXECUTION_FAILED", DeviceFault),
        ("CUDA failure 900: operation not permitted when stream is capturing", DeviceFault),
        ("Got invalid dimensions for input: x", RuntimeError),
    ],
)
def test_what_errors_are_about(words: str, kind: type[Exception]) -> None:
    assert type(explain(RuntimeError(words), DeviceState(0))) is kind


def test_closing_frees_the_sessions() -> None:
    session = make()
    session.batch_up_to(4)
    session.run({"x": batch(2)})
    session.close()
    assert session.instances[0].raw is None
