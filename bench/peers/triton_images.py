"""Triton with an ensemble of its Python backend: image files in, scores out."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

from bench.peers.fetch import BUILD, Tools, with_libraries
from bench.process import ServerProcess, free_port

# The files travel as plain bytes: of TYPE_STRING this backend dies under NumPy 2. DLPack for the
# reason that `bench.peers.triton` gives.
_PREPROCESS = """\
import io

import numpy as np
import triton_python_backend_utils as pb_utils
from PIL import Image


class TritonPythonModel:
    def execute(self, requests):
        responses = []
        for request in requests:
            files = np.from_dlpack(pb_utils.get_input_tensor_by_name(request, "file"))
            images = []
            for content in files:
                image = Image.open(io.BytesIO(content.tobytes())).convert("RGB")
                width, height = image.size
                scale = 256 / min(width, height)
                image = image.resize(
                    (max(256, int(width * scale)), max(256, int(height * scale))),
                    Image.Resampling.BILINEAR,
                )
                left, top = (image.width - 224) // 2, (image.height - 224) // 2
                images.append(np.asarray(image.crop((left, top, left + 224, top + 224))))
            tensor = pb_utils.Tensor.from_dlpack("image", np.stack(images))
            responses.append(pb_utils.InferenceResponse([tensor]))
        return responses
"""

_CLASSIFY = """\
import os

import numpy as np
import onnxruntime
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args):
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
            np.from_dlpack(pb_utils.get_input_tensor_by_name(r, "image")) for r in requests
        ]
        result = self.session.run(["logits"], {"image": np.concatenate(arrays)})[0]
        responses, start = [], 0
        for array in arrays:
            tensor = pb_utils.Tensor.from_dlpack("logits", result[start : start + len(array)])
            responses.append(pb_utils.InferenceResponse([tensor]))
            start += len(array)
        return responses
"""

_PREPROCESS_CONFIG = """\
name: "preprocess"
backend: "python"
max_batch_size: 8
input [{ name: "file" data_type: TYPE_UINT8 dims: [-1] }]
output [{ name: "image" data_type: TYPE_UINT8 dims: [224, 224, 3] }]
dynamic_batching {}
instance_group [{ count: 2 kind: KIND_CPU }]
"""

_CLASSIFY_CONFIG = """\
backend: "python"
max_batch_size: 8
input [{ name: "image" data_type: TYPE_UINT8 dims: [224, 224, 3] }]
output [{ name: "logits" data_type: TYPE_FP32 dims: [1000] }]
dynamic_batching {}
instance_group [{ count: 2 kind: KIND_CPU }]
"""

_ENSEMBLE_CONFIG = """\
platform: "ensemble"
max_batch_size: 8
input [{ name: "file" data_type: TYPE_UINT8 dims: [-1] }]
output [{ name: "logits" data_type: TYPE_FP32 dims: [1000] }]
ensemble_scheduling { step [
  { model_name: "preprocess" model_version: -1
    input_map { key: "file" value: "file" } output_map { key: "image" value: "image" } },
  { model_name: "NETWORK" model_version: -1
    input_map { key: "image" value: "image" } output_map { key: "logits" value: "logits" } }
] }
"""


def start_ensemble(tools: Tools, models: Mapping[str, Path]) -> ServerProcess:
    """Start Triton with an ensemble for each model and wait until it is ready.

    Args:
        tools: Where Triton is.
        models: ONNX files by name; each takes uint8 [batch, 224, 224, 3] as "image", gives
            "logits".

    Raises:
        RuntimeError: it ended or did not become ready; the message has the end of its log.
    """
    repository = BUILD / "triton-images"
    shutil.rmtree(repository, ignore_errors=True)
    _write(repository / "preprocess", _PREPROCESS_CONFIG, _PREPROCESS)
    for name, model in models.items():
        network = f"{name}-network"
        _write(repository / network, f'name: "{network}"\n{_CLASSIFY_CONFIG}', _CLASSIFY)
        os.link(model, repository / network / "1/model.onnx")
        ensemble = _ENSEMBLE_CONFIG.replace("NETWORK", network)
        _write(repository / name, f'name: "{name}"\n{ensemble}')
    surroundings = with_libraries(tools.python_library)
    surroundings["PATH"] = f"{Path(sys.executable).parent}:{surroundings.get('PATH', '')}"
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
        "Triton, Python backend", command, port, BUILD / "triton-images.log", surroundings
    )


def _write(folder: Path, config: str, code: str = "") -> None:
    (folder / "1").mkdir(parents=True)
    (folder / "config.pbtxt").write_text(config)
    if code:
        (folder / "1/model.py").write_text(code)
