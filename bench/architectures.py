"""Prune, export and quantize every small architecture; check each file against PyTorch.

    python -m bench.architectures [NAME …] [--ratio 0.5] [--json FILE]

The weights are random: this shows what the pipeline can be given, not what
accuracy is kept. A row that fails makes the exit code 1.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from pollard.compress.candidates import build
from pollard.compress.data import Part
from pollard.compress.errors import CompressionError
from pollard.compress.evaluate import session_predictor
from pollard.compress.export import probe_images
from pollard.compress.prune import prune
from pollard.compress.quantize import QuantizeConfig
from pollard.compress.spec import InputSpec
from pollard.runtime.machine import Machine
from pollard.runtime.sessions import open_session

SPEC = InputSpec(32, 32, 3, (0.5,) * 3, (0.25,) * 3)

# So little is narrowed where shuffles and splits keep most layers whole.
_RATIOS = {"shufflenet": 0.3, "cross-stage": 0.3}


def load() -> dict[str, Callable[[], nn.Module]]:
    """Return the architectures that the tests share."""
    path = Path(__file__).parents[1] / "tests" / "compression" / "architectures.py"
    spec = importlib.util.spec_from_file_location("pollard_bench_architectures", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made: dict[str, Callable[[], nn.Module]] = module.ARCHITECTURES
    return made


def check(make: Callable[[], nn.Module], ratio: float) -> dict[str, Any]:
    """Return what came of one architecture.

    Raises:
        CompressionError: a stage failed.
    """
    pruned = prune(make(), SPEC, ratio)
    images = probe_images(SPEC, 64, seed=1)
    part = Part("probe", images, np.zeros(len(images), np.int64))
    config = QuantizeConfig(len(images), reduce_range=not Machine.detect().has_vnni)
    with tempfile.TemporaryDirectory() as folder:
        files = build("pruned", pruned.module, SPEC, Path(folder), part, config)
        logits = [session_predictor(open_session(file.path))(images) for file in files]
    centred = [(one - one.mean(0)).ravel() for one in logits]
    return {
        "macs_removed": round(pruned.removed, 4),
        "width_multiple": pruned.rounding,
        "parity_fp32": files[0].parity,
        "correlation_int8": round(float(np.corrcoef(*centred)[0, 1]), 4),
        "left_whole": pruned.left_whole,
    }


def main() -> None:
    """Run all, or those named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    made = load()
    rows: dict[str, dict[str, Any]] = {}
    for name in arguments.names or made:
        try:
            row = check(made[name], _RATIOS.get(name, arguments.ratio))
        except CompressionError as error:
            row = {"failed": f"{type(error).__name__}: {error}"}
        rows[name] = row
        told = row.get("failed") or (
            f"{row['macs_removed']:6.1%} of MACs removed, parity {row['parity_fp32']:.1e}, "
            f"int8 correlates {row['correlation_int8']:.3f}, {len(row['left_whole'])} layers whole"
        )
        print(f"{name:22} {told}", flush=True)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    sys.exit(any("failed" in row for row in rows.values()))


if __name__ == "__main__":
    main()
