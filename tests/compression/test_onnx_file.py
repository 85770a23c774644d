from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import typer
from onnx import TensorProto, helper, numpy_helper
from torch import nn
from typer.testing import CliRunner, Result

from pollard.compress.candidates import build
from pollard.compress.cli import register
from pollard.compress.data import Dataset, Part, load_data
from pollard.compress.errors import CompressionError, ModelUnknown, UsageInvalid
from pollard.compress.evaluate import predict_part, right_answers, session_predictor
from pollard.compress.export import export_core, probe_images
from pollard.compress.macs import count_parameters, layer_costs
from pollard.compress.models import load_model, resolve
from pollard.compress.onnx_file import OnnxModule, read_core
from pollard.compress.packing import pack
from pollard.compress.pipeline import compress
from pollard.compress.quantize import QuantizeConfig
from pollard.compress.recipe import Recipe
from pollard.compress.spec import InputSpec
from pollard.runtime.sessions import open_session

SPEC = InputSpec(8, 10, 3, (0.4, 0.5, 0.6), (0.25,) * 3)
DIGITS = InputSpec(28, 28, 1, (0.2,), (0.3,))


def write(path: Path, module: nn.Module) -> Path:
    """Write a module as other people do: names of their own, one size of batch, no node names."""
    model = export_core(module, SPEC)
    graph = model.graph
    for node in graph.node:
        node.name = ""
        for names in (node.input, node.output):
            for index, name in enumerate(names):
                names[index] = {"normalized": "logits", "logits": "answer"}.get(name, name)
    graph.input[0].name, graph.output[0].name = "logits", "answer"
    graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    del graph.value_info[:]
    onnx.save(model, path)
    return path


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    ).eval()  # fmt: skip


@pytest.fixture(scope="module")
def file(net: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("onnx") / "net.onnx", net)


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_data("digits", DIGITS)


