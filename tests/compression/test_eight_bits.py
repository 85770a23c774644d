from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from torch import nn

from pollard.compress import export
from pollard.compress.candidates import Tuning, build
from pollard.compress.data import Part
from pollard.compress.eight_bits import ImageJudge, search
from pollard.compress.evaluate import session_predictor, torch_predictor
from pollard.compress.quantize import Prepared, QuantizeConfig, prepare
from pollard.compress.spec import InputSpec
from pollard.compress.tasks.classification import Right
from pollard.runtime.sessions import open_session

SPEC = InputSpec(16, 16, 3, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
IMAGES = export.probe_images(SPEC, 160, seed=5)


class Gate:
    """A real judge of divergence with a gate of its own on it."""

    attainable = True
    unit = "nats"

    def __init__(self, net: nn.Module, core: onnx.ModelProto, max_drop: float) -> None:
        self.max_drop = max_drop
        labels = torch_predictor(net, SPEC)(IMAGES).argmax(axis=1)
        self.part = Part("x/choose", IMAGES, labels)
        raw = export.serialize(export.attach_pixels(core, SPEC))
        self._judge = ImageJudge(raw, self.part, Right(np.ones(len(IMAGES), bool)), 5, 100.0)

    def divergence(self, model: bytes, few: bool = False) -> float:
        return self._judge.divergence(model, few)

    def drop(self, model: bytes) -> float:
        return self._judge.divergence(model)


Nets = Callable[..., tuple[nn.Module, onnx.ModelProto, InputSpec]]


def ready(core: onnx.ModelProto, **config: Any) -> Prepared:
    part = Part("x/train", IMAGES[:96], np.zeros(96, np.int64))
    fields = {"calibration_images": 96, "reduce_range": True, **config}
    return prepare(core, SPEC, part, QuantizeConfig(**fields))


def convolutions(raw: bytes) -> tuple[int, int]:
    """Return how many convolutions have 8-bit weights, and how many float ones."""
    model = onnx.load_from_string(raw)
    makers = {output: node for node in model.graph.node for output in node.output}
    nodes = [node for node in model.graph.node if node.op_type == "Conv"]
    quantized = [n for n in nodes if n.input[1] in makers]
    return len(quantized), len(nodes) - len(quantized)


def test_the_best_way_is_chosen_and_all_that_were_tried_are_told(
    depthwise_core: Nets,
) -> None:
    net, core, _ = depthwise_core(nn.ReLU)
    prepared = ready(core)
    found = search(prepared, Gate(net, core, 1e9))
    trials = {row["name"]: row["divergence"] for row in found.told["trials"]}
    assert found.told["divergence"] == min(trials.values()) < trials["min-max"]
    assert any("equalized" in name for name in trials)
    assert any("biases corrected" in name for name in trials)
    assert found.told["float_layers"] == []
    assert found.told["holds"]


def test_layers_go_back_to_float_until_the_gate_holds_and_say_why(
    depthwise_core: Nets,
) -> None:
    net, core, _ = depthwise_core()
    prepared = ready(core, method="percentile-99.9", equalize=False)
    plain = search(prepared, Gate(net, core, 1e9))
    gate = Gate(net, core, 0.5 * plain.told["divergence"])
    found = search(prepared, gate)
    told = found.told["float_layers"]
    assert found.told["holds"]
    assert found.told["drop"] <= gate.max_drop
    assert 0 < len(told) < 8
    for row in told:
        assert "in 8 bits it alone moves the answers by" in row["why"]
    quantized, floats = convolutions(found.raw)
    assert quantized + floats == 7
    assert floats == len([row for row in told if row["layer"] != "5"])
    open_session(found.raw, target="cpu-int8")


def test_nothing_may_stay_in_float_where_it_is_not_allowed(
    depthwise_core: Nets,
) -> None:
    net, core, _ = depthwise_core()
    prepared = ready(core, method="min-max", float_layers=False)
    found = search(prepared, Gate(net, core, 1e-9))
    assert convolutions(found.raw) == (7, 0)
    assert not found.told["holds"]
    assert "nothing in 8 bits holds" in found.told["notes"][0]


def test_training_is_tried_where_layers_in_float_are_dear(
    depthwise_core: Nets,
) -> None:
    net, core, _ = depthwise_core()
    prepared = ready(core, method="min-max", float_layers=False)
    asked = []

    def train(
        prepared: Prepared, core: onnx.ModelProto, quantized: onnx.ModelProto
    ) -> tuple[onnx.ModelProto, dict[str, Any]]:
        asked.append("QuantizeLinear" in {node.op_type for node in quantized.graph.node})
        return core, {"epochs": 0}

    found = search(prepared, Gate(net, core, 1e-9), train=train)
    assert asked == [True]
    assert any("trained in 8 bits" in row["name"] for row in found.told["trials"])


def test_a_candidate_carries_how_it_was_made(
    depthwise_net: Callable[..., nn.Module], tmp_path: Path
) -> None:
    net = depthwise_net()
    labels = torch_predictor(net, SPEC)(IMAGES).argmax(axis=1)
    part = Part("x/choose", IMAGES, labels)
    tuning = Tuning(part, Right(np.ones(len(IMAGES), bool)), 5, 50.0)
    config = QuantizeConfig(64, reduce_range=True)
    files = build("parent", net, SPEC, tmp_path, part, config, tuning)
    assert [file.quantization is None for file in files] == [True, False]
    told = files[1].quantization
    assert told is not None
    assert told["holds"]
    assert told["drop"] < 50
    right = session_predictor(open_session(files[1].path))(IMAGES).argmax(axis=1) == labels
    assert 100 * (1 - right.mean()) == pytest.approx(told["drop"])
