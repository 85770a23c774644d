"""Triton with its Python backend, running the same ONNX files in the same ONNX Runtime."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import grpc
import numpy as np
import onnxruntime

from bench.models import BuiltModel
from bench.peers.fetch import BUILD, Tools, with_libraries
from bench.process import ServerProcess, free_port
from pollard.inference import grpc_service_pb2 as pb
from pollard.inference import grpc_service_pb2_grpc as pb_grpc

# The backend was built for NumPy 1: under NumPy 2 its `as_numpy` gives the first element everywhere
# and its `Tensor` is empty, without a word. DLPack is right under both.
# One session an instance with one thread that does not spin; the requests that the dynamic batcher
# hands over are run as one batch.
_MODEL = """\
import json
import os

import numpy as np
import onnxruntime
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args):
        config = json.loads(args["model_config"])
        self.input = config["input"][0]["name"]
        self.output = config["output"][0]["name"]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        path = os.path.join(args["model_repository"], args["model_version"], "model.onnx")
        self.session = onnxruntime.InferenceSession(
            path, options, providers=["CPUExecutionProvider"]
        )

    def execute(self, requests):
        arrays = [
            np.from_dlpack(pb_utils.get_input_tensor_by_name(request, self.input))
            for request in requests
        ]
        joined = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
        result = self.session.run([self.output], {self.input: joined})[0]
        responses, start = [], 0
        for array in arrays:
            end = start + len(array)
            tensor = pb_utils.Tensor.from_dlpack(self.output, result[start:end])
            responses.append(pb_utils.InferenceResponse([tensor]))
            start = end
        return responses
"""

_CONFIG = """\
name: "{name}"
backend: "python"
max_batch_size: {max_batch}
input [{{ name: "{input}" data_type: TYPE_FP32 dims: [{input_dims}] }}]
output [{{ name: "{output}" data_type: TYPE_FP32 dims: [{output_dims}] }}]
dynamic_batching {{}}
instance_group [{{ count: {instances} kind: KIND_CPU }}]
"""


def start_triton(tools: Tools, models: Sequence[BuiltModel]) -> ServerProcess:
    """Start Triton with `models` and wait until it is ready.

    Raises:
        RuntimeError: it ended or did not become ready; the message has the end of its log.
    """
    repository = BUILD / "triton"
    shutil.rmtree(repository, ignore_errors=True)
    for model in models:
        folder = repository / model.name / "1"
        folder.mkdir(parents=True)
        os.link(model.onnx, folder / "model.onnx")
        (folder / "model.py").write_text(_MODEL)
        (folder.parent / "config.pbtxt").write_text(
            _CONFIG.format(
                name=model.name,
                max_batch=model.max_batch,
                input=model.input,
                input_dims=", ".join(map(str, model.input_shape)),
                output=model.output,
                output_dims=", ".join(map(str, model.output_shape)),
                instances=model.triton_instances,
            )
        )
    environment = with_libraries(tools.python_library)
    # The interpreter that the backend embeds heeds neither PYTHONPATH nor PYTHONHOME, but it looks
    # for itself on the PATH and so finds this environment's packages.
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment.get('PATH', '')}"
    port = free_port()
    command = [
        str(tools.tritonserver),
        f"--model-repository={repository}",
        f"--backend-directory={tools.backends}",
        "--allow-http=false",
        "--allow-metrics=false",
        "--grpc-address=127.0.0.1",
        f"--grpc-port={port}",
        "--backend-config=python,shm-default-byte-size=16777216",
    ]
    server = ServerProcess.start(
        "Triton, Python backend", command, port, Path(BUILD / "triton.log"), environment
    )
    try:
        for model in models:
            _check(server, model)
    except BaseException:
        server.stop()
        raise
    return server


def _check(server: ServerProcess, model: BuiltModel) -> None:
    """Check that Triton answers what the file answers.

    Raises:
        RuntimeError: it does not.
    """
    values = np.random.default_rng(0).normal(size=(2, *model.input_shape)).astype(np.float32)
    session = onnxruntime.InferenceSession(model.onnx, providers=["CPUExecutionProvider"])
    wanted = session.run([model.output], {model.input: values})[0]
    request = pb.ModelInferRequest(model_name=model.name)
    request.inputs.add(name=model.input, datatype="FP32", shape=values.shape)
    request.raw_input_contents.append(values.tobytes())
    options = [("grpc.max_receive_message_length", -1)]
    with grpc.insecure_channel(server.address, options) as channel:
        answer = pb_grpc.GRPCInferenceServiceStub(channel).ModelInfer(request, timeout=60)
    given = np.frombuffer(answer.raw_output_contents[0], np.float32)
    if given.size != wanted.size or not np.allclose(given, wanted.reshape(-1), 1e-3, 1e-3):
        raise RuntimeError(f"Triton does not answer what {model.name} answers; nothing is measured")
