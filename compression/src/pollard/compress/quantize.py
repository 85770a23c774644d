"""8-bit models for processors: static QDQ, uint8 activations, int8 weights per channel.

Symmetric int8 activations and per-tensor weights, onnxruntime's defaults, leave
operators in float and make the model slower than before.
"""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from pollard.compress import external_weights
from pollard.compress.calibration import (
    Method,
    Range,
    Reader,
    Statistics,
    collect,
    fused_outputs,
)
from pollard.compress.data import Part
from pollard.compress.errors import QuantizeFailed, UsageInvalid, first_line
from pollard.compress.export import (
    CORE_INPUT,
    first_convolutions,
    prepend,
    shift_first,
    strip_metadata,
    to_channels_first,
)
from pollard.compress.ort_tools import make_importable
from pollard.compress.recipe import CALIBRATIONS
from pollard.compress.spec import InputSpec

# Bytes of the images of one calibration batch; what the network makes of them is some
# ten to a hundred times as much.
_CALIBRATION_BYTES = 1024**2


@dataclass(frozen=True)
class QuantizeConfig:
    """How to quantize.

    Raises:
        UsageInvalid: a value means nothing.
    """

    calibration_images: int = 512
    reduce_range: bool = False
    """Weights of 7 bits, for processors without VNNI, whose 16-bit sums would
    saturate. Depthwise weights keep 8: their kernel adds up in 32 bits."""
    method: Method | Literal["auto"] = "auto"
    """How ranges come from what was seen; see :data:`pollard.compress.calibration.METHODS`.
    "auto" compares all of them where there is something to choose by, and is "min-max"
    where there is not."""
    equalize: bool = True
    """Whether channels may be balanced between two layers, where there is something to
    choose by."""
    correct_biases: bool = True
    """Whether biases may make up for rounding; likewise."""
    float_layers: bool = True
    """Whether layers may stay in float for the gate; likewise."""

    def __post_init__(self) -> None:
        if self.method not in CALIBRATIONS:
            raise UsageInvalid(
                f"calibration {self.method!r} is not one of {', '.join(CALIBRATIONS)}"
            )

    @property
    def plain_method(self) -> Method:
        """The method where nothing is compared."""
        return "min-max" if self.method == "auto" else self.method


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


@dataclass
class Prepared:
    """A float model made ready for the quantizer, which can then be built many times."""

    core: onnx.ModelProto
    """From float CORE_INPUT to float logits, optimized, with the types of its tensors."""
    config: QuantizeConfig
    read: Callable[[], Reader]
    """Returns the calibration inputs, from the first one on."""
    finish: Callable[[onnx.ModelProto], None]
    """Lets a quantized model take what is served, in place."""
    overrides: dict[str, object] = field(default_factory=dict)
    shift: NDArray[np.float64] = field(default_factory=lambda: np.zeros(1))
    """What the network's input is smaller by than the PyTorch model's, per channel; the
    biases of the first convolutions make up for it."""

    def collect(self, channels_of: Collection[str] = ()) -> Statistics:
        """Run the calibration inputs.

        Raises:
            QuantizeFailed: there are none, or the network gives something not finite.
        """
        return collect(self.core, self.read(), channels_of)

    def build(
        self,
        ranges: Mapping[str, Range],
        *,
        float_nodes: Collection[str] = (),
        core: onnx.ModelProto | None = None,
    ) -> onnx.ModelProto:
        """Return a quantized model as it is served.

        Args:
            ranges: Of every tensor, as from :meth:`Statistics.ranges`.
            float_nodes: Nodes that stay in float.
            core: The same graph with other weights, instead of `core`.

        Raises:
            QuantizeFailed: onnxruntime's quantizer refuses the model.
        """
        model = self.build_core(ranges, float_nodes=float_nodes, core=core)
        self.finish(model)
        return model

    def build_core(
        self,
        ranges: Mapping[str, Range],
        *,
        float_nodes: Collection[str] = (),
        core: onnx.ModelProto | None = None,
    ) -> onnx.ModelProto:
        """Return a quantized model that keeps the network's own float input; as :meth:`build`."""
        core = self.core if core is None else core
        overrides = {**depthwise_overrides(core, self.config), **self.overrides}
        return _quantize_static(core, ranges, self.config, set(float_nodes), overrides)


