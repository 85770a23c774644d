"""Loading onto a GPU, with the processor in its place: where models go, and what is warm."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from pollard.runtime.bundle import Bundle, write_bundle
from pollard.runtime.cuda import CudaOptions, Device
from pollard.runtime.device_errors import DeviceState
from pollard.runtime.device_session import DeviceSession, Instance
from pollard.runtime.errors import GoldenMismatch
from pollard.runtime.machine import Machine
from pollard.runtime.staging import PageableStaging
from pollard.services.inference import devices, loader, repository
from pollard.services.inference.engine import Engine, ServedModel
from pollard.services.inference.errors import LoadRefused
from pollard.services.inference.loader import EngineOptions, Loader
from pollard.services.inference.repository import Limits, RepositoryModel, read_folder
from pollard.services.inference.tuning import Tunings

GPU = dataclasses.replace(
    Machine.detect(), execution_providers=("CUDAExecutionProvider", "CPUExecutionProvider")
)


@pytest.fixture
def opened(monkeypatch) -> list[tuple[DeviceSession, CudaOptions]]:
    """Models are opened on the processor in place of the GPU; returns what was opened."""
    found: list[tuple[DeviceSession, CudaOptions]] = []

    def open_session(model, *, target, intra_op_threads, spinning, cuda):
        assert target == "cuda-fp16"
        state = DeviceState(0)
        instances = [
            Instance(
                onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"]),
                state,
                PageableStaging(),
                device="cpu",
            )
            for _ in cuda.placed
        ]
        found.append((DeviceSession(instances, target), cuda))
        return found[-1][0]

    monkeypatch.setattr(loader, "open_session", open_session)
    monkeypatch.setattr(devices.cuda, "require", lambda *_: None)
    monkeypatch.setattr(devices.cuda, "memory", lambda _: (1 << 34, 1 << 34))
    return found


def for_gpu(bundle: Bundle, folder: Path) -> Bundle:
    """The same bundle, whose variant is one for GPUs."""
    manifest = bundle.manifest
    variant = manifest.variants[0]
    variant.target = variant.name = "cuda-fp16"
    files = {name: bundle.path / name for name in (variant.model_file, variant.golden_file)}
    return write_bundle(folder, manifest, {**files, "labels.txt": bundle.path / "labels.txt"})


async def load(bundle: Bundle, tmp_path: Path, **options: object):
    machine_loader = Loader(
        GPU, EngineOptions(**options), tunings=Tunings(GPU, tmp_path / "tuning.json")
    )
    try:
        return await machine_loader.load("adder", 1, bundle.digest, 1, bundle.path)
    finally:
        machine_loader.close()


async def test_a_revision_on_a_gpu_is_warm_joined_and_answers(
    make_bundle, tmp_path, opened
) -> None:
    revision = await load(for_gpu(make_bundle(1.0), tmp_path / "gpu"), tmp_path)
    session, _ = opened[0]
    assert (revision.workers, len(session.instances)) == (2, 2)
    assert revision.joined_batch == 8
    assert revision.info.target == "cuda-fp16"
    assert session.stages
    for instance in session.instances:
        assert sorted(instance._buckets) == [1, 2, 4, 8]
    engine = Engine()
    engine.switch(ServedModel("adder", {1: revision}, {"production": ((1, 1),)}))
    feeds = {"x": np.full((3, 4), 2, np.float32)}
    answer = await engine.infer(engine.resolve("adder"), feeds, revision.info.outputs)
    assert (answer["y"] == 3).all()
    await engine.close()
    # Freed with the revision.
    assert all(instance.raw is None for instance in session.instances)


async def test_what_is_set_by_hand_goes_before(make_bundle, tmp_path, opened) -> None:
    revision = await load(
        for_gpu(make_bundle(1.0), tmp_path / "gpu"),
        tmp_path,
        workers=3,
        joined_batch=4,
        cuda=CudaOptions(device_id=0, memory_limit_bytes=1 << 30, graphs=True),
    )
    assert (revision.workers, revision.joined_batch) == (3, 4)
    assert opened[0][1] == CudaOptions(instances=3, memory_limit_bytes=1 << 30, graphs=True)
    await revision.retire()


async def test_a_refused_revision_is_freed_at_once(make_bundle, tmp_path, opened) -> None:
    bundle = make_bundle(1.0)
    wrong = make_bundle(2.0)
    files = {
        "cpu-fp32/model.onnx": wrong.path / "cpu-fp32/model.onnx",
        "cpu-fp32/golden.npz": bundle.path / "cpu-fp32/golden.npz",
        "labels.txt": bundle.path / "labels.txt",
    }
    manifest = bundle.manifest
    manifest.variants[0].target = "cuda-fp16"
    with pytest.raises(GoldenMismatch):
        await load(write_bundle(tmp_path / "wrong", manifest, files), tmp_path)
    assert all(instance.raw is None for instance in opened[0][0].instances)


def placed(folder: Path, config: str, machine: Machine = GPU) -> tuple[str, tuple[int, ...], int]:
    (folder / "1").mkdir(parents=True, exist_ok=True)
    (folder / "1" / "model.onnx").write_bytes(b"")
    (folder / "config.pbtxt").write_text(config)
    model = RepositoryModel(read_folder("m", folder), 1, Limits())
    outline = model.outline(machine)
    return outline.target, outline.devices, outline.workers


def test_instance_groups_say_where_a_model_runs(tmp_path, monkeypatch) -> None:
    both = (Device(0, "a", 1), Device(1, "b", 1))
    monkeypatch.setattr(repository.cuda, "devices", lambda: both)
    for config, wanted in (
        ("", ("cuda-fp16", (), 0)),
        ("instance_group { kind: KIND_CPU count: 3 }", ("cpu-fp32", (), 3)),
        ("instance_group { kind: KIND_GPU count: 3 }", ("cuda-fp16", (), 3)),
        (
            "instance_group { kind: KIND_GPU count: 2 gpus: [0, 1] }",
            ("cuda-fp16", (0, 0, 1, 1), 4),
        ),
    ):
        assert placed(tmp_path / "m", config) == wanted
    with pytest.raises(LoadRefused, match=r"gpu id 2\. GPUs available: 0, 1"):
        placed(tmp_path / "m", "instance_group { kind: KIND_GPU gpus: [2] }")


def test_a_server_for_one_kind_refuses_the_other(tmp_path) -> None:
    gpu_alone = dataclasses.replace(GPU, execution_providers=("CUDAExecutionProvider",))
    processor = dataclasses.replace(GPU, execution_providers=("CPUExecutionProvider",))
    with pytest.raises(LoadRefused, match="--provider auto"):
        placed(tmp_path / "m", "instance_group { kind: KIND_CPU }", gpu_alone)
    with pytest.raises(LoadRefused, match="no GPUs are available"):
        placed(tmp_path / "m", "instance_group { kind: KIND_GPU }", processor)
    assert placed(tmp_path / "m", "", processor)[0] == "cpu-fp32"
    tensorrt = dataclasses.replace(GPU, execution_providers=("TensorrtExecutionProvider",))
    assert placed(tmp_path / "m", "", tensorrt)[0] == "tensorrt-int8"
