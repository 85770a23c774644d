"""`cuda-fp16` where there is no GPU: what can be said honestly is said, and nothing else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from pollard.compress.devices import PROCESSOR, find_device
from pollard.compress.errors import UsageInvalid
from pollard.compress.pipeline import CompressionResult, compress
from pollard.compress.plan import make_plan
from pollard.compress.progress import Reporter
from pollard.compress.recipe import Recipe
from pollard.runtime.bundle import Bundle
from pollard.runtime.machine import Machine
from pollard.runtime.sessions import compare_golden, open_session

pytestmark = pytest.mark.skipif(
    "CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="CUDA may work here"
)


class Listener(Reporter):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


def _recipe(weights: Path) -> Recipe:
    return Recipe(
        model="zoo:small-cnn-28",
        data="digits",
        weights=str(weights),
        target="cuda-fp16",
        prune=0.6,
        max_drop=10.0,
        epochs=2,
        threads=2,
        calibration_images=64,
    )


@pytest.fixture(scope="module")
def made(
    digits_parent: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[CompressionResult, Path, Listener]:
    out, listener = tmp_path_factory.mktemp("half") / "bundle", Listener()
    return compress(_recipe(digits_parent), out, reporter=listener), out, listener


def test_it_is_said_that_nothing_was_timed(
    made: tuple[CompressionResult, Path, Listener],
) -> None:
    result, out, listener = made
    assert any("nothing is timed" in text for text in listener.said)
    assert "onnxruntime-gpu" in result.report["device"]["why_not"]
    assert result.report["summary"]["speedup"] is None
    page = (out / "report.html").read_text()
    assert "not measured" in page
    assert " µs" not in page


def test_the_manifest_has_accuracy_and_no_latency(
    made: tuple[CompressionResult, Path, Listener],
) -> None:
    _, out, _ = made
    manifest = Bundle.open(out).manifest
    (variant,) = manifest.variants
    assert (variant.name, variant.target) == ("cuda-fp16", "cuda-fp16")
    assert variant.requirements.execution_provider == "CUDAExecutionProvider"
    assert variant.measurement.accuracy.samples == 445
    assert not variant.measurement.latencies
    assert not manifest.parent.latencies
    assert Machine.detect().why_not(variant) is not None


def test_the_file_is_half_as_large_and_its_widths_are_eights(
    made: tuple[CompressionResult, Path, Listener],
) -> None:
    result, _, _ = made
    candidate = result.chosen.candidate
    assert candidate.name == "pruned-fp16"
    assert candidate.size_bytes < 0.6 * 4 * candidate.parameters
    changed = [
        layer["after"]["out_channels"]
        for layer in result.report["layers"]
        if layer["after"]["out_channels"] != layer["before"]["out_channels"]
    ]
    assert changed
    assert all(width % 8 == 0 for width in changed)
    assert candidate.ranges is not None
    assert max(candidate.ranges.values()) < 32752


def test_golden_outputs_leave_room_for_another_order_of_summation(
    made: tuple[CompressionResult, Path, Listener],
) -> None:
    _, out, _ = made
    bundle = Bundle.open(out)
    variant = bundle.variant("cuda-fp16")
    golden = bundle.golden(variant)
    assert golden is not None
    compare_golden(open_session(bundle.model_path(variant)), golden, variant.golden_tolerance)
    span = float(np.ptp(golden.outputs["logits"].astype(np.float64)))
    assert 0.02 * span <= variant.golden_tolerance.absolute * 1.001 < 0.1 * span


def test_a_plan_promises_no_speed(digits_parent: Path) -> None:
    recipe = _recipe(digits_parent)
    plan = make_plan(recipe)
    assert plan.speedups == {}
    assert plan.pruned is not None
    assert plan.pruned.rounding % 8 == 0
    assert any("nothing can be timed here" in line for line in plan.lines(recipe))


def test_8_bits_for_cuda_are_refused_with_the_reason() -> None:
    with pytest.raises(UsageInvalid, match="no 8-bit convolutions"):
        Recipe(model="m", data="d", weights="w", target="cuda-int8")  # type: ignore[arg-type]


@pytest.mark.parametrize("asked", [{"budget": ("latency=0.5",)}, {"search": 3}])
def test_what_needs_times_of_operators_is_refused(asked: dict[str, object]) -> None:
    with pytest.raises(UsageInvalid, match="use prune"):
        Recipe(model="m", data="d", weights="w", target="cuda-fp16", **asked)  # type: ignore[arg-type]


def test_other_targets_are_judged_on_the_processor() -> None:
    machine = Machine.detect()
    device = find_device("cpu-int8", machine)
    assert (device.name, device.timed, device.why_not) == (machine.processor, True, "")
    assert device.batches == PROCESSOR.batches
