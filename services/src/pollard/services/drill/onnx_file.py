"""ONNX files of a classifier of any size, without the package onnx.

A machine that serves models has ONNX Runtime, but no reason to have onnx. The few messages that
the drill's classifier takes are described here with the field numbers of ONNX's `onnx.proto`, in a
descriptor pool of their own: onnx, where it is installed, registers the same names.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from numpy.typing import NDArray

_FLOAT, _UINT8 = 1, 2
_IR_VERSION, _OPSET = 10, 18

_FIELD = descriptor_pb2.FieldDescriptorProto
_INT, _TEXT, _BYTES = _FIELD.TYPE_INT64, _FIELD.TYPE_STRING, _FIELD.TYPE_BYTES

# Message → field → number, type (a name is a message's), repeated.
_MESSAGES: dict[str, dict[str, tuple[int, int | str, bool]]] = {
    "OperatorSet": {"domain": (1, _TEXT, False), "version": (2, _INT, False)},
    "Dimension": {"value": (1, _INT, False), "parameter": (2, _TEXT, False)},
    "Shape": {"dim": (1, "Dimension", True)},
    "TensorType": {"elem_type": (1, _INT, False), "shape": (2, "Shape", False)},
    "Type": {"tensor_type": (1, "TensorType", False)},
    "ValueInfo": {"name": (1, _TEXT, False), "type": (2, "Type", False)},
    "Attribute": {"name": (1, _TEXT, False), "i": (3, _INT, False), "type": (20, _INT, False)},
    "Node": {
        "input": (1, _TEXT, True),
        "output": (2, _TEXT, True),
        "op_type": (4, _TEXT, False),
        "attribute": (5, "Attribute", True),
    },
    "Tensor": {
        "dims": (1, _INT, True),
        "data_type": (2, _INT, False),
        "name": (8, _TEXT, False),
        "raw_data": (9, _BYTES, False),
    },
    "Graph": {
        "node": (1, "Node", True),
        "name": (2, _TEXT, False),
        "initializer": (5, "Tensor", True),
        "input": (11, "ValueInfo", True),
        "output": (12, "ValueInfo", True),
    },
    "Model": {
        "ir_version": (1, _INT, False),
        "producer_name": (2, _TEXT, False),
        "graph": (7, "Graph", False),
        "opset_import": (8, "OperatorSet", True),
    },
}

_ATTRIBUTE_INT = 2


def classifier(side: int, classes: int, megabytes: float, seed: int) -> bytes:
    """Return an ONNX file of about so many megabytes: dense layers over grey images.

    It takes uint8 [batch, side, side, 1] as "image" and gives float32 [batch, classes] as
    "scores". Other seeds give other answers for the same image.

    Args:
        side: Height and width of the images.
        classes: Number of classes.
        megabytes: Size of the weights.
        seed: Decides the weights.
    """
    pixels = side * side
    # pixels·h + h² + h·classes weights of four bytes.
    linear, wanted = pixels + classes, megabytes * 1e6 / 4
    hidden = max(8, round((-linear + (linear**2 + 4 * wanted) ** 0.5) / 2))
    generator = np.random.default_rng(seed)

    def weights(rows: int, columns: int, gain: float) -> NDArray[np.float32]:
        scale = np.float32(gain / rows**0.5)
        return generator.standard_normal((rows, columns), np.float32) * scale

    model = _new("Model", ir_version=_IR_VERSION, producer_name="pollard drill")
    model.opset_import.add(version=_OPSET)
    graph = model.graph
    graph.name = "drill"
    # Grey values have a spread of about 74, scores should have one of about 2.
    for name, values in (
        ("w0", weights(pixels, hidden, 2 / 74)),
        ("w1", weights(hidden, hidden, 2**0.5)),
        ("w2", weights(hidden, classes, 2**0.5)),
    ):
        graph.initializer.add(
            name=name, data_type=_FLOAT, dims=values.shape, raw_data=values.tobytes()
        )
    cast = graph.node.add(input=["image"], output=["float"], op_type="Cast")
    cast.attribute.add(name="to", i=_FLOAT, type=_ATTRIBUTE_INT)
    flow = "float"
    for op_type, weight, output in (
        ("Flatten", "", "flat"),
        ("MatMul", "w0", "a"),
        ("Relu", "", "b"),
        ("MatMul", "w1", "c"),
        ("Relu", "", "d"),
        ("MatMul", "w2", "scores"),
    ):
        graph.node.add(input=[flow, weight] if weight else [flow], output=[output], op_type=op_type)
        flow = output
    _declare(graph.input, "image", _UINT8, (side, side, 1))
    _declare(graph.output, "scores", _FLOAT, (classes,))
    return bytes(model.SerializeToString(deterministic=True))


def _declare(values: Any, name: str, data_type: int, shape: tuple[int, ...]) -> None:
    tensor = values.add(name=name).type.tensor_type
    tensor.elem_type = data_type
    tensor.shape.dim.add(parameter="batch")
    for size in shape:
        tensor.shape.dim.add(value=size)


@functools.cache
def _classes() -> dict[str, Any]:
    package = "pollard.drill.onnx"
    file = descriptor_pb2.FileDescriptorProto(
        name="pollard/drill/onnx.proto", package=package, syntax="proto3"
    )
    for message, fields in _MESSAGES.items():
        described = file.message_type.add(name=message)
        for name, (number, kind, repeated) in fields.items():
            field = described.field.add(name=name, number=number)
            field.label = _FIELD.LABEL_REPEATED if repeated else _FIELD.LABEL_OPTIONAL
            if isinstance(kind, str):
                field.type, field.type_name = _FIELD.TYPE_MESSAGE, f".{package}.{kind}"
            else:
                field.type = kind  # type: ignore[assignment]  # one of the constants above
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{package}.{name}"))
        for name in _MESSAGES
    }


def _new(message: str, **fields: Any) -> Any:
    return _classes()[message](**fields)
