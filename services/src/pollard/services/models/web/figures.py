"""What a bundle's manifest says in figures, beside its parent; read once for each bundle."""

from __future__ import annotations

import asyncio
import contextlib
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass

import structlog

from pollard.bundle.v1 import bundle_pb2
from pollard.services.common.lifecycle import cancel, spawn

KEPT = 2048
"""Bundles whose figures are kept."""

PATIENCE_SECONDS = 0.15
"""How long a page waits for manifests that have to be fetched; what comes later comes live."""

_AT_ONCE = 8

_TASKS = {
    bundle_pb2.TASK_CLASSIFICATION: "Classification",
    bundle_pb2.TASK_DETECTION: "Detection",
    bundle_pb2.TASK_SEGMENTATION: "Segmentation",
    bundle_pb2.TASK_EMBEDDING: "Embedding",
}

_log = structlog.get_logger("pollard.page")


@dataclass(frozen=True)
class Estimate:
    """A measured share with its interval."""

    name: str
    value: float
    lower: float
    upper: float
    confidence: float
    samples: int
    dataset: str


@dataclass(frozen=True)
class Figures:
    """One model file as it was measured; 0 and None for what was not."""

    target: str
    accuracy: Estimate | None
    size_bytes: int
    macs: int
    parameters: int
    batch: int
    """Batch of the latencies."""
    p50_us: float
    p99_us: float
    processor: str
    agreement: Estimate | None


@dataclass(frozen=True)
class Compared:
    """A variant beside the parent; None where one of the two was not measured."""

    figures: Figures
    accuracy_change: float | None = None
    size_ratio: float | None = None
    macs_ratio: float | None = None
    parameters_ratio: float | None = None
    speedup: float | None = None


@dataclass(frozen=True)
class Summary:
    """What is worth knowing of a bundle at a glance."""

    task: str
    variants: tuple[Compared, ...]
    parent: Figures | None
    has_report: bool
    takes_images: bool

    @property
    def best(self) -> Compared | None:
        """The variant that the bundle lists first."""
        return self.variants[0] if self.variants else None


def summarize(manifest: bundle_pb2.Manifest) -> Summary:
    """Return the figures of a manifest."""
    parent = _figures(manifest.parent) if manifest.HasField("parent") else None
    variants = []
    for variant in manifest.variants:
        measured = _figures(variant.measurement, variant.target, parent)
        variants.append(_compare(measured, parent, variant.measurement, manifest.parent))
    return Summary(
        task=_TASKS.get(manifest.task, "Tensors"),
        variants=tuple(variants),
        parent=parent,
        has_report=any(file.path == "report.html" for file in manifest.files),
        takes_images=bool(manifest.preprocess) and manifest.task in _TASKS,
    )


def _figures(
    measured: bundle_pb2.Measurement, target: str = "", beside: Figures | None = None
) -> Figures:
    latency = _latency(measured, beside.batch if beside is not None else 1)
    return Figures(
        target=target or measured.target,
        accuracy=_estimate(measured.accuracy) if measured.HasField("accuracy") else None,
        size_bytes=measured.size_bytes,
        macs=measured.macs,
        parameters=measured.parameters,
        batch=latency.batch_size if latency else 0,
        p50_us=latency.p50_us if latency else 0.0,
        p99_us=latency.p99_us if latency else 0.0,
        processor=latency.processor if latency else "",
        agreement=_estimate(measured.agreement) if measured.HasField("agreement") else None,
    )


def _latency(measured: bundle_pb2.Measurement, batch: int) -> bundle_pb2.Latency | None:
    """Return the latency of a batch, else that of the smallest one."""
    found = sorted(measured.latencies, key=lambda each: (each.batch_size, each.intra_op_threads))
    return next((each for each in found if each.batch_size == batch), found[0] if found else None)


def _estimate(metric: bundle_pb2.Metric) -> Estimate:
    return Estimate(
        name=metric.name,
        value=metric.value,
        lower=metric.lower,
        upper=metric.upper,
        confidence=metric.confidence,
        samples=metric.samples,
        dataset=metric.dataset,
    )


def _compare(
    ours: Figures,
    parent: Figures | None,
    measured: bundle_pb2.Measurement,
    of_parent: bundle_pb2.Measurement,
) -> Compared:
    if parent is None:
        return Compared(ours)
    speedup = None
    pairs = {(each.batch_size, each.intra_op_threads): each.p50_us for each in of_parent.latencies}
    for each in measured.latencies:
        theirs = pairs.get((each.batch_size, each.intra_op_threads))
        if each.batch_size == ours.batch and theirs and each.p50_us:
            speedup = theirs / each.p50_us
            break
    change = None
    if ours.accuracy is not None and parent.accuracy is not None:
        change = ours.accuracy.value - parent.accuracy.value
    return Compared(
        ours,
        accuracy_change=change,
        size_ratio=_ratio(ours.size_bytes, parent.size_bytes),
        macs_ratio=_ratio(ours.macs, parent.macs),
        parameters_ratio=_ratio(ours.parameters, parent.parameters),
        speedup=speedup,
    )


def _ratio(ours: int, theirs: int) -> float | None:
    return ours / theirs if ours and theirs else None


class Summaries:
    """Figures by the digest of their bundle, which never change.

    Args:
        read: Reads the manifest of a bundle by its digest.
    """

    def __init__(self, read: Callable[[str], Awaitable[bundle_pb2.Manifest]]) -> None:
        self._read = read
        self._kept: OrderedDict[str, Summary] = OrderedDict()
        self._reading: dict[str, asyncio.Task[None]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._turn = asyncio.Semaphore(_AT_ONCE)

    async def of(self, digests: Collection[str]) -> dict[str, Summary]:
        """Return the figures of those bundles whose manifests are here soon enough."""
        wanted = set(digests)
        for digest in wanted - self._kept.keys() - self._reading.keys():
            self._reading[digest] = spawn(self._tasks, self._load(digest), "figures")
        waiting = [self._reading[digest] for digest in wanted & self._reading.keys()]
        if waiting:
            await asyncio.wait(waiting, timeout=PATIENCE_SECONDS)
        found = {}
        for digest in wanted & self._kept.keys():
            self._kept.move_to_end(digest)
            found[digest] = self._kept[digest]
        return found

    async def close(self) -> None:
        """Stop reading."""
        await cancel(*self._tasks)

    async def _load(self, digest: str) -> None:
        try:
            async with self._turn:
                manifest = await self._read(digest)
            self._kept[digest] = summarize(manifest)
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        except asyncio.CancelledError:
            raise
        except Exception as error:
            # The page shows dashes; VerifyStore tells what is damaged.
            _log.warning("a manifest cannot be read", bundle_sha256=digest, error=str(error))
        finally:
            with contextlib.suppress(KeyError):
                del self._reading[digest]
