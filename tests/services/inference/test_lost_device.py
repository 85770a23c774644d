"""A GPU that fails or goes away: what requests, readiness, health and the manager are told."""

from __future__ import annotations

import asyncio
import dataclasses
from types import MappingProxyType

import grpc
import numpy as np
import onnxruntime
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from pollard.inference import grpc_service_pb2 as pb
from pollard.models.v1 import fleet_service_pb2 as fleet_pb
from pollard.runtime.device_errors import DeviceState
from pollard.runtime.device_session import DeviceSession, Instance
from pollard.runtime.machine import Machine
from pollard.runtime.sessions import TensorInfo
from pollard.runtime.staging import PageableStaging
from pollard.services.inference import devices
from pollard.services.inference.config import config_of
from pollard.services.inference.description import ModelDescription, Outline
from pollard.services.inference.engine import Engine, ServedModel
from pollard.services.inference.errors import DeviceFailed, MemoryShort, ModelNotReady
from pollard.services.inference.loader import EngineOptions, Loader
from pollard.services.inference.main import build_standalone_server
from pollard.services.inference.methods import Call, ProtocolMethods
from pollard.services.inference.revision import LoadedRevision, RevisionInfo
from pollard.services.inference.settings import InferenceSettings
from pollard.services.inference.shared_memory import SharedMemory
from pollard.services.inference.sync import InferenceMember

LOST = "CUDA failure 719: unspecified launch failure ; GPU=0 ; hostname=h"
FULL = "CUDA failure 2: out of memory ; GPU=0 ; hostname=h"


class Raw:
    """A real session that can be told to fail as a GPU's would."""

    def __init__(self, model: bytes) -> None:
        self._session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
        self.fails = ""

    def __getattr__(self, name: str):
        return getattr(self._session, name)

    def run_with_iobinding(self, binding, options=None):
        if self.fails:
            raise RuntimeError(self.fails)
        self._session.run_with_iobinding(binding, options)


class Loaded:
    """A revision on a device in whose place the processor is."""

    def __init__(self, model: str, raw: Raw) -> None:
        self.raw = raw
        session = DeviceSession(
            [Instance(raw, DeviceState(0), PageableStaging(), device="cpu")], "cuda-fp16"
        )
        assert session.batch_up_to(8)
        tensor = TensorInfo("x", "FP32", (-1, 4))
        info = RevisionInfo(
            model=model,
            revision=1,
            digest="",
            size_bytes=1,
            variant="cuda-fp16",
            target="cuda-fp16",
            inputs=(tensor,),
            outputs=(dataclasses.replace(tensor, name="y"),),
            max_batch_size=8,
        )
        self.revision = LoadedRevision(info, session, workers=1, joined_batch=8, max_queue=64)


def served(name: str, revision: LoadedRevision) -> ServedModel:
    return ServedModel(
        name, MappingProxyType({1: revision}), MappingProxyType({"production": ((1, 1),)})
    )


@pytest.fixture
async def engine(make_bundle):
    """An engine with two models, each on a GPU of its own; yields it and their sessions."""
    engine = Engine()
    bundle = make_bundle(1.0)
    raws = {}
    for name in ("one", "two"):
        loaded = Loaded(name, Raw(bundle.model_path("cpu-fp32").read_bytes()))
        raws[name] = loaded.raw
        engine.switch(served(name, loaded.revision))
    yield engine, raws
    for raw in raws.values():
        raw.fails = ""
    await engine.close()


async def ask(engine: Engine, model: str, rows: int = 1) -> np.ndarray:
    revision = engine.resolve(model)
    feeds = {"x": np.full((rows, 4), 2, np.float32)}
    return (await engine.infer(revision, feeds, revision.info.outputs))["y"]


class Everything:
    """A catalogue that is ready."""

    ready = True


def methods(engine: Engine) -> ProtocolMethods:
    return ProtocolMethods(engine, Everything(), SharedMemory(enabled=False))


async def ready(engine: Engine, model: str = "") -> bool:
    protocol = methods(engine)
    if not model:
        return (await protocol.server_ready(pb.ServerReadyRequest(), Call())).ready
    return (await protocol.model_ready(pb.ModelReadyRequest(name=model), Call())).ready


async def test_a_lost_gpu_is_told_and_other_models_serve_on(engine) -> None:
    engine, raws = engine
    told = asyncio.Event()
    engine.on_lost = told.set
    assert (await ask(engine, "one") == 3).all()
    raws["one"].fails = LOST
    with pytest.raises(DeviceFailed, match="unspecified launch failure") as caught:
        await ask(engine, "one")
    assert caught.value.reason == "DEVICE_LOST"
    await asyncio.wait_for(told.wait(), 30)
    assert (await ready(engine), await ready(engine, "one"), await ready(engine, "two")) == (
        True,
        False,
        True,
    )
    with pytest.raises(ModelNotReady, match="its GPU is lost"):
        engine.resolve("one", "1")
    assert (await ask(engine, "two") == 3).all()
    assert not engine.lost
    told.clear()
    raws["two"].fails = LOST
    with pytest.raises(DeviceFailed):
        await ask(engine, "two")
    await asyncio.wait_for(told.wait(), 30)
    assert engine.lost
    assert not await ready(engine)


