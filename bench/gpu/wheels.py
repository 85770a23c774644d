"""What a bare machine lacks, as wheels that travel to where there is no network.

Expected there: Python 3.12, torch 2.9 or newer, NumPy 2, Pillow, psutil, typer, rich, uvloop, onnx,
onnxscript, grpcio 1.81.1 and protobuf 6.33 or newer, onnxruntime-gpu with CUDA and cuDNN.
"""

from __future__ import annotations

WHEELS = (
    "annotated-types==0.8.0",
    "googleapis-common-protos==1.76.0",
    "grpcio-health-checking==1.81.1",
    "grpcio-reflection==1.81.1",
    "grpcio-status==1.81.1",
    "pydantic==2.14.3",
    "pydantic-core==2.50.4",
    "pydantic-settings==2.16.3",
    "python-dotenv==1.2.4",
    "structlog==26.1.0",
    "torch-pruning==1.6.1",
    "typing-inspection==0.4.5",
)
"""3.3 MB."""

FOR_COMPRESS = ("narwhals==2.28.0", "plotly==7.1.0", "safetensors==0.8.0")
"""What the sections `training` and `compress` need besides: 11 MB."""

IF_OLDER = ("grpcio==1.85.1", "protobuf==6.33.6")
"""Where those that are there are older than what is expected: 8 MB more."""

_PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")


def instructions() -> str:
    """Return the commands that fetch the wheels and put them to use."""
    platforms = " ".join(f"--platform {name}" for name in _PLATFORMS)
    download = (
        "python3 -m pip download --no-deps --only-binary=:all: --python-version 3.12 "
        f"--implementation cp {platforms} -d wheels"
    )
    return "\n".join(
        [
            "# Where there is a network:",
            f"{download} {' '.join(WHEELS)}",
            "# Only for the sections training and compress:",
            f"{download} {' '.join(FOR_COMPRESS)}",
            "# Only if the machine has grpcio before 1.81.1 or protobuf before 6.33:",
            f"{download} {' '.join(IF_OLDER)}",
            "# On the machine with the GPU, in the root of the repository, with `wheels` there:",
            "python3 -m pip install --no-index --no-deps --no-compile --target site wheels/*.whl",
            "PYTHONPATH=$PWD/site python3 -m bench.gpu",
        ]
    )
