from __future__ import annotations

import io

import numpy as np
import pytest
import torch

from pollard.compress import export, quantize
from pollard.compress.data import Part
from pollard.compress.golden import make_golden
from pollard.compress.zoo import find
from pollard.runtime.bundle import Golden
from pollard.runtime.errors import GoldenMismatch
from pollard.runtime.sessions import compare_golden, open_session


def _models() -> dict[str, bytes]:
    entry = find("small-cnn-28")
    torch.manual_seed(0)
    core = export.export_core(entry.build(10), entry.spec)
    images = export.probe_images(entry.spec, 32, seed=9)
    part = Part("synthetic/train", images, np.zeros(32, np.int64))
    quantized = quantize.quantize(core, entry.spec, part, quantize.QuantizeConfig())
    return {
        "cpu-fp32": export.serialize(export.attach_pixels(core, entry.spec)),
        "cpu-int8": export.serialize(quantized),
    }


@pytest.fixture(scope="module")
def models() -> dict[str, bytes]:
    return _models()


@pytest.mark.parametrize("target", ["cpu-fp32", "cpu-int8"])
def test_golden_outputs_hold_and_notice_another_model(
    models: dict[str, bytes], target: str
) -> None:
    spec = find("small-cnn-28").spec
    session = open_session(models[target], target=target)
    raw, tolerance = make_golden(session, models[target], spec)
    with np.load(io.BytesIO(raw)) as archive:
        golden = Golden({"image": archive["input/image"]}, {"logits": archive["output/logits"]})
    compare_golden(session, golden, tolerance)
    wrong = Golden(golden.inputs, {"logits": golden.outputs["logits"][:, ::-1]})
    with pytest.raises(GoldenMismatch):
        compare_golden(session, wrong, tolerance)


def test_golden_files_are_the_same_every_time(models: dict[str, bytes]) -> None:
    spec = find("small-cnn-28").spec
    session = open_session(models["cpu-int8"], target="cpu-int8")
    one, other = (make_golden(session, models["cpu-int8"], spec)[0] for _ in range(2))
    assert one == other
