"""What a bundle answers offline: the yardstick of every answer that a server gives for it."""

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
    """One image."""

    png: bytes
    """The file that is sent to VisionService."""
    tensor: NDArray[np.generic]
    """The input that is sent to ModelInfer, with the batch as first dimension."""
    label: int = 0
    """Index of the right class, where anybody knows it."""


def make_samples(images: NDArray[np.uint8], labels: NDArray[np.int64]) -> list[Sample]:
    """Make files and tensors of images, uint8 (N, H, W, 1) or (N, H, W, 3)."""
    samples = []
    for image, label in zip(images, labels, strict=True):
        buffer = io.BytesIO()
        pixels = image[:, :, 0] if image.shape[2] == 1 else image
        Image.fromarray(pixels).save(buffer, format="PNG")
        samples.append(Sample(buffer.getvalue(), image[None], int(label)))
    return samples


def random_samples(count: int, height: int, width: int, channels: int, seed: int) -> list[Sample]:
    """Make so many images of noise, the same for the same seed."""
    generator = np.random.default_rng(seed)
    images = generator.integers(0, 256, (count, height, width, channels), dtype=np.uint8)
    return make_samples(images, np.zeros(count, np.int64))


class Reference:
    """One revision's answers to all samples, computed by the runtime without any service."""

    def __init__(self, bundle: Bundle, samples: Sequence[Sample]) -> None:
        """Run every sample through the bundle's own steps and the variant that servers take.

        Args:
            bundle: A classifier that takes images.
            samples: What will be asked.
        """
        variant = select_variant(bundle.manifest, Machine.detect())
        session = open_session(bundle.model_path(variant), target=variant.target)
        pipeline = Pipeline(bundle.manifest.preprocess)
        self.input_name = bundle.manifest.inputs[0].name
        self.output_name = (
            bundle.manifest.postprocess.classification.output or bundle.manifest.outputs[0].name
        )
        self.variant = variant.name
        self.inputs: list[NDArray[np.generic]] = []
        """What each sample becomes for the model, with the batch as first dimension."""
        scores, outputs = [], []
        for sample in samples:
            self.inputs.append(pipeline.apply(sample.png).batch)
            found = session.run({self.input_name: self.inputs[-1]})
            outputs.append(np.asarray(found[self.output_name][0], np.float32))
            row = np.zeros(outputs[-1].shape[-1])
            for best in classify(found, bundle.manifest, bundle.labels, top_k=len(row)):
                row[best.class_index] = best.score
            scores.append(row)
        self.scores = np.stack(scores)
        self.outputs = np.stack(outputs)
        self.labels = np.array([sample.label for sample in samples])

    @property
    def classes(self) -> int:
        """Number of classes."""
        return int(self.scores.shape[1])

    @property
    def accuracy(self) -> float:
        """Share of the samples whose best class is right."""
        return float(np.mean(self.scores.argmax(axis=1) == self.labels))

    def matches_scores(self, index: int, scores: NDArray[np.float64]) -> bool:
        """Say whether the scores of a sample are this revision's, (classes,)."""
        return _close(scores, self.scores[index], 1e-9)

    def matches_output(self, index: int, output: NDArray[np.float32]) -> bool:
        """Say whether an output tensor is this revision's, (1, classes)."""
        return output.shape == (1, self.classes) and _close(
            output[0], self.outputs[index], _ABSOLUTE
        )


def _close(found: NDArray[np.floating], expected: NDArray[np.floating], absolute: float) -> bool:
    # np.allclose does the same in five times the time, which counts where every answer is checked.
    # Written so that NaN is not close.
    return bool(np.all(np.abs(found - expected) <= absolute + _RELATIVE * np.abs(expected)))


def telling(one: Reference, other: Reference) -> int:
    """Count the samples for which the revisions' answers differ, so that each can be told apart."""
    return sum(
        not one.matches_scores(index, other.scores[index])
        and not one.matches_output(index, other.outputs[index][None])
        for index in range(len(one.scores))
    )
