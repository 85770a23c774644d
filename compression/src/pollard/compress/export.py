"""From PyTorch to ONNX files that take uint8 pixels, height by width by channels.

The network is exported with the float input that PyTorch knows, and the way from
pixels to that input is then written into the graph: a float graph casts, subtracts
the mean and leaves the scaling to the first convolution's weights, which is exact.
What a quantized graph does is in :mod:`pollard.compress.quantize`.
"""

from __future__ import annotations

import functools
import logging
import re
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from pollard.compress import accelerator
from pollard.compress.errors import ExportFailed, first_line
from pollard.compress.evaluate import OUTPUT, session_predictor, torch_predictor
from pollard.compress.macs import example_input
from pollard.compress.onnx_file import OnnxModule
from pollard.compress.spec import InputSpec
from pollard.runtime.sessions import Session, open_session

OPSET = 20
INPUT = "image"

SEVERAL = ("boxes", "scores")
"""What the outputs of a graph that has two are called."""

# Input of the network proper, behind the normalisation.
CORE_INPUT = "normalized"

MAX_BATCH = 1024

# What the exporter says of the line of the model's code that it could not follow.
_WHERE = re.compile(r'following call raised this error:\s+File "([^"]+)", line (\d+), in .*\n(.*)')

# Largest difference of the logits that is still the same function, relative to
# their range: what float32 in another order of summation gives.
_PARITY = 1e-3


def export_core(module: nn.Module, spec: InputSpec | torch.Tensor) -> onnx.ModelProto:
    """Export a module with its float input.

    Returns:
        A model from float32 [batch, channels, height, width] to what the module gives,
        without batch norms and without any metadata.

    Raises:
        ExportFailed: the module cannot be traced or converted.
    """
    if isinstance(module, OnnxModule):
        given = onnx.ModelProto()
        given.CopyFrom(module.core)
        strip_metadata(given)
        return given
    batch = torch.export.Dim("batch", min=1, max=MAX_BATCH)
    names = _output_names(module, spec)
    try:
        with _quiet(), _operators_made_once():
            program = torch.onnx.export(
                module.eval(),
                (example_input(spec, 2),),
                dynamo=True,
                external_data=False,
                dynamic_shapes=({0: batch},),
                input_names=[CORE_INPUT],
                output_names=names,
                opset_version=OPSET,
                verbose=False,
            )
            if program is None:
                raise ExportFailed("the exporter gave no model")
            # Made anew by each call, and nobody else's.
            model: onnx.ModelProto = program.model_proto
            del program
    except Exception as error:  # the exporter raises whatever its passes raise
        # The exporter's own words are how to report a bug; the reason stands behind them.
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        told = f"the model cannot be exported to ONNX: {first_line(cause)}"
        if "data-dependent" in told:
            told += " An `if` that asks for the values of a tensor must become torch.where"
        if where := _WHERE.search(str(cause)):
            told += f" ({where[1]}, line {where[2]}: {where[3].strip()})"
        raise ExportFailed(told) from error
    strip_metadata(model)
    _lower_batch_norms(model)
    return model


def _output_names(module: nn.Module, spec: InputSpec | torch.Tensor) -> list[str]:
    with torch.inference_mode():
        outputs = module.eval()(example_input(spec))
    if isinstance(outputs, torch.Tensor):
        return [OUTPUT]
    if len(outputs) != len(SEVERAL):
        raise ExportFailed(
            f"the model gives {len(outputs)} outputs; known are one, and two: boxes and scores"
        )
    return list(SEVERAL)


