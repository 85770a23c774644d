"""Where a network's time goes: MACs, parameters, bytes and measured latency of every layer."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from pollard.compress.candidates import build
from pollard.compress.data import Part
from pollard.compress.export import probe_images
from pollard.compress.kernels import Kernel, kernel_of
from pollard.compress.latency import LatencyTable, typical_us
from pollard.compress.macs import example_input, layer_costs
from pollard.compress.operations import Operation, list_operations
from pollard.compress.progress import Reporter
from pollard.compress.quantize import QuantizeConfig, pixels_are_quantized
from pollard.compress.shortcuts import rewrite_shortcuts
from pollard.compress.spec import InputSpec
from pollard.runtime.machine import Machine
from pollard.runtime.sessions import open_session

SCHEMA_VERSION = 1

# How far the sum of a table may be from the time of the whole file.
AGREEMENT = 0.10


@dataclass(frozen=True)
class OperationProfile:
    """One operator with what is fused into it."""

    name: str
    kind: str
    """Such as "Conv 3×3 /2 + Relu"."""
    in_channels: int
    out_channels: int
    output: str
    """Such as "16×16"."""
    macs: int
    parameters: int
    weight_bytes: int
    """Of its weights in the file of this target."""
    latency_us: float | None
    """None where it is not measured by itself."""


@dataclass(frozen=True)
class TargetProfile:
    """A network in one target."""

    target: str
    operations: list[OperationProfile]
    summed_us: float
    """What the table says: all operators, and what a call and each operator cost besides."""
    measured_us: float
    """What the whole file takes."""
    table_digest: str

    @property
    def ratio(self) -> float:
        """The table's sum over the time of the whole file."""
        return self.summed_us / self.measured_us

    @property
    def agrees(self) -> bool:
        """Whether the two are within 10 % of each other."""
        return abs(self.ratio - 1) <= AGREEMENT

    @property
    def unmeasured(self) -> list[str]:
        """Operators that the sum does not contain."""
        return [op.name for op in self.operations if op.latency_us is None]

    def to_json(self) -> dict[str, Any]:
        """Return the figures."""
        return {**asdict(self), "ratio": self.ratio, "agrees": self.agrees}


@dataclass(frozen=True)
class Profile:
    """What :func:`profile_module` found."""

    name: str
    batch: int
    threads: int
    targets: list[TargetProfile]
    machine: Machine = field(repr=False)

    def to_json(self) -> dict[str, Any]:
        """Return the content of a profile file."""
        return {
            "schema_version": SCHEMA_VERSION,
            "kind": "profile",
            "name": self.name,
            "batch": self.batch,
            "threads": self.threads,
            "machine": {
                "processor": self.machine.processor,
                "vnni": self.machine.has_vnni,
                "cores": self.machine.cores,
                "onnxruntime": self.machine.onnxruntime,
            },
            "targets": [target.to_json() for target in self.targets],
        }


def profile_module(
    module: nn.Module,
    spec: InputSpec,
    *,
    name: str = "model",
    targets: Sequence[str] = ("cpu-fp32", "cpu-int8"),
    batch: int = 1,
    threads: int = 1,
    folder: Path | None = None,
    again: bool = False,
    reporter: Reporter | None = None,
) -> Profile:
    """Measure every operator of a module, and the whole file, in each target.

    Args:
        module: What to profile; it is not changed. Latency hardly depends on the weights.
        spec: What it takes.
        name: For people.
        targets: "cpu-fp32", "cpu-int8" or both.
        batch: Images of a call.
        threads: Of onnxruntime.
        folder: Where latency tables are kept; the user's cache when None.
        again: Measure again what the table has.
        reporter: Told of progress.

    Raises:
        ExportFailed, QuantizeFailed: the module cannot be written for a target.
    """
    machine = Machine.detect()
    files = _files(module, spec, targets, machine)
    found = []
    for target in targets:
        table = LatencyTable(target, batch, threads, machine, folder)
        found.append(profile_file(module, spec, files[target], table, again, reporter))
    return Profile(name, batch, threads, found, machine)


