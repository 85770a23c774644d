"""What each revision answers offline: the yardstick of every answer under load."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pollard.runtime.bundle import Bundle
from pollard.runtime.machine import Machine, select_variant
from pollard.runtime.postprocess import classify
from pollard.runtime.sessions import open_session
from pollard.runtime.transforms import Pipeline

# The same file on the same machine gives the same numbers but for the order of additions, which
# may depend on the size of the batch.
_RELATIVE, _ABSOLUTE = 1e-3, 1e-4


@dataclass(frozen=True)
class Sample:
    """One held-out image."""

    png: bytes
    """The file that is sent to VisionService."""
    tensor: NDArray[np.uint8]
    """The input that is sent to ModelInfer, (1, H, W, C)."""
    label: int
    """Index of the right class."""


def make_samples(images: NDArray[np.uint8], labels: NDArray[np.int64]) -> list[Sample]:
    """Make files and tensors of images, uint8 (N, H, W, 1)."""
    samples = []
    for image, label in zip(images, labels, strict=True):
        buffer = io.BytesIO()
        Image.fromarray(image[:, :, 0]).save(buffer, format="PNG")
        samples.append(Sample(buffer.getvalue(), image[None], int(label)))
    return samples


class Reference:
    """One revision's answers to all samples, computed by the runtime without any service."""

    def __init__(self, bundle: Bundle, samples: Sequence[Sample]) -> None:
        """Run every sample through the bundle's own steps and the variant that servers take."""
        variant = select_variant(bundle.manifest, Machine.detect())
        session = open_session(bundle.model_path(variant), target=variant.target)
        pipeline = Pipeline(bundle.manifest.preprocess)
        self.input_name = bundle.manifest.inputs[0].name
        self.output_name = bundle.manifest.postprocess.classification.output
        self.variant = variant.name
        classes = bundle.manifest.outputs[0].shape[-1]
        self.scores = np.zeros((len(samples), classes))
        self.outputs = np.zeros((len(samples), classes), np.float32)
        for index, sample in enumerate(samples):
            tensor = pipeline.apply(sample.png).array
            outputs = session.run({self.input_name: tensor[None]})
            self.outputs[index] = outputs[self.output_name][0]
            for best in classify(outputs, bundle.manifest, bundle.labels, top_k=classes):
                self.scores[index, best.class_index] = best.score
        self.labels = np.array([sample.label for sample in samples])

    @property
    def classes(self) -> int:
        """Number of classes."""
        return self.scores.shape[1]

    @property
    def accuracy(self) -> float:
        """Share of the samples whose best class is right."""
        return float(np.mean(self.scores.argmax(axis=1) == self.labels))

    def matches_scores(self, index: int, scores: NDArray[np.float64]) -> bool:
        """Say whether the scores of a sample are this revision's, (classes,)."""
        return bool(np.allclose(scores, self.scores[index], rtol=_RELATIVE, atol=1e-9))

    def matches_output(self, index: int, output: NDArray[np.float32]) -> bool:
        """Say whether an output tensor is this revision's, (1, classes)."""
        return output.shape == (1, self.classes) and bool(
            np.allclose(output[0], self.outputs[index], rtol=_RELATIVE, atol=_ABSOLUTE)
        )


def telling(one: Reference, other: Reference) -> int:
    """Count the samples for which the revisions' answers differ, so that each can be told apart."""
    return sum(
        not one.matches_scores(index, other.scores[index])
        and not one.matches_output(index, other.outputs[index][None])
        for index in range(len(one.scores))
    )
