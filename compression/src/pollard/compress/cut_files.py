"""The stages prune and recover: what they leave in their folders, and how it is read again."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from pollard.compress.channel_map import load_pruned, save_pruned
from pollard.compress.checkpoint import Checkpoint
from pollard.compress.codec import decode, encode
from pollard.compress.data import Dataset
from pollard.compress.progress import Reporter
from pollard.compress.prune import Pruned
from pollard.compress.recover import recover
from pollard.compress.spec import InputSpec
from pollard.compress.stages import Done, Stages, read_json, scratch, write_json
from pollard.compress.training import FitConfig, History

_CUT, _HISTORY = "cut.json", "history.json"

# Of the time that is left, what recovery may take; the rest is for exporting and measuring.
_RECOVERY_SHARE = 0.7


@dataclasses.dataclass(frozen=True)
class Recovered:
    """A cut network after its recovery."""

    pruned: Pruned
    """Its module is the recovered one."""
    history: History


def save_cut(cut: Pruned | None, folder: Path) -> None:
    """Write what was cut; None says that nothing needs to be."""
    content = None
    if cut is not None:
        save_pruned(cut.module, folder, cut.channels)
        frozen = [n for n, p in cut.module.named_parameters() if not p.requires_grad]
        content = {"frozen": frozen, "cut": encode(cut, skip=("module",))}
    write_json(folder / _CUT, content)


def load_cut(parent: nn.Module, folder: Path, weights: Path | None = None) -> Pruned | None:
    """Read what :func:`save_cut` wrote.

    Args:
        parent: Of the architecture that was cut; it is not changed.
        folder: Of the stage that cut.
        weights: Folder with later weights of the same network.

    Raises:
        WeightsInvalid: see :func:`pollard.compress.channel_map.load_pruned`.
    """
    content = read_json(folder / _CUT)
    if content is None:
        return None
    module = load_pruned(copy.deepcopy(parent), weights or folder)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name not in content["frozen"])
    return decode(Pruned, content["cut"], module=module)


def recover_stage(
    stages: Stages,
    cut_folder: Path,
    inputs: Mapping[str, Any],
    parent: nn.Module,
    data: Dataset,
    spec: InputSpec,
    fit: FitConfig,
    reporter: Reporter,
    start: nn.Module | None = None,
    share: float = 1.0,
) -> Done[Recovered]:
    """Recover what a stage cut; killed in the middle, it goes on from there.

    Args:
        stages: Makes or finds it.
        cut_folder: Of the stage that cut.
        inputs: What goes into the key beside ``fit``, such as the key of that stage.
        parent: The teacher, and the architecture that was cut.
        data: Train and choose are used.
        spec: What the parent takes.
        fit: How.
        reporter: Told of progress.
        start: The same network with the weights to begin from, if not as it was cut.
        share: Of the time that recoveries may take, where the reporter knows of a limit.
    """

    def make(folder: Path) -> None:
        cut = _present(load_cut(parent, cut_folder))
        if start is not None:
            cut.module.load_state_dict(start.state_dict())
        checkpoint = Checkpoint(scratch(folder) / "recover.pt", json.dumps(encode(fit)))
        history = recover(
            cut.module, parent, data, spec, fit, reporter=reporter, checkpoint=checkpoint,
            seconds=_RECOVERY_SHARE * share * reporter.left,
        )  # fmt: skip
        save_pruned(cut.module, folder, cut.channels)
        write_json(folder / _HISTORY, encode(history))

    def load(folder: Path) -> Recovered:
        pruned = _present(load_cut(parent, cut_folder, folder))
        return Recovered(pruned, decode(History, read_json(folder / _HISTORY)))

    told = {**inputs, "fit": fit}
    if reporter.max_seconds is not None:
        told["max_seconds"] = reporter.max_seconds
    return stages.run("recover", told, make, load)


def _present(cut: Pruned | None) -> Pruned:
    if cut is None:  # a stage that cut nothing is never recovered
        raise AssertionError("nothing was cut")
    return cut
