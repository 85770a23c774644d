"""Where the files of a target are judged: on the device that they are for, if it is here.

A float16 file for CUDA can be answered with on a processor, operator by operator rounded as CUDA
rounds. What that takes says nothing of a GPU, so nothing is timed then.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from pollard.compress import half
from pollard.compress.candidates import Candidate
from pollard.compress.export import serialize
from pollard.runtime import cuda
from pollard.runtime.device_session import DeviceSession
from pollard.runtime.errors import DeviceFault, ModelLoadFailed
from pollard.runtime.machine import PROVIDERS, Machine
from pollard.runtime.sessions import Session, open_session

CUDA = "cuda-fp16"

_LARGEST_BATCH = 32


@dataclass(frozen=True)
class Device:
    """What files are judged on."""

    target: str
    """Target whose provider runs them; "" emulates float16 on the processor."""
    name: str
    """The GPU or the processor, as it calls itself."""
    batches: tuple[int, ...] = (1, 8)
    """Batches that are timed; none where times would be another device's."""
    judged_batch: int = 1
    """Batch by whose time files are compared: on a GPU a single image measures how soon kernels
    are started, whatever they do."""
    why_not: str = ""
    """Why it is not the device that the files are for; empty if it is."""

    @property
    def timed(self) -> bool:
        """Whether times taken here are those of the device that the files are for."""
        return bool(self.batches)

    @property
    def provider(self) -> str:
        """onnxruntime's execution provider."""
        return PROVIDERS[self.target or "cpu-fp32"]


PROCESSOR = Device("cpu-fp32", "this processor")
"""What files for processors are judged on, where its name does not matter."""


def find_device(target: str, machine: Machine) -> Device:
    """Return what files of a target are judged on, on this machine."""
    if target != CUDA:
        return Device("cpu-fp32", machine.processor)
    if PROVIDERS[CUDA] not in machine.execution_providers:
        why = (
            f"onnxruntime {machine.onnxruntime} here offers "
            f"{', '.join(machine.execution_providers)}; onnxruntime-gpu and a GPU are needed"
        )
    else:
        try:
            open_session(_one_convolution(), target=CUDA)
        except (ModelLoadFailed, DeviceFault) as error:
            why = str(error)
        else:
            return Device(CUDA, cuda.devices()[0].name, (1, 8, _LARGEST_BATCH), _LARGEST_BATCH)
    return Device("", machine.processor, (), why_not=why)


def open_on(device: Device, candidate: Candidate) -> Session:
    """Open a file as it is judged: as it is served, or in emulation."""
    if device.target == CUDA:
        session = open_session(candidate.path, target=CUDA)
        if isinstance(session, DeviceSession):
            # Through staging buffers, as the service does it.
            session.batch_up_to(_LARGEST_BATCH, (*session.inputs, *session.outputs))
        return session
    if candidate.target == CUDA:
        return open_session(serialize(half.emulated(onnx.load(candidate.path))))
    return open_session(candidate.path, target=candidate.target)


def _one_convolution() -> bytes:
    """Return a model that shows whether a provider works."""
    graph = helper.make_graph(
        [helper.make_node("Conv", ["x", "w"], ["y"])],
        "probe",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 8, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 8, 6, 6])],
        [numpy_helper.from_array(np.ones((8, 8, 3, 3), np.float32), "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return serialize(model)
