"""What a rollout with shadows needs to know of the two bundles that it compares."""

from __future__ import annotations

from dataclasses import dataclass

from pollard.bundle.v1 import bundle_pb2
from pollard.services.common.errors import FailedPrecondition

MARGIN = 0.02
"""How much less than the measured agreement is accepted: live requests are other images."""

_SCORES = {
    bundle_pb2.DATA_TYPE_FP16,
    bundle_pb2.DATA_TYPE_FP32,
    bundle_pb2.DATA_TYPE_FP64,
    bundle_pb2.DATA_TYPE_INT8,
    bundle_pb2.DATA_TYPE_UINT8,
    bundle_pb2.DATA_TYPE_INT32,
    bundle_pb2.DATA_TYPE_INT64,
}


@dataclass(frozen=True)
class Comparison:
    """How the answers of two revisions are compared."""

    output: str
    """Output of shape [batch, classes] that both give."""
    transform_again: bool
    """Whether they prepare images differently, so that tensors cannot be copied."""
    min_agreement: float
    """Smallest share of items that agree; 0 does not judge it."""


def compare(
    number: int,
    manifest: bundle_pb2.Manifest,
    base_number: int,
    base: bundle_pb2.Manifest,
    min_agreement: float | None,
) -> Comparison:
    """Find out how two revisions can be compared.

    Args:
        number: The new revision.
        manifest: Its manifest.
        base_number: The base revision.
        base: Its manifest.
        min_agreement: Smallest share of items that agree; None takes the measured one.

    Raises:
        FailedPrecondition: their answers cannot be compared, or no agreement was measured.
    """
    about = {"revision": number, "base_revision": base_number}
    ours, theirs = _answer(manifest), _answer(base)
    for which, spec in ((number, ours), (base_number, theirs)):
        if spec is None:
            raise FailedPrecondition(
                f"revision {which} gives no scores of shape [batch, classes], so answers of "
                "shadows cannot be compared; leave --shadow out, the canary steps compare errors "
                "and latency",
                reason="SHADOW_NOT_COMPARABLE",
                **about,
            )
    assert ours is not None  # noqa: S101 - just looked at
    assert theirs is not None  # noqa: S101 - likewise
    if (ours.name, ours.data_type, ours.shape[1]) != (
        theirs.name,
        theirs.data_type,
        theirs.shape[1],
    ) or _labels(manifest) != _labels(base):
        raise FailedPrecondition(
            f"revision {number} answers with {_words(ours)}, revision {base_number} with "
            f"{_words(theirs)}"
            + ("" if _words(ours) != _words(theirs) else " and other labels")
            + ": their answers cannot be compared; leave --shadow out",
            reason="SHADOW_NOT_COMPARABLE",
            **about,
        )
    steps, base_steps = list(manifest.preprocess), list(base.preprocess)
    return Comparison(
        output=ours.name,
        transform_again=bool(steps and base_steps) and steps != base_steps,
        min_agreement=_measured(number, manifest, base_number, base)
        if min_agreement is None
        else min_agreement,
    )


def _answer(manifest: bundle_pb2.Manifest) -> bundle_pb2.TensorSpec | None:
    wanted = manifest.postprocess.classification.output
    for spec in manifest.outputs:
        if wanted in ("", spec.name):
            fits = len(spec.shape) == 2 and spec.shape[1] > 1 and spec.data_type in _SCORES
            return spec if fits else None
    return None


def _labels(manifest: bundle_pb2.Manifest) -> str:
    path = manifest.postprocess.labels_file
    return next((file.sha256 for file in manifest.files if path and file.path == path), "")


def _words(spec: bundle_pb2.TensorSpec) -> str:
    kind = bundle_pb2.DataType.Name(spec.data_type).removeprefix("DATA_TYPE_")
    return f"{spec.name} {kind}[{','.join(map(str, spec.shape))}]"


def _measured(
    number: int, manifest: bundle_pb2.Manifest, base_number: int, base: bundle_pb2.Manifest
) -> float:
    """Return the agreement that the bundles promise, less a margin."""
    about = {"revision": number, "base_revision": base_number}
    measured = _with_parent(manifest)
    if measured is None:
        raise FailedPrecondition(
            f"the bundle of revision {number} tells no agreement with its parent, so there is "
            "nothing to take for --min-agreement auto; give a number, such as --min-agreement 95%, "
            "or 0 to judge no agreement",
            reason="AGREEMENT_UNKNOWN",
            **about,
        )
    parent, of_base = manifest.provenance.parent_digest, base.provenance.parent_digest
    if not parent or parent != of_base:
        raise FailedPrecondition(
            f"the agreement of revision {number} was measured with a parent from which revision "
            f"{base_number} was not made, so it says nothing of the two; give a number, such as "
            "--min-agreement 95%, or 0 to judge no agreement",
            reason="AGREEMENT_OF_ANOTHER_PARENT",
            parent_digest=parent,
            base_parent_digest=of_base,
            **about,
        )
    # Where both differ from the parent, they may differ from each other by both.
    theirs = _with_parent(base)
    together = measured - (0.0 if theirs is None else 1 - theirs)
    return max(together - MARGIN, 0.0)


def _with_parent(manifest: bundle_pb2.Manifest) -> float | None:
    found = [
        variant.measurement.agreement.value
        for variant in manifest.variants
        if variant.measurement.HasField("agreement")
    ]
    return min(found, default=None)
