"""ONNX Runtime sessions as every part of Pollard opens them.

What is measured at compression and what is served are the same thing, because
both come through :func:`open_session`.
"""

from __future__ import annotations

import ctypes
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pollard.bundle.v1 import bundle_pb2
from pollard.runtime.bundle import Bundle, Golden
from pollard.runtime.cuda import CudaOptions
from pollard.runtime.errors import (
    DeviceFault,
    GoldenMismatch,
    ModelLoadFailed,
    SignatureMismatch,
)
from pollard.runtime.machine import PROVIDERS
from pollard.runtime.tensors import FROM_ONNXRUNTIME, describe, protocol_name

Array = NDArray[np.generic]

_ONNX_BF16 = 16
"""`onnx.TensorProto.BFLOAT16`."""


@dataclass(frozen=True)
class TensorInfo:
    """One input or output of a graph."""

    name: str
    datatype: str
    """As the Open Inference Protocol names it, such as ``"FP32"``."""
    shape: tuple[int, ...]
    """-1 stands for any size."""


class Session:
    """A loaded model. :meth:`run` may be called from many threads at once."""

    def __init__(self, raw: Any, target: str) -> None:
        self.raw = raw
        """The ``onnxruntime.InferenceSession``."""
        self.target = target
        self.inputs = tuple(_info(node) for node in raw.get_inputs())
        self.outputs = tuple(_info(node) for node in raw.get_outputs())
        self._output_names = [info.name for info in self.outputs]
        self._types = {info.name: info.datatype for info in (*self.inputs, *self.outputs)}
        self._by_value = "BF16" in self._types.values()
        if self._by_value and "BYTES" in self._types.values():
            raise ModelLoadFailed(
                "the model has tensors of BF16 and of BYTES; onnxruntime's Python interface can "
                "carry only one of the two in one run. Let the graph cast BF16 from or to FP32"
            )

    @property
    def lost(self) -> str:
        """Why it cannot run any more, if its device is gone; empty while it can."""
        return ""

    @property
    def stages(self) -> bool:
        """Whether several requests are better given to :meth:`run_parts` than joined before."""
        return False

    def padded(self, rows: int) -> int:
        """Return how many rows are computed for a batch of so many."""
        return rows

    def close(self) -> None:
        """Free what is not freed with the object; nothing may run any more."""

    def run(
        self, feeds: Mapping[str, Array], outputs: Sequence[str] | None = None
    ) -> dict[str, Array]:
        """Run one batch and return the outputs by name; releases the GIL.

        Args:
            feeds: Arrays by input name, of the declared types; BF16 as its bits in uint16. Their
                elements need not be aligned.
            outputs: Names of the outputs wanted; all when None.
        """
        names = self._output_names if outputs is None else list(outputs)
        if self._by_value:
            return self._run_by_value(feeds, names)
        values = self.raw.run(names, aligned(feeds))
        return dict(zip(names, values, strict=True))

    def run_parts(
        self, parts: Sequence[Mapping[str, Array]], outputs: Sequence[str] | None = None
    ) -> dict[str, Array]:
        """Run several requests as one batch, in their order; see :meth:`run`.

        Args:
            parts: Arrays by input name, of each request; the first dimension is the batch.
            outputs: Names of the outputs wanted; all when None.
        """
        joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        return self.run(joined, outputs)

    def _run_by_value(
        self, feeds: Mapping[str, Array], names: list[str], raw: Any = None
    ) -> dict[str, Array]:
        """Run with onnxruntime's own values, which can hold types that NumPy lacks."""
        import onnxruntime

        wrap = onnxruntime.OrtValue
        # The values do not own the arrays' memory, so those are kept until the run is over.
        arrays = {name: np.ascontiguousarray(array) for name, array in aligned(feeds).items()}
        values = {
            name: (
                wrap.ortvalue_from_numpy_with_onnx_type(array, _ONNX_BF16)
                if self._types[name] == "BF16"
                else wrap.ortvalue_from_numpy(array)
            )
            for name, array in arrays.items()
        }
        results = (raw or self.raw).run_with_ort_values(names, values)
        return {
            name: _bits(value) if self._types[name] == "BF16" else value.numpy()
            for name, value in zip(names, results, strict=True)
        }


def aligned(feeds: Mapping[str, Array]) -> dict[str, Array]:
    """Return arrays whose elements lie where onnxruntime may read them, as copies where need be.

    onnxruntime takes any address, and its kernels read from it as if it were aligned.
    """
    return {name: array if array.flags.aligned else array.copy() for name, array in feeds.items()}


def _bits(value: Any) -> Array:
    """Copy the 16-bit elements of one of onnxruntime's values."""
    shape = tuple(value.shape())
    size = 2 * math.prod(shape)
    return np.frombuffer(ctypes.string_at(value.data_ptr(), size), np.uint16).reshape(shape)


