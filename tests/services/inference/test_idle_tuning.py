"""Revisions are measured when the server has nothing else to do, and never in the way."""

from __future__ import annotations

import asyncio
import threading
from types import MappingProxyType

import numpy as np
import pytest

from pollard.runtime.machine import Machine
from pollard.services.inference import idle_tuning, loader
from pollard.services.inference.description import BundleModel
from pollard.services.inference.engine import Engine, ServedModel
from pollard.services.inference.idle_tuning import wait_seconds
from pollard.services.inference.loader import EngineOptions, Loader
from pollard.services.inference.repository import Limits, ModelRepository, RepositoryModel
from pollard.services.inference.tuning import Tuning, Tunings

MACHINE = Machine.detect()


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(idle_tuning, "_LOOK_SECONDS", 0.01)
    monkeypatch.setattr(idle_tuning, "_FIRST_WAIT_SECONDS", 0.02)


class Bench:
    """An engine and a loader that measures, and what they load."""

    def __init__(self, make_bundle, path, **options) -> None:
        self.engine = Engine()
        self.make_bundle = make_bundle
        self.looks = 0
        self.tunings = Tunings(MACHINE, path)
        self.loader = Loader(
            MACHINE,
            EngineOptions(memory_headroom_bytes=0, **options),
            tunings=self.tunings,
            busy=self.busy,
        )
        self.bundles = {}

    def busy(self) -> bool:
        self.looks += 1
        return self.engine.busy()

    async def load(self, number: int = 1, **bundle):
        made = self.bundles[number] = self.make_bundle(float(number), **bundle)
        return await self.loader.load("adder", number, made.digest, made.size_bytes, made.path)

    def serve(self, revision) -> None:
        number = revision.info.revision
        self.engine.switch(
            ServedModel(
                "adder",
                MappingProxyType({number: revision}),
                MappingProxyType({"production": ((number, 1),)}),
            )
        )

    async def ask(self, value: float = 0.0) -> float:
        revision = self.engine.resolve("adder")
        feeds = {"x": np.full((1, 4), value, np.float32)}
        return float((await self.engine.infer(revision, feeds, revision.info.outputs))["y"][0, 0])

    def find(self, number: int) -> Tuning | None:
        return self.tunings.find(self.tunings.key(b"", self.bundles[number].digest, "throughput"))

    async def close(self) -> None:
        self.loader.close()
        await self.engine.close()


@pytest.fixture
async def bench(make_bundle, tmp_path):
    bench = Bench(make_bundle, tmp_path / "tuning.json")
    yield bench
    await bench.close()


async def until(condition) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.005)


def workers() -> int:
    """Count the threads of revision 1."""
    return sum(thread.name.startswith("adder-1-") for thread in threading.enumerate())


class Held:
    """In place of `measure`: goes on until it is told to stop."""

    def __init__(self) -> None:
        self.begun = 0
        self.open = False

    def __call__(self, open_with, feeds_of, *, stop, **_) -> None:
        self.begun += 1
        self.open = True
        pause = threading.Event()
        while not stop():
            pause.wait(0.005)
        self.open = False


async def test_a_revision_is_measured_after_its_load_and_then_run_so(bench) -> None:
    revision = await bench.load()
    assert bench.find(1) is None
    assert revision.info.tuning is None
    bench.serve(revision)
    await until(lambda: revision.info.tuning is not None)
    found = bench.find(1)
    assert found == revision.info.tuning
    assert revision.joined_batch == found.joined_batch
    assert (revision.workers, revision.info.threads) == (found.workers, found.threads)
    assert await bench.ask(1.0) == 2.0


async def test_a_model_is_measured_once_on_a_kind_of_machine(bench, make_bundle, tmp_path) -> None:
    first = await bench.load()
    await until(lambda: first.info.tuning is not None)
    await first.retire()
    again = Bench(make_bundle, tmp_path / "tuning.json")
    second = await again.load()
    assert second.info.tuning == bench.find(1)
    assert again.loader._tuner._subjects == []
    await second.retire()
    await again.close()


