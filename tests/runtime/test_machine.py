from __future__ import annotations

import dataclasses

import onnxruntime
import pytest

from pollard.bundle.v1 import bundle_pb2
from pollard.runtime.errors import RequirementsNotMet
from pollard.runtime.machine import Machine, available_memory_bytes, select_variant


@pytest.fixture
def machine() -> Machine:
    return dataclasses.replace(
        Machine.detect(),
        execution_providers=("CPUExecutionProvider",),
        cpu_features=frozenset({"avx2"}),
        onnxruntime="1.31.1",
    )


def _manifest(*variants: tuple[str, dict[str, object]]) -> bundle_pb2.Manifest:
    manifest = bundle_pb2.Manifest()
    for target, needs in variants:
        manifest.variants.add(
            name=target, target=target, requirements=bundle_pb2.Requirements(**needs)
        )
    return manifest


def test_detection_finds_onnxruntime_and_memory():
    found = Machine.detect()
    assert found.onnxruntime == onnxruntime.__version__
    assert "cpu-fp32" in found.targets
    assert 0 < available_memory_bytes() <= found.memory_bytes
    assert found.cores >= 1


def test_the_first_runnable_variant_is_taken(machine):
    manifest = _manifest(("cpu-int8", {"cpu_features": ["avx512_vnni"]}), ("cpu-fp32", {}))
    assert select_variant(manifest, machine).name == "cpu-fp32"
    vnni = dataclasses.replace(machine, cpu_features=frozenset({"avx_vnni"}))
    assert vnni.has_vnni
    assert select_variant(manifest, vnni).name == "cpu-int8"


def test_an_accelerator_comes_before_the_processor(machine):
    manifest = _manifest(("cpu-fp32", {}), ("cuda-fp16", {}))
    cuda = dataclasses.replace(
        machine, execution_providers=("CUDAExecutionProvider", "CPUExecutionProvider")
    )
    assert select_variant(manifest, cuda).name == "cuda-fp16"
    assert select_variant(manifest, machine).name == "cpu-fp32"


@pytest.mark.parametrize(
    ("target", "needs", "words"),
    [
        ("cpu-int8", {"cpu_features": ["avx512_vnni"]}, "avx512_vnni"),
        ("cuda-fp16", {}, "CUDAExecutionProvider"),
        ("cpu-fp32", {"min_onnxruntime": "1.100.0"}, r"1\.100\.0"),
        ("cpu-fp32", {"memory_bytes": 1 << 60}, "memory"),
    ],
)
def test_what_is_missing_is_named(machine, target, needs, words):
    with pytest.raises(RequirementsNotMet, match=words):
        select_variant(_manifest((target, needs)), machine)


def test_versions_are_compared_as_numbers(machine):
    manifest = _manifest(("cpu-fp32", {"min_onnxruntime": "1.9.0"}))
    assert select_variant(manifest, machine).name == "cpu-fp32"
