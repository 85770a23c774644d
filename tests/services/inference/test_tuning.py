"""What is measured of a model is kept, found again, and never in the way."""

import asyncio
import json
import threading

import numpy as np
import pytest

from pollard.runtime.machine import Machine
from pollard.runtime.sessions import open_session
from pollard.services.inference.engine import Engine, ServedModel
from pollard.services.inference.loader import EngineOptions, Loader
from pollard.services.inference.tuning import Tuning, Tunings, measure

MACHINE = Machine.detect()
OPTIONS = EngineOptions(memory_headroom_bytes=0)


async def load(bundle, loader):
    return await loader.load("adder", 1, bundle.digest, bundle.size_bytes, bundle.path)


async def test_a_model_is_measured_once_on_a_kind_of_machine(make_bundle, tmp_path) -> None:
    bundle, path = make_bundle(1.0), tmp_path / "tuning.json"
    asked: list[int] = []

    def busy() -> bool:
        asked.append(threading.get_ident())
        return False

    for _ in range(2):
        loader = Loader(MACHINE, OPTIONS, tunings=Tunings(MACHINE, path), busy=busy)
        revision = await load(bundle, loader)
        found = Tunings(MACHINE, path).find(b"", bundle.digest, "throughput")
        assert found is not None
        assert revision.joined_batch == min(found.joined_batch, revision.info.max_batch_size)
        measured = len(asked)
        await revision.retire()
        loader.close()
    assert measured == len(asked)
    assert threading.get_ident() not in asked
    assert Tunings(MACHINE, path).find(b"", bundle.digest, "latency") is None


async def test_nothing_is_measured_while_requests_come(make_bundle, tmp_path) -> None:
    bundle, path = make_bundle(1.0), tmp_path / "tuning.json"
    engine = Engine()
    loader = Loader(MACHINE, OPTIONS, tunings=Tunings(MACHINE, path), busy=engine.busy)
    first = await load(bundle, loader)
    assert path.exists()
    engine.switch(ServedModel("adder", {1: first}, {"production": ((1, 1),)}))
    assert not engine.busy()
    await engine.infer(
        engine.resolve("adder"), {"x": np.zeros((1, 4), np.float32)}, first.info.outputs
    )
    assert engine.busy()
    other = make_bundle(2.0)
    second = await load(other, loader)
    assert Tunings(MACHINE, path).find(b"", other.digest, "throughput") is None
    await second.retire()
    await engine.close()
    loader.close()


@pytest.mark.parametrize("content", ["{", "[]", '{"a": 1}', '{"a": {"threads": "many"}}'])
async def test_a_damaged_file_is_measured_anew(make_bundle, tmp_path, content) -> None:
    path = tmp_path / "tuning.json"
    path.write_text(content)
    tunings = Tunings(MACHINE, path)
    tunings.keep(b"", "d", "latency", Tuning(2, 1, 4, 1e-3))
    assert Tunings(MACHINE, path).find(b"", "d", "latency") == Tuning(2, 1, 4, 1e-3)
    assert len(json.loads(path.read_text())) == 1


async def test_what_is_set_by_hand_is_not_measured_over(make_bundle, tmp_path) -> None:
    bundle = make_bundle(1.0)
    tunings = Tunings(MACHINE)
    tunings.keep(b"", bundle.digest, "throughput", Tuning(1, 2, 8, 1e-5))
    options = EngineOptions(memory_headroom_bytes=0, workers=3, joined_batch=2)
    loader = Loader(MACHINE, options, tunings=tunings, busy=lambda: False)
    revision = await load(bundle, loader)
    assert revision.joined_batch == 2
    names = [thread.name for thread in threading.enumerate()]
    assert sum(name.startswith("adder-1-") for name in names) == 3
    await revision.retire()
    loader.close()


def test_a_measurement_gives_up_at_once_when_told_to(make_bundle) -> None:
    session = open_session(make_bundle(1.0).model_path("cpu-fp32"))
    turns = iter([False, False, True, True, True])
    found = measure(
        lambda threads: session,
        lambda rows: {"x": np.zeros((rows, 4), np.float32)},
        aim="throughput",
        cores=2,
        max_batch=8,
        stop=lambda: next(turns),
    )
    assert found is None


async def test_an_idle_engine_is_not_busy() -> None:
    engine = Engine()
    assert not await asyncio.to_thread(engine.busy)
    await engine.close()
