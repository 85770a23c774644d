"""onnxruntime's tools are found, whatever was imported before."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import sys
before = list(sys.path)
from pollard.compress.half import _converter
_converter()
sys.path[:] = before
from pollard.compress.ort_tools import make_importable
make_importable()
import onnxruntime.quantization
"""


def test_quantization_is_imported_though_the_path_of_imports_was_restored() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