def profile_file(
    module: nn.Module,
    spec: InputSpec,
    file: Path | bytes,
    table: LatencyTable,
    again: bool = False,
    reporter: Reporter | None = None,
) -> TargetProfile:
    """Measure every operator of a module, and a file that was made from it.

    Args:
        module: In PyTorch.
        spec: What it takes.
        file: The ONNX file in the table's target.
        table: Takes what is measured.
        again: Measure again what the table has.
        reporter: Told of progress.
    """
    operations, kernels = trace(module, spec, table.target)
    measured: list[float] = []

    def measure_whole() -> None:
        # A session of its own each time: where one lies in memory can cost it a quarter.
        session = open_session(file, target=table.target, intra_op_threads=table.threads)
        feeds = {session.inputs[0].name: probe_images(spec, table.batch)}
        measured.append(typical_us(lambda: session.raw.run(None, feeds), 0.4))
        session.close()

    # Before, beside and behind the table, so that no moment of the machine meets one of them alone.
    measure_whole()
    table.measure(filter(None, kernels), reporter=reporter, again=again, between=measure_whole)
    for _ in range(2):
        measure_whole()
    return _describe(module, spec, table, operations, kernels, min(measured))


def trace(
    module: nn.Module, spec: InputSpec, target: str
) -> tuple[list[Operation], list[Kernel | None]]:
    """Return a module's operations as a file of ``target`` has them, and their rows.

    The last row has no operation: it is the way from pixels to the network's input.
    """
    work = copy.deepcopy(module)
    if target == "cpu-int8":
        rewrite_shortcuts(work, example_input(spec))
    operations = list_operations(work, spec)
    kernels = [kernel_of(operation, operation.channels()) for operation in operations]
    return operations, [*kernels, pixels(spec, target)]


def pixels(spec: InputSpec, target: str) -> Kernel:
    """Return the row of the way from pixels to the network's input."""
    size = (spec.height, spec.width)
    plain = target == "cpu-int8" and pixels_are_quantized(spec)
    return Kernel(
        "QuantizedPixels" if plain else "Pixels", spec.channels, spec.channels, *size, *size
    )


def _describe(
    module: nn.Module,
    spec: InputSpec,
    table: LatencyTable,
    operations: Sequence[Operation],
    kernels: Sequence[Kernel | None],
    measured_us: float,
) -> TargetProfile:
    """Put a table's rows beside what the layers cost."""
    costs = {cost.name: cost for cost in layer_costs(module, spec)}
    seen: set[str] = set()
    rows: list[OperationProfile] = []
    quantized = table.target == "cpu-int8"
    for operation, kernel in zip(operations, kernels[:-1], strict=True):
        cost = costs.get(operation.name) if operation.is_layer else None
        # A layer that runs several times has its figures where it runs first.
        first = cost is not None and operation.name not in seen
        seen.add(operation.name)
        ins, outs = operation.channels()
        parameters = cost.parameters if cost is not None and first else 0
        byte = 1 if quantized and operation.kind != "ConvTranspose" else 4
        rows.append(
            OperationProfile(
                operation.name,
                _title(operation),
                ins,
                outs,
                f"{operation.out_height}×{operation.out_width}",
                cost.macs if cost is not None and first else 0,
                parameters,
                parameters * byte,
                None if kernel is None else table[kernel],
            )
        )
    first_kernel = kernels[-1]
    assert first_kernel is not None  # noqa: S101 - narrows the type
    size = f"{spec.height}×{spec.width}"
    taken = table[first_kernel]
    rows.insert(
        0,
        OperationProfile(
            "pixels", "from uint8", spec.channels, spec.channels, size, 0, 0, 0, taken
        ),
    )
    total = sum(row.latency_us or 0.0 for row in rows) + table.overheads.per_run
    digest = table.digest(filter(None, kernels))
    return TargetProfile(table.target, rows, round(total, 2), round(measured_us, 2), digest)


def _title(operation: Operation) -> str:
    title = operation.kind
    if operation.kind in ("Conv", "ConvTranspose", "MaxPool", "AveragePool"):
        title += f" {operation.kernel[0]}×{operation.kernel[1]}"
    if operation.stride != (1, 1):
        title += f" /{operation.stride[0]}"
    if operation.groups > 1:
        title += f" groups {operation.groups}"
    if operation.adds:
        title += " + Add"
    return title + (f" + {operation.activation}" if operation.activation else "")


def _files(
    module: nn.Module, spec: InputSpec, targets: Sequence[str], machine: Machine
) -> dict[str, bytes]:
    probes = probe_images(spec, 32)
    part = Part("probe", probes, np.zeros(len(probes), np.int64))
    config = None
    if "cpu-int8" in targets:
        config = QuantizeConfig(len(probes), reduce_range=not machine.has_vnni)
    with tempfile.TemporaryDirectory(prefix="pollard-profile-") as folder:
        built = build("parent", module, spec, Path(folder), part, config)
        return {candidate.target: candidate.path.read_bytes() for candidate in built}
