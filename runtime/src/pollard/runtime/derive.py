"""A bundle out of a plain ONNX file: what the graph says of itself becomes the manifest."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from google.protobuf import json_format

from pollard.bundle.v1 import bundle_pb2
from pollard.runtime import transforms
from pollard.runtime.bundle import Bundle, read_labels, write_bundle
from pollard.runtime.digests import sha256_file
from pollard.runtime.errors import ModelLoadFailed, SignatureMismatch
from pollard.runtime.sessions import Session, TensorInfo, check_signature, open_session
from pollard.runtime.tensors import NUMPY, manifest_type

_VARIANT = "cpu-fp32"
_LABELS = "labels.txt"


def derive_bundle(
    model: Path | str, directory: Path | str, *, labels: Path | str | None = None
) -> Bundle:
    """Write a bundle of one ONNX file into ``directory``, which must not exist or be empty.

    Without labels the task is raw: tensors in, tensors out. With labels it is
    classification by the one output of [batch, number of labels]; images are
    decoded and resized for a graph that takes uint8 NHWC of a fixed size, and
    other graphs get no preprocessing, because nothing says how they normalise.
    The manifest has no golden outputs: nobody has said what is right.

    Args:
        model: The ONNX file, with its weights inside.
        directory: Where to write the bundle.
        labels: Text file, one label a line in the order of the classes, UTF-8.

    Raises:
        ModelLoadFailed: onnxruntime cannot load the file on a CPU, or its
            weights are in other files.
        SignatureMismatch: no output, or more than one, fits the labels.
        BundleCorrupt: the labels are not UTF-8.
        OSError: a file cannot be read or written.
    """
    model = Path(model)
    session = _open_alone(model)
    files: dict[str, bytes | Path] = {f"{_VARIANT}/model.onnx": model}
    manifest = bundle_pb2.Manifest(
        schema_version=1,
        name=model.stem,
        task=bundle_pb2.TASK_RAW,
        variants=[
            bundle_pb2.Variant(
                name=_VARIANT,
                target="cpu-fp32",
                model_file=f"{_VARIANT}/model.onnx",
                requirements=bundle_pb2.Requirements(execution_provider="CPUExecutionProvider"),
            )
        ],
        inputs=[_spec(info) for info in session.inputs],
        outputs=[_spec(info) for info in session.outputs],
        provenance=bundle_pb2.Provenance(
            source=model.name, parent_digest=sha256_file(model), derived=True
        ),
    )
    if labels is not None:
        content = Path(labels).read_bytes()
        files[_LABELS] = content
        _classify(manifest, session, len(read_labels(content)))
    bundle = write_bundle(directory, manifest, files)
    check_signature(session, bundle.manifest)
    return bundle


def describe_derived(bundle: Bundle) -> str:
    """Return the manifest as JSON without what is long or the same in every bundle."""
    shown = json_format.MessageToDict(bundle.manifest, preserving_proto_field_name=True)
    for key in ("files", "schema_version"):
        shown.pop(key, None)
    return json.dumps(shown, indent=2, ensure_ascii=False)


def _open_alone(model: Path) -> Session:
    """Open the model as it will lie in the bundle: without the files around it."""
    if not model.is_file():
        raise ModelLoadFailed(f"{model} is not a file", path=str(model))
    with tempfile.TemporaryDirectory(prefix="pollard-derive-") as folder:
        alone = Path(folder) / "model.onnx"
        try:
            alone.hardlink_to(model.resolve())
        except OSError:
            shutil.copyfile(model, alone)
        try:
            return open_session(alone, optimised=False)
        except ModelLoadFailed as error:
            message = f"{model}: {error.message}"
            try:
                open_session(model, optimised=False)
            except ModelLoadFailed:
                raise ModelLoadFailed(message, path=str(model)) from error
            raise ModelLoadFailed(
                f"{model} keeps its weights in other files; write them into it with "
                "onnx.save(onnx.load(...), ...), or make a bundle that holds them",
                path=str(model),
            ) from error


def _spec(info: TensorInfo) -> bundle_pb2.TensorSpec:
    return bundle_pb2.TensorSpec(
        name=info.name, data_type=manifest_type(info.datatype), shape=info.shape
    )


def _classify(manifest: bundle_pb2.Manifest, session: Session, classes: int) -> None:
    if not classes:
        raise SignatureMismatch("the file of labels is empty")
    fitting = [
        spec
        for spec in manifest.outputs
        if len(spec.shape) == 2
        and spec.shape[1] in (classes, -1)
        and spec.data_type in (bundle_pb2.DATA_TYPE_FP32, bundle_pb2.DATA_TYPE_FP64)
    ]
    fitting = [spec for spec in fitting if spec.shape[1] == classes] or fitting
    if len(fitting) != 1:
        have = ", ".join(f"{spec.name}{list(spec.shape)}" for spec in manifest.outputs)
        raise SignatureMismatch(
            f"{classes} labels need one output of floats with the shape [batch, {classes}]; the "
            f"graph has {have}"
        )
    output = fitting[0]
    scores = _try(session, output.name)
    if scores is not None and scores.shape[-1] != classes:
        raise SignatureMismatch(
            f"output {output.name} has {scores.shape[-1]} classes, and there are {classes} labels"
        )
    output.shape[1] = classes
    output.layout = "NC"
    manifest.task = bundle_pb2.TASK_CLASSIFICATION
    manifest.postprocess.labels_file = _LABELS
    manifest.postprocess.classification.output = output.name
    manifest.postprocess.classification.activation = (
        bundle_pb2.ACTIVATION_NONE
        if scores is not None and _are_probabilities(scores)
        else bundle_pb2.ACTIVATION_SOFTMAX
    )
    _take_images(manifest)


def _take_images(manifest: bundle_pb2.Manifest) -> None:
    if len(manifest.inputs) != 1:
        return
    spec = manifest.inputs[0]
    if spec.data_type != bundle_pb2.DATA_TYPE_UINT8 or len(spec.shape) != 4:
        return
    _, height, width, channels = spec.shape
    if height < 1 or width < 1 or channels not in (1, 3):
        return
    spec.layout = "NHWC"
    manifest.preprocess.extend(
        [transforms.decode(gray=channels == 1), transforms.resize(width, height)]
    )


def _try(session: Session, output: str) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]] | None:
    """Run the graph once on noise; None when noise of its shapes does not fit it."""
    random = np.random.default_rng(0)
    feeds: Mapping[str, np.ndarray[tuple[int, ...], np.dtype[np.generic]]] = {
        info.name: (random.random([max(size, 1) for size in info.shape]) * 255).astype(
            NUMPY[info.datatype]
        )
        for info in session.inputs
    }
    try:
        return np.asarray(session.run(feeds, [output])[output], np.float64)
    except Exception:  # onnxruntime's exceptions share no base class but this
        return None


def _are_probabilities(
    scores: np.ndarray[tuple[int, ...], np.dtype[np.float64]],
) -> bool:
    return bool(
        (scores >= 0).all() and (scores <= 1).all() and np.allclose(scores.sum(-1), 1, atol=1e-3)
    )