def _lower_batch_norms(model: onnx.ModelProto) -> None:
    """Turn what batch norms are left into one multiplication and one addition, in place.

    The exporter folds those that follow a convolution. One in front of it, as
    in networks with pre-activation, cannot go into weights whose padding is zero.
    """
    graph = model.graph
    ranks = {
        value.name: len(value.type.tensor_type.shape.dim)
        for value in (*graph.value_info, *graph.input)
    }
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        if node.op_type != "BatchNormalization":
            nodes.append(node)
            continue
        gamma, beta, mean, variance = (
            numpy_helper.to_array(_initializer(model, name)).astype(np.float64)
            for name in node.input[1:5]
        )
        epsilon = next((a.f for a in node.attribute if a.name == "epsilon"), 1e-5)
        factor = gamma / np.sqrt(variance + epsilon)
        result = node.output[0]
        shape = (1, -1, *[1] * (ranks.get(node.input[0], 4) - 2))
        for suffix, values in (("factor", factor), ("offset", beta - mean * factor)):
            constant = values.astype(np.float32).reshape(shape)
            graph.initializer.append(numpy_helper.from_array(constant, f"{result}_{suffix}"))
        nodes.append(
            helper.make_node("Mul", [node.input[0], f"{result}_factor"], [f"{result}_scaled"])
        )
        nodes.append(helper.make_node("Add", [f"{result}_scaled", f"{result}_offset"], [result]))
    del graph.node[:]
    graph.node.extend(nodes)
    used = {name for node in graph.node for name in node.input}
    # One by one: putting back what is kept would copy it, and protobuf frees the message's
    # memory only as a whole.
    for index in reversed(range(len(graph.initializer))):
        if graph.initializer[index].name not in used:
            del graph.initializer[index]


@contextmanager
def _quiet() -> Iterator[None]:
    # The exporter warns of its own deprecated calls and logs every pass.
    names = (
        "onnxscript",
        "onnx_ir",
        "torch.onnx",
        "torch.onnx._internal.exporter._registration",
        "torch.fx.experimental.symbolic_shapes",
    )
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    stderr = sys.stderr
    sys.stderr = _Hushed(stderr)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        sys.stderr = stderr
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


class _Hushed:
    """Standard error for all threads but the one that exports.

    Of a model that it cannot follow, the exporter prints what it had got so far.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._thread = threading.get_ident()

    def write(self, text: str) -> int:
        if threading.get_ident() == self._thread:
            return len(text)
        written: int = self._stream.write(text)
        return written

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@functools.cache
def _exporters_operators() -> tuple[Any, Callable[..., object]] | None:
    """Return the class of what the exporter knows of operators, and what makes one only once.

    None where this version of PyTorch does it in another way.
    """
    try:
        from torch.onnx._internal.exporter._registration import ONNXRegistry

        return ONNXRegistry, functools.cache(ONNXRegistry.from_torchlib)
    except (ImportError, AttributeError):
        return None


@contextmanager
def _operators_made_once() -> Iterator[None]:
    """Have the exporter read the sources of its thousand operators once, and not for each export.

    That takes a second, more than exporting a small network.
    """
    found = _exporters_operators()
    if found is None:
        yield
        return
    registry, once = found
    usual = vars(registry)["from_torchlib"]
    # Only while it is at work here: others may add operators of their own to what they get.
    registry.from_torchlib = staticmethod(once)
    try:
        yield
    finally:
        registry.from_torchlib = usual


def attach_pixels(core: onnx.ModelProto, spec: InputSpec) -> onnx.ModelProto:
    """Return a copy of a float model that takes uint8 [batch, height, width, channels].

    Exact: pixels are cast, the mean is subtracted, and the scaling goes into
    the weights of the first convolutions, or into one multiplication where the
    graph does not begin with convolutions.
    """
    model = onnx.ModelProto()
    model.CopyFrom(core)
    graph = model.graph
    mean = np.array(spec.mean, np.float64) * 255.0
    scale = 1.0 / (np.array(spec.std, np.float64) * 255.0)
    nodes, pixels = to_channels_first()
    if first := first_convolutions(model):
        rescale_first(model, first, scale)
        scale = np.ones_like(scale)
    chain: list[tuple[str, NDArray[np.float64] | None]] = [("Cast", None)]
    if np.any(mean):
        chain.append(("Sub", mean))
    if np.any(scale != 1):
        chain.append(("Mul", scale))
    for position, (operator, values) in enumerate(chain):
        last = position == len(chain) - 1
        result = CORE_INPUT if last else f"pixels_{operator.lower()}"
        if values is None:
            nodes.append(
                helper.make_node(
                    "Cast", [pixels], [result], name="pixels/cast", to=TensorProto.FLOAT
                )
            )
        else:
            constant = f"pixels_{operator.lower()}_by"
            shaped = values.astype(np.float32).reshape(1, -1, 1, 1)
            graph.initializer.append(numpy_helper.from_array(shaped, constant))
            nodes.append(
                helper.make_node(
                    operator, [pixels, constant], [result], name=f"pixels/{operator.lower()}"
                )
            )
        pixels = result
    prepend(model, nodes, spec)
    return model


def to_channels_first() -> tuple[list[onnx.NodeProto], str]:
    # Transposed while the elements are one byte: four times less to move.
    name = "pixels_nchw"
    return [
        helper.make_node("Transpose", [INPUT], [name], name="pixels/transpose", perm=[0, 3, 1, 2])
    ], name


def prepend(model: onnx.ModelProto, nodes: list[onnx.NodeProto], spec: InputSpec) -> None:
    """Put ``nodes``, which make the network's input from pixels, in front of it, in place."""
    graph = model.graph
    rest = list(graph.node)
    del graph.node[:]
    graph.node.extend([*nodes, *rest])
    del graph.input[:]
    graph.input.append(
        helper.make_tensor_value_info(INPUT, TensorProto.UINT8, ["batch", *spec.shape])
    )
    # Shapes of what was in between may be gone; onnxruntime infers them itself.
    del graph.value_info[:]
    strip_metadata(model)
    onnx.checker.check_model(model)


