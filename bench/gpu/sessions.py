"""ONNX Runtime by itself, without Pollard's runtime: the limit that the service is held against."""

from __future__ import annotations

import math
import statistics
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

_PROVIDERS = {"cuda": "CUDAExecutionProvider", "cpu": "CPUExecutionProvider"}

DEFAULTS = {"device_id": "0", "cudnn_conv_algo_search": "HEURISTIC", "prefer_nhwc": "1"}
"""Options of the CUDA provider where nothing else is said: the fastest that were seen."""


def make_session(
    model: Path | bytes,
    provider: str,
    provider_options: Mapping[str, str] | None = None,
    *,
    profile: Path | None = None,
) -> Any:
    """Return an `onnxruntime.InferenceSession` on the provider, and on no other.

    Args:
        model: The file, or its bytes.
        provider: "cuda" or "cpu".
        provider_options: Of the CUDA provider; not looked at on the CPU.
        profile: Where to write a profile.

    Raises:
        RuntimeError: onnxruntime fell back to another provider.
    """
    import onnxruntime

    # The provider's warnings come from the default logger, whatever a session's options say.
    onnxruntime.set_default_logger_severity(3)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    providers: list[Any] = ["CPUExecutionProvider"]
    if provider == "cuda":
        given = {**DEFAULTS, **(provider_options or {})}
        providers.insert(0, ("CUDAExecutionProvider", given))
    source = model if isinstance(model, bytes) else str(model)
    session = onnxruntime.InferenceSession(source, options, providers=providers)
    if session.get_providers()[0] != _PROVIDERS[provider]:
        raise RuntimeError(
            f"onnxruntime gave {session.get_providers()} instead of {_PROVIDERS[provider]}"
        )
    return session


@dataclass(frozen=True)
class Speed:
    """What repeated runs took."""

    p50_ms: float
    p99_ms: float
    images_per_second: float
    """Rows over the whole time, not from the median."""
    first_ms: float = math.nan
    """Of the first run, which searches kernels and allocates."""

    def told(self) -> dict[str, float]:
        """Return it for a file."""
        return {name: round(value, 4) for name, value in vars(self).items()}


def time_runs(once: Callable[[], object], batch: int, seconds: float) -> Speed:
    """Run it for so long, after the first runs; at least five times."""
    started = time.perf_counter()
    once()
    first = time.perf_counter() - started
    for _ in range(3):
        once()
    took: list[float] = []
    begun = last = time.perf_counter()
    while last - begun < seconds or len(took) < 5:
        once()
        now = time.perf_counter()
        took.append(now - last)
        last = now
    return Speed(
        1e3 * statistics.median(took),
        1e3 * float(np.percentile(took, 99)),
        batch * len(took) / (last - begun),
        1e3 * first,
    )


def time_callers(once: Callable[[], object], callers: int, batch: int, seconds: float) -> float:
    """Return the images per second of so many threads that call it at the same time."""
    once()
    counts = [0] * callers
    until = time.perf_counter() + seconds

    def call(number: int) -> None:
        while time.perf_counter() < until:
            once()
            counts[number] += 1

    threads = [threading.Thread(target=call, args=(number,)) for number in range(callers)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return batch * sum(counts) / (time.perf_counter() - started)


def host_runner(session: Any, feeds: Mapping[str, Array]) -> Callable[[], object]:
    """Return a run with arrays of the host in and out, as most programs do it."""
    return lambda: session.run(None, dict(feeds))


def bound_runner(session: Any, feeds: Mapping[str, Array], provider: str) -> Callable[[], object]:
    """Return a run whose inputs lie on the device, and whose outputs stay there.

    A session that captures a CUDA graph captures it in the first run, and never runs unbound.
    """
    binding = session.io_binding()
    kept = [_on_device(array, provider) for array in feeds.values()]
    for name, value in zip(feeds, kept, strict=True):
        binding.bind_ortvalue_input(name, value)
    kept += _places(session, feeds, provider, binding)

    def once() -> object:
        session.run_with_iobinding(binding)
        return kept  # for as long as the binding

    return once


def staged_runner(session: Any, feeds: Mapping[str, Array], provider: str) -> Callable[[], object]:
    """Return a run that copies into one place on the device, runs, and copies the outputs back."""
    binding = session.io_binding()
    values = {name: _on_device(array, provider) for name, array in feeds.items()}
    for name, value in values.items():
        binding.bind_ortvalue_input(name, value)
    places = _places(session, feeds, provider, binding)

    def once() -> object:
        for name, array in feeds.items():
            values[name].update_inplace(array)
        session.run_with_iobinding(binding)
        return [place.numpy() for place in places]

    return once


def _places(session: Any, feeds: Mapping[str, Array], provider: str, binding: Any) -> list[Any]:
    """Bind a place on the device for each output, float32 of the batch that goes in."""
    import onnxruntime

    batch = next(iter(feeds.values())).shape[0]
    places = []
    for node in session.get_outputs():
        place = onnxruntime.OrtValue.ortvalue_from_shape_and_type(
            [batch, *node.shape[1:]], np.float32, provider, 0
        )
        places.append(place)
        binding.bind_ortvalue_output(node.name, place)
    return places


def _on_device(array: Array, provider: str) -> Any:
    import onnxruntime

    return onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array), provider, 0)


def random_feeds(session: Any, batch: int) -> dict[str, Array]:
    """Return random inputs of the types that the model takes."""
    generator = np.random.default_rng(0)
    feeds: dict[str, Array] = {}
    for node in session.get_inputs():
        shape = (batch, *node.shape[1:])
        if node.type == "tensor(uint8)":
            feeds[node.name] = generator.integers(0, 256, shape, np.uint8)
        else:
            feeds[node.name] = generator.standard_normal(shape, np.float32)
    return feeds


def tiny_model() -> bytes:
    """Return a model of one convolution: enough to see whether a provider works."""
    from onnx import TensorProto, helper, numpy_helper

    weights = np.ones((8, 8, 3, 3), np.float32)
    graph = helper.make_graph(
        [helper.make_node("Conv", ["x", "w"], ["y"])],
        "tiny",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 8, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 8, 6, 6])],
        [numpy_helper.from_array(weights, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return bytes(model.SerializeToString())
