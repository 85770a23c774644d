"""The files that compete: parent and pruned, in float and in 8 bits."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx
from torch import nn

from pollard.compress import export, half, quantize
from pollard.compress.data import Part
from pollard.compress.eight_bits import ImageJudge, Train, layer_costs_of, search
from pollard.compress.macs import count_parameters, example_input, total_macs
from pollard.compress.onnx_file import OnnxModule
from pollard.compress.progress import Reporter
from pollard.compress.shortcuts import rewrite_shortcuts
from pollard.compress.spec import InputSpec
from pollard.compress.tasks import Verdict
from pollard.runtime.bundle import write_durably

PARENT_FLOAT = "parent-fp32"

_RANGE_BATCH = 32


@dataclass(frozen=True)
class Candidate:
    """One ONNX file that could be shipped."""

    name: str
    """"parent" or "pruned", and "-fp32", "-int8" or "-fp16"."""
    target: str
    """Target of the file: "cpu-fp32", "cpu-int8" or "cuda-fp16"."""
    path: Path
    module: nn.Module
    """The PyTorch model that it was exported from."""
    spec: InputSpec
    macs: int
    parameters: int
    cpu_features: tuple[str, ...] = ()
    """What a processor must offer."""
    parity: float | None = None
    """Largest difference from the PyTorch model, relative to the logits' range;
    None for 8 bits, where it is not meant to be equal."""
    quantization: dict[str, Any] | None = None
    """How the 8-bit file came about: ranges, what was tried, which layers stayed float and
    why. None for float, and where nothing was chosen."""
    ranges: dict[str, float] | None = None
    """Largest magnitude of each layer's activations on calibration images; of float16 files."""

    @property
    def pruned(self) -> bool:
        """Whether it is narrower than the parent."""
        return self.name.startswith("pruned")

    @property
    def size_bytes(self) -> int:
        """Size of the file."""
        return self.path.stat().st_size


@dataclass(frozen=True)
class Tuning:
    """What 8-bit files are chosen by."""

    choose: Part
    """The choosing part."""
    parent: Verdict = field(repr=False)
    """How right the parent's answers to its images are."""
    classes: int
    """How many there are."""
    max_drop: float
    """Most points that may be lost."""
    train: Train | None = None
    """Trains in 8 bits where nothing else holds the gate; not tried when None."""


def build_half(
    kind: str, module: nn.Module, spec: InputSpec, folder: Path, calibration: Part, images: int
) -> list[Candidate]:
    """Export a module in float and in float16, check the files, and write them.

    Args:
        kind: "parent" or "pruned".
        module: What to export; it is not changed.
        spec: What it takes.
        folder: Where to write.
        calibration: Images on which activations must stay within float16.
        images: How many of them are looked at.

    Returns:
        The float32 file, for the CPU, and the float16 one, for CUDA.

    Raises:
        HalfOverflow: weights or activations are too large for float16.
        ExportFailed: it cannot be exported or converted, or the float file computes something
            else.
    """
    built = build(kind, module, spec, folder)
    model = onnx.load(built[0].path)
    converted = half.to_float16(model)
    seen = calibration.images[:images]
    ranges = half.check_range(
        model, (seen[at : at + _RANGE_BATCH] for at in range(0, len(seen), _RANGE_BATCH))
    )
    path = folder / f"{kind}-fp16.onnx"
    write_durably(path, export.serialize(converted))
    return [
        *built,
        dataclasses.replace(
            built[0],
            name=f"{kind}-fp16",
            target="cuda-fp16",
            path=path,
            parity=None,
            ranges=ranges,
        ),
    ]


def build(
    kind: str,
    module: nn.Module,
    spec: InputSpec,
    folder: Path,
    calibration: Part | None = None,
    config: quantize.QuantizeConfig | None = None,
    tuning: Tuning | None = None,
    reporter: Reporter | None = None,
) -> list[Candidate]:
    """Export a module, check the files, and write them.

    Args:
        kind: "parent" or "pruned".
        module: What to export; it is not changed.
        spec: What it takes.
        folder: Where to write.
        calibration: Images for 8-bit ranges.
        config: How to quantize; float only when None.
        tuning: What the 8-bit file is chosen by; one plain way is taken when None.
        reporter: Told of progress.

    Returns:
        The float candidate, and the 8-bit one if ``config`` is given.

    Raises:
        ExportFailed, QuantizeFailed: it cannot be exported or quantized, or
            the float file computes something else.
    """
    macs, parameters = total_macs(module, spec), count_parameters(module)
    core = export.export_core(module, spec)
    raw = export.serialize(export.attach_pixels(core, spec))
    parity = export.check_parity(raw, module, spec)
    path = folder / f"{kind}-fp32.onnx"
    write_durably(path, raw)
    built = [
        Candidate(f"{kind}-fp32", "cpu-fp32", path, module, spec, macs, parameters, parity=parity)
    ]
    if config is None or calibration is None:
        return built
    # Without parameter-free shortcuts no float operator stays between two 8-bit ones.
    work = copy.deepcopy(module)
    traced = not isinstance(module, OnnxModule)
    if traced and rewrite_shortcuts(work, example_input(spec)):
        core = export.export_core(work, spec)
    handed_over = [core]
    del core
    prepared = quantize.prepare(handed_over, spec, calibration, config)
    told = None
    if tuning is None:
        model = prepared.build(prepared.collect().ranges(config.plain_method))
        quantized = export.serialize(model)
    else:
        judge = ImageJudge(raw, tuning.choose, tuning.parent, tuning.classes, tuning.max_drop)
        costs = layer_costs_of(work, spec) if traced else None
        found = search(prepared, judge, train=tuning.train, costs=costs, reporter=reporter)
        quantized, told = found.raw, found.told
    path = folder / f"{kind}-int8.onnx"
    write_durably(path, quantized)
    features = tuple(quantize.requirements(config))
    built.append(
        Candidate(
            f"{kind}-int8", "cpu-int8", path, module, spec, macs, parameters,
            cpu_features=features, quantization=told,
        )
    )  # fmt: skip
    return built
