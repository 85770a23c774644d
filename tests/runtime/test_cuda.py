"""What is said of a machine on which CUDA cannot be used, or can."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import onnxruntime
import pytest

from pollard.runtime import cuda
from pollard.runtime.cuda import CudaOptions, Device, Facts, problems
from pollard.runtime.errors import ProviderMissing
from pollard.runtime.machine import Machine
from pollard.runtime.sessions import open_session

GOOD = Facts(
    onnxruntime="1.31.1",
    providers=("TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"),
    cuda_version="13.0",
    driver="580.159.04",
    driver_cuda=13000,
    devices=(Device(0, "NVIDIA H200", 1 << 37), Device(1, "NVIDIA H200", 1 << 37)),
)

needs_cpu_build = pytest.mark.skipif(
    "CUDAExecutionProvider" in onnxruntime.get_available_providers(),
    reason="this onnxruntime has CUDA",
)


@pytest.mark.parametrize(
    ("change", "device", "words"),
    [
        ({"onnxruntime": ""}, 0, ["not installed", "pollard-runtime[gpu]"]),
        ({"providers": ("CPUExecutionProvider",)}, 0, ["onnxruntime-gpu", "never both"]),
        (
            {"driver_cuda": 0, "driver_problem": "libcuda.so.1 was not found", "devices": ()},
            0,
            ["no usable NVIDIA driver", "libcuda.so.1", "580"],
        ),
        (
            {"driver": "550.54.15", "driver_cuda": 12040},
            0,
            ["550.54.15 is too old", "CUDA 12.4", "built for CUDA 13.0", "580"],
        ),
        (
            {"missing": ("libcudnn.so.9", "libcublas.so.13")},
            0,
            ["libcudnn.so.9, libcublas.so.13", "nvidia-cublas nvidia-cudnn-cu13"],
        ),
        ({"driver_problem": "cuInit failed with 803"}, 0, ["cuInit failed with 803"]),
        ({"devices": ()}, 0, ["shows no GPU", "CUDA_VISIBLE_DEVICES"]),
        ({}, 2, ["there is no GPU 2", "0 (NVIDIA H200), 1 (NVIDIA H200)"]),
        ({}, -1, ["there is no GPU -1"]),
    ],
)
def test_what_is_missing_is_named_with_its_cure(change, device, words) -> None:
    found = problems(device, dataclasses.replace(GOOD, **change))
    assert len(found) == 1
    for word in words:
        assert word in found[0]


def test_everything_missing_is_told_at_once() -> None:
    facts = dataclasses.replace(GOOD, driver_cuda=0, devices=(), missing=("libcudart.so.13",))
    assert len(problems(0, facts)) == 2


def test_nothing_is_missing() -> None:
    assert problems(1, GOOD) == []


def test_cuda_12_is_named_by_its_own_packages() -> None:
    assert cuda.libraries("12.8")[:2] == ("libcublasLt.so.12", "libcublas.so.12")
    assert cuda.packages_of(["libcudart.so.12", "libcudnn.so.9"], 12) == [
        "nvidia-cuda-runtime-cu12",
        "nvidia-cudnn-cu12",
    ]


def test_options_of_the_provider() -> None:
    options = CudaOptions(instances=2, memory_limit_bytes=1 << 30, graphs=True, tf32=False)
    assert options.placed == (0, 0)
    assert options.provider_options(0) == {
        "device_id": "0",
        "arena_extend_strategy": "kSameAsRequested",
        "cudnn_conv_algo_search": "HEURISTIC",
        "prefer_nhwc": "1",
        "use_tf32": "0",
        "gpu_mem_limit": str(1 << 29),
        "enable_cuda_graph": "1",
    }
    assert CudaOptions(devices=(1, 0)).placed == (1, 0)
    assert "gpu_mem_limit" not in CudaOptions().provider_options(0)


@needs_cpu_build
def test_asking_for_a_gpu_that_is_not_there() -> None:
    machine = Machine.detect()
    with pytest.raises(ProviderMissing, match="onnxruntime-gpu"):
        machine.with_provider("cuda")
    with pytest.raises(ProviderMissing, match="TensorrtExecutionProvider cannot be used"):
        machine.with_provider("tensorrt")
    assert machine.with_provider("auto") == machine
    assert "CPUExecutionProvider" in machine.with_provider("cpu").execution_providers
    with pytest.raises(ProviderMissing, match="CUDAExecutionProvider cannot be used"):
        open_session(b"", target="cuda-fp16")


def test_a_build_for_gpus_without_one_runs_on_the_processor(monkeypatch) -> None:
    built = dataclasses.replace(Machine.detect(), execution_providers=GOOD.providers)
    facts = dataclasses.replace(GOOD, driver_cuda=0, devices=())
    monkeypatch.setattr(cuda, "_looked", lambda: facts)
    assert built.with_provider("auto").execution_providers == ("CPUExecutionProvider",)
    monkeypatch.setattr(cuda, "_looked", lambda: GOOD)
    # Without libnvinfer TensorRT is none, and CUDA still is one.
    if cuda.tensorrt_problems():
        assert built.with_provider("auto").execution_providers == GOOD.providers[1:]
    assert built.with_provider("cuda").execution_providers == ("CUDAExecutionProvider",)


def test_the_processors_path_looks_for_no_gpu() -> None:
    code = (
        "import pollard.runtime.cuda as cuda\n"
        "def no(*_): raise SystemExit('looked for CUDA')\n"
        "cuda.look = cuda._load = no\n"
        "from pollard.runtime.machine import Machine\n"
        "import sys\n"
        "Machine.detect().with_provider('cpu').targets\n"
        "import pollard.runtime.sessions\n"
        "assert 'pollard.runtime.device_session' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
