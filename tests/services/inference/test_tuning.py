"""What is measured of a model is chosen well, kept, and found again."""

from __future__ import annotations

import json

import numpy as np
import pytest
import structlog

from pollard.runtime.machine import Machine
from pollard.runtime.sessions import open_session
from pollard.services.inference import tuning
from pollard.services.inference.tuning import (
    Point,
    Tuning,
    Tunings,
    hand_over_seconds,
    measure,
    worth_handing_over_seconds,
)

MACHINE = Machine.detect()


@pytest.mark.parametrize("content", ["{", "[]", '{"a": 1}', '{"a": {"threads": "many"}}'])
def test_a_damaged_file_is_measured_anew(tmp_path, content) -> None:
    path = tmp_path / "tuning.json"
    path.write_text(content)
    tunings = Tunings(MACHINE, path)
    key = tunings.key(b"", "d", "latency")
    kept = tunings.keep(key, Tuning(2, 1, 4, 1e-3, points=(Point(2, 1, 1, 1e3),)))
    assert Tunings(MACHINE, path).find(key) == kept
    assert json.loads(path.read_text()).keys() == {"sha256", key}


def test_a_byte_that_is_another_is_told_or_changes_no_measurement(tmp_path) -> None:
    path = tmp_path / "tuning.json"
    tunings = Tunings(MACHINE, path)
    key = tunings.key(b"", "d", "latency")
    kept = tunings.keep(key, Tuning(2, 1, 4, 1e-3, points=(Point(2, 1, 1, 1e3),)))
    whole = path.read_bytes()
    digits = range(whole.index(b": ") + 3, len(whole))
    for place in range(len(whole)):
        for other in {whole[place] ^ 1, whole[place] ^ 2, 0, *b"09 "} - {whole[place]}:
            path.write_bytes(whole[:place] + bytes([other]) + whole[place + 1 :])
            with structlog.testing.capture_logs() as lines:
                found = Tunings(MACHINE, path).find(key)
            if place in digits:
                assert found is None
            assert found in (kept, None)
            assert [line["path"] for line in lines] == ([] if found else [str(path)])
    # And once it was measured again, nothing more is said.
    kept = Tunings(MACHINE, path).keep(key, kept)
    with structlog.testing.capture_logs() as lines:
        assert Tunings(MACHINE, path).find(key) == kept
    assert not lines


def test_a_measurement_is_of_one_model_one_aim_and_one_kind_of_machine(tmp_path) -> None:
    tunings = Tunings(MACHINE, tmp_path / "new folder" / "tuning.json")
    kept = tunings.keep(tunings.key(b"model", "", "latency"), Tuning(1, 2, 8, 1e-3))
    assert (kept.processor, kept.cores) == (MACHINE.processor, MACHINE.cores)
    assert kept.measured_at > 0
    again = Tunings(MACHINE, tmp_path / "new folder" / "tuning.json")
    assert again.find(again.key(b"model", "", "latency")) == kept
    assert again.find(again.key(b"model", "", "throughput")) is None
    assert again.find(again.key(b"other", "", "latency")) is None


def test_a_file_of_an_earlier_version_is_read(tmp_path) -> None:
    path = tmp_path / "tuning.json"
    old = {"threads": 1, "workers": 2, "joined_batch": 4, "row_seconds": 0.5}
    path.write_text(json.dumps({"k": old}))
    assert Tunings(MACHINE, path).find("k") == Tuning(1, 2, 4, 0.5)


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


class Priced:
    """A session of which every row and every run has its price, on a clock of its own."""

    def __init__(self, clock: list[float], threads: int, run: float, row: float) -> None:
        self.clock = clock
        self.seconds = lambda rows: (run + rows * row) / (1 + 0.5 * (threads - 1))

    def run(self, feeds, outputs=None):
        self.clock[0] += self.seconds(len(feeds["x"]))


@pytest.fixture
def price(monkeypatch):
    """Returns a function that measures a model with such prices, in seconds."""

    def measured(run: float, row: float, **arguments) -> Tuning:
        clock = [0.0]
        # Only what the model takes counts, so that what else this machine does cannot.
        monkeypatch.setattr(tuning.time, "perf_counter", lambda: clock[0])
        monkeypatch.setattr(tuning.time, "thread_time", lambda: clock[0])
        given = {"aim": "latency", "cores": 1, "max_batch": 64, **arguments}
        found = measure(
            lambda threads: Priced(clock, threads, run, row),
            lambda rows: {"x": np.zeros((rows, 4), np.float32)},
            stop=lambda: False,
            **given,
        )
        monkeypatch.undo()
        return found

    return measured


def test_requests_are_joined_where_that_saves_time(price) -> None:
    assert price(0.0, 1e-4).joined_batch == 1
    assert price(1e-4, 1e-5).joined_batch == 64
    assert price(1e-4, 1e-5, max_batch=8).joined_batch == 8


def test_of_batches_that_are_as_fast_the_smallest_is_taken(price) -> None:
    # 8 rows cost 1.9 % more each than one, 16 rows 0.9 % more than 64 do.
    assert price(2e-5, 1e-4, max_batch=64).joined_batch == 16


def test_a_batch_takes_only_so_long(price) -> None:
    slow = price(2e-3, 4e-3)
    assert slow.joined_batch == 2
    assert price(2e-3, 4e-3, aim="throughput").joined_batch == 32
    assert price(0.01, 0.5, aim="throughput").joined_batch == 1


def test_threads_are_as_many_as_answer_soonest_or_most(price) -> None:
    fast = price(0.0, 1e-3, cores=4, max_batch=1)
    assert (fast.threads, fast.workers) == (4, 1)
    assert fast.row_seconds == pytest.approx(1e-3 / 2.5)
    settled = price(0.0, 1e-3, cores=4, max_batch=1, threads=2)
    assert (settled.threads, settled.workers) == (2, 2)
    assert {point.threads for point in settled.points} == {2}
    assert price(0.0, 1e-3, cores=4, max_batch=1, workers=3).workers == 3


def test_what_is_found_holds_on_a_real_session(make_bundle) -> None:
    path = make_bundle(1.0).model_path("cpu-fp32")
    found = measure(
        lambda threads: open_session(path, intra_op_threads=threads),
        lambda rows: {"x": np.zeros((rows, 4), np.float32)},
        aim="throughput",
        cores=2,
        max_batch=8,
        stop=lambda: False,
    )
    assert found is not None
    assert (found.threads, found.workers) in ((1, 2), (2, 1))
    assert found.joined_batch in (1, 2, 4, 8)
    assert {point.rows for point in found.points} == {1, 2, 4, 8}
    assert all(point.rows_per_second > 0 for point in found.points)
    assert len({(p.threads, p.callers, p.rows) for p in found.points}) == len(found.points)


def test_a_run_is_worth_handing_over_from_so_long_on_as_that_takes(monkeypatch) -> None:
    assert hand_over_seconds() > 0
    monkeypatch.setattr(tuning, "hand_over_seconds", lambda: 1e-6)
    few, many = (worth_handing_over_seconds(cores) for cores in (2, 16))
    assert few > many > 1e-6
    # However slow the machine, nothing else waits longer for a run than this.
    monkeypatch.setattr(tuning, "hand_over_seconds", lambda: 1.0)
    assert worth_handing_over_seconds(1) < 1e-3
