"""What is reported of a run: one dictionary, as JSON and as a page."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from pollard.compress.bundling import tool_versions
from pollard.compress.codec import strict
from pollard.compress.data import Dataset
from pollard.compress.devices import Device
from pollard.compress.macs import LayerCost
from pollard.compress.profile import TargetProfile
from pollard.compress.prune import Pruned
from pollard.compress.report_page import render_page
from pollard.compress.search import Found, front
from pollard.compress.stages import Done
from pollard.compress.tasks import task_of
from pollard.compress.training import History
from pollard.compress.verify import MIN_SPEEDUP, Measured
from pollard.runtime.machine import Machine

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Packing:
    """A parent packed as it is."""

    recipe: dict[str, Any]
    name: str
    source: str
    seed: int
    data: Dataset
    parent_digest: str
    machine: Machine
    device: Device
    """What was judged on."""
    parent: Measured
    layers: list[LayerCost]
    seconds: float


@dataclass(frozen=True)
class Compression:
    """A compression run."""

    recipe: dict[str, Any]
    name: str
    source: str
    target: str
    max_drop: float
    seed: int
    data: Dataset
    parent_digest: str
    machine: Machine
    device: Device
    """What was judged on."""
    parent: Measured
    """On the held-out part."""
    chosen: Measured
    """On the held-out part."""
    candidates: list[Measured]
    """On the choosing part."""
    dropped: list[dict[str, str]]
    overruns: Mapping[str, str]
    """Candidates that take more than the budgets allow, and what they take."""
    pruned: Pruned | None
    history: History | None
    layers_before: list[LayerCost]
    layers_after: list[LayerCost]
    profiles: dict[str, TargetProfile]
    """Name of a candidate → where its time goes."""
    stages: Sequence[Done[Any]]
    """What the result was made in."""
    search: Found | None
    warnings: list[str]
    """What makes the figures doubtful, each a sentence."""
    seconds: float


def describe_parent(run: Packing) -> dict[str, Any]:
    """Return the content of report.json for a parent packed as it is."""
    parent = run.parent
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": "bundle",
        **_common(run),
        "summary": {
            "accuracy": parent.accuracy.value,
            "size_bytes": parent.candidate.size_bytes,
            "latency_ms": _milliseconds(parent),
            "macs": parent.candidate.macs,
            "parameters": parent.candidate.parameters,
        },
        "parent": parent.to_json(),
        "layers": _layers(run.layers, run.layers),
        "confusion": {"classes": _classes(run.data), "parent": parent.confusion.tolist()},
    }


def describe_compression(run: Compression) -> dict[str, Any]:
    """Return the content of report.json for a compression run."""
    parent, chosen = run.parent, run.chosen
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": "compress",
        **_common(run),
        "target": run.target,
        "gate": {"max_drop_points": run.max_drop, "min_speedup": MIN_SPEEDUP},
        "summary": {
            "shipped": chosen.candidate.name,
            "accuracy_parent": parent.accuracy.value,
            "accuracy_compressed": chosen.accuracy.value,
            "size_parent_bytes": parent.candidate.size_bytes,
            "size_compressed_bytes": chosen.candidate.size_bytes,
            "judged_batch": chosen.judged_batch,
            "latency_parent_ms": _milliseconds(parent),
            "latency_compressed_ms": _milliseconds(chosen),
            "speedup": None if chosen.speedup is None else chosen.speedup.estimate,
            "speedup_lower": None if chosen.speedup is None else chosen.speedup.lower,
            "macs_parent": parent.candidate.macs,
            "macs_compressed": chosen.candidate.macs,
            "parameters_parent": parent.candidate.parameters,
            "parameters_compressed": chosen.candidate.parameters,
        },
        "parent": parent.to_json(),
        "chosen": chosen.to_json(),
        "candidates": [m.to_json() for m in run.candidates],
        "dropped_stages": run.dropped,
        "overruns": dict(run.overruns),
        "warnings": [*run.data.warnings, *run.warnings],
        "pruning": None if run.pruned is None else _pruning(run.pruned, run.recipe["prune"]),
        "recovery": None if run.history is None else asdict(run.history),
        "layers": _layers(run.layers_before, run.layers_after),
        "profiles": {name: profile.to_json() for name, profile in run.profiles.items()},
        "search": None if run.search is None else _search(run.search),
        "stages": [
            {
                "name": done.name,
                "key": done.key,
                "seconds": round(done.seconds, 2),
                "reused": done.reused,
            }
            for done in run.stages
        ],
        "confusion": {
            "classes": _classes(run.data),
            "parent": parent.confusion.tolist(),
            "chosen": chosen.confusion.tolist(),
        },
    }


def _classes(data: Dataset) -> list[str]:
    return task_of(data.task).confusion_labels(data.classes)


def render(content: dict[str, Any]) -> tuple[bytes, bytes]:
    """Return report.json and report.html."""
    return (json.dumps(strict(content), indent=1, allow_nan=False) + "\n").encode(), render_page(
        content
    ).encode()


def _common(run: Packing | Compression) -> dict[str, Any]:
    data = run.data
    return {
        "name": run.name,
        "source": run.source,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(run.seconds, 1),
        "machine": {
            "processor": run.machine.processor,
            "vnni": run.machine.has_vnni,
            "cores": run.machine.cores,
            "onnxruntime": run.machine.onnxruntime,
        },
        "device": {
            "name": run.device.name,
            "provider": run.device.provider,
            "timed": run.device.timed,
            "why_not": run.device.why_not,
        },
        "data": {
            "name": data.name,
            "classes": len(data.classes),
            "train": len(data.train),
            "choose": len(data.choose),
            "held_out": len(data.held_out),
            "split": data.split,
            "damaged": data.damaged,
            "digest": data.digest,
            "task": data.task,
        },
        "recipe": run.recipe,
        "provenance": {
            "seed": run.seed,
            "parent_digest": run.parent_digest,
            "tool_versions": tool_versions(),
        },
    }


def _milliseconds(measured: Measured) -> float | None:
    return measured.latency_us / 1000 if measured.timed else None


def _search(found: Found) -> dict[str, Any]:
    return {**asdict(found), "front": [trial.number for trial in front(found.trials)]}


def _pruning(pruned: Pruned, requested: float) -> dict[str, Any]:
    return {
        "requested": requested,
        "removed": pruned.removed,
        "rounding": pruned.rounding,
        "macs_before": pruned.macs_before,
        "macs_after": pruned.macs_after,
        "groups": [asdict(group) for group in pruned.groups],
        "rewritten_shortcuts": pruned.rewritten,
        "left_whole": pruned.left_whole,
        "removed_blocks": pruned.blocks,
        "dense": [asdict(plan) for plan in pruned.dense],
        "search": pruned.search,
    }


def _layers(before: list[LayerCost], after: list[LayerCost]) -> list[dict[str, Any]]:
    earlier = {layer.name: layer for layer in before}
    rows = []
    for layer in after:
        old = earlier.get(layer.name)
        rows.append(
            {
                "name": layer.name,
                "kind": layer.kind,
                "output": layer.output,
                "before": None if old is None else _cost(old),
                "after": _cost(layer),
            }
        )
    return rows


def _cost(layer: LayerCost) -> dict[str, int]:
    return {
        "in_channels": layer.in_channels,
        "out_channels": layer.out_channels,
        "macs": layer.macs,
        "parameters": layer.parameters,
    }
