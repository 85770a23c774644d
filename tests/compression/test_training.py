from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pollard.compress import augmentation, training
from pollard.compress.checkpoint import Checkpoint
from pollard.compress.data import Dataset, Part
from pollard.compress.errors import TrainingDiverged
from pollard.compress.progress import Reporter
from pollard.compress.schedules import one_cycle
from pollard.compress.spec import InputSpec
from pollard.compress.training import (
    FitConfig,
    _loss,
    fit,
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


def test_trained_weights_lie_in_memory_as_before(data: Dataset) -> None:
    net = _net()
    before = {name: value.stride() for name, value in net.state_dict().items()}
    fit(net, data, SPEC, FitConfig(1, 16, 1e-2))
    assert {name: value.stride() for name, value in net.state_dict().items()} == before


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


@settings(deadline=None)  # how long it takes says more of the machine than of this
@given(st.sampled_from(["none", "shift", "crop-flip"]), st.integers(0, 100))
def test_augmentation_moves_pixels_and_invents_none(kind: str, seed: int) -> None:
    generator = np.random.default_rng(seed)
    images = generator.integers(1, 256, (6, 20, 16, 3)).astype(np.uint8)
    spec = InputSpec(20, 16, 3, (0.0,) * 3, (1.0,) * 3, augmentation=kind)  # type: ignore[arg-type]
    drawn = augmentation.draw(augmentation.of_spec(spec), len(images), spec, generator)
    moved = augmentation.apply(torch.from_numpy(images), drawn).numpy()
    assert moved.shape == images.shape
    assert moved.dtype == np.uint8
    for before, after in zip(images, moved, strict=True):
        assert set(map(tuple, after.reshape(-1, 3))) <= {
            *map(tuple, before.reshape(-1, 3)),
            (0, 0, 0),
        }


@settings(deadline=None)  # how long it takes says more of the machine than of this
@given(st.integers(0, 400))
def test_the_learning_rate_rises_to_its_peak_and_falls(total: int) -> None:
    shares = [one_cycle(total)(step) for step in range(total + 1)]
    assert all(0 < share <= 1 for share in shares)
    peak = shares.index(max(shares))
    assert shares[: peak + 1] == sorted(shares[: peak + 1])
    assert shares[peak:] == sorted(shares[peak:], reverse=True)


class _Killed(BaseException):
    pass


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_fit_that_was_killed_goes_on_to_the_same_weights(
    data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: Any
) -> None:
    config = FitConfig(3, 24, 1e-2, seed=5, optimizer=optimizer)
    whole = _net_with_chance()
    wanted = fit(whole, data, SPEC, config)
    seen: list[int] = []

    def broken(*given: Any, **more: Any) -> Any:
        if len(seen) == 5:  # in the middle of the second epoch of three steps each
            raise _Killed
        seen.append(1)
        return _loss(*given, **more)

    monkeypatch.setattr(training, "_loss", broken)
    checkpoint = Checkpoint(tmp_path / "at.pt", "this", every_seconds=0, share=math.inf)
    with pytest.raises(_Killed):
        fit(_net_with_chance(), data, SPEC, config, checkpoint=checkpoint)
    monkeypatch.setattr(training, "_loss", _loss)
    torch.manual_seed(99)
    again = _net_with_chance()
    steps = _Steps()
    found = fit(again, data, SPEC, config, checkpoint=checkpoint, reporter=steps)
    assert found == wanted
    assert steps.counts == [5, 1, 1, 1, 1]
    for key, value in whole.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key


def test_a_checkpoint_of_other_work_or_a_damaged_one_is_not_used(tmp_path: Path) -> None:
    path = tmp_path / "at.pt"
    Checkpoint(path, "this").save({"step": 3})
    assert Checkpoint(path, "this").load() == {"step": 3}
    assert Checkpoint(path, "that").load() is None
    path.write_bytes(path.read_bytes()[:-40])
    assert Checkpoint(path, "this").load() is None
    Checkpoint(path, "this").remove()
    assert Checkpoint(path, "this").load() is None


class _Steps(Reporter):
    """Notes by how much the work advances."""

    def __init__(self) -> None:
        self.counts: list[int] = []

    @contextmanager
    def step(self, title: str, total: int) -> Iterator[Any]:
        yield self

    def advance(self, count: int = 1, note: str = "") -> None:
        self.counts.append(count)


def _net_with_chance() -> nn.Sequential:
    net = _net()
    net.insert(4, nn.Dropout(0.3))
    return net


def test_a_limit_of_time_takes_fewer_steps_and_keeps_what_was_learnt(data: Dataset) -> None:
    seen: list[float] = []

    class Watch:
        def step(self, step: int, loss: float, learning_rate: float) -> None:
            seen.append(learning_rate)

        def epoch(self, epoch: int, loss: float, score: float, best: bool) -> None:
            pass

    history = fit(_net(), data, SPEC, FitConfig(50, 16, 1e-2), observer=Watch(), seconds=1e-9)
    assert len(seen) == 1
    assert len(history.choose_accuracy) == 1
    assert history.stopped == "1 of 200 steps fitted into the time that was given"


def test_shortened_training_ends_with_a_small_learning_rate(
    data: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Half:
        def __init__(self, seconds: float) -> None:
            self.done = 0

        def fitting(self, left: int) -> int:
            self.done += 1
            return min(left, 30 - self.done) if self.done >= 10 else left

    monkeypatch.setattr(training, "Pace", Half)
    rates: list[float] = []

    class Watch:
        def step(self, step: int, loss: float, learning_rate: float) -> None:
            rates.append(learning_rate)

        def epoch(self, epoch: int, loss: float, score: float, best: bool) -> None:
            pass

    history = fit(_net(), data, SPEC, FitConfig(50, 16, 1e-2), observer=Watch(), seconds=1.0)
    assert len(rates) == 30
    assert rates[-1] < 0.05 * max(rates)
    # Seven whole epochs of four steps, and the half of one.
    assert len(history.choose_accuracy) == 8
