"""Peak memory of making VGG16 (224×224, 138 million weights) an 8-bit file.

    python -m bench.calibration_memory [--images 1000] [--method percentile-99.99] [--json FILE]

The weights are random and the images synthetic: memory depends on neither. A process of
its own exports, calibrates and quantizes; its peak is what the operating system counts.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

from bench.environment import environment
from pollard.compress import export
from pollard.compress.calibration import METHODS
from pollard.compress.data import Part
from pollard.compress.quantize import QuantizeConfig, prepare
from pollard.compress.spec import InputSpec

SPEC = InputSpec(224, 224, 3, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_PLAN = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0)


def vgg16() -> nn.Sequential:
    """Return VGG16 (Simonyan and Zisserman, 2015, configuration D)."""
    layers: list[nn.Module] = []
    channels = 3
    for width in _PLAN:
        if width:
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
            channels = width
        else:
            layers.append(nn.MaxPool2d(2))
    layers += [nn.Flatten(), nn.Linear(512 * 49, 4096), nn.ReLU()]
    layers += [nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, 1000)]
    return nn.Sequential(*layers).eval()


def _child(count: int, method: str) -> dict[str, float]:
    torch.manual_seed(0)
    few = export.probe_images(SPEC, 20, seed=1)
    images = np.tile(few, (-(-count // len(few)), 1, 1, 1))[:count]
    part = Part("synthetic/train", images, np.zeros(count, np.int64))
    started = time.monotonic()
    given = [export.export_core(vgg16(), SPEC)]
    exported = _peak()
    prepared = prepare(given, SPEC, part, QuantizeConfig(count, method=method))  # type: ignore[arg-type]
    prepared_peak = _peak()
    statistics = prepared.collect()
    calibrated = _peak()
    raw = export.serialize(prepared.build(statistics.ranges(prepared.config.method)))
    return {
        "images": statistics.images,
        "exported_peak_gb": exported,
        "prepared_peak_gb": prepared_peak,
        "calibrated_peak_gb": calibrated,
        "peak_gb": _peak(),
        "file_mb": round(len(raw) / 1e6, 1),
        "seconds": round(time.monotonic() - started, 1),
    }


def _peak() -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return round(int(line.split()[1]) * 1024 / 1e9, 2)
    raise SystemExit("the operating system does not tell the peak of a process")


def main() -> None:
    """Measure in a process of its own, and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--method", choices=METHODS, default="percentile-99.99")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child is not None:
        arguments.child.write_text(json.dumps(_child(arguments.images, arguments.method)))
        return
    with tempfile.TemporaryDirectory() as folder:
        told = Path(folder) / "told.json"
        command = [sys.executable, "-m", "bench.calibration_memory", "--child", str(told)]
        command += ["--images", str(arguments.images), "--method", arguments.method]
        subprocess.run(command, check=True)
        found = json.loads(told.read_text())
    print(json.dumps(found, indent=2))
    if arguments.json is not None:
        content = {"environment": environment(), "method": arguments.method, **found}
        arguments.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