async def test_nothing_is_measured_while_requests_come(bench) -> None:
    revision = await bench.load()
    bench.serve(revision)
    async with asyncio.timeout(30):
        while bench.looks < 30:
            assert await bench.ask(1.0) == 2.0
    assert bench.find(1) is None
    # And once they have ceased:
    await until(lambda: revision.info.tuning is not None)


async def test_nothing_is_measured_while_another_revision_is_loaded(bench, monkeypatch) -> None:
    gate = threading.Event()
    verify = BundleModel.verify

    def slowly(self) -> None:
        verify(self)
        gate.wait(30)

    first = await bench.load(1)
    monkeypatch.setattr(BundleModel, "verify", slowly)
    loading = asyncio.create_task(bench.load(2))
    await until(lambda: bench.loader._loads)
    await asyncio.sleep(0.3)
    assert bench.find(1) is None
    gate.set()
    second = await loading
    await until(lambda: first.info.tuning is not None and second.info.tuning is not None)
    for revision in (first, second):
        await revision.retire()


@pytest.mark.parametrize("by", ["a load", "a request"])
async def test_a_measurement_is_broken_off_and_made_later(bench, monkeypatch, by) -> None:
    held, measure = Held(), idle_tuning.measure
    monkeypatch.setattr(idle_tuning, "measure", held)
    revision = await bench.load()
    bench.serve(revision)
    await until(lambda: held.open)
    assert revision.info.tuning is None
    # Now, for it may be tried again before this test goes on.
    monkeypatch.setattr(idle_tuning, "measure", measure)
    if by == "a request":
        assert await bench.ask(2.0) == 3.0
        await until(lambda: not held.open)
    else:
        # Ready though the measurement would go on for ever.
        other = await bench.load(2)
        await other.retire()
    await until(lambda: revision.info.tuning is not None)


async def test_a_load_gets_the_memory_that_a_measurement_holds(bench, monkeypatch) -> None:
    held = Held()
    monkeypatch.setattr(idle_tuning, "measure", held)
    monkeypatch.setattr(
        loader, "available_memory_bytes", lambda: (1 << 20) if held.open else (1 << 40)
    )
    revision = await bench.load()
    await until(lambda: held.open)
    other = await bench.load(2, memory_bytes=1 << 30)
    for each in (revision, other):
        await each.retire()


async def test_a_model_too_large_to_be_opened_again_is_run_as_it_is(bench, monkeypatch) -> None:
    available = [1 << 40]
    monkeypatch.setattr(loader, "available_memory_bytes", lambda: available[0])
    revision = await bench.load(memory_bytes=1 << 30)
    available[0] = 1 << 30
    (subject,) = bench.loader._tuner._subjects
    await until(lambda: subject.broken_off > 2)
    assert bench.find(1) is None
    await revision.retire()
    await until(lambda: not bench.loader._tuner._tasks)


def test_it_is_tried_less_and_less_often() -> None:
    waits = [idle_tuning.wait_seconds(times) for times in range(100)]
    assert waits[1] == 2 * waits[0]
    assert waits == sorted(waits)
    assert waits[-1] == wait_seconds(10**9) == idle_tuning._LONGEST_WAIT_SECONDS


async def test_a_revision_that_is_freed_is_not_measured(bench, monkeypatch) -> None:
    held = Held()
    monkeypatch.setattr(idle_tuning, "measure", held)
    revision = await bench.load()
    await until(lambda: held.open)
    await revision.retire()
    await until(lambda: not bench.loader._tuner._tasks)
    assert held.begun == 1
    assert bench.find(1) is None