def prepare(
    core: onnx.ModelProto | list[onnx.ModelProto],
    spec: InputSpec,
    calibration: Part,
    config: QuantizeConfig,
) -> Prepared:
    """Make a float model ready for 8 bits and for pixels.

    Where one scale serves all channels, the pixels are the quantized input and
    nothing is computed on them at all. Otherwise one DequantizeLinear per
    channel normalises them, and what rounding its zero points left over goes
    into the first convolutions' biases.

    Args:
        core: From :func:`pollard.compress.export.export_core`; it is not changed. A list
            that holds nothing else hands it over and is emptied: the weights of a large
            network then lie in memory once less while it is optimized.
        spec: What it takes.
        calibration: Images that the ranges are measured on.
        config: How.

    Raises:
        QuantizeFailed: onnxruntime's preprocessing refuses the model.
    """
    pixels = _pixel_map(spec)
    if isinstance(core, list):
        model = core.pop()
    else:
        model = onnx.ModelProto()
        model.CopyFrom(core)
    rest = pixels.rest
    shift = np.zeros_like(rest)
    if np.any(rest) and (first := first_convolutions(model)):
        shift_first(model, first, rest)
        rest, shift = shift, rest

    def feed(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        centred = images.astype(np.float32) - pixels.zero.astype(np.float32)
        made = centred * pixels.scale + rest.astype(np.float32)
        return np.ascontiguousarray(made.transpose(0, 3, 1, 2))

    def finish(quantized: onnx.ModelProto) -> None:
        if not (pixels.uniform and _feed_pixels_directly(quantized, spec)):
            _dequantize_pixels(quantized, spec, pixels, rest)

    overrides: dict[str, object] = {}
    given = [model]
    del model  # large networks need not lie in memory while they are optimized
    if pixels.uniform:
        overrides[CORE_INPUT] = [
            {"scale": np.array(pixels.scale[0]), "zero_point": np.array(pixels.zero[0])}
        ]
    return Prepared(
        _pre_process(given),
        config,
        lambda: _Images(calibration, config, feed),
        finish,
        overrides,
        shift,
    )


def prepare_core(
    core: onnx.ModelProto, read: Callable[[], Reader], config: QuantizeConfig
) -> Prepared:
    """Make a float model that keeps its float input ready for 8 bits.

    Args:
        core: From :func:`pollard.compress.export.export_core`; it is not changed.
        read: Returns inputs like those in use, from the first one on.
        config: How.

    Raises:
        QuantizeFailed: onnxruntime's preprocessing refuses the model.
    """
    return Prepared(_pre_process([core]), config, read, lambda _: None)


def quantize(
    core: onnx.ModelProto, spec: InputSpec, calibration: Part, config: QuantizeConfig
) -> onnx.ModelProto:
    """Quantize a float model by one method and let it take pixels.

    :func:`pollard.compress.eight_bits.search` looks for the best one.

    Args:
        core, spec, calibration, config: As for :func:`prepare`.

    Returns:
        A model from uint8 [batch, height, width, channels] to float32
        [batch, classes].

    Raises:
        QuantizeFailed: onnxruntime's quantizer refuses the model.
    """
    prepared = prepare(core, spec, calibration, config)
    return prepared.build(prepared.collect().ranges(config.plain_method))


def quantize_core(core: onnx.ModelProto, reader: Reader, config: QuantizeConfig) -> onnx.ModelProto:
    """Quantize a float model that keeps its float input, by one method.

    Args:
        core: From :func:`pollard.compress.export.export_core`; it is not changed.
        reader: Gives inputs like those in use.
        config: How.

    Raises:
        QuantizeFailed: onnxruntime's quantizer refuses the model.
    """
    prepared = prepare_core(core, lambda: reader, config)
    return prepared.build(prepared.collect().ranges(config.plain_method))


class _Images:
    """Feeds calibration images in small batches."""

    def __init__(
        self,
        part: Part,
        config: QuantizeConfig,
        feed: Callable[[NDArray[np.uint8]], NDArray[np.float32]],
    ) -> None:
        self._images = part.images[: config.calibration_images]
        self._feed = feed
        size = 4 * int(np.prod(part.images.shape[1:]))
        self._size = max(1, min(32, _CALIBRATION_BYTES // size))
        self._start = 0

    def get_next(self) -> dict[str, NDArray[np.float32]] | None:
        """Return the next batch by input name, or None at the end."""
        batch = self._images[self._start : self._start + self._size]
        self._start += self._size
        if len(batch) == 0:
            return None
        return {CORE_INPUT: self._feed(batch)}


def depthwise_overrides(model: onnx.ModelProto, config: QuantizeConfig) -> dict[str, object]:
    """Return the quantizer's overrides that leave depthwise weights their 8 bits.

    onnxruntime adds products of a depthwise convolution up in 32 bits on every processor,
    where other convolutions saturate without VNNI; it does so only where a channel in
    gives one channel out.
    """
    if not config.reduce_range:
        return {}
    shapes = {tensor.name: list(tensor.dims) for tensor in model.graph.initializer}
    found: dict[str, object] = {}
    for node in model.graph.node:
        if node.op_type != "Conv" or node.input[1] not in shapes:
            continue
        group = next((a.i for a in node.attribute if a.name == "group"), 1)
        shape = shapes[node.input[1]]
        if group > 1 and len(shape) == 4 and shape[:2] == [group, 1]:
            found[node.input[1]] = [{"axis": 0, "reduce_range": False}]
    return found


def _pre_process(given: list[onnx.ModelProto]) -> onnx.ModelProto:
    """Fold constants and infer types, as onnxruntime's quant_pre_process does.

    From file to file, which takes half the memory; ``given`` is emptied. Its symbolic
    inference is for transformers: it gives up on resizing with a free batch.
    """
    import onnxruntime

    with tempfile.TemporaryDirectory(prefix="pollard-quantize-") as folder, _quiet(), _told():
        plain, optimized, inferred = (str(Path(folder) / name) for name in ("p", "o", "i"))
        external_weights.save(given.pop(), Path(plain))
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.optimized_model_filepath = optimized
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.add_session_config_entry("session.disable_prepacking", "1")
        onnxruntime.InferenceSession(plain, options, providers=["CPUExecutionProvider"])
        onnx.shape_inference.infer_shapes_path(optimized, inferred)
        return onnx.load(inferred)


def _quantize_static(
    model: onnx.ModelProto,
    ranges: Mapping[str, Range],
    config: QuantizeConfig,
    float_nodes: set[str],
    overrides: Mapping[str, object],
) -> onnx.ModelProto:
    make_importable()
    from onnxruntime.quantization import (
        CalibrationMethod,
        QuantFormat,
        QuantType,
        quantize_static,
    )
    from onnxruntime.quantization.calibrate import TensorsData, save_tensors_data

    # What a rectifier reads has the range of what it gives: only that is ever quantized.
    known = {**ranges, **{name: ranges[to] for name, to in _known_fusions(model, ranges).items()}}
    data = {name: (np.float32(low), np.float32(high)) for name, (low, high) in known.items()}
    with tempfile.TemporaryDirectory(prefix="pollard-quantize-") as folder, _quiet():
        plain, cache, written = (Path(folder) / name for name in ("p.onnx", "c.json", "q.onnx"))
        with _told():
            external_weights.save(model, plain)
            save_tensors_data(TensorsData(CalibrationMethod.MinMax, data), cache)
            quantize_static(
                plain,
                written,
                None,
                quant_format=QuantFormat.QDQ,
                per_channel=True,
                reduce_range=config.reduce_range,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                calibrate_method=CalibrationMethod.MinMax,
                calibration_cache_path=cache,
                nodes_to_exclude=sorted(
                    {*float_nodes, *unsupported_nodes(model), *tail_nodes(model)}
                ),
                extra_options={"TensorQuantOverrides": dict(overrides)} if overrides else {},
            )
            quantized = onnx.load(written)
    strip_metadata(quantized)
    return quantized


def _known_fusions(model: onnx.ModelProto, ranges: Mapping[str, Range]) -> dict[str, str]:
    found = fused_outputs(model)
    for name, to in found.items():
        while to not in ranges and to in found:  # a rectifier behind another one
            to = found[to]
        found[name] = to
    return {name: to for name, to in found.items() if to in ranges}


def tail_nodes(model: onnx.ModelProto) -> list[str]:
    """Return the nodes behind the last layers of a graph of several outputs.

    They make boxes in pixels of what the layers say: 256 places are too few for that, and there
    is next to nothing to compute.
    """
    if len(model.graph.output) < 2:
        return []
    leads: set[str] = set()
    """Tensors that some layer still works on."""
    tail = []
    for node in reversed(model.graph.node):
        is_layer = node.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul")
        if is_layer or leads.intersection(node.output):
            leads.update(node.input)
        else:
            tail.append(node.name)
    return tail[::-1]


def unsupported_nodes(model: onnx.ModelProto) -> list[str]:
    """Return the nodes that stay float whatever is asked for."""
    # onnxruntime has no 8-bit kernels for them on processors. Its quantizer takes the wrong axis
    # of a grouped transposed convolution's weights, and fails on a norm over several axes.
    axes = {tensor.name: len(tensor.dims) for tensor in model.graph.initializer}
    return [
        node.name
        for node in model.graph.node
        if node.op_type == "ConvTranspose"
        or (node.op_type == "LayerNormalization" and axes.get(node.input[1], 1) > 1)
    ]


@contextlib.contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the quantizer raises bare exceptions of every kind
        raise QuantizeFailed(
            f"onnxruntime cannot quantize the model: {first_line(error)}"
        ) from error


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
