"""onnxruntime's tools in Python, which import each other by their bare names."""

from __future__ import annotations

import sys
from pathlib import Path


def make_importable() -> None:
    """Let modules of `onnxruntime.transformers` find each other.

    Its package puts its folder into `sys.path` when it is first imported. Whoever restores that
    list afterwards takes it out again, and later imports of `onnxruntime.quantization` fail.
    """
    import onnxruntime.transformers

    folder = str(Path(onnxruntime.transformers.__file__).parent)
    if folder not in sys.path:
        sys.path.append(folder)