async def test_more_threads_are_taken_beside_requests(bench, monkeypatch) -> None:
    def found(open_with, feeds_of, **_) -> Tuning:
        for threads in (1, 2):
            open_with(threads).run(feeds_of(1))
        return Tuning(2, 1, 4, 1e-6, max_batch=8)

    monkeypatch.setattr(idle_tuning, "measure", found)
    revision = await bench.load()
    bench.serve(revision)
    before = revision.session
    await until(lambda: revision.info.tuning is not None)
    assert revision.session is not before
    assert revision.session.raw.get_session_options().intra_op_num_threads == 2
    assert (revision.info.threads, revision.workers, revision.joined_batch) == (2, 1, 4)
    assert await bench.ask(3.0) == 4.0
    await until(lambda: workers() == 1)


async def test_what_is_set_by_hand_is_not_measured_over(make_bundle, tmp_path) -> None:
    bench = Bench(make_bundle, None, workers=3, joined_batch=2, intra_op_threads=1)
    revision = await bench.load()
    for _ in range(2):
        assert (revision.workers, revision.joined_batch, revision.info.threads) == (3, 2, 1)
        assert set(revision.info.set_by_hand) == {"workers", "joined_batch", "threads"}
        assert workers() == 3
        await until(lambda: revision.info.tuning is not None)
    assert {point.threads for point in revision.info.tuning.points} == {1}
    await revision.retire()
    await bench.close()


async def test_a_measurement_of_other_settings_does_not_count(make_bundle) -> None:
    bench = Bench(make_bundle, None, intra_op_threads=2)
    bundle = bench.make_bundle(1.0)
    key = bench.tunings.key(b"", bundle.digest, "throughput")
    bench.tunings.keep(key, Tuning(1, 2, 8, 1e-5, max_batch=8))
    revision = await bench.load()
    assert bench.bundles[1].digest == bundle.digest
    assert revision.info.threads == 2
    assert revision.info.tuning is None
    await until(lambda: revision.info.tuning is not None)
    assert bench.find(1).threads == 2
    await revision.retire()
    await bench.close()


async def test_a_file_that_has_changed_since_its_load_is_not_measured(
    bench, make_bundle, tmp_path
) -> None:
    folder = tmp_path / "models" / "adder" / "1"
    folder.mkdir(parents=True)
    model = make_bundle(1.0).model_path("cpu-fp32").read_bytes()
    (folder / "model.onnx").write_bytes(model)
    entry = ModelRepository(tmp_path / "models").read("adder")
    source = RepositoryModel(entry, 1, Limits(default_batch_size=8))
    revision = await bench.loader.load_source(source)
    (folder / "model.onnx").write_bytes(make_bundle(2.0).model_path("cpu-fp32").read_bytes())
    await until(lambda: not bench.loader._tuner._tasks)
    assert revision.info.tuning is None
    assert bench.tunings.find(bench.tunings.key(model, "", "throughput")) is None
    await revision.retire()


async def test_without_measurements_nothing_is_measured(make_bundle) -> None:
    bundle = make_bundle(1.0)
    quiet = Loader(MACHINE, EngineOptions(memory_headroom_bytes=0), busy=lambda: False)
    revision = await quiet.load("adder", 1, bundle.digest, bundle.size_bytes, bundle.path)
    await asyncio.sleep(0.05)
    assert revision.info.tuning is None
    await revision.retire()
    quiet.close()


async def test_an_idle_engine_is_not_busy() -> None:
    engine = Engine()
    assert not await asyncio.to_thread(engine.busy)
    await engine.close()


async def test_from_how_long_on_runs_are_handed_over_is_measured_unless_it_was_set(
    make_bundle, monkeypatch
) -> None:
    monkeypatch.setattr(loader, "worth_handing_over_seconds", lambda cores: 1.0)
    bundle = make_bundle(1.0)
    for given, inline in ((None, True), (0.0, False), (2.0, True)):
        options = EngineOptions(memory_headroom_bytes=0, inline_seconds=given)
        loading = Loader(MACHINE, options)
        revision = await loading.load("adder", 1, bundle.digest, bundle.size_bytes, bundle.path)
        work = revision.work({"x": np.zeros((1, 4), np.float32)}, (), 0.0, None)
        assert revision.runs_inline(work) == inline
        await revision.retire()
        loading.close()
