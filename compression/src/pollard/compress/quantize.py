"""8-bit models for processors: static QDQ, uint8 activations, int8 weights per channel.

Symmetric int8 activations and per-tensor weights, onnxruntime's defaults, leave
operators in float and make the model slower than before.
"""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from pollard.compress.data import Part
from pollard.compress.errors import QuantizeFailed
from pollard.compress.export import (
    CORE_INPUT,
    first_convolutions,
    prepend,
    shift_first,
    strip_metadata,
    to_channels_first,
)
from pollard.compress.spec import InputSpec

# Images of one calibration run; with min-max ranges only two numbers per tensor
# and run are kept, so memory does not grow with the number of images.
_CALIBRATION_BYTES = 4 * 1024**2


@dataclass(frozen=True)
class QuantizeConfig:
    """How to quantize."""

    calibration_images: int = 512
    reduce_range: bool = False
    """Weights of 7 bits, for processors without VNNI, whose 16-bit sums would
    saturate."""


def requirements(config: QuantizeConfig) -> list[str]:
    """Return the processor features that the quantized model needs."""
    return [] if config.reduce_range else ["avx512_vnni"]


@dataclass(frozen=True)
class _PixelMap:
    """How pixels become the network's input: (pixel - zero) * scale, plus a rest."""

    zero: NDArray[np.uint8]
    scale: NDArray[np.float32]
    rest: NDArray[np.float64]
    """What rounding the zero points left over, in units of the network's input."""

    @property
    def uniform(self) -> bool:
        """Whether one zero and one scale serve all channels without a rest."""
        return (
            len(set(self.zero.tolist())) == 1
            and len(set(self.scale.tolist())) == 1
            and not np.any(np.abs(self.rest) > 1e-9)
        )


def _pixel_map(spec: InputSpec) -> _PixelMap:
    mean = np.array(spec.mean, np.float64) * 255.0
    zero = np.clip(np.round(mean), 0, 255)
    scale = 1.0 / (np.array(spec.std, np.float64) * 255.0)
    return _PixelMap(zero.astype(np.uint8), scale.astype(np.float32), (zero - mean) * scale)


def pixels_are_quantized(spec: InputSpec) -> bool:
    """Tell whether the pixels are the quantized input as they are."""
    return _pixel_map(spec).uniform


