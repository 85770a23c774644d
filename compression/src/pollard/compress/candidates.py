"""The files that compete: parent and pruned, in float and in 8 bits."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from pollard.compress import export, quantize
from pollard.compress.data import Part
from pollard.compress.macs import count_parameters, example_input, total_macs
from pollard.compress.shortcuts import rewrite_shortcuts
from pollard.compress.spec import InputSpec
from pollard.runtime.bundle import write_durably

PARENT_FLOAT = "parent-fp32"


@dataclass(frozen=True)
class Candidate:
    """One ONNX file that could be shipped."""

    name: str
    """"parent-fp32", "parent-int8", "pruned-fp32" or "pruned-int8"."""
    target: str
    """Target of the file: "cpu-fp32" or "cpu-int8"."""
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

    @property
    def pruned(self) -> bool:
        """Whether it is narrower than the parent."""
        return self.name.startswith("pruned")

    @property
    def size_bytes(self) -> int:
        """Size of the file."""
        return self.path.stat().st_size


def build(
    kind: str,
    module: nn.Module,
    spec: InputSpec,
    folder: Path,
    calibration: Part | None = None,
    config: quantize.QuantizeConfig | None = None,
) -> list[Candidate]:
    """Export a module, check the files, and write them.

    Args:
        kind: "parent" or "pruned".
        module: What to export; it is not changed.
        spec: What it takes.
        folder: Where to write.
        calibration: Images for 8-bit ranges.
        config: How to quantize; float only when None.

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
    if rewrite_shortcuts(work, example_input(spec)):
        core = export.export_core(work, spec)
    model = quantize.quantize(core, spec, calibration, config)
    path = folder / f"{kind}-int8.onnx"
    write_durably(path, export.serialize(model))
    features = tuple(quantize.requirements(config))
    built.append(
        Candidate(
            f"{kind}-int8", "cpu-int8", path, module, spec, macs, parameters, cpu_features=features
        )
    )
    return built