def first_convolutions(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """Return the convolutions that read the input, or nothing if anything else does.

    Only ungrouped ones with constant weights count, whose weights say which
    input channel they belong to.
    """
    weights = {tensor.name for tensor in model.graph.initializer}
    readers = [node for node in model.graph.node if CORE_INPUT in node.input]
    for node in readers:
        group = next((a.i for a in node.attribute if a.name == "group"), 1)
        if node.op_type != "Conv" or group != 1 or node.input[1] not in weights:
            return []
        if sum(node.input[1] in other.input for other in model.graph.node) > 1:
            return []
    return readers


def rescale_first(
    model: onnx.ModelProto, convolutions: list[onnx.NodeProto], scale: NDArray[np.float64]
) -> None:
    """Multiply the weights of the first convolutions by ``scale`` per input channel, in place."""
    for node in convolutions:
        tensor = _initializer(model, node.input[1])
        weight = numpy_helper.to_array(tensor).astype(np.float64) * scale.reshape(1, -1, 1, 1)
        tensor.CopyFrom(numpy_helper.from_array(weight.astype(np.float32), tensor.name))


def shift_first(
    model: onnx.ModelProto, convolutions: list[onnx.NodeProto], shift: NDArray[np.float64]
) -> None:
    """Change the biases as if ``shift`` per channel were added to the input, in place.

    Exact but for the border: padding stays zero where it would be shifted, too.
    """
    for node in convolutions:
        weight = numpy_helper.to_array(_initializer(model, node.input[1])).astype(np.float64)
        change = (weight.sum(axis=(2, 3)) * shift.reshape(1, -1)).sum(axis=1)
        if len(node.input) > 2 and node.input[2]:
            tensor = _initializer(model, node.input[2])
            bias = numpy_helper.to_array(tensor).astype(np.float64) + change
            tensor.CopyFrom(numpy_helper.from_array(bias.astype(np.float32), tensor.name))
        else:
            name = f"{node.input[1]}_shift"
            model.graph.initializer.append(numpy_helper.from_array(change.astype(np.float32), name))
            del node.input[2:]
            node.input.append(name)


def _initializer(model: onnx.ModelProto, name: str) -> onnx.TensorProto:
    for tensor in model.graph.initializer:
        if tensor.name == name:
            return tensor
    raise ExportFailed(f"the graph has no constant {name!r}")


def strip_metadata(model: onnx.ModelProto) -> None:
    """Remove everything that says where the model was made, in place.

    Exporters record source paths and stack traces on every node.
    """
    model.doc_string = ""
    del model.metadata_props[:]
    model.domain = ""
    model.model_version = 0
    _strip_graph(model.graph)
    for function in model.functions:
        function.doc_string = ""
        del function.metadata_props[:]
        for node in function.node:
            _strip_node(node)


def _strip_graph(graph: onnx.GraphProto) -> None:
    graph.doc_string = ""
    graph.name = "pollard"
    del graph.metadata_props[:]
    for value in (*graph.input, *graph.output, *graph.value_info):
        value.doc_string = ""
        del value.metadata_props[:]
    for tensor in graph.initializer:
        tensor.doc_string = ""
        del tensor.metadata_props[:]
    for node in graph.node:
        _strip_node(node)


def _strip_node(node: onnx.NodeProto) -> None:
    node.doc_string = ""
    del node.metadata_props[:]
    for attribute in node.attribute:
        attribute.doc_string = ""
        if attribute.HasField("g"):
            _strip_graph(attribute.g)


def serialize(model: onnx.ModelProto) -> bytes:
    """Return the bytes of the file; the same model gives the same bytes."""
    return model.SerializeToString(deterministic=True)


def probe_images(spec: InputSpec, count: int = 8, seed: int = 0) -> NDArray[np.uint8]:
    """Return synthetic images: smooth blobs and noise, uint8 [count, height, width, channels]."""
    generator = np.random.default_rng(seed)
    images = np.empty((count, *spec.shape), np.uint8)
    y, x = np.mgrid[0 : spec.height, 0 : spec.width]
    for index in range(count):
        canvas = np.zeros(spec.shape, np.float64)
        for _ in range(6):
            centre_y, centre_x = generator.uniform(0, spec.height), generator.uniform(0, spec.width)
            radius = generator.uniform(0.05, 0.3) * max(spec.height, spec.width)
            blob = np.exp(-((y - centre_y) ** 2 + (x - centre_x) ** 2) / (2 * radius**2))
            canvas += blob[:, :, None] * generator.uniform(0, 255, spec.channels)
        canvas += generator.normal(0, 6 * (index % 3), spec.shape)
        images[index] = np.clip(canvas, 0, 255).astype(np.uint8)
    return images


def check_parity(model: bytes, module: nn.Module, spec: InputSpec) -> float:
    """Compare a float file, opened as it is served, with the module.

    Batches of one and of several are run.

    Returns:
        The largest difference of an output, relative to its range.

    Raises:
        ExportFailed: they differ by more than rounding explains.
    """
    images = probe_images(spec)
    # On the processor, as the file: a GPU sums in another order.
    with accelerator.on(accelerator.CPU):
        wanted = torch_predictor(module, spec)(images)
    session = open_session(model)
    predict = session_predictor(session)
    worst = 0.0
    for count in (len(images), 1):
        try:
            got = predict(images[:count])
        except Exception as error:  # onnxruntime raises its own kinds, without a common root
            first = str(error).strip().splitlines()[0]
            raise ExportFailed(
                f"the exported file does not run with {count} image(s); does the model fix its "
                f"batch, as with len(x) or view(8, …)? {first}"
            ) from error
        want = wanted[:count]
        if got.shape != want.shape:
            raise ExportFailed(
                f"the exported file gives {list(got.shape)} for {count} image(s), the model gives "
                f"{list(want.shape)}"
            )
        for part in _outputs(session, want.shape[-1]):
            span = float(np.ptp(wanted[..., part])) or 1.0
            worst = max(worst, float(np.abs(got[..., part] - want[..., part]).max()) / span)
    if not worst <= _PARITY:
        chance = by_chance(wanted, lambda: torch_predictor(module, spec)(images))
        raise ExportFailed(
            f"the exported file differs from the PyTorch model by {worst:.2e} of the logits' range "
            f"(allowed {_PARITY:g}){chance}"
        )
    return worst


def try_export(module: nn.Module, spec: InputSpec) -> None:
    """Export a module and compare, keep nothing: before the work that only an export makes useful.

    Raises:
        ExportFailed: it cannot be exported, or the file computes something else.
    """
    check_parity(serialize(attach_pixels(export_core(module, spec), spec)), module, spec)


def by_chance(before: NDArray[np.float32], again: Callable[[], NDArray[np.float32]]) -> str:
    """Return what to say where a model answers the same input otherwise each time."""
    if np.array_equal(before, again(), equal_nan=True):
        return ""
    return (
        ". It answers the same input otherwise each time: what is random must stop with eval(), "
        "such as F.dropout(x, training=self.training)"
    )


def _outputs(session: Session, width: int) -> list[slice]:
    """Return where each output lies in packed answers: pixels say nothing of logits."""
    if len(session.outputs) == 1:
        return [slice(None)]
    edges = np.cumsum([output.shape[-1] for output in session.outputs[:-1]]).tolist()
    return [slice(a, b) for a, b in zip([0, *edges], [*edges, width], strict=True)]
