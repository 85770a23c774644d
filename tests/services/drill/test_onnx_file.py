"""The drill's own ONNX files are what ONNX says that they are."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from pollard.runtime.sessions import open_session
from pollard.services.drill.onnx_file import classifier


def test_onnx_itself_finds_nothing_wrong_with_them() -> None:
    model = onnx.load_from_string(classifier(16, 10, 1.0, seed=0))
    onnx.checker.check_model(model, full_check=True)
    assert [node.op_type for node in model.graph.node][:2] == ["Cast", "Flatten"]
    assert model.opset_import[0].version == 18


@pytest.mark.parametrize("megabytes", [0.1, 1.0, 5.0])
def test_they_are_as_large_as_asked_for(megabytes: float) -> None:
    assert len(classifier(16, 10, megabytes, seed=0)) == pytest.approx(megabytes * 1e6, rel=0.05)


def test_another_seed_gives_other_answers_and_the_same_one_the_same() -> None:
    images = np.random.default_rng(0).integers(0, 256, (8, 16, 16, 1), dtype=np.uint8)
    scores = [
        open_session(classifier(16, 10, 0.5, seed)).run({"image": images})["scores"]
        for seed in (1, 2, 1)
    ]
    assert scores[0].shape == (8, 10)
    assert np.array_equal(scores[0], scores[2])
    assert (np.abs(scores[0] - scores[1]).max(axis=1) > 0.1).all()
    assert 0.5 < scores[0].std() < 10