async def test_every_request_of_a_batch_learns_that_the_gpu_is_lost(engine) -> None:
    engine, raws = engine
    raws["one"].fails = LOST
    answers = await asyncio.gather(*(ask(engine, "one") for _ in range(20)), return_exceptions=True)
    assert {type(each) for each in answers} <= {DeviceFailed, ModelNotReady}


async def test_a_full_gpu_fails_the_request_and_nothing_else(engine) -> None:
    engine, raws = engine
    raws["one"].fails = FULL
    with pytest.raises(DeviceFailed, match="not enough free memory") as caught:
        await ask(engine, "one")
    assert caught.value.reason == "DEVICE_MEMORY_SHORT"
    assert await ready(engine, "one")
    raws["one"].fails = ""
    assert (await ask(engine, "one") == 3).all()


async def test_a_gpu_is_shown_in_the_configuration(engine) -> None:
    engine, _ = engine
    (group,) = config_of(engine.resolve("one")).instance_group
    assert group.Kind.Name(group.kind) == "KIND_GPU"


def outline(**fields: object) -> Outline:
    given = {"model": "m", "version": 1, "target": "cuda-fp16", "size_bytes": 1, **fields}
    return Outline(model_file=b"x" * (10 << 20), **given)


def test_memory_is_refused_before_anything_is_loaded(monkeypatch) -> None:
    monkeypatch.setattr(devices.cuda, "require", lambda *_: None)
    free = 1 << 30
    monkeypatch.setattr(devices.cuda, "memory", lambda _: (free, 1 << 34))
    options = EngineOptions(device_headroom_bytes=256 << 20)
    devices.check_device_memory(options, outline())
    with pytest.raises(MemoryShort, match="828 MiB of GPU 0, and 768 of 16384"):
        devices.check_device_memory(options, outline(workers=6))
    with pytest.raises(MemoryShort, match="828 MiB"):
        devices.check_device_memory(options, outline(), copies=3)
    with pytest.raises(MemoryShort, match="GPU 1"):
        devices.check_device_memory(options, outline(devices=(0, 1, 1), needed_bytes=400 << 20))
    limited = dataclasses.replace(
        options, cuda=dataclasses.replace(options.cuda, memory_limit_bytes=19 << 20)
    )
    with pytest.raises(MemoryShort, match="--gpu-memory-limit allows 19 MiB"):
        devices.check_device_memory(limited, outline())


def test_memory_that_is_short_in_the_first_runs_ends_the_load(session_in_loading) -> None:
    session, raw, description = session_in_loading
    raw.fails = FULL
    with pytest.raises(MemoryShort, match="a batch of 8 does not fit into the memory of the GPU"):
        devices.warm_on_device(session, description, lambda: None)


@pytest.fixture
def session_in_loading(make_bundle):
    raw = Raw(make_bundle(1.0).model_path("cpu-fp32").read_bytes())
    session = DeviceSession(
        [Instance(raw, DeviceState(0), PageableStaging(), device="cpu")], "cuda-fp16"
    )
    tensor = TensorInfo("x", "FP32", (-1, 4))
    return session, raw, ModelDescription((tensor,), (dataclasses.replace(tensor, name="y"),), 8)


async def health(address: str) -> int:
    async with grpc.aio.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        return (await stub.Check(health_pb2.HealthCheckRequest(), timeout=30)).status


@pytest.mark.parametrize("frontend", ["grpcio", "core"])
async def test_health_says_when_nothing_can_run_any_more(tmp_path, make_bundle, frontend) -> None:
    (tmp_path / "models").mkdir()
    server = build_standalone_server(
        InferenceSettings(
            port=0, repository=tmp_path / "models", frontend=frontend, cache_dir=tmp_path / "cache"
        )
    )
    await server.start()
    try:
        serving = health_pb2.HealthCheckResponse
        while await health(server.address) != serving.SERVING:
            await asyncio.sleep(0.02)
        loaded = Loaded("one", Raw(make_bundle(1.0).model_path("cpu-fp32").read_bytes()))
        server.engine.switch(served("one", loaded.revision))
        loaded.raw.fails = LOST
        with pytest.raises(DeviceFailed):
            await ask(server.engine, "one")
        while await health(server.address) != serving.NOT_SERVING:
            await asyncio.sleep(0.02)
        # What still runs is worth to be sent requests.
        other = Loaded("two", Raw(make_bundle(2.0).model_path("cpu-fp32").read_bytes()))
        server.engine.switch(served("two", other.revision))
        while await health(server.address) != serving.SERVING:
            await asyncio.sleep(0.02)
        assert (await ask(server.engine, "two") == 4).all()
    finally:
        await server.stop(1.0)


async def test_the_manager_is_told_that_the_revision_failed(engine, make_bundle) -> None:
    engine, raws = engine
    loader = Loader(Machine.detect(), EngineOptions(inline_seconds=0.0))
    told = asyncio.Event()
    member = InferenceMember(engine, loader, told.set)
    engine.on_lost = member.devices_changed
    raws["one"].fails = LOST
    with pytest.raises(DeviceFailed):
        await ask(engine, "one")
    await asyncio.wait_for(told.wait(), 30)
    (status,) = member.statuses()
    assert (status.model, status.state) == ("one", fleet_pb.REVISION_STATE_FAILED)
    assert "its GPU is lost" in status.error.message
    await member.close()
