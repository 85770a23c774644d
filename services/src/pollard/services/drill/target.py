"""What is drilled: a model with two revisions, the images to ask about, and the right answers."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pollard.bundle.v1 import bundle_pb2
from pollard.client import AsyncModelsClient
from pollard.client.load import IMAGE, KINDS
from pollard.runtime.bundle import Bundle
from pollard.runtime.errors import RuntimeFault
from pollard.runtime.reference import Reference, Sample, random_samples, telling
from pollard.services.drill.bundles import SAMPLES, drill_bundle, drill_samples
from pollard.services.drill.errors import DrillFailed
from pollard.services.drill.options import DrillOptions

_OWN_MODEL = "drill"
_SIDE = 64
"""Height and width of the images for a model that takes any."""


@dataclass(frozen=True)
class Target:
    """What is drilled."""

    model: str
    alias: str
    revisions: tuple[int, int]
    """Swapped to in turn; the first is served when the load begins."""
    samples: Sequence[Sample]
    references: dict[int, Reference]
    """The right answers, by revision."""
    kinds: Sequence[str] = KINDS
    """What is asked for."""
    signature_changes: bool = False
    """Whether the revisions take different inputs."""
    before: int = 0
    """Revision that the alias led to before the drill; 0 for the drill's own model."""

    def other(self, revision: int) -> int:
        """Return the revision that is not this one."""
        first, second = self.revisions
        return second if revision == first else first


async def own_target(
    models: AsyncModelsClient, options: DrillOptions, directory: Path, name: str = _OWN_MODEL
) -> Target:
    """Register two revisions of a model of the drill's own; the first one is served.

    Raises:
        PollardError: the manager refused them.
        OSError: they cannot be written.
    """
    samples = drill_samples()
    references, numbers = {}, []
    for index, letter in enumerate("ab"):
        bundle = await asyncio.to_thread(
            drill_bundle, directory / letter, options.seed + index, options.model_mb
        )
        alias = options.alias if index == 0 else None
        pushed = await models.push(bundle.path, name, alias=alias)
        number = pushed.revision.revision
        numbers.append(number)
        references[number] = await asyncio.to_thread(Reference, bundle, samples)
    return Target(name, options.alias, (numbers[0], numbers[1]), samples, references)


async def given_target(models: AsyncModelsClient, options: DrillOptions, directory: Path) -> Target:
    """Fetch two revisions of a registered model and let the first one be served.

    Raises:
        PollardError: there is no such model or revision.
        DrillFailed: the revisions cannot be drilled; says why.
    """
    model = options.model or ""
    before = (await models.alias(model, options.alias)).revision
    one, other = options.revisions or await _newest_two(models, model)
    bundles = []
    for number in (one, other):
        await models.pull(model, directory / str(number), revision=number)
        bundles.append(Bundle.open(directory / str(number)))
        if bundles[-1].manifest.postprocess.WhichOneof("task") != "classification":
            raise DrillFailed(
                f"revision {number} of {model!r} is no classifier of images; leave MODEL out to "
                "drill with a model that the drill brings"
            )
    try:
        first = _samples_for(bundles[0])
        references = {
            number: await asyncio.to_thread(Reference, bundle, first)
            for number, bundle in zip((one, other), bundles, strict=True)
        }
    except RuntimeFault as error:
        raise DrillFailed(f"{model!r} cannot be run here: {error.message}") from error
    found = telling(references[one], references[other])
    if found < len(first) // 2 or references[one].classes != references[other].classes:
        raise DrillFailed(
            f"the answers of revisions {one} and {other} of {model!r} can be told apart for "
            f"{found} of {len(first)} images only; choose two that differ more with --revisions"
        )
    alike = all(
        left.shape == right.shape and left.dtype == right.dtype and np.array_equal(left, right)
        for left, right in zip(references[one].inputs, references[other].inputs, strict=True)
    )
    changed = [list(bundle.manifest.inputs) for bundle in bundles]
    return Target(
        model,
        options.alias,
        (one, other),
        [
            Sample(sample.png, tensor)
            for sample, tensor in zip(first, references[one].inputs, strict=True)
        ],
        references,
        # A tensor fits one of the revisions only where their steps differ.
        kinds=KINDS if alike else (IMAGE,),
        signature_changes=changed[0] != changed[1],
        before=before,
    )


async def _newest_two(models: AsyncModelsClient, model: str) -> tuple[int, int]:
    numbers = [item.revision for item in await models.revisions(model)]
    if len(numbers) < 2:
        raise DrillFailed(
            f"{model!r} has {len(numbers)} revision; a swap takes two. Push another one, or leave "
            "MODEL out to drill with a model that the drill brings"
        )
    return numbers[1], numbers[0]


def _samples_for(bundle: Bundle) -> list[Sample]:
    manifest = bundle.manifest
    gray = any(
        step.decode.color_mode == bundle_pb2.COLOR_MODE_GRAY
        for step in manifest.preprocess
        if step.WhichOneof("step") == "decode"
    )
    shape = list(manifest.inputs[0].shape[1:])
    if manifest.inputs[0].layout == "NCHW":
        shape = [*shape[1:], shape[0]]
    height, width = (size if size > 0 else _SIDE for size in (*shape, -1, -1)[:2])
    return random_samples(SAMPLES, height, width, 1 if gray else 3, seed=1)
