"""When graphs are recorded and sessions freed, with the processor in the place of the GPU."""

from __future__ import annotations

import gc
import threading
import weakref

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper

from pollard.runtime import device_graphs
from pollard.runtime.device_errors import DeviceState
from pollard.runtime.device_graphs import capturing, running
from pollard.runtime.device_session import DeviceSession, Instance
from pollard.runtime.errors import DeviceFault, DeviceMemoryShort
from pollard.runtime.staging import PageableStaging


class Raw:
    """A real session that notes which runs record or replay a graph, and whether they are alone."""

    def __init__(self) -> None:
        tensors = [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 3]) for name in "xy"
        ]
        graph = helper.make_graph(
            [helper.make_node("Neg", ["x"], ["y"])], "negative", tensors[:1], tensors[1:]
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
        self._session = onnxruntime.InferenceSession(
            model.SerializeToString(), providers=["CPUExecutionProvider"]
        )
        self.runs: list[tuple[str, bool]] = []
        """The graph's number, "-1" for none, and whether nothing else may run meanwhile."""
        self.fails: dict[str, str] = {}
        """By the graph's number, with what the next run fails."""

    def __getattr__(self, name: str):
        return getattr(self._session, name)

    def run_with_iobinding(self, binding, options=None):
        graph = options.get_run_config_entry("gpu_graph_id")
        self.runs.append((graph, device_graphs._gate._alone))
        if graph in self.fails:
            raise RuntimeError(self.fails.pop(graph))
        self._session.run_with_iobinding(binding, options)


def with_graphs() -> tuple[DeviceSession, Raw]:
    raw = Raw()
    instance = Instance(raw, DeviceState(0), PageableStaging(), graphs=True, device="cpu")
    session = DeviceSession([instance], "cuda-fp16")
    assert session.batch_up_to(4)
    return session, raw


def rows(count: int) -> dict[str, np.ndarray]:
    return {"x": np.full((count, 3), count, np.float32)}


def test_a_size_is_run_then_recorded_alone_then_replayed_beside_others() -> None:
    session, raw = with_graphs()
    for _ in range(2):
        assert (session.run(rows(2))["y"] == -2).all()
    assert raw.runs == [("-1", False), ("2", True), ("2", False), ("2", False)]
    session.close()


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        ("CUDA failure 2: out of memory", DeviceMemoryShort),
        ("CUDNN failure 3: CUDNN_STATUS_BAD_PARAM", DeviceFault),
    ],
)
def test_what_fails_before_its_graph_is_recorded_is_recorded_alone_later(words, kind) -> None:
    session, raw = with_graphs()
    raw.fails = {"-1": words}
    with pytest.raises(kind):
        session.run(rows(2))
    assert raw.runs == [("-1", False)]
    assert (session.run(rows(2))["y"] == -2).all()
    # Never recorded while others run: the first run with the graph's number is the one alone.
    assert raw.runs[1:3] == [("-1", False), ("2", True)]
    session.close()


def test_a_graph_that_cannot_be_recorded_is_done_without() -> None:
    session, raw = with_graphs()
    raw.fails = {"2": "CUDA failure 900: operation not permitted when stream is capturing"}
    for _ in range(2):
        assert (session.run(rows(2))["y"] == -2).all()
    assert [graph for graph, _ in raw.runs] == ["-1", "2", "-1", "-1"]
    assert "900" in session.instances[0].graph_problem
    session.close()


def test_sessions_are_freed_while_nobody_records() -> None:
    freed: list[int] = []

    class Noted(Raw):
        def __del__(self) -> None:
            freed.append(device_graphs._gate._inside)

    session = DeviceSession(
        [
            Instance(Noted(), DeviceState(0), PageableStaging(), gated=True, device="cpu")
            for _ in range(2)
        ],
        "cuda-fp16",
    )
    session.close()
    gc.collect()
    assert freed == [1, 1]


def test_threads_that_captures_forbid_nothing_run_meanwhile(monkeypatch) -> None:
    session, raw = with_graphs()
    session.run(rows(2))
    raw.runs.clear()
    # As on a GPU, for all threads.
    monkeypatch.setattr(device_graphs, "keep_apart", lambda: True)
    with capturing():
        assert (session.run(rows(2))["y"] == -2).all()
    assert raw.runs == [("2", True)]
    session.close()


def test_where_the_capture_mode_cannot_be_changed_runs_wait_for_captures() -> None:
    # There is no CUDA where these tests run.
    assert not device_graphs.keep_apart()
    with running(True):
        assert device_graphs._gate._inside == 1
    with running(False):
        assert device_graphs._gate._inside == 0


def test_a_thread_of_its_own_gives_what_a_call_gives_and_keeps_nothing_of_it() -> None:
    thread = device_graphs.OwnThread("own")

    class Noted:
        """Something that can be looked for later."""

    def fail() -> None:
        kept = Noted()
        raise KeyError(repr(kept))

    given = [Noted()]
    seen = weakref.ref(given[0])
    assert thread.call(lambda: (given.pop(), threading.current_thread().name))[1] == "own"
    with pytest.raises(KeyError):
        thread.call(fail)
    # Without the collector of cycles: a batch is megabytes.
    assert seen() is None
    thread.close()


def test_whoever_records_waits_for_those_who_run_and_they_for_it() -> None:
    order: list[str] = []
    inside, leave = threading.Event(), threading.Event()

    def run() -> None:
        with running(True):
            inside.set()
            assert leave.wait(60)
            order.append("run")

    def record() -> None:
        with capturing():
            order.append("recorded")

    def run_later() -> None:
        with running(True):
            order.append("run later")

    threads = [threading.Thread(target=run)]
    threads[0].start()
    assert inside.wait(60)
    threads.append(threading.Thread(target=record))
    threads[1].start()
    while not device_graphs._gate._waiting:
        threading.Event().wait(0.001)
    threads.append(threading.Thread(target=run_later))
    threads[2].start()
    leave.set()
    for thread in threads:
        thread.join(60)
    assert order == ["run", "recorded", "run later"]
