"""Win back the accuracy that pruning cost: distillation from the parent."""

from __future__ import annotations

import copy
import math

from torch import nn

from pollard.compress.accelerator import placed
from pollard.compress.checkpoint import Checkpoint
from pollard.compress.data import Dataset
from pollard.compress.progress import Reporter
from pollard.compress.spec import InputSpec
from pollard.compress.training import (
    FitConfig,
    History,
    choose_accuracy,
    fit,
    recalibrate_batch_norm,
)


def recover(
    pruned: nn.Module,
    parent: nn.Module,
    data: Dataset,
    spec: InputSpec,
    config: FitConfig,
    *,
    reporter: Reporter | None = None,
    checkpoint: Checkpoint | None = None,
    seconds: float = math.inf,
) -> History:
    """Fine-tune ``pruned`` in place with the parent as its teacher.

    The batch-norm statistics are measured anew first: those of the parent
    describe channels that are gone. They are measured once more at the end, on
    images as they are served, and kept if the choosing part agrees.

    With a ``checkpoint`` it goes on from where it was left, to the same result; with
    ``seconds`` it takes about so long at most.

    Raises:
        OSError: the checkpoint cannot be written.
        TrainingDiverged: see :func:`pollard.compress.training.fit`.
    """
    with placed(pruned, parent):
        recalibrate_batch_norm(pruned, data.train, spec)
        history = fit(
            pruned,
            data,
            spec,
            config,
            teacher=parent,
            reporter=reporter,
            title="Recovering accuracy",
            checkpoint=checkpoint,
            seconds=seconds,
        )
        before = choose_accuracy(pruned, spec, data.choose)
        kept = copy.deepcopy(pruned.state_dict())
        recalibrate_batch_norm(pruned, data.train, spec)
        if choose_accuracy(pruned, spec, data.choose) < before:
            pruned.load_state_dict(kept)
    return history
