"""Measure how much memory a model needs, in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from pollard.compress.errors import ExportFailed
from pollard.compress.spec import InputSpec

_MEBIBYTE = 1024**2

# The peak of a fresh process is that of the model and of nothing before it. Everything
# that a server has loaded anyway is loaded before the first reading.
_CHILD = """
import sys
from pathlib import Path
import numpy as np
import psutil
from pollard.runtime.sessions import open_session
def peak():
    # Not getrusage: its peak is inherited from the process that started this one.
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return psutil.Process().memory_info().rss
import onnxruntime
path, target, shape = Path(sys.argv[1]), sys.argv[2], [int(n) for n in sys.argv[3].split(",")]
before = peak()
session = open_session(path, target=target)
session.run({session.inputs[0].name: np.zeros(shape, np.uint8)})
print(peak() - before)
"""


def measure_memory(model: Path, target: str, spec: InputSpec, batch: int) -> int:
    """Return what loading a model and running one batch adds to a process, in bytes.

    Args:
        model: The ONNX file.
        target: Its target.
        spec: What it takes.
        batch: Images of the batch.

    Raises:
        ExportFailed: the model cannot be run.
    """
    shape = ",".join(str(size) for size in (batch, *spec.shape))
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, str(model), target, shape],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise ExportFailed(f"the model cannot be run with {batch} images: {lines[-1]}")
    # In whole mebibytes: pages are what is measured, and the last digits are noise.
    return max(1, -(-int(done.stdout) // _MEBIBYTE)) * _MEBIBYTE
