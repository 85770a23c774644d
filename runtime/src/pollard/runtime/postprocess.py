"""From output tensors to answers, as the manifest says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pollard.bundle.v1 import bundle_pb2
from pollard.runtime.errors import ManifestInvalid, TensorInvalid

DEFAULT_TOP_K = 5


class ScoredClass(NamedTuple):
    """One class of a classification."""

    class_index: int
    """Index of the class, from 0."""
    label: str
    """Its label; empty when the bundle has none."""
    score: float
    """Its score; a probability when the manifest says softmax."""


def classify(
    outputs: Mapping[str, NDArray[np.generic]],
    manifest: bundle_pb2.Manifest,
    labels: Sequence[str] = (),
    top_k: int = 0,
) -> list[ScoredClass]:
    """Answer for one image: `classify_batch` for a batch of one.

    Raises:
        ManifestInvalid, TensorInvalid: as `classify_batch`, and TensorInvalid
            for another number of images.
    """
    answers = classify_batch(outputs, manifest, labels, top_k)
    if len(answers) != 1:
        raise TensorInvalid(
            f"the model answered for {len(answers)} images, not for one", images=len(answers)
        )
    return answers[0]


def classify_batch(
    outputs: Mapping[str, NDArray[np.generic]],
    manifest: bundle_pb2.Manifest,
    labels: Sequence[str] = (),
    top_k: int = 0,
) -> list[list[ScoredClass]]:
    """Return the best classes of each image by falling score.

    Classes with equal outputs are ordered by their index.

    Args:
        outputs: Output tensors by name; the classification's is [batch, classes].
        manifest: Of the revision that gave the outputs.
        labels: Labels in the order of the classes, or none.
        top_k: Number of classes wanted; 0 means what the manifest says, more
            than there are means all.

    Raises:
        ManifestInvalid: the manifest does not describe a classification.
        TensorInvalid: the output is missing, not [batch, classes], or holds a
            value that is not finite.
    """
    raw, scores = _scores(outputs, manifest)
    # Every activation grows with its input; the inputs tell apart what
    # rounding in the scores would make equal.
    return [
        _best(row, row_scores, manifest, labels, top_k)
        for row, row_scores in zip(raw, scores, strict=True)
    ]


def classify_views(
    outputs: Mapping[str, NDArray[np.generic]],
    manifest: bundle_pb2.Manifest,
    labels: Sequence[str] = (),
    top_k: int = 0,
) -> list[ScoredClass]:
    """Answer for one image that the model saw several times: its scores are averaged.

    The mean is taken of the scores, that is, after the activation.

    Args:
        outputs: Output tensors by name; the classification's is [views, classes].
        manifest: As for `classify_batch`.
        labels: As for `classify_batch`.
        top_k: As for `classify_batch`.

    Raises:
        ManifestInvalid, TensorInvalid: as `classify_batch`, and TensorInvalid
            for no views.
    """
    raw, scores = _scores(outputs, manifest)
    if len(raw) == 0:
        raise TensorInvalid("the model answered for no view of the image")
    mean = scores.mean(axis=0)
    return _best(raw[0] if len(raw) == 1 else mean, mean, manifest, labels, top_k)


def _scores(
    outputs: Mapping[str, NDArray[np.generic]], manifest: bundle_pb2.Manifest
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the outputs and the scores, each [batch, classes]."""
    if manifest.postprocess.WhichOneof("task") != "classification":
        raise ManifestInvalid("the manifest does not describe a classification")
    task = manifest.postprocess.classification
    name = task.output or (manifest.outputs[0].name if manifest.outputs else "")
    raw = _matrix(name, output_of(outputs, name), "classes")
    return raw, activate(raw, task.activation)


def output_of(outputs: Mapping[str, NDArray[np.generic]], name: str) -> NDArray[np.generic]:
    """Return an output by its name.

    Raises:
        TensorInvalid: the model did not give it.
    """
    if name not in outputs:
        have = ", ".join(outputs) or "none"
        raise TensorInvalid(f"the model gave no output {name!r}; it gave {have}", output=name)
    return outputs[name]


def embed_views(
    outputs: Mapping[str, NDArray[np.generic]], manifest: bundle_pb2.Manifest
) -> NDArray[np.float32]:
    """Return the vector of one image, float32 [features]: the mean over its views.

    Raises:
        ManifestInvalid: the manifest does not describe an embedding.
        TensorInvalid: the output is missing, not [views, features], or holds a value that is not
            finite.
    """
    if manifest.postprocess.WhichOneof("task") != "embedding":
        raise ManifestInvalid("the manifest does not describe an embedding")
    task = manifest.postprocess.embedding
    name = task.output or (manifest.outputs[0].name if manifest.outputs else "")
    vectors = _matrix(name, output_of(outputs, name), "features")
    if len(vectors) == 0:
        raise TensorInvalid("the model answered for no view of the image")
    vector = vectors.mean(axis=0)
    if task.l2_normalize:
        # A vector of zeros has no direction.
        vector /= np.linalg.norm(vector) or 1.0
    return np.asarray(vector, np.float32)


def _best(
    order_by: NDArray[np.float64],
    scores: NDArray[np.float64],
    manifest: bundle_pb2.Manifest,
    labels: Sequence[str],
    top_k: int,
) -> list[ScoredClass]:
    default = manifest.postprocess.classification.default_top_k or DEFAULT_TOP_K
    count = min(top_k or default, len(scores))
    # Equal values stand in the order of their classes, and only what may be wanted is sorted.
    least = np.partition(order_by, len(scores) - count)[len(scores) - count]
    near = np.flatnonzero(order_by >= least)
    best = near[np.argsort(-order_by[near], kind="stable")[:count]]
    return [
        ScoredClass(int(i), labels[i] if i < len(labels) else "", float(scores[i])) for i in best
    ]


def _matrix(name: str, output: NDArray[np.generic], what: str) -> NDArray[np.float64]:
    # A pooled head may leave [batch, classes, 1, 1].
    if output.ndim < 2 or output.shape[1] == 0 or set(output.shape[2:]) - {1}:
        raise TensorInvalid(
            f"output {name!r} has shape {list(output.shape)}, not [batch, {what}]",
            output=name,
            shape=list(output.shape),
        )
    raw = output.reshape(output.shape[:2]).astype(np.float64)
    if not np.isfinite(raw).all():
        raise TensorInvalid(f"output {name!r} holds values that are not finite", output=name)
    return raw


def activate(raw: NDArray[np.float64], activation: int) -> NDArray[np.float64]:
    """Turn outputs [batch, classes] into scores, without overflow for any finite value."""
    if activation == bundle_pb2.ACTIVATION_SOFTMAX:
        exponentials = np.exp(raw - raw.max(axis=1, keepdims=True))
        return np.asarray(exponentials / exponentials.sum(axis=1, keepdims=True))
    if activation == bundle_pb2.ACTIVATION_SIGMOID:
        # exp() of a value that is never positive cannot overflow.
        small = np.exp(-np.abs(raw))
        return np.where(raw >= 0, 1 / (1 + small), small / (1 + small))
    return raw
