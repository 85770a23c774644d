from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from pollard.compress.data import Dataset, Part
from pollard.compress.errors import TrainingDiverged
from pollard.compress.spec import InputSpec
from pollard.compress.training import (
    FitConfig,
    augment,
    fit,
    one_cycle,
    recalibrate_batch_norm,
)

SPEC = InputSpec(8, 8, 1, (0.5,), (0.5,), augmentation="crop-flip")


def _part(name: str, count: int, seed: int) -> Part:
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 2, count)
    images = labels[:, None, None, None] * 120 + generator.integers(0, 80, (count, 8, 8, 1))
    return Part(name, images.astype(np.uint8), labels.astype(np.int64))


@pytest.fixture
def data() -> Dataset:
    return Dataset(
        "d", ["dark", "light"], _part("t", 64, 0), _part("c", 32, 1), _part("h", 32, 2), "0" * 64
    )


def _net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2)
    )


def test_training_learns_and_keeps_the_best_epoch(data: Dataset) -> None:
    net = _net()
    history = fit(net, data, SPEC, FitConfig(4, 16, 1e-2))
    assert max(history.choose_accuracy) == 1.0
    assert history.choose_accuracy[history.best_epoch - 1] == 1.0
    assert not net.training


def test_the_same_seed_gives_the_same_weights(data: Dataset) -> None:
    nets = [_net(), _net()]
    for net in nets:
        fit(net, data, SPEC, FitConfig(2, 16, 1e-2, seed=5))
    for one, other in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_loss_that_is_not_finite_stops_training_from_scratch(data: Dataset) -> None:
    net = _net()
    with torch.no_grad():
        net[4].bias[0] = float("inf")  # type: ignore[index, operator]
    with pytest.raises(TrainingDiverged, match="lower the learning rate"):
        fit(net, data, SPEC, FitConfig(2, 16, 1e-2))


def test_recovery_that_diverges_keeps_the_last_good_state(data: Dataset) -> None:
    class Bomb(nn.Module):
        """A teacher whose answers turn to NaN in the second epoch."""

        def __init__(self) -> None:
            super().__init__()
            self.calls = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            value = 1.0 if self.calls <= 6 else float("nan")
            return torch.full((len(x), 2), value)

    net = _net()
    history = fit(net, data, SPEC, FitConfig(5, 16, 1e-2, distill_weight=0.1), teacher=Bomb())
    assert "nan" in history.stopped
    assert len(history.loss) == 1
    assert all(bool(value.isfinite().all()) for value in net.state_dict().values())


def test_recalibration_measures_the_statistics_of_the_images(data: Dataset) -> None:
    net = _net()
    net[1].running_mean += 100  # type: ignore[operator, union-attr]
    recalibrate_batch_norm(net, data.train, SPEC)
    with torch.no_grad():
        seen = net[0](SPEC.normalize(data.train.images)).mean((0, 2, 3))
    assert torch.allclose(net[1].running_mean, seen, atol=1e-4)  # type: ignore[arg-type]
    assert net[1].momentum == 0.1


@given(st.sampled_from(["none", "shift", "crop-flip"]), st.integers(0, 100))
def test_augmentation_moves_pixels_and_invents_none(kind: str, seed: int) -> None:
    generator = np.random.default_rng(seed)
    images = generator.integers(1, 256, (6, 20, 16, 3)).astype(np.uint8)
    spec = InputSpec(20, 16, 3, (0.0,) * 3, (1.0,) * 3, augmentation=kind)  # type: ignore[arg-type]
    moved = augment(images, spec, generator)
    assert moved.shape == images.shape
    assert moved.dtype == np.uint8
    for before, after in zip(images, moved, strict=True):
        assert set(map(tuple, after.reshape(-1, 3))) <= {
            *map(tuple, before.reshape(-1, 3)),
            (0, 0, 0),
        }


@given(st.integers(0, 400))
def test_the_learning_rate_rises_to_its_peak_and_falls(total: int) -> None:
    shares = [one_cycle(total)(step) for step in range(total + 1)]
    assert all(0 < share <= 1 for share in shares)
    peak = shares.index(max(shares))
    assert shares[: peak + 1] == sorted(shares[: peak + 1])
    assert shares[peak:] == sorted(shares[peak:], reverse=True)
