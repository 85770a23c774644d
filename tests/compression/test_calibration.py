from __future__ import annotations

import numpy as np
import pytest
from torch import nn

from pollard.compress import export
from pollard.compress.calibration import METHODS, Histogram, collect, observable
from pollard.compress.data import Part
from pollard.compress.errors import QuantizeFailed
from pollard.compress.quantize import QuantizeConfig, prepare
from pollard.compress.spec import InputSpec

SPEC = InputSpec(16, 16, 3, (0.5,) * 3, (0.25,) * 3)


def filled(values: np.ndarray, pieces: int = 1) -> Histogram:
    made = Histogram()
    for piece in np.array_split(values.astype(np.float32), pieces):
        made.add(piece)
    return made


@pytest.mark.parametrize("percent", [99.9, 99.99])
def test_percentiles_are_those_of_all_values(percent: float) -> None:
    values = np.random.default_rng(0).standard_normal(1_000_000)
    cut = (100 - percent) / 2
    wanted = np.percentile(values, [cut, 100 - cut])
    got = filled(values, 17).range(f"percentile-{percent}")  # type: ignore[arg-type]
    np.testing.assert_allclose(got, wanted, rtol=0.05)


def test_ends_are_exact_and_hold_zero() -> None:
    made = filled(np.array([3.0, 7.25, 1.0]))
    assert made.range("min-max") == (0.0, 7.25)
    assert filled(np.array([-2.5, -1.0])).range("min-max") == (-2.5, 0.0)


def test_growing_values_do_not_lose_those_counted_before() -> None:
    values = np.concatenate([np.full(1000, 0.9), np.full(1000, 1000.0)])
    low, high = filled(values, 2).range("percentile-99.9")
    assert (low, high) == pytest.approx((0.0, 1000.0), rel=0.01)


def squared_error(values: np.ndarray, bounds: tuple[float, float]) -> float:
    step = (bounds[1] - bounds[0]) / 255
    zero = round(-bounds[0] / step)
    rounded = (np.clip(np.round(values / step) + zero, 0, 255) - zero) * step
    return float(((values - rounded) ** 2).mean())


@pytest.mark.parametrize("shape", ["laplace", "uniform", "rectified"])
def test_the_least_error_is_no_larger_than_that_of_any_other_way(shape: str) -> None:
    generator = np.random.default_rng(1)
    values = {
        "laplace": generator.laplace(size=100_000),
        "uniform": generator.uniform(-1, 1, 100_000),
        "rectified": np.maximum(generator.standard_normal(100_000), 0),
    }[shape]
    made = filled(values)
    errors = {method: squared_error(values, made.range(method)) for method in METHODS}
    assert errors["mse"] <= 1.05 * min(errors.values())
    if shape == "laplace":
        assert errors["mse"] < 0.9 * errors["min-max"]


@pytest.mark.parametrize("method", METHODS)
def test_a_tensor_of_zeros_has_a_range(method: str) -> None:
    assert filled(np.zeros(10)).range(method) == (0.0, 0.0)  # type: ignore[arg-type]


def test_values_that_are_not_finite_are_named() -> None:
    with pytest.raises(QuantizeFailed, match="not finite"):
        filled(np.array([1.0, np.nan]))


def test_what_a_rectifier_alone_reads_is_not_kept_and_channels_are_told_apart() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    part = Part("x", export.probe_images(SPEC, 6), np.zeros(6, np.int64))
    prepared = prepare(export.export_core(net, SPEC), SPEC, part, QuantizeConfig())
    names = observable(prepared.core)
    assert len(names) == 3  # the input, the rectified, the output
    before = prepared.core.SerializeToString(deterministic=True)
    statistics = collect(prepared.core, prepared.read(), names[1:2])
    assert statistics.images == 6
    assert statistics.channel_peaks[names[1]].shape == (8,)
    peak = statistics.channel_peaks[names[1]].max()
    assert peak == pytest.approx(statistics.histograms[names[1]].high)
    assert prepared.core.SerializeToString(deterministic=True) == before


def test_without_images_there_is_an_error() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3)).eval()
    part = Part("x", np.zeros((0, 16, 16, 3), np.uint8), np.zeros(0, np.int64))
    prepared = prepare(export.export_core(net, SPEC), SPEC, part, QuantizeConfig())
    with pytest.raises(QuantizeFailed, match="no images"):
        prepared.collect()
