from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from torch import nn

from pollard.compress import export
from pollard.compress.data import Part
from pollard.compress.equalize import equalize, find_pairs
from pollard.compress.quantize import Prepared, QuantizeConfig, prepare
from pollard.compress.spec import InputSpec
from pollard.runtime.sessions import open_session

SPEC = InputSpec(16, 16, 3, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


Make = Callable[..., tuple[nn.Module, onnx.ModelProto, InputSpec]]


def ready(core: onnx.ModelProto) -> Prepared:
    part = Part("x", export.probe_images(SPEC, 24, seed=5), np.zeros(24, np.int64))
    return prepare(core, SPEC, part, QuantizeConfig())


def answers(model: onnx.ModelProto, inputs: NDArray[np.float32]) -> NDArray[np.float32]:
    session = open_session(export.serialize(model))
    return np.asarray(session.run({export.CORE_INPUT: inputs}, [export.OUTPUT])[export.OUTPUT])


def equalized(prepared: Prepared) -> onnx.ModelProto:
    pairs = find_pairs(prepared.core)
    statistics = prepared.collect({pair.tensor for pair in pairs})
    return equalize(prepared.core, pairs, statistics.channel_peaks)


def test_a_rectified_network_computes_the_same_to_the_bit(
    depthwise_core: Make,
) -> None:
    prepared = ready(depthwise_core(nn.ReLU)[1])
    model = equalized(prepared)
    assert export.serialize(model) != export.serialize(prepared.core)
    inputs = np.random.default_rng(0).standard_normal((8, 3, 16, 16)).astype(np.float32)
    np.testing.assert_array_equal(answers(model, inputs), answers(prepared.core, inputs))


def test_an_upper_bound_cuts_nothing_that_calibration_saw(
    depthwise_core: Make,
) -> None:
    prepared = ready(depthwise_core(nn.ReLU6)[1])
    pairs = find_pairs(prepared.core)
    assert pairs
    assert all(pair.bounded for pair in pairs)
    model = equalized(prepared)
    feeds = prepared.read().get_next()
    assert feeds is not None
    inputs = feeds[export.CORE_INPUT]
    np.testing.assert_array_equal(answers(model, inputs), answers(prepared.core, inputs))


def test_in_front_of_a_depthwise_layer_channels_become_equally_wide(
    depthwise_core: Make,
) -> None:
    prepared = ready(depthwise_core(nn.ReLU)[1])
    groups = {
        node.name: next((a.i for a in node.attribute if a.name == "group"), 1)
        for node in prepared.core.graph.node
    }
    tensors = [p.tensor for p in find_pairs(prepared.core) if groups[p.second] > 1]
    before = prepared.collect(tensors).channel_peaks
    prepared.core = equalized(prepared)
    after = prepared.collect(tensors).channel_peaks
    for tensor in tensors:
        live = before[tensor] > 0
        assert np.ptp(np.log2(before[tensor][live])) > 1.5
        # Powers of two leave a factor of two between the widest and the narrowest.
        assert np.ptp(np.log2(after[tensor][live])) <= 1.0 + 1e-6


def test_layers_whose_output_is_read_twice_are_left_alone() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1)

        def forward(self, x: object) -> object:
            x = self.first(x)
            return x + self.second(x)

    assert find_pairs(ready(export.export_core(Twice().eval(), SPEC)).core) == []


@pytest.mark.parametrize("groups", [1, 2])
def test_grouped_layers_follow_their_own_channels(groups: int) -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3, groups=groups)
    ).eval()
    prepared = ready(export.export_core(net, SPEC))
    assert len(find_pairs(prepared.core)) == 1
    inputs = np.random.default_rng(0).standard_normal((4, 3, 16, 16)).astype(np.float32)
    np.testing.assert_array_equal(
        answers(equalized(prepared), inputs), answers(prepared.core, inputs)
    )