def quantize(
    core: onnx.ModelProto, spec: InputSpec, calibration: Part, config: QuantizeConfig
) -> onnx.ModelProto:
    """Quantize a float model and let it take pixels.

    Where one scale serves all channels, the pixels are the quantized input and
    nothing is computed on them at all. Otherwise one DequantizeLinear per
    channel normalises them, and what rounding its zero points left over goes
    into the first convolutions' biases.

    Args:
        core: From :func:`pollard.compress.export.export_core`; it is not changed.
        spec: What it takes.
        calibration: Images that the ranges are measured on.
        config: How.

    Returns:
        A model from uint8 [batch, height, width, channels] to float32
        [batch, classes].

    Raises:
        QuantizeFailed: onnxruntime's quantizer refuses the model.
    """
    pixels = _pixel_map(spec)
    model = onnx.ModelProto()
    model.CopyFrom(core)
    rest = pixels.rest
    if np.any(rest) and (first := first_convolutions(model)):
        shift_first(model, first, rest)
        rest = np.zeros_like(rest)

    def feed(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        centred = images.astype(np.float32) - pixels.zero.astype(np.float32)
        made = centred * pixels.scale + rest.astype(np.float32)
        return np.ascontiguousarray(made.transpose(0, 3, 1, 2))

    overrides = {}
    if pixels.uniform:
        overrides[CORE_INPUT] = [
            {"scale": np.array(pixels.scale[0]), "zero_point": np.array(pixels.zero[0])}
        ]
    quantized = _quantize_static(model, _Reader(calibration, config, feed), config, overrides)
    if not (pixels.uniform and _feed_pixels_directly(quantized, spec)):
        _dequantize_pixels(quantized, spec, pixels, rest)
    return quantized


class Reader(Protocol):
    """Feeds a calibration run."""

    def get_next(self) -> dict[str, NDArray[np.float32]] | None:
        """Return the next batch by input name, or None at the end."""


def quantize_core(core: onnx.ModelProto, reader: Reader, config: QuantizeConfig) -> onnx.ModelProto:
    """Quantize a float model that keeps its float input.

    Args:
        core: From :func:`pollard.compress.export.export_core`; it is not changed.
        reader: Gives inputs like those in use.
        config: How.

    Raises:
        QuantizeFailed: onnxruntime's quantizer refuses the model.
    """
    return _quantize_static(core, reader, config, {})


class _Reader:
    """Feeds calibration images in small batches."""

    def __init__(
        self,
        part: Part,
        config: QuantizeConfig,
        feed: Callable[[NDArray[np.uint8]], NDArray[np.float32]],
    ) -> None:
        self._images = part.images[: config.calibration_images]
        self._feed = feed
        self._size = max(
            1, min(32, _CALIBRATION_BYTES // (4 * int(np.prod(part.images.shape[1:]))))
        )
        self._start = 0

    def get_next(self) -> dict[str, NDArray[np.float32]] | None:
        """Return the next batch by input name, or None at the end."""
        batch = self._images[self._start : self._start + self._size]
        self._start += self._size
        if len(batch) == 0:
            return None
        return {CORE_INPUT: self._feed(batch)}


def _quantize_static(
    model: onnx.ModelProto, reader: Reader, config: QuantizeConfig, overrides: Mapping[str, object]
) -> onnx.ModelProto:
    from onnxruntime.quantization import (
        CalibrationMethod,
        QuantFormat,
        QuantType,
        quantize_static,
    )
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with tempfile.TemporaryDirectory(prefix="pollard-quantize-") as folder, _quiet():
        plain, prepared, written = (
            Path(folder) / f"{name}.onnx" for name in ("plain", "prepared", "quantized")
        )
        try:
            # Symbolic inference is for transformers: it gives up on resizing with a free
            # batch and then leaves files in the current directory.
            onnx.save(model, plain)
            quant_pre_process(plain, prepared, skip_symbolic_shape=True)
            quantize_static(
                prepared,
                written,
                reader,
                quant_format=QuantFormat.QDQ,
                per_channel=True,
                reduce_range=config.reduce_range,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                calibrate_method=CalibrationMethod.MinMax,
                nodes_to_exclude=_float_nodes(onnx.load(prepared)),
                extra_options={"TensorQuantOverrides": dict(overrides)} if overrides else {},
            )
            quantized = onnx.load(written)
        except Exception as error:  # the quantizer raises bare exceptions of every kind
            first = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
            raise QuantizeFailed(f"onnxruntime cannot quantize the model: {first}") from error
    strip_metadata(quantized)
    return quantized


def _float_nodes(model: onnx.ModelProto) -> list[str]:
    # onnxruntime has no 8-bit kernel for it on processors, and its quantizer takes the
    # wrong axis of a grouped one's weights.
    return [node.name for node in model.graph.node if node.op_type == "ConvTranspose"]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    # The quantizer logs and prints advice that has been followed already.
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        root.setLevel(level)


def _feed_pixels_directly(model: onnx.ModelProto, spec: InputSpec) -> bool:
    """Replace the input's QuantizeLinear by the pixels themselves; tell whether it was there."""
    readers = [node for node in model.graph.node if CORE_INPUT in node.input]
    if len(readers) != 1 or readers[0].op_type != "QuantizeLinear":
        return False
    nodes, name = to_channels_first()
    quantized = readers[0].output[0]
    for node in model.graph.node:
        for position, source in enumerate(node.input):
            if source == quantized:
                node.input[position] = name
    model.graph.node.remove(readers[0])
    prepend(model, nodes, spec)
    return True


def _dequantize_pixels(
    model: onnx.ModelProto, spec: InputSpec, pixels: _PixelMap, rest: NDArray[np.float64]
) -> None:
    nodes, name = to_channels_first()
    model.graph.initializer.append(numpy_helper.from_array(pixels.scale, "pixels_scale"))
    model.graph.initializer.append(numpy_helper.from_array(pixels.zero, "pixels_zero"))
    result = "pixels_dequantized" if np.any(rest) else CORE_INPUT
    nodes.append(
        helper.make_node(
            "DequantizeLinear",
            [name, "pixels_scale", "pixels_zero"],
            [result],
            name="pixels/dequantize",
            axis=1,
        )
    )
    if np.any(rest):
        shaped = rest.astype(np.float32).reshape(1, -1, 1, 1)
        model.graph.initializer.append(numpy_helper.from_array(shaped, "pixels_rest"))
        nodes.append(
            helper.make_node("Add", [result, "pixels_rest"], [CORE_INPUT], name="pixels/add")
        )
    prepend(model, nodes, spec)
