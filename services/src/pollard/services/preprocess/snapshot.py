"""What one preprocess server serves at one moment.

A snapshot is immutable and switched by one reference: whoever holds one sees
routes, revisions and their preprocessing that belong together, whatever is
switched meanwhile.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from pollard.bundle.v1 import bundle_pb2
from pollard.runtime.images import ImageLimits
from pollard.runtime.transforms import Pipeline
from pollard.services.common.desired import Route
from pollard.services.common.routing import PRODUCTION, choose_revision
from pollard.services.common.shadows import ShadowRule
from pollard.services.preprocess.errors import (
    ModelTakesNoImages,
    NotAugmentable,
    RequestInvalid,
    RevisionNotReady,
    RevisionUnknown,
)

_NAMES_SHOWN = 20
_MAX_KEY_LENGTH = 1024


@dataclass(frozen=True)
class Selector:
    """Which revision a request wants."""

    model: str
    revision: int | None = None
    """A revision number, or None to follow an alias."""
    alias: str = PRODUCTION
    sticky_key: str = ""

    def __post_init__(self) -> None:
        """Refuse what can never be found.

        Raises:
            RequestInvalid: a part is empty, too long or not positive.
        """
        if not self.model:
            raise RequestInvalid("model.model is empty; name the model", field="model.model")
        if self.revision is not None and self.revision < 1:
            raise RequestInvalid(
                f"model.revision is {self.revision}; revisions count from 1",
                field="model.revision",
                revision=self.revision,
            )
        if not self.alias:
            raise RequestInvalid(
                "model.alias is empty; leave it out for production", field="model.alias"
            )
        if len(self.sticky_key) > _MAX_KEY_LENGTH:
            raise RequestInvalid(
                f"model.sticky_key is longer than {_MAX_KEY_LENGTH} characters",
                field="model.sticky_key",
            )


@dataclass(frozen=True)
class ServedRevision:
    """One revision with all that its images need."""

    model: str
    revision: int
    digest: str
    """SHA-256 of the bundle's manifest."""
    size_bytes: int
    manifest: bundle_pb2.Manifest
    labels: tuple[str, ...]
    pipeline: Pipeline | None
    """None for a model that takes no images."""
    steps: bytes
    """The steps as decode workers take them."""

    @classmethod
    def build(
        cls,
        model: str,
        revision: int,
        digest: str,
        size_bytes: int,
        manifest: bundle_pb2.Manifest,
        labels: Iterable[str],
        limits: ImageLimits | None = None,
    ) -> ServedRevision:
        """Check that the revision's images can be prepared, and prepare for that.

        Raises:
            StepsInvalid: its steps cannot be carried out or do not give what
                its input takes.
        """
        pipeline = None
        if manifest.preprocess and len(manifest.inputs) == 1:
            pipeline = Pipeline(manifest.preprocess, limits)
            pipeline.check_fits(manifest.inputs[0])
        steps = bundle_pb2.Manifest(preprocess=manifest.preprocess).SerializeToString()
        return cls(model, revision, digest, size_bytes, manifest, tuple(labels), pipeline, steps)

    @property
    def input(self) -> bundle_pb2.TensorSpec:
        """The input that images become."""
        return self.manifest.inputs[0]

    def image_pipeline(self) -> Pipeline:
        """Return the pipeline.

        Raises:
            ModelTakesNoImages: there is none.
        """
        if self.pipeline is None:
            raise ModelTakesNoImages(
                f"revision {self.revision} of model {self.model!r} takes no images; "
                "send tensors to the inference service's ModelInfer",
                model=self.model,
                revision=self.revision,
            )
        return self.pipeline

    @functools.cached_property
    def five_crop_steps(self) -> bytes:
        """The steps with five crops in the place of the centre crop, as workers take them.

        Raises:
            NotAugmentable: there is no centre crop.
        """
        manifest = bundle_pb2.Manifest(preprocess=self.manifest.preprocess)
        for step in manifest.preprocess:
            if step.WhichOneof("step") == "center_crop":
                crop = step.center_crop
                step.five_crop.CopyFrom(bundle_pb2.FiveCrop(width=crop.width, height=crop.height))
                return manifest.SerializeToString()
        raise NotAugmentable(
            f"revision {self.revision} of model {self.model!r} crops no centre out of its images, "
            "so there are no corners to crop",
            model=self.model,
            revision=self.revision,
        )