@pytest.fixture(scope="module")
def reader_of_digits(digits: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file that reads digits: random features, and a readout by least squares.

    Channels come last, as Keras writes them. Its time is that of fetching weights, so that
    8 bits are faster on every processor.
    """
    generator = np.random.default_rng(0)
    inputs = DIGITS.normalize(digits.train.images).flatten(1).numpy().astype(np.float64)
    features = generator.normal(0, 0.1, (784, 4096)).astype(np.float32)
    hidden = np.maximum(inputs @ features, 0)
    wanted = np.eye(10)[digits.train.labels]
    gram = hidden @ hidden.T + 10.0 * np.eye(len(hidden))
    readout = (hidden.T @ np.linalg.solve(gram, wanted)).astype(np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("Flatten", ["pixels"], ["flat"]),
            helper.make_node("MatMul", ["flat", "features"], ["sums"]),
            helper.make_node("Relu", ["sums"], ["hidden"]),
            helper.make_node("MatMul", ["hidden", "readout"], ["answer"]),
        ],
        "keras",
        [helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["n", 28, 28, 1])],
        [helper.make_tensor_value_info("answer", TensorProto.FLOAT, ["n", 10])],
        [
            numpy_helper.from_array(features, "features"),
            numpy_helper.from_array(readout, "readout"),
        ],
    )
    path = tmp_path_factory.mktemp("onnx") / "reader.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]), path)
    return path


def test_a_file_answers_and_costs_what_the_module_does(net: nn.Module, file: Path) -> None:
    loaded = load_model(resolve(str(file), SPEC), classes=4)
    assert loaded.source.reference == "onnx:net.onnx"
    assert loaded.source.name == "net"
    images = SPEC.normalize(probe_images(SPEC, 5))
    with torch.no_grad():
        torch.testing.assert_close(loaded.module(images), net(images), atol=1e-5, rtol=1e-4)
    wanted = [(c.in_channels, c.out_channels, c.output, c.macs) for c in layer_costs(net, SPEC)]
    costs = layer_costs(loaded.module, SPEC)
    assert [(c.in_channels, c.out_channels, c.output, c.macs) for c in costs] == wanted
    # The batch norm is folded: its two parameters a channel are gone.
    assert count_parameters(loaded.module) == count_parameters(net) - 16
    assert "net" not in repr(loaded.module)
    copy.deepcopy(loaded.module)


def test_files_are_made_of_it_as_of_a_module(file: Path, tmp_path: Path) -> None:
    loaded = load_model(resolve(str(file), SPEC), classes=4)
    images = probe_images(SPEC, 64)
    part = Part("p", images, np.zeros(64, np.int64))
    files = build(
        "parent", loaded.module, SPEC, tmp_path, part, QuantizeConfig(64, reduce_range=True)
    )
    assert [file.name for file in files] == ["parent-fp32", "parent-int8"]
    logits = [session_predictor(open_session(file.path))(images) for file in files]
    assert np.corrcoef(logits[0].ravel(), logits[1].ravel())[0, 1] > 0.99


def test_a_file_alone_is_quantized_to_a_bundle(
    reader_of_digits: Path, digits: Dataset, tmp_path: Path
) -> None:
    recipe = Recipe(
        str(reader_of_digits), "digits", "", prune=0.0, max_drop=2.0, threads=2, spec=DIGITS,
        calibration="min-max", correct_biases=False,
    )  # fmt: skip
    result = compress(recipe, tmp_path / "out", cache=tmp_path / "stages")
    assert result.chosen.candidate.name == "parent-int8"
    assert result.report["name"] == "reader"
    assert result.report["summary"]["macs_parent"] == 794 * 4096
    assert str(tmp_path) not in (tmp_path / "out" / "report.json").read_text()
    assert result.chosen.accuracy.value > 0.9
    session = open_session(tmp_path / "out" / "cpu-int8" / "model.onnx")
    logits = predict_part(session_predictor(session), digits.held_out)
    assert right_answers(logits, digits.held_out).mean() == result.chosen.accuracy.value


def test_a_file_alone_is_packed_as_it_is(reader_of_digits: Path, tmp_path: Path) -> None:
    labels = tmp_path / "labels.txt"
    labels.write_text("\n".join("0123456789"))
    made = pack(str(reader_of_digits), labels, tmp_path / "out", weights="", spec=DIGITS)
    assert made.manifest.name == "reader"
    assert [v.target for v in made.manifest.variants] == ["cpu-fp32"]


def run(*arguments: object) -> Result:
    app = typer.Typer()
    register(app)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_command_does_not_prune_a_file_unless_told_to(
    reader_of_digits: Path, tmp_path: Path
) -> None:
    common = ["compress", str(reader_of_digits), "--data", "digits", "--out", str(tmp_path / "o")]
    done = run(*common)
    assert done.exit_code == 2
    assert "--input-size" in done.output
    common += ["--input-size", "28x28x1"]
    done = run(*common, "--prune", "0.5")
    assert done.exit_code == 2
    assert "for pruning give the PyTorch model" in " ".join(done.output.split())
    recipe = tmp_path / "recipe.yaml"
    assert run(*common, "--init", recipe).exit_code == 0
    assert "prune: 0.0" in recipe.read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.graph.output.extend([m.graph.output[0]]), "1 inputs and 2 outputs"),
        (
            lambda m: setattr(m.graph.input[0].type.tensor_type, "elem_type", TensorProto.DOUBLE),
            "takes DOUBLE",
        ),
        (
            lambda m: setattr(m.graph.input[0].type.tensor_type.shape.dim[2], "dim_value", 9),
            "does --input-size say",
        ),
        (
            lambda m: m.graph.input.extend(
                [helper.make_tensor_value_info("more", TensorProto.FLOAT, [1])]
            ),
            "2 inputs and 1 outputs",
        ),
        (lambda m: m.graph.ClearField("node"), "cannot be read"),
    ],
)
def test_files_that_are_no_such_network_are_refused(
    change: object, message: str, file: Path, tmp_path: Path
) -> None:
    path = tmp_path / "net.onnx"
    model = onnx.load(file)
    change(model)  # type: ignore[operator]
    onnx.save(model, path)
    with pytest.raises(ModelUnknown, match=message):
        read_core(path, SPEC)


def test_a_batch_that_is_fixed_within_is_told_with_what_to_do(
    net: nn.Module, tmp_path: Path
) -> None:
    path = write(tmp_path / "fixed.onnx", net)
    model = onnx.load(path)
    shape = numpy_helper.from_array(np.array([1, 4], np.int64), "shape")
    model.graph.initializer.append(shape)
    last = next(node for node in model.graph.node if "answer" in node.output)
    last.output[0] = "before"
    model.graph.node.append(helper.make_node("Reshape", ["before", "shape"], ["answer"]))
    onnx.save(model, path)
    with pytest.raises(ModelUnknown, match=r"export it with a batch that is free") as caught:
        load_model(resolve(f"onnx:{path}", SPEC))
    assert str(caught.value).count("onnx:fixed.onnx") == 1


def test_what_a_file_cannot_do_is_told(file: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelUnknown, match="no ONNX file"):
        resolve("absent.onnx", SPEC)
    source = resolve(f"onnx:{file}", SPEC)
    with pytest.raises(UsageInvalid, match="for training give the PyTorch model"):
        source.require_pytorch("training")
    with pytest.raises(UsageInvalid, match="holds its own weights"):
        load_model(source, file)
    module = load_model(source).module
    assert isinstance(module, OnnxModule)
    part = Part("p", probe_images(SPEC, 8), np.zeros(8, np.int64))
    (_, quantized) = build("parent", module, SPEC, tmp_path, part, QuantizeConfig(8))
    with pytest.raises(CompressionError, match="is quantized already"):
        read_core(quantized.path, SPEC)
