"""Write a verified model as a bundle, whole or not at all."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import psutil

from pollard.bundle.v1 import bundle_pb2
from pollard.compress.candidates import Candidate
from pollard.compress.devices import CUDA, Device
from pollard.compress.errors import OutputExists
from pollard.compress.evaluate import Accuracy
from pollard.compress.export import INPUT, OPSET
from pollard.compress.golden import make_golden
from pollard.compress.memory import measure_memory
from pollard.compress.spec import InputSpec
from pollard.compress.tasks import task_of
from pollard.compress.truth import TASKS, TaskName
from pollard.compress.verify import MAX_BATCH, Measured
from pollard.runtime.bundle import MANIFEST, Bundle, sync_directory, write_bundle, write_durably
from pollard.runtime.machine import PROVIDERS, Machine
from pollard.runtime.sessions import check_golden, check_signature, open_session

# Oldest onnxruntime whose kernels know the opset written here.
MIN_ONNXRUNTIME = "1.18.0"

# Where the bundle is made within the staging directory.
BUNDLE = "bundle"

# Name of a metric for people → name in manifests.
_METRICS = {task.metric: task.metric_key for task in map(task_of, TASKS)}

_TOOLS = ("torch", "onnx", "onnxruntime", "onnxscript", "torch-pruning", "numpy", "pillow")


@dataclass(frozen=True)
class Origin:
    """Where a bundle comes from."""

    name: str
    source: str
    recipe_json: str
    seed: int
    classes: list[str]
    data_digest: str
    """Of the images that it was measured with; empty when there were none."""
    parent_digest: str
    """SHA-256 of the parent's weights."""
    task: TaskName = "classification"
    """What it is for."""


