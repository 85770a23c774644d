"""The errors of compression, in one tree.

::

    CompressionError             exit code 1
    ├── UsageInvalid               exit code 2: the command asks for something impossible
    │   ├── ModelUnknown             no such zoo model, module or factory
    │   ├── OutputExists             the output holds something already
    │   ├── DeviceUnusable           PyTorch cannot compute on the device that is asked for
    │   └── CacheUnusable            finished stages cannot be kept where they should be
    ├── WeightsInvalid             the weights are unreadable or do not fit the model
    ├── DataInvalid                the data cannot be used
    │   ├── DataDamaged              too many files cannot be decoded
    │   └── LabelsMismatch           the classes are not those of the model's head
    ├── TrainingDiverged           the loss was not finite before any good state
    ├── PruneFailed                the model cannot be pruned as asked
    ├── ExportFailed               the ONNX file is not the PyTorch model
    │   └── HalfOverflow             weights or activations are too large for float16
    ├── QuantizeFailed             the model cannot be quantized
    ├── DeviceFailed               the device failed while it computed, or its memory is too small
    ├── DiskFull                   there is no space for the next stage
    └── GateRefused              exit code 3: nothing that may be shipped was found

``exit_code`` is what the commands end with.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar

# Colours of terminals, which some libraries put into their messages.
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


def first_line(error: BaseException) -> str:
    """Return what an error of another library says, in one line; its kind where it says nothing."""
    lines = _COLOUR.sub("", str(error)).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__


class CompressionError(Exception):
    """Root of every error that this distribution raises on purpose."""

    exit_code: ClassVar[int] = 1


class UsageInvalid(CompressionError):
    """The command or the call asks for something impossible."""

    exit_code = 2


class ModelUnknown(UsageInvalid):
    """There is no such zoo model, module or factory."""


class OutputExists(UsageInvalid):
    """The output holds something already and overwriting was not asked for."""


class DeviceUnusable(UsageInvalid):
    """PyTorch cannot compute on the device that is asked for."""


class CacheUnusable(UsageInvalid):
    """Finished stages cannot be kept where they should be."""


class WeightsInvalid(CompressionError):
    """The weights are unreadable, or their keys or shapes are not the model's."""


class DataInvalid(CompressionError):
    """The data cannot be used: absent, no images, one class, too few."""


class DataDamaged(DataInvalid):
    """More files than tolerated cannot be decoded; the message names some."""


class LabelsMismatch(DataInvalid):
    """The data's classes are not those of the model's head."""


class TrainingDiverged(CompressionError):
    """The loss was not finite before there was any good state to keep."""


class PruneFailed(CompressionError):
    """The model cannot be traced or pruned as asked."""


class ExportFailed(CompressionError):
    """The model cannot be exported, or the file does not compute what PyTorch computes."""


class HalfOverflow(ExportFailed):
    """Weights or activations are too large for float16; the message names them."""


class QuantizeFailed(CompressionError):
    """onnxruntime's quantizer refuses the model."""


class DeviceFailed(CompressionError):
    """The device failed while it computed, or its memory was too small."""


class DiskFull(CompressionError):
    """There is no space for the next stage; those that are finished are kept."""


class GateRefused(CompressionError):
    """No candidate holds the accuracy gate and is faster than the parent.

    Args:
        message: Why, with the numbers.
        figures: The same numbers for machines.
    """

    exit_code = 3

    def __init__(self, message: str, figures: Mapping[str, Any] | None = None) -> None:
        super().__init__(message)
        self.figures: dict[str, Any] = dict(figures or {})
