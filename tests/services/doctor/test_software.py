"""What doctor says of Python, packages and ONNX Runtime."""

from __future__ import annotations

from typing import Any

import pytest

from pollard.runtime import cuda
from pollard.services.doctor import software
from pollard.services.doctor.findings import State

ALIKE = {"pollard-runtime": "0.1.0", "pollard-services": "0.1.0", "grpcio": "1.85.1"}


def runs(_: str) -> None:
    """A model runs, wherever."""


def states(findings: Any) -> dict[str, State]:
    return {finding.subject: finding.state for finding in findings}


def test_an_old_python_is_bad() -> None:
    (finding, *_) = software.python((3, 10, 4))
    assert finding.state is State.BAD
    assert "3.11" in finding.cure


def test_this_python_is_good() -> None:
    assert set(states(software.python()).values()) == {State.GOOD}


def test_packages_of_different_versions_are_bad() -> None:
    (first, *_) = software.packages({**ALIKE, "pollard-client": "0.2.0"})
    assert first.state is State.BAD
    assert "pollard-runtime==0.2.0" in first.cure


def test_extras_are_noted_with_their_use() -> None:
    found = {finding.subject: finding for finding in software.packages(ALIKE)}
    assert found["Pollard"].state is State.GOOD
    assert found["extras"].state is State.NOTE
    assert "pollard-services[s3]" in found["extras"].found


def test_both_kinds_of_onnxruntime_are_bad() -> None:
    versions = {"onnxruntime": "1.31.1", "onnxruntime-gpu": "1.31.1"}
    (first, *_) = software.onnxruntime(versions, "cpu", runs)
    assert first.state is State.BAD
    assert "uninstall" in first.cure


def test_a_model_that_does_not_run_is_bad() -> None:
    def fails(_: str) -> None:
        raise RuntimeError("no such kernel\nand more")

    (finding,) = software.onnxruntime({}, "cpu", fails)
    assert (finding.state, finding.found) == (State.BAD, "no such kernel")


def facts(**found: Any) -> cuda.Facts:
    return cuda.Facts("1.31.1", ("CUDAExecutionProvider",), "13.0", **found)


@pytest.mark.parametrize(
    ("found", "provider", "state", "words"),
    [
        (facts(driver_problem="libcuda.so.1 is not there"), "auto", State.GOOD, "none here"),
        (facts(driver_problem="libcuda.so.1 is not there"), "cuda", State.BAD, "driver"),
        (facts(driver_cuda=12040, driver="550.1"), "auto", State.NOTE, "too old"),
        (facts(driver_cuda=12040, driver="550.1"), "cuda", State.BAD, "too old"),
        (facts(driver_cuda=13000, missing=("libcudnn.so.9",)), "cuda", State.BAD, "libcudnn.so.9"),
        (facts(driver_cuda=13000), "cuda", State.BAD, "no GPU"),
    ],
)
def test_a_gpu_is_missed_only_where_it_is_wanted(
    monkeypatch: pytest.MonkeyPatch, found: cuda.Facts, provider: Any, state: State, words: str
) -> None:
    monkeypatch.setattr(cuda, "look", lambda: found)
    finding = list(software.onnxruntime({}, provider, runs))[-1]
    assert finding.state is state
    assert words in finding.found
    assert finding.cure or state is State.GOOD


def test_a_gpu_is_named_and_a_model_run_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    device = cuda.Device(0, "NVIDIA H200", 141 << 30)
    monkeypatch.setattr(
        cuda, "look", lambda: facts(driver_cuda=13000, driver="580.1", devices=(device,))
    )
    targets: list[str] = []
    found = list(software.onnxruntime({}, "auto", targets.append))
    assert targets == ["cpu-fp32", "cuda-fp16"]
    assert "NVIDIA H200, 141 GiB" in found[1].found
    assert {each.state for each in found} == {State.GOOD}