def open_session(
    model: Path | bytes,
    *,
    target: str = "cpu-fp32",
    intra_op_threads: int = 1,
    spinning: bool = False,
    optimised: bool = True,
    cuda: CudaOptions | None = None,
) -> Session:
    """Load an ONNX model.

    Args:
        model: The file, or its bytes.
        target: Decides the execution provider.
        intra_op_threads: Threads that one call uses; 0 means all cores.
        spinning: Let idle threads spin: lower latency for one caller, at the
            cost of the processor time of everybody else.
        optimised: Rewrite the graph and lay its weights out for speed. Without
            it a large model is loaded sooner: enough to look at it.
        cuda: How it is run on a GPU; only for targets that are not the
            processor's. None takes the first GPU.

    Raises:
        ModelLoadFailed: onnxruntime refuses the model; a `ProviderMissing` if
            the target's provider cannot be used here, and never another
            provider in its place.
        DeviceFault: the GPU is full, or failed.
    """
    import onnxruntime

    provider = PROVIDERS[target]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = intra_op_threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # what matters comes back as an exception
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if spinning else "0")
    if not optimised:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.add_session_config_entry("session.disable_prepacking", "1")
    if not provider.startswith("CPU"):
        from pollard.runtime.providers import open_on_device

        return open_on_device(model, target, options, cuda or CudaOptions())
    source = model if isinstance(model, bytes) else str(model)
    try:
        raw = onnxruntime.InferenceSession(source, options, providers=[provider])
    except Exception as error:  # onnxruntime's exceptions share no base class but this
        raise load_failed(error) from error
    return Session(raw, target)


def load_failed(error: Exception) -> ModelLoadFailed:
    """Return the error of a model that onnxruntime refuses."""
    newest = re.search(r"domain (\S+) is till opset (\d+)", str(error))
    if newest is not None:
        import onnxruntime

        return ModelLoadFailed(
            f"the model asks for a newer opset of {newest[1]} than {newest[2]}, the newest "
            f"of onnxruntime {onnxruntime.__version__} here; export it for an older one",
            newest_opset=newest[2],
        )
    return ModelLoadFailed(f"onnxruntime cannot load the model: {_first_line(error)}")


def check_signature(session: Session, manifest: bundle_pb2.Manifest) -> None:
    """Check that the graph has exactly the inputs and outputs of the manifest.

    Raises:
        SignatureMismatch: naming the tensor and both sides.
    """
    for side, infos, specs in (
        ("input", session.inputs, manifest.inputs),
        ("output", session.outputs, manifest.outputs),
    ):
        have = {info.name: info for info in infos}
        want = {spec.name: spec for spec in specs}
        if have.keys() != want.keys():
            raise SignatureMismatch(
                f"the manifest declares the {side}s {sorted(want)}, the graph has {sorted(have)}"
            )
        for name, spec in want.items():
            info = have[name]
            declared = protocol_name(spec.data_type)
            if declared != info.datatype or not _compatible(tuple(spec.shape), info.shape):
                raise SignatureMismatch(
                    f"the manifest declares {side} {name!r} as {describe(declared, spec.shape)}, "
                    f"the graph has {describe(info.datatype, info.shape)}",
                    tensor=name,
                )


def check_golden(session: Session, bundle: Bundle, variant: bundle_pb2.Variant | str) -> None:
    """Run a variant's golden inputs and compare the outputs with the recorded ones.

    A variant without golden inputs passes: a bundle derived from a plain ONNX
    file has none.

    Raises:
        GoldenMismatch: with the largest difference and the tolerance.
        BundleCorrupt: the golden file is unreadable.
    """
    if isinstance(variant, str):
        variant = bundle.variant(variant)
    golden = bundle.golden(variant)
    if golden is not None:
        compare_golden(session, golden, variant.golden_tolerance)


def compare_golden(session: Session, golden: Golden, tolerance: bundle_pb2.Tolerance) -> None:
    """Run ``golden.inputs`` and compare with ``golden.outputs``.

    Raises:
        GoldenMismatch: with the largest difference and the tolerance.
    """
    try:
        actual = session.run(golden.inputs, list(golden.outputs))
    except DeviceFault:
        raise  # says nothing of the model
    except Exception as error:  # onnxruntime's exceptions share no base class but this
        raise GoldenMismatch(f"the golden inputs cannot be run: {_first_line(error)}") from error
    for name, expected in golden.outputs.items():
        got = actual[name]
        if got.shape != expected.shape or got.dtype != expected.dtype:
            raise GoldenMismatch(
                f"output {name!r} is {got.dtype}{list(got.shape)}, "
                f"golden is {expected.dtype}{list(expected.shape)}",
                output=name,
            )
        if expected.dtype.kind not in "fiub":
            if not np.array_equal(got, expected):
                raise GoldenMismatch(f"output {name!r} differs from the golden one", output=name)
            continue
        wanted = expected.astype(np.float64)
        difference = np.abs(got.astype(np.float64) - wanted)
        allowed = tolerance.absolute + tolerance.relative * np.abs(wanted)
        # Written so that NaN fails.
        if not bool(np.all(difference <= allowed)):
            raise GoldenMismatch(
                f"output {name!r} is off the golden one by up to {float(np.max(difference)):.4g} "
                f"(allowed {tolerance.absolute:g} + {tolerance.relative:g} × |golden|)",
                output=name,
            )


def _info(node: Any) -> TensorInfo:
    datatype = FROM_ONNXRUNTIME.get(node.type)
    if datatype is None:
        raise ModelLoadFailed(f"tensor {node.name!r} has the unsupported type {node.type}")
    shape = tuple(size if isinstance(size, int) and size > 0 else -1 for size in node.shape)
    return TensorInfo(node.name, datatype, shape)


def _compatible(declared: tuple[int, ...], actual: tuple[int, ...]) -> bool:
    # Graphs often leave output sizes open that the manifest knows; the other
    # way round the manifest would promise what the graph refuses.
    return len(declared) == len(actual) and all(
        have in (-1, want) for want, have in zip(declared, actual, strict=True)
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
