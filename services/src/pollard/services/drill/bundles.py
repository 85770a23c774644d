"""The drill's own revisions: two small classifiers whose answers can be told apart."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

from pollard.bundle.v1 import bundle_pb2
from pollard.runtime.bundle import Bundle, write_bundle
from pollard.runtime.reference import Sample, random_samples
from pollard.runtime.sessions import open_session
from pollard.services.drill.onnx_file import classifier

SIDE = 16
"""Height and width of the images."""

CLASSES = 10
SAMPLES = 64

_TARGET = "cpu-fp32"
_MODEL, _GOLDEN, _LABELS = f"{_TARGET}/model.onnx", f"{_TARGET}/golden.npz", "labels.txt"


def drill_samples() -> list[Sample]:
    """Make the images that the drill asks about."""
    return random_samples(SAMPLES, SIDE, SIDE, 1, seed=1)


def drill_bundle(directory: Path, seed: int, megabytes: float) -> Bundle:
    """Write a revision of the drill's model.

    Args:
        directory: Where; must not exist or be empty.
        seed: Another one gives other weights and other answers.
        megabytes: Size of the ONNX file.

    Raises:
        OSError: it cannot be written.
    """
    model = classifier(SIDE, CLASSES, megabytes, seed)
    images = np.random.default_rng(0).integers(0, 256, (2, SIDE, SIDE, 1), dtype=np.uint8)
    scores = open_session(model, target=_TARGET).run({"image": images})["scores"]
    golden = io.BytesIO()
    np.savez(golden, allow_pickle=False, **{"input/image": images, "output/scores": scores})
    files: dict[str, bytes | Path] = {
        _MODEL: model,
        _GOLDEN: golden.getvalue(),
        _LABELS: "".join(f"class {index}\n" for index in range(CLASSES)).encode(),
    }
    return write_bundle(directory, _manifest(), files)


def _manifest() -> bundle_pb2.Manifest:
    manifest = bundle_pb2.Manifest(
        schema_version=1, name="drill", task=bundle_pb2.TASK_CLASSIFICATION
    )
    manifest.inputs.add(
        name="image",
        data_type=bundle_pb2.DATA_TYPE_UINT8,
        shape=[-1, SIDE, SIDE, 1],
        layout="NHWC",
    )
    manifest.outputs.add(
        name="scores", data_type=bundle_pb2.DATA_TYPE_FP32, shape=[-1, CLASSES], layout="NC"
    )
    manifest.preprocess.add().decode.CopyFrom(
        bundle_pb2.Decode(color_mode=bundle_pb2.COLOR_MODE_GRAY)
    )
    manifest.postprocess.classification.output = "scores"
    manifest.postprocess.classification.activation = bundle_pb2.ACTIVATION_SOFTMAX
    manifest.postprocess.labels_file = _LABELS
    variant = manifest.variants.add(
        name=_TARGET,
        target=_TARGET,
        model_file=_MODEL,
        golden_file=_GOLDEN,
        max_batch_size=8,
    )
    variant.golden_tolerance.absolute = 1e-3
    variant.golden_tolerance.relative = 1e-3
    variant.requirements.execution_provider = "CPUExecutionProvider"
    variant.requirements.opset = 18
    return manifest
