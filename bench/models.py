"""The models of the benchmarks, built with fixed seeds; their weights are random.

What a model answers does not matter here, only how long it takes, so nothing is trained. All of
them take float32 [batch, channels, height, width], so that requests are as large as elsewhere.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from bench.peers.fetch import BUILD

_RECIPE = 1
"""Raised when a model is built differently, so that built ones are built again."""

_MAX_BATCH = 32


@dataclass(frozen=True)
class BuiltModel:
    """A model on disk."""

    name: str
    title: str
    onnx: Path
    target: str
    """The target of Pollard's bundle."""
    input: str
    output: str
    input_shape: tuple[int, ...]
    """Without the batch."""
    output_shape: tuple[int, ...]
    """Without the batch."""
    max_batch: int = _MAX_BATCH
    triton_instances: int = 2


def small_cnn() -> BuiltModel:
    """Return the CNN for 28×28 grey images, float32."""
    return _torch_model("cnn28", "28×28 CNN, fp32", _small_cnn, (1, 28, 28), (10,), int8=False)


def resnet56() -> BuiltModel:
    """Return the ResNet-56 for CIFAR, int8."""
    return _torch_model("resnet56", "ResNet-56 CIFAR, int8", _resnet56, (3, 32, 32), (10,))


def resnet50() -> BuiltModel:
    """Return the ResNet-50 for 224×224 images, int8."""
    return _torch_model("resnet50", "ResNet-50 224, int8", resnet50_module, (3, 224, 224), (1000,))


def small_cnn_224() -> BuiltModel:
    """Return the small CNN for 224×224 images, int8."""
    return _torch_model("cnn224", "small CNN 224, int8", _small_cnn_224, (3, 224, 224), (1000,))


def mobilenet_v2() -> BuiltModel:
    """Return the MobileNetV2 for 224×224 images, int8."""
    return _torch_model("mobilenet", "MobileNetV2 224, int8", _mobilenet_v2, (3, 224, 224), (1000,))


MODELS: dict[str, Callable[[], BuiltModel]] = {
    "cnn28": small_cnn,
    "resnet56": resnet56,
    "resnet50": resnet50,
}


def large_model(seed: int, megabytes: int = 100) -> bytes:
    """Return an ONNX model of so many megabytes of weights that runs quickly: three dense layers.

    Takes float32 [batch, 64] as "x", gives float32 [batch, 64] as "y".
    """
    hidden = int((megabytes * 1e6 / 4) ** 0.5)
    generator = np.random.default_rng(seed)

    def weights(rows: int, columns: int, name: str) -> onnx.TensorProto:
        values = generator.standard_normal((rows, columns), np.float32) / rows**0.5
        return numpy_helper.from_array(values, name)

    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "w0"], ["a"]),
            helper.make_node("Relu", ["a"], ["b"]),
            helper.make_node("MatMul", ["b", "w1"], ["c"]),
            helper.make_node("Relu", ["c"], ["d"]),
            helper.make_node("MatMul", ["d", "w2"], ["y"]),
        ],
        "large",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 64])],
        [weights(64, hidden, "w0"), weights(hidden, hidden, "w1"), weights(hidden, 64, "w2")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return bytes(model.SerializeToString())


def _torch_model(
    name: str,
    title: str,
    build: Callable[[], Any],
    input_shape: tuple[int, ...],
    output_shape: tuple[int, ...],
    *,
    int8: bool = True,
) -> BuiltModel:
    folder = BUILD / "models" / name
    path, stamp = folder / "model.onnx", folder / "recipe.json"
    recipe = json.dumps({"recipe": _RECIPE, "int8": int8})
    if not (path.exists() and stamp.exists() and stamp.read_text() == recipe):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        model = _export(build, input_shape)
        if int8:
            model = _quantize(model, input_shape)
        onnx.save(model, path)
        stamp.write_text(recipe)
    return BuiltModel(
        name=name,
        title=title,
        onnx=path,
        target="cpu-int8" if int8 else "cpu-fp32",
        input="normalized",
        output="logits",
        input_shape=input_shape,
        output_shape=output_shape,
        # Of one and two instances the one that is faster on two cores.
        triton_instances=2 if int8 else 1,
    )


def _export(build: Callable[[], Any], shape: tuple[int, ...]) -> onnx.ModelProto:
    import torch

    from pollard.compress.export import export_core
    from pollard.compress.spec import InputSpec

    torch.manual_seed(0)
    channels, height, width = shape
    spec = InputSpec(height, width, channels, (0.0,) * channels, (1.0,) * channels)
    return export_core(build().eval(), spec)


class _Calibration:
    """Random images in the form that onnxruntime's quantizer reads."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        generator = np.random.default_rng(0)
        self._images: Iterator[np.ndarray] = iter(
            generator.standard_normal((4, 2, *shape), np.float32)
        )

    def get_next(self) -> dict[str, np.ndarray] | None:
        """Return the next batch; None at the end."""
        images = next(self._images, None)
        return None if images is None else {"normalized": images}


def _quantize(model: onnx.ModelProto, shape: tuple[int, ...]) -> onnx.ModelProto:
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with tempfile.TemporaryDirectory() as folder:
        prepared, written = Path(folder) / "prepared.onnx", Path(folder) / "quantized.onnx"
        quant_pre_process(model, prepared)
        quantize_static(
            prepared,
            written,
            _Calibration(shape),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
        return onnx.load(written)


def _small_cnn() -> Any:
    from pollard.compress.zoo.small import SmallCnn28

    return SmallCnn28()


def _resnet56() -> Any:
    from pollard.compress.zoo.cifar_resnet import resnet56

    return resnet56()


def _small_cnn_224() -> Any:
    from pollard.compress.zoo.small import SmallCnn224

    return SmallCnn224(1000)


def _mobilenet_v2() -> Any:
    from pollard.compress.zoo import mobilenet

    return mobilenet.mobilenet_v2()


def resnet50_module() -> Any:
    """Return the ResNet-50 of He et al. (2016) with the stride in the 3×3 convolutions."""
    import torch
    from torch import nn

    conv = partial(nn.Conv2d, bias=False)

    class Bottleneck(nn.Module):
        def __init__(self, wide_in: int, narrow: int, stride: int) -> None:
            super().__init__()
            wide = 4 * narrow
            self.body = nn.Sequential(
                *(conv(wide_in, narrow, 1), nn.BatchNorm2d(narrow), nn.ReLU()),
                *(conv(narrow, narrow, 3, stride, 1), nn.BatchNorm2d(narrow), nn.ReLU()),
                *(conv(narrow, wide, 1), nn.BatchNorm2d(wide)),
            )
            self.shortcut = (
                nn.Sequential(conv(wide_in, wide, 1, stride), nn.BatchNorm2d(wide))
                if stride != 1 or wide_in != wide
                else nn.Identity()
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(self.body(x) + self.shortcut(x))

    layers: list[nn.Module] = [
        *(conv(3, 64, 7, 2, 3), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
    ]
    width = 64
    for narrow, blocks, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for block in range(blocks):
            layers.append(Bottleneck(width, narrow, stride if block == 0 else 1))
            width = 4 * narrow
    # Not adaptive pooling: that exports as ReduceMean, which no quantizer fuses.
    return nn.Sequential(*layers, nn.AvgPool2d(7), nn.Flatten(), nn.Linear(width, 1000))