def tool_versions() -> dict[str, str]:
    """Return the versions of everything that shapes a model file."""
    found: dict[str, str] = {}
    for name in (*_TOOLS, "pollard-compression"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@contextmanager
def staging(out: Path, *, force: bool = False) -> Iterator[Path]:
    """Give a directory beside ``out``; what lies in its `bundle` takes the place of ``out``.

    Whatever happens, ``out`` is either as it was or complete. What a killed run
    left beside it is cleared away.

    Raises:
        OutputExists: ``out`` holds something, and ``force`` is not set or it is
            not a bundle.
    """
    check_output(out, force=force)
    out = out.absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    _clear_abandoned(out)
    work = out.with_name(f".{out.name}.staging-{os.getpid()}")
    work.mkdir()
    try:
        yield work
        aside = out.with_name(f".{out.name}.staging-{os.getpid()}-old")
        if out.exists():
            out.rename(aside)
        try:
            (work / BUNDLE).rename(out)
        except OSError:
            if aside.exists():
                aside.rename(out)
            raise
        sync_directory(out.parent)
        shutil.rmtree(aside, ignore_errors=True)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def check_output(out: Path, *, force: bool) -> None:
    """Refuse an output that holds something.

    Raises:
        OutputExists: see :func:`staging`.
    """
    if not out.exists():
        return
    if not out.is_dir():
        raise OutputExists(f"{out} is a file; a bundle is a directory")
    if not any(out.iterdir()):
        return
    if not force:
        raise OutputExists(
            f"{out} is not empty; choose another directory (--force of a command replaces it)"
        )
    if not (out / MANIFEST).is_file():
        raise OutputExists(f"{out} is not empty and not a bundle; --force replaces bundles only")


def _clear_abandoned(out: Path) -> None:
    prefix = f".{out.name}.staging-"
    for left in out.parent.glob(f"{prefix}*"):
        owner = left.name.removeprefix(prefix).removesuffix("-old")
        if owner.isdigit() and not psutil.pid_exists(int(owner)):
            shutil.rmtree(left, ignore_errors=True)


def assemble(
    directory: Path,
    chosen: Measured,
    parent: Measured | None,
    origin: Origin,
    spec: InputSpec,
    report: tuple[bytes, bytes],
    machine: Machine,
    device: Device,
    extra: Mapping[str, bytes] | None = None,
) -> Bundle:
    """Write a bundle of one variant into an empty directory and check it as a server would.

    Args:
        directory: Empty.
        chosen: The model and its held-out figures.
        parent: The parent's figures; None for a bundle without one.
        origin: Where it comes from.
        spec: What it takes.
        report: report.json and report.html.
        machine: Where it was measured.
        device: On what.
        extra: Further files, by path within the bundle.

    Raises:
        RuntimeFault: the bundle does not pass the checks of a server.
        OSError: it cannot be written.
    """
    candidate = chosen.candidate
    # Where there is no GPU, the processor's float32 arithmetic stands in for it: golden outputs
    # are allowed to differ by more than that.
    runs_here = candidate.target if candidate.target != CUDA or device.timed else "cpu-fp32"
    return write_variant(
        directory,
        candidate,
        measurement(chosen, machine, device, compared=parent is not None),
        None if parent is None else measurement(parent, machine, device),
        origin,
        spec,
        {"report.json": report[0], "report.html": report[1], **(extra or {})},
        runs_here,
    )


def write_variant(
    directory: Path,
    candidate: Candidate,
    figures: bundle_pb2.Measurement,
    parent: bundle_pb2.Measurement | None,
    origin: Origin,
    spec: InputSpec,
    files: Mapping[str, bytes],
    runs_here: str,
) -> Bundle:
    """Write a bundle of one file and check it as a server would.

    Args:
        directory: Empty.
        candidate: The file.
        figures: What is known of it.
        parent: What is known of its parent.
        origin: Where it comes from.
        spec: What it takes.
        files: Further files of the bundle.
        runs_here: Target that this machine can run it as.

    Raises:
        RuntimeFault, OSError: as :func:`assemble`.
    """
    raw = candidate.path.read_bytes()
    session = open_session(raw, target=runs_here)
    golden, tolerance = make_golden(session, raw, spec, candidate.target)
    variant = candidate.target
    model_file, golden_file = f"{variant}/model.onnx", f"{variant}/golden.npz"
    classes = origin.classes
    manifest = bundle_pb2.Manifest(
        name=origin.name,
        inputs=[
            bundle_pb2.TensorSpec(
                name=INPUT,
                data_type=bundle_pb2.DATA_TYPE_UINT8,
                shape=[-1, *spec.shape],
                layout="NHWC",
            )
        ],
        preprocess=spec.steps(),
        postprocess=bundle_pb2.Postprocess(labels_file="labels.txt"),
        parent=parent,
        provenance=bundle_pb2.Provenance(
            recipe_json=origin.recipe_json,
            seed=origin.seed,
            tool_versions=tool_versions(),
            data_digest=origin.data_digest,
            parent_digest=origin.parent_digest,
            source=origin.source,
        ),
    )
    task_of(origin.task).describe(manifest, classes)
    for output in manifest.outputs:
        # Cells and pixels are the graph's own; the first is the batch.
        known = next(each.shape for each in session.outputs if each.name == output.name)
        output.shape[1:] = known[1:]
    manifest.create_time.GetCurrentTime()
    manifest.variants.append(
        bundle_pb2.Variant(
            name=variant,
            target=candidate.target,
            model_file=model_file,
            golden_file=golden_file,
            golden_tolerance=tolerance,
            requirements=bundle_pb2.Requirements(
                cpu_features=list(candidate.cpu_features),
                execution_provider=PROVIDERS[candidate.target],
                min_onnxruntime=MIN_ONNXRUNTIME,
                opset=_opset(raw),
                # What a process takes says nothing of a GPU's memory; servers look for themselves.
                memory_bytes=(
                    0
                    if candidate.target == CUDA
                    else measure_memory(candidate.path, runs_here, spec, MAX_BATCH)
                ),
            ),
            measurement=figures,
            max_batch_size=MAX_BATCH,
        )
    )
    labels = "".join(f"{label}\n" for label in classes)
    write_bundle(
        directory,
        manifest,
        {
            model_file: raw,
            golden_file: golden,
            "labels.txt": labels.encode(),
            **files,
        },
    )
    return _check_as_served(directory, variant, spec, runs_here)


def _check_as_served(directory: Path, variant: str, spec: InputSpec, target: str) -> Bundle:
    bundle = Bundle.open(directory)
    session = open_session(bundle.model_path(variant), target=target)
    check_signature(session, bundle.manifest)
    check_golden(session, bundle, variant)
    spec.pipeline.check_fits(bundle.manifest.inputs[0])
    return bundle


def _opset(raw: bytes) -> int:
    imports = onnx.load_from_string(raw).opset_import
    return next((entry.version for entry in imports if entry.domain in ("", "ai.onnx")), OPSET)


def measurement(
    measured: Measured, machine: Machine, device: Device, *, compared: bool = False
) -> bundle_pb2.Measurement:
    """Return the figures in the manifest's form, with the agreement if there is a parent."""
    return bundle_pb2.Measurement(
        target=measured.candidate.target,
        accuracy=_metric(_METRICS[measured.accuracy.metric], measured.accuracy),
        agreement=_metric("agreement", measured.parent_agreement) if compared else None,
        size_bytes=measured.candidate.size_bytes,
        macs=measured.candidate.macs,
        parameters=measured.candidate.parameters,
        latencies=[
            bundle_pb2.Latency(
                batch_size=timing.batch_size,
                intra_op_threads=1,
                p50_us=timing.p50_us,
                p99_us=timing.p99_us,
                samples=timing.samples,
                processor=device.name,
                execution_provider=device.provider,
                onnxruntime=machine.onnxruntime,
            )
            for timing in measured.timings
        ],
    )


def _metric(name: str, share: Accuracy) -> bundle_pb2.Metric:
    return bundle_pb2.Metric(
        name=name,
        value=share.value,
        samples=share.samples,
        lower=share.lower,
        upper=share.upper,
        confidence=0.95,
        dataset=share.dataset,
    )


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file for machines, whole or not at all."""
    write_durably(path.absolute(), (json.dumps(content, indent=2) + "\n").encode())
