"""Shadows: copies of one revision's requests on another, as servers are told of them, and how the
answers are compared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pollard.models.v1 import fleet_service_pb2 as fleet_pb

SHADOW_METADATA = "pollard-shadow"
"""gRPC metadata key that marks a request as a copy: it is run at low priority, only while a worker
is idle, and not counted with the requests."""


@dataclass(frozen=True)
class ShadowRule:
    """Which requests are copied."""

    revision: int
    """On which the copies run."""
    base_revision: int
    """Whose requests are copied."""
    share: float
    """Of its requests, 0 to 1."""
    output: str
    """That is compared: [batch, classes]."""
    transform_again: bool
    """Whether images must be prepared again, so that tensors cannot be copied."""

    @classmethod
    def of(cls, message: fleet_pb.Shadow) -> ShadowRule:
        """Return what the manager says."""
        return cls(
            message.revision,
            message.base_revision,
            message.share_ppm / 1e6,
            message.output,
            message.transform_again,
        )

    def to_proto(self) -> fleet_pb.Shadow:
        """Return it as the manager says it."""
        return fleet_pb.Shadow(
            revision=self.revision,
            base_revision=self.base_revision,
            share_ppm=round(self.share * 1e6),
            output=self.output,
            transform_again=self.transform_again,
        )


def compare_answers(scores: NDArray[Any], base: NDArray[Any]) -> tuple[int, list[float]]:
    """Compare the scores of two revisions for the same items.

    Args:
        scores: The shadow's, of shape [batch, classes].
        base: The base revision's, of the same shape.

    Returns:
        How many items have the same first answer, and the relative distance |a - b| / |b| of each;
        infinite where one of them is no number.

    Raises:
        ValueError: the shapes are no such.
    """
    if scores.ndim != 2 or scores.shape != base.shape or not scores.shape[1]:
        raise ValueError(f"shapes {scores.shape} and {base.shape} cannot be compared")
    ours, theirs = scores.astype(np.float64), base.astype(np.float64)
    finite = np.isfinite(ours).all(axis=1)
    usable = finite & np.isfinite(theirs).all(axis=1)
    same = ours.argmax(axis=1) == theirs.argmax(axis=1)
    # What is no number is no answer, unless the base revision gave none either.
    same &= finite | ~np.isfinite(theirs).all(axis=1)
    distances = np.full(len(ours), np.inf)
    difference = np.linalg.norm(ours[usable] - theirs[usable], axis=1)
    length = np.linalg.norm(theirs[usable], axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        distances[usable] = np.where(difference == 0, 0.0, difference / length)
    return int(same.sum()), [float(each) for each in distances]
