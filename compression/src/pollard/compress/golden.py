"""Golden inputs and outputs: how a server knows that it computes what was verified."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

from pollard.bundle.v1 import bundle_pb2
from pollard.compress import half
from pollard.compress.devices import CUDA
from pollard.compress.export import INPUT, probe_images, serialize
from pollard.compress.spec import InputSpec
from pollard.runtime.sessions import Session

GOLDEN_IMAGES = 4
_SEED = 1

# Allowed difference relative to the range of the outputs: summation in another
# order for floats; for 8 bits also a rounding that falls the other way in some layers.
_FLOAT_SHARE = 1e-3
_INT8_SHARE = 0.05
# For float16 what a GPU's other order of summation gives in 11 bits, over some dozens of layers.
_FP16_SHARE = 0.02


def make_golden(
    session: Session, model: bytes, spec: InputSpec, target: str = ""
) -> tuple[bytes, bundle_pb2.Tolerance]:
    """Record the outputs for synthetic images.

    The tolerance is at least three times the difference between the model as
    served and the same model without any optimisation, where 8-bit layers are
    computed in float: another processor or version differs by less.

    Args:
        session: The model, opened as it is served.
        model: Its bytes.
        spec: What it takes.
        target: What it is for, if that is not what it was opened for: a float16 file may have been
            opened on a processor.

    Returns:
        A NumPy archive with the arrays "input/image" and "output/" with the name of each
        output, and the tolerance.
    """
    images = probe_images(spec, GOLDEN_IMAGES, _SEED)
    outputs = {
        name: np.asarray(value, np.float32) for name, value in session.run({INPUT: images}).items()
    }
    # One tolerance holds for all: pixels must not make it too wide for scores.
    span = min(float(np.ptp(value)) or 1.0 for value in outputs.values())
    share = {"cpu-int8": _INT8_SHARE, CUDA: _FP16_SHARE}.get(target or session.target, _FLOAT_SHARE)
    if (target or session.target) == CUDA:
        # Rounded after every operator, which the processor's own run of a float16 file is not.
        model = serialize(half.emulated(onnx.load_from_string(model)))
    plain = _unoptimized(model, images, list(outputs))
    difference = max(
        # What the relative part of the tolerance allows needs no absolute one.
        float((np.abs(value - other) - share * np.abs(value)).max())
        for value, other in zip(outputs.values(), plain, strict=True)
    )
    buffer = io.BytesIO()
    arrays: dict[str, NDArray[Any]] = {f"input/{INPUT}": images}
    arrays |= {f"output/{name}": value for name, value in outputs.items()}
    np.savez(buffer, **arrays)  # type: ignore[arg-type]  # the keys are array names, not options
    tolerance = bundle_pb2.Tolerance(
        relative=share, absolute=float(np.float32(max(share * span, 3 * difference)))
    )
    return buffer.getvalue(), tolerance


def _unoptimized(
    model: bytes, images: NDArray[np.uint8], names: list[str]
) -> list[NDArray[np.float32]]:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return [np.asarray(value, np.float32) for value in session.run(names, {INPUT: images})]
