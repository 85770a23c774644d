"""onnxruntime's tools are found, whatever was imported before."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
from pollard.compress.half import _converter
_converter()
from pollard.compress.ort_tools import make_importable
make_importable()
import onnxruntime.quantization
"""


def test_quantization_is_imported_after_the_conversion_to_float16() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
