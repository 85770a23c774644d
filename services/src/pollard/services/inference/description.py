"""What the engine needs to know of one version of a model, wherever the model comes from.

A source answers in steps, so that what can be refused early is refused before anything is loaded:
an outline before, a description once the graph is open, and then its own checks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from pollard.bundle.v1 import bundle_pb2
from pollard.inference import model_config_pb2
from pollard.runtime.bundle import Bundle
from pollard.runtime.keys import TrustedKeys
from pollard.runtime.machine import Machine, select_variant
from pollard.runtime.sessions import Array, Session, TensorInfo, check_golden, check_signature
from pollard.runtime.signing import require_signature
from pollard.services.inference.scheduling import Scheduling
from pollard.services.inference.tensors import declared

_JOINING_GAIN = 1.10
"""Joining requests must make an image at least this much faster to be worth its latency."""


@dataclass(frozen=True)
class Outline:
    """What is known of a version before its graph is opened."""

    model: str
    version: int
    model_file: Path | bytes
    """The ONNX file, or its content."""
    target: str
    """Decides the execution provider."""
    size_bytes: int
    """Size of its files."""
    digest: str = ""
    """SHA-256 of the bundle's manifest; empty if there is none."""
    variant: str = ""
    needed_bytes: int = 0
    """Memory that it takes; 0 if there is no figure."""
    workers: int = 0
    """Threads that run its requests; 0 leaves it to the server."""
    threads: int = 0
    """Threads that one run uses; 0 leaves it to the server."""
    devices: tuple[int, ...] = ()
    """GPU of each worker; empty leaves it to the server."""

    @property
    def on_device(self) -> bool:
        """Whether it runs on a GPU."""
        return not self.target.startswith("cpu")


@dataclass(frozen=True)
class ModelDescription:
    """What a version takes and gives and how it is run."""

    inputs: tuple[TensorInfo, ...]
    """In the order of the graph."""
    outputs: tuple[TensorInfo, ...]
    """In the order of the graph."""
    max_batch_size: int
    """Largest first dimension; 0 if the first dimension is not a batch."""
    joined_batch: int = 0
    """Largest batch made of waiting requests; 1 joins none; 0 if the model has no opinion."""
    joining_settled: bool = False
    """Whether it was written down, so that no measurement goes before it."""
    scheduling: Scheduling | None = None
    """Priorities and queue limits; None for the server's."""
    labels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Names of the classes, by output."""
    config: model_config_pb2.ModelConfig | None = None
    """As it was written, with what it leaves out filled in; None if there is none."""
    warmups: tuple[Mapping[str, Array], ...] = ()
    """Requests to run before the version is ready, beside zeros of the smallest and the largest
    batch."""


class ModelSource(Protocol):
    """One version of a model that can be loaded. Called on the loader's thread, in this order."""

    def outline(self, machine: Machine) -> Outline:
        """Read what must be known before the load.

        Raises:
            RuntimeFault: it cannot be read, or cannot run on this machine.
            LoadRefused: the server cannot carry its tensors.
        """

    def verify(self) -> None:
        """Compare its bytes with what is known of them.

        Raises:
            RuntimeFault: they are damaged.
        """

    def describe(self, session: Session) -> ModelDescription:
        """Describe it, now that its graph is open.

        Raises:
            RuntimeFault: the graph is not what the description says.
            LoadRefused: the description does not fit the graph.
        """

    def check(self, session: Session) -> None:
        """Check that the graph gives the answers that it should.

        Raises:
            RuntimeFault: it does not.
        """


class BundleModel:
    """A revision in a bundle."""

    def __init__(
        self,
        model: str,
        revision: int,
        digest: str,
        size_bytes: int,
        path: Path,
        trusted: TrustedKeys | None = None,
    ) -> None:
        """Take the bundle at `path`.

        Args:
            model: Name of the model.
            revision: Number of the revision.
            digest: SHA-256 that the bundle's manifest must have.
            size_bytes: Size of the bundle's files.
            path: The bundle's directory.
            trusted: Keys of which one must have signed it; None asks for no signature.
        """
        self._trusted = trusted
        self._model = model
        self._revision = revision
        self._digest = digest
        self._size_bytes = size_bytes
        self._path = path
        self._bundle: Bundle | None = None
        self._variant = bundle_pb2.Variant()

    def outline(self, machine: Machine) -> Outline:
        """Choose the best variant for this machine."""
        bundle = Bundle.open(self._path, verify=False, expect=self._digest)
        variant = select_variant(bundle.manifest, machine)
        for spec in (*bundle.manifest.inputs, *bundle.manifest.outputs):
            declared(spec)
        self._bundle, self._variant = bundle, variant
        return Outline(
            model=self._model,
            version=self._revision,
            model_file=bundle.model_path(variant),
            target=variant.target,
            size_bytes=self._size_bytes,
            digest=self._digest,
            variant=variant.name,
            needed_bytes=variant.requirements.memory_bytes,
        )

    def verify(self) -> None:
        """Compare every file with its digest, and the signature with the trusted keys."""
        self._opened.verify()
        if self._trusted is not None:
            require_signature(self._opened, self._trusted)

    def describe(self, session: Session) -> ModelDescription:
        """Describe it by the manifest: inputs and outputs in the graph's order."""
        manifest = self._opened.manifest
        check_signature(session, manifest)
        inputs = {spec.name: declared(spec) for spec in manifest.inputs}
        outputs = {spec.name: declared(spec) for spec in manifest.outputs}
        labels = self._opened.labels
        output = manifest.postprocess.classification.output
        return ModelDescription(
            inputs=tuple(inputs[info.name] for info in session.inputs),
            outputs=tuple(outputs[info.name] for info in session.outputs),
            max_batch_size=max(1, self._variant.max_batch_size),
            joined_batch=best_joined_batch(self._variant),
            labels={output: tuple(labels)} if output and labels else {},
        )

    def check(self, session: Session) -> None:
        """Run the golden inputs."""
        check_golden(session, self._opened, self._variant)

    @property
    def _opened(self) -> Bundle:
        assert self._bundle is not None  # noqa: S101 - outline comes first
        return self._bundle


def best_joined_batch(variant: bundle_pb2.Variant) -> int:
    """Return the batch to which waiting requests should be joined, by the bundle's own figures.

    On a processor a batch often makes an image no faster and the first of its requests slower, so
    without figures that speak for it nothing is joined.
    """
    per_image: dict[int, float] = {}
    for latency in variant.measurement.latencies:
        if latency.intra_op_threads <= 1 and latency.p50_us > 0:
            per_image[max(1, latency.batch_size)] = latency.p50_us / max(1, latency.batch_size)
    single = per_image.get(1)
    if single is None:
        return 1
    paying = [size for size, each in per_image.items() if single / each >= _JOINING_GAIN]
    return min(paying, key=lambda size: per_image[size], default=1)
