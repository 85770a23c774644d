"""A plain ONNX file becomes a bundle that says what its graph says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from pollard.bundle.v1 import bundle_pb2
from pollard.runtime.bundle import Bundle
from pollard.runtime.derive import derive_bundle, describe_derived
from pollard.runtime.errors import ModelLoadFailed, SignatureMismatch


def classifier(folder: Path, *, softmax: bool = False, classes: int = 3, seed: int = 0) -> Path:
    """Write a classifier of uint8 [n, 4, 4, 1]; return its path."""
    weights = np.random.default_rng(seed).normal(size=(16, classes)).astype(np.float32)
    nodes = [
        helper.make_node("Cast", ["image"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Flatten", ["float"], ["flat"]),
        helper.make_node("MatMul", ["flat", "weights"], ["raw" if softmax else "scores"]),
    ]
    if softmax:
        nodes.append(helper.make_node("Softmax", ["raw"], ["scores"], axis=1))
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["n", 4, 4, 1])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["n", "classes"])],
        [numpy_helper.from_array(weights, "weights")],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    path = folder / "tiny.onnx"
    onnx.save(made, path)
    return path


def test_without_labels_it_is_raw(tmp_path: Path) -> None:
    model = classifier(tmp_path)
    derived = derive_bundle(model, tmp_path / "bundle")
    bundle = Bundle.open(tmp_path / "bundle")  # verifies every digest
    assert bundle.digest == derived.digest
    manifest = bundle.manifest
    assert manifest.task == bundle_pb2.TASK_RAW
    assert manifest.provenance.derived
    assert manifest.provenance.source == "tiny.onnx"
    assert [(spec.name, list(spec.shape)) for spec in manifest.inputs] == [("image", [-1, 4, 4, 1])]
    assert [(spec.name, list(spec.shape)) for spec in manifest.outputs] == [("scores", [-1, 3])]
    assert bundle.model_path("cpu-fp32").read_bytes() == model.read_bytes()
    assert '"derived": true' in describe_derived(bundle)


@pytest.mark.parametrize("softmax", [False, True])
def test_with_labels_it_classifies_images(tmp_path: Path, softmax: bool) -> None:
    (tmp_path / "labels").write_text("a\nb\nc\n")
    model = classifier(tmp_path, softmax=softmax)
    bundle = derive_bundle(model, tmp_path / "bundle", labels=tmp_path / "labels")
    assert bundle.manifest.task == bundle_pb2.TASK_CLASSIFICATION
    assert bundle.labels == ["a", "b", "c"]
    assert list(bundle.manifest.outputs[0].shape) == [-1, 3]
    activation = bundle.manifest.postprocess.classification.activation
    wanted = bundle_pb2.ACTIVATION_NONE if softmax else bundle_pb2.ACTIVATION_SOFTMAX
    assert activation == wanted
    assert [step.WhichOneof("step") for step in bundle.manifest.preprocess] == ["decode", "resize"]


@pytest.mark.parametrize("labels", ["a\nb\n", "", "a\nb\nc\nd\n"])
def test_labels_that_do_not_fit_are_refused(tmp_path: Path, labels: str) -> None:
    (tmp_path / "labels").write_text(labels)
    with pytest.raises(SignatureMismatch, match="labels"):
        derive_bundle(classifier(tmp_path), tmp_path / "bundle", labels=tmp_path / "labels")
    assert not (tmp_path / "bundle").exists()


def test_what_is_no_model_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.onnx").write_bytes(b"this is no graph")
    with pytest.raises(ModelLoadFailed, match=r"x\.onnx"):
        derive_bundle(tmp_path / "x.onnx", tmp_path / "bundle")
    with pytest.raises(ModelLoadFailed, match="not a file"):
        derive_bundle(tmp_path / "y.onnx", tmp_path / "bundle")


def test_weights_in_other_files_are_refused_with_what_to_do(tmp_path: Path) -> None:
    model = onnx.load(classifier(tmp_path))
    outside = tmp_path / "outside.onnx"
    onnx.save(model, outside, save_as_external_data=True, location="weights.bin", size_threshold=0)
    with pytest.raises(ModelLoadFailed, match=r"weights in other files.*onnx\.save"):
        derive_bundle(outside, tmp_path / "bundle")
