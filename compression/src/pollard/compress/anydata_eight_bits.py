"""8-bit files of a module whose data and metric are the caller's own.

They are looked for as those of image classifiers are, by
:func:`pollard.compress.eight_bits.search`: compared by how far they move the outputs, on the
inputs that the metric itself asks about, and judged by the metric.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pollard.compress import export, quantize
from pollard.compress.accelerator import CPU, placed
from pollard.compress.anydata_cuts import Batches
from pollard.compress.eight_bits import search
from pollard.compress.errors import DataInvalid
from pollard.compress.evaluate import OUTPUT
from pollard.compress.macs import example_input
from pollard.compress.progress import Reporter
from pollard.compress.shortcuts import rewrite_shortcuts
from pollard.runtime.sessions import Session, open_session

Predict = Callable[[Tensor], Tensor]
"""From a batch of inputs to outputs: a module, or an ONNX file as it is served."""

Evaluate = Callable[[Predict], float]
"""From a model to its metric, of which more is better."""

# Inputs that ways are compared on, and that single layers are.
_COMPARED, _FEW = 256, 64


def score(eval_fn: Evaluate, predict: Predict) -> float:
    """Return the metric of a model.

    Raises:
        DataInvalid: it is no finite number.
    """
    with torch.no_grad():
        if isinstance(predict, nn.Module):
            with placed(predict.eval()) as device:
                given: Any = eval_fn(_answers_beside(predict, device))
        else:
            given = eval_fn(predict)
    try:
        value = float(given)
    except (TypeError, ValueError, RuntimeError):
        value = math.nan
    if not math.isfinite(value):
        raise DataInvalid(f"eval_fn gave {given!r}; it must give a finite number")
    return value


def _answers_beside(module: nn.Module, device: torch.device) -> Predict:
    """Return what answers with a module on a device, and gives outputs back where inputs are."""
    if device == CPU:
        return module
    return lambda inputs: module(inputs.to(device)).to(inputs.device)


def predictor(session: Session) -> Predict:
    """Return a function that answers with an ONNX file with the module's own input."""

    def predict(inputs: Tensor) -> Tensor:
        feeds = {export.CORE_INPUT: inputs.detach().cpu().float().contiguous().numpy()}
        answer = torch.from_numpy(np.asarray(session.run(feeds, [OUTPUT])[OUTPUT]))
        return answer.to(inputs.device)

    return predict


class MetricJudge:
    """Judges by the caller's metric, and by the distance of the outputs from the float file's.

    Args:
        float_file: The float file of the module that is quantized.
        parent: The metric of the parent's float file.
        eval_fn: The metric that everything is chosen by.
        max_drop: Most of it that may be lost.
    """

    unit = "of the outputs' variance"

    def __init__(
        self, float_file: bytes, parent: float, eval_fn: Evaluate, max_drop: float
    ) -> None:
        self.max_drop = max_drop
        self._parent, self._eval_fn = parent, eval_fn
        inputs: list[Tensor] = []
        outputs: list[Tensor] = []
        answer = predictor(open_session(float_file))

        def watched(given: Tensor) -> Tensor:
            made = answer(given)
            if sum(map(len, inputs)) < _COMPARED:
                inputs.append(given.detach().clone())
                outputs.append(made)
            return made

        self.attainable = parent - score(eval_fn, watched) <= max_drop + 1e-12
        if not inputs:
            raise DataInvalid("eval_fn does not ask the model about any input")
        self._inputs, self._wanted = torch.cat(inputs)[:_COMPARED], torch.cat(outputs)[:_COMPARED]
        self._spread = float(self._wanted.var(0, unbiased=False).mean()) or 1.0

    def divergence(self, model: bytes, few: bool = False) -> float:
        """Return the mean squared distance of the outputs, as a share of their variance."""
        inputs = self._inputs[: _FEW if few else None]
        answer = predictor(open_session(model))
        given = torch.cat([answer(piece) for piece in torch.split(inputs, 32)])
        return float((given - self._wanted[: len(given)]).square().mean()) / self._spread

    def drop(self, model: bytes) -> float:
        """Return what is lost of the metric."""
        return self._parent - score(self._eval_fn, predictor(open_session(model)))


class Reader:
    """Feeds the inputs of some batches to calibration."""

    def __init__(self, data: Batches, batches: int) -> None:
        self._batches = itertools.islice(data, batches)

    def get_next(self) -> dict[str, NDArray[np.float32]] | None:
        """Return the next batch by input name, or None at the end."""
        batch = next(self._batches, None)
        return None if batch is None else {export.CORE_INPUT: batch[0].cpu().float().numpy()}


def quantize_module(
    module: nn.Module,
    example: Tensor,
    data: Batches,
    batches: int,
    judge: MetricJudge,
    config: quantize.QuantizeConfig,
    reporter: Reporter,
) -> tuple[bytes, dict[str, Any]]:
    """Return the best 8-bit file of a module, and how it came about.

    Args:
        module: In float; it is not changed.
        example: float32 [1, …].
        data: What ranges are measured on.
        batches: How many of them.
        judge: Compares and judges.
        config: What may be tried.
        reporter: Told of progress.

    Raises:
        ExportFailed, QuantizeFailed: the module cannot be exported or quantized.
    """
    work = copy.deepcopy(module)
    # Without parameter-free shortcuts no float operator stays between two 8-bit ones.
    rewrite_shortcuts(work, example_input(example))
    core = export.export_core(work, example)
    prepared = quantize.prepare_core(core, lambda: Reader(data, batches), config)
    found = search(prepared, judge, reporter=reporter)
    onnx.checker.check_model(onnx.load_from_string(found.raw))
    return found.raw, found.told
