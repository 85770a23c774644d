"""Six of the architectures; all of them run in bench/architectures.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from pollard.compress.candidates import build
from pollard.compress.data import Part
from pollard.compress.evaluate import session_predictor
from pollard.compress.export import probe_images
from pollard.compress.macs import total_macs
from pollard.compress.prune import Pruned, prune
from pollard.compress.quantize import QuantizeConfig
from pollard.compress.spec import InputSpec
from pollard.runtime.machine import Machine
from pollard.runtime.sessions import open_session

SPEC = InputSpec(32, 32, 3, (0.5,) * 3, (0.25,) * 3)

Architectures = dict[str, Callable[[], nn.Module]]
Silenced = Callable[[nn.Module, Pruned], nn.Module]


@pytest.mark.parametrize(
    ("name", "ratio"),
    [
        ("densenet", 0.5),
        ("shufflenet", 0.3),
        ("mobilenet-v3", 0.5),
        ("unet", 0.5),
        ("fpn", 0.5),
        ("gated", 0.5),
        ("cross-stage", 0.3),
    ],
)
def test_an_architecture_is_pruned_exported_and_quantized(
    name: str, ratio: float, architectures: Architectures, silenced: Silenced, tmp_path: Path
) -> None:
    parent = architectures[name]()
    pruned = prune(parent, SPEC, ratio)
    assert ratio <= pruned.removed <= ratio + 0.07
    assert pruned.macs_before == total_macs(parent, SPEC)

    # Pruning is right if it does what silencing the same channels does.
    example = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(
            pruned.module(example), silenced(parent, pruned)(example), rtol=1e-4, atol=1e-4
        )

    images = probe_images(SPEC, 48, seed=1)
    calibration = Part("probe", images, np.zeros(len(images), np.int64))
    config = QuantizeConfig(48, reduce_range=not Machine.detect().has_vnni)
    files = build("pruned", pruned.module, SPEC, tmp_path, calibration, config)
    logits = [session_predictor(open_session(file.path))(images) for file in files]
    together = np.corrcoef(*((one - one.mean(0)).ravel() for one in logits))[0, 1]
    assert together > 0.9


def test_what_cannot_be_followed_through_a_shuffle_stays_whole(
    architectures: Architectures,
) -> None:
    pruned = prune(architectures["shufflenet"](), SPEC, 0.3)
    assert "cannot be followed" in pruned.left_whole["4.body.2.0"]
    assert "4.body.2.0" not in pruned.channels


def test_bare_parameters_follow_where_they_are_one_value_a_channel(
    architectures: Architectures,
) -> None:
    convnext = prune(architectures["convnext"](), SPEC, 0.5).module
    scales = [p.numel() for name, p in convnext.named_parameters() if name.endswith("scale")]
    assert scales == [convnext.get_submodule(f"{i}.down").out_features for i in (1, 3)]
    assert scales != [32, 64]
    functional = prune(architectures["functional"](), SPEC, 0.4)
    assert functional.left_whole["first"] == "a bare parameter hangs on it"
