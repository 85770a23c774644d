"""Triton with its Python backend, running the same ONNX files in the same ONNX Runtime."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.models import BuiltModel
from bench.peers.fetch import BUILD, Tools, with_libraries
from bench.process import ServerProcess, free_port

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
            pb_utils.get_input_tensor_by_name(request, self.input).as_numpy()
            for request in requests
        ]
        joined = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
        result = self.session.run([self.output], {self.input: joined})[0]
        responses, start = [], 0
        for array in arrays:
            end = start + len(array)
            tensor = pb_utils.Tensor(self.output, result[start:end])
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
    return ServerProcess.start(
        "Triton, Python backend", command, port, Path(BUILD / "triton.log"), environment
    )
