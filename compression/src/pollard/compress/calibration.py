"""Ranges of a network's tensors, measured on images in one pass and in bounded memory.

Of every tensor that may become 8 bits a histogram is kept, whose bins grow with what is
seen, and nothing else: memory depends on the network alone, not on the number of images.
All ways to choose ranges are then answered from the same histograms.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto

from pollard.compress import external_weights
from pollard.compress.errors import QuantizeFailed
from pollard.compress.recipe import METHODS, Method

Range = tuple[float, float]

_BINS = 4096

# Values that a histogram takes of one tensor and batch; smallest and largest are of all.
# Taken at even distances: a million of them tell the 99.999th percentile well.
_SAMPLES = 1 << 17


class Reader(Protocol):
    """Feeds a calibration run."""

    def get_next(self) -> dict[str, NDArray[np.float32]] | None:
        """Return the next batch by input name, or None at the end."""


class Histogram:
    """Counts values in bins between -span and span; span doubles when it is exceeded."""

    def __init__(self) -> None:
        self.low, self.high = np.inf, -np.inf
        self._span = 0.0
        self._counts = np.zeros(_BINS, np.int64)

    def add(self, values: NDArray[np.float32]) -> None:
        """Count values; smallest and largest are of all, the bins of a sample.

        Raises:
            QuantizeFailed: a value is not finite.
        """
        flat = values.ravel()
        if not flat.size:
            return
        low, high = float(flat.min()), float(flat.max())
        if not (np.isfinite(low) and np.isfinite(high)):
            raise QuantizeFailed("the network gives values that are not finite on these images")
        self.low, self.high = min(self.low, low), max(self.high, high)
        self._widen(max(-low, high))
        if self._span == 0:  # nothing but zeros so far
            self._counts[_BINS // 2] += min(flat.size, _SAMPLES)
            return
        # An odd stride, so that a sample does not follow the rows of a picture.
        stride = -(-flat.size // _SAMPLES)
        sample = flat[:: stride | 1]
        places = (sample * (_BINS / (2 * self._span)) + _BINS / 2).astype(np.int64)
        self._counts += np.bincount(np.clip(places, 0, _BINS - 1), minlength=_BINS)

    def _widen(self, reach: float) -> None:
        if reach <= self._span:
            return
        if self._span == 0:
            self._span = reach
            return
        while reach > self._span:
            pairs = self._counts.reshape(-1, 2).sum(axis=1)
            self._counts = np.zeros(_BINS, np.int64)
            self._counts[_BINS // 4 : _BINS // 4 + _BINS // 2] = pairs
            self._span *= 2

    def range(self, method: Method) -> Range:
        """Return the range that a method gives; it holds zero, as quantizers need."""
        low, high = min(0.0, float(self.low)), max(0.0, float(self.high))
        if method == "min-max" or self._span == 0 or low == high:
            return low, high
        if method == "mse":
            found = self._least_squares(low, high)
        else:
            found = self._percentile(float(method.removeprefix("percentile-")))
        return min(0.0, max(low, found[0])), max(0.0, min(high, found[1]))

    def _percentile(self, percent: float) -> Range:
        # As onnxruntime does: what is cut is cut half at each end.
        edges = np.linspace(-self._span, self._span, _BINS + 1)
        share = np.concatenate([[0.0], np.cumsum(self._counts)]) / self._counts.sum()
        cut = (100.0 - percent) / 200.0
        ends = np.interp([cut, 1.0 - cut], share, edges)
        return float(ends[0]), float(ends[1])

    def _least_squares(self, low: float, high: float) -> Range:
        """Cut until the squared error of rounding and cutting together is least."""
        middles = (np.arange(_BINS) + 0.5) / _BINS * (2 * self._span) - self._span
        seen = self._counts > 0
        middles, weights = middles[seen], self._counts[seen].astype(np.float64)
        total = weights.sum()

        def error(bounds: Range) -> float:
            step = (bounds[1] - bounds[0]) / 255
            beyond = middles - np.clip(middles, *bounds)
            # What is zero stays zero exactly: rectifiers make most of it.
            rounded = weights[np.abs(middles) > step / 2].sum() / total
            return float((weights @ beyond**2) / total + rounded * step * step / 12)

        shares = np.geomspace(1.0, 0.05, 100)
        best = (low, high)
        for _ in range(2):  # both ends in turn, then once more
            best = min(((low * share, best[1]) for share in shares), key=error)
            best = min(((best[0], high * share) for share in shares), key=error)
        return best


@dataclass
class Statistics:
    """What was seen of every tensor."""

    histograms: dict[str, Histogram]
    images: int = 0
    channel_peaks: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    """Tensor → largest magnitude of each channel, for those that were asked for."""

    def ranges(self, method: Method) -> dict[str, Range]:
        """Return the range of every tensor."""
        return {name: histogram.range(method) for name, histogram in self.histograms.items()}


def observable(model: onnx.ModelProto) -> list[str]:
    """Return the float tensors of a graph that nodes take or give, in the graph's order.

    What a rectifier alone reads is left out: it is fused, and its output counts.
    """
    graph = model.graph
    kinds = {
        value.name: value.type.tensor_type.elem_type
        for value in (*graph.value_info, *graph.input, *graph.output)
    }
    constants = {tensor.name for tensor in graph.initializer}
    fused = set(fused_outputs(model))
    names: dict[str, None] = {}
    for node in graph.node:
        for name in (*node.input, *node.output):
            known = name in constants or name in fused or not name
            if not known and kinds.get(name, TensorProto.FLOAT) == TensorProto.FLOAT:
                names[name] = None
    return list(names)


def fused_outputs(model: onnx.ModelProto) -> dict[str, str]:
    """Return tensor → the rectified tensor that takes its place in 8 bits."""
    graph = model.graph
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    given = {output.name for output in graph.output} | {value.name for value in graph.input}
    found = {}
    for node in graph.node:
        for name in node.output:
            nodes = readers.get(name, [])
            if len(nodes) == 1 and nodes[0].op_type in ("Relu", "Clip") and name not in given:
                found[name] = nodes[0].output[0]
    return found


def collect(model: onnx.ModelProto, reader: Reader, channels_of: Iterable[str] = ()) -> Statistics:
    """Run a float model on calibration inputs and keep what ranges are chosen by.

    Args:
        model: With types of its tensors inferred; it is not changed.
        reader: Gives the inputs.
        channels_of: Tensors [batch, channels, …] whose channels are also told apart.

    Raises:
        QuantizeFailed: there are no inputs, or the network gives something not finite.
    """
    names = observable(model)
    session = _session(model, names)
    inputs = {value.name for value in model.graph.input}
    outputs = [name for name in names if name not in inputs]
    statistics = Statistics({name: Histogram() for name in names})
    peaks = set(channels_of)
    while (feeds := reader.get_next()) is not None:
        seen: Mapping[str, NDArray[np.float32]] = dict(
            zip(outputs, session.run(outputs, feeds), strict=True)
        )
        for name, values in {**feeds, **seen}.items():
            statistics.histograms[name].add(np.asarray(values))
            if name in peaks and values.ndim >= 2:
                axes = (0, *range(2, values.ndim))
                peak = np.maximum(values.max(axis=axes), -values.min(axis=axes)).astype(np.float64)
                old = statistics.channel_peaks.get(name)
                statistics.channel_peaks[name] = peak if old is None else np.maximum(old, peak)
        statistics.images += len(next(iter(feeds.values())))
    if not statistics.images:
        raise QuantizeFailed("there are no images to measure 8-bit ranges on")
    return statistics


def _session(model: onnx.ModelProto, names: list[str]) -> onnxruntime.InferenceSession:
    told = {value.name: value for value in (*model.graph.value_info, *model.graph.output)}
    given = {value.name for value in (*model.graph.input, *model.graph.output)}
    plain = len(model.graph.output)
    for name in names:
        if name not in given:
            unknown = onnx.helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
            model.graph.output.append(told.get(name, unknown))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # An arena keeps the peak of every size that it has seen; packed weights are a copy.
    options.enable_cpu_mem_arena = False
    options.add_session_config_entry("session.disable_prepacking", "1")
    try:
        # By a file: large weights in memory several times over are what takes the memory.
        with tempfile.TemporaryDirectory(prefix="pollard-calibrate-") as folder:
            path = Path(folder) / "observed.onnx"
            external_weights.save(model, path)
            return onnxruntime.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"]
            )
    finally:
        del model.graph.output[plain:]


__all__ = [
    "METHODS",
    "Histogram",
    "Method",
    "Range",
    "Reader",
    "Statistics",
    "collect",
    "fused_outputs",
    "observable",
]