@dataclass(frozen=True)
class ServedModel:
    """The revisions of one model and where its aliases lead."""

    name: str
    revisions: Mapping[int, ServedRevision] = field(default_factory=lambda: MappingProxyType({}))
    routes: Mapping[str, Route] = field(default_factory=lambda: MappingProxyType({}))
    shadows: Mapping[str, ShadowRule] = field(default_factory=lambda: MappingProxyType({}))
    """By alias; both revisions of each are in `revisions`."""


@dataclass(frozen=True)
class Missing:
    """What should be served of one model and is not, for its manifest could not be had."""

    revisions: frozenset[int] = frozenset()
    aliases: frozenset[str] = frozenset()
    """Those that lead nowhere for that."""


@dataclass(frozen=True)
class Snapshot:
    """Everything that requests are served from."""

    models: Mapping[str, ServedModel] = field(default_factory=lambda: MappingProxyType({}))
    endpoints: tuple[str, ...] = ()
    """gRPC targets of the inference servers."""
    settled: bool = True
    """Whether it is what the manager, or the cache, says; until then nothing is known to be
    unknown."""
    refused: Mapping[str, frozenset[tuple[str, int]]] = field(
        default_factory=lambda: MappingProxyType({})
    )
    """Models and revisions that some of them refuse, by target."""
    missing: Mapping[str, Missing] = field(default_factory=lambda: MappingProxyType({}))
    """By model; only those of which something is missing."""

    def endpoints_for(self, model: str, revision: int) -> tuple[str, ...]:
        """Return the inference servers that can run a revision; all of them when none is known."""
        if not self.refused:
            return self.endpoints
        key = (model, revision)
        able = tuple(each for each in self.endpoints if key not in self.refused.get(each, ()))
        return able or self.endpoints

    @functools.cached_property
    def has_image_shadows(self) -> bool:
        """Whether images of any model are copied."""
        return any(
            rule.transform_again
            for model in self.models.values()
            for rule in model.shadows.values()
        )

    def choose(self, selector: Selector) -> ServedRevision:
        """Return the revision that the request gets.

        Raises:
            RevisionUnknown: there is no such model, revision or alias; says
                what there is.
            RevisionNotReady: the alias leads nowhere for now, what is asked for could not be had
                here, or nobody has said yet what to serve.
        """
        if not self.settled:
            raise RevisionNotReady(
                "this server has only just started and does not know yet what to serve; try again",
                model=selector.model,
            )
        model = self.models.get(selector.model)
        missing = self.missing.get(selector.model)
        if missing is not None and (
            selector.revision in missing.revisions
            if selector.revision is not None
            else selector.alias in missing.aliases
        ):
            what = (
                f"revision {selector.revision}"
                if selector.revision is not None
                else f"the revision that alias {selector.alias!r} leads to"
            )
            raise RevisionNotReady(
                f"{what} of model {selector.model!r} is not on this server yet, and its log says "
                "why; try again later, or another server",
                model=selector.model,
            )
        if model is None:
            raise RevisionUnknown(
                f"there is no model {selector.model!r}; {_there('models', sorted(self.models))}",
                model=selector.model,
            )
        if selector.revision is not None:
            if selector.revision not in model.revisions:
                raise RevisionUnknown(
                    f"model {selector.model!r} has no revision {selector.revision} that is "
                    f"served; {_there('revisions', sorted(model.revisions))}",
                    model=selector.model,
                    revision=selector.revision,
                )
            return model.revisions[selector.revision]
        if selector.alias not in model.routes:
            raise RevisionUnknown(
                f"model {selector.model!r} has no alias {selector.alias!r}; "
                f"{_there('aliases', sorted(model.routes))}",
                model=selector.model,
                alias=selector.alias,
            )
        chosen = choose_revision(model.routes[selector.alias], selector.sticky_key)
        if chosen is None or chosen not in model.revisions:
            raise RevisionNotReady(
                f"alias {selector.alias!r} of model {selector.model!r} leads to no revision "
                "that is served now; try again later",
                model=selector.model,
                alias=selector.alias,
            )
        return model.revisions[chosen]


class Current:
    """The one reference to the snapshot in force."""

    def __init__(self, snapshot: Snapshot | None = None) -> None:
        """Begin with ``snapshot``, by default one that knows nothing yet."""
        self.snapshot = snapshot or Snapshot(settled=False)


def _there(what: str, names: list[str] | list[int]) -> str:
    if not names:
        return f"there are no {what} here"
    shown = ", ".join(str(name) for name in names[:_NAMES_SHOWN])
    return f"{what} are {shown}" + (", …" if len(names) > _NAMES_SHOWN else "")
