from __future__ import annotations

import itertools
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from pollard.compress.errors import PruneFailed, UsageInvalid
from pollard.compress.kernels import Kernel
from pollard.compress.latency import LatencyTable
from pollard.compress.pipeline import compress
from pollard.compress.progress import Reporter
from pollard.compress.recipe import Recipe
from pollard.compress.search import Found, Outcome, Point, Trial, choose, front, search, window
from pollard.compress.trials import Processes


def outcome(latency: float, drop: float) -> Outcome:
    return Outcome("pruned-fp32", latency, drop, 10, 10, 0.0)


def trial(number: int, latency: float, drop: float | None) -> Trial:
    found = None if drop is None else outcome(latency, drop)
    return Trial(number, Point(latency, "l2", True), found, "" if found else "too far")


def made_up(point: Point) -> Outcome:
    """Loses more the faster it is, and more with l1 than with the others."""
    if point.latency < 0.12:
        raise PruneFailed("too far")
    return outcome(point.latency, (1 / point.latency - 1) * (2 if point.importance == "l1" else 1))


def slow(point: Point) -> Outcome:
    time.sleep(0.3)
    return made_up(point)


def numbers(found: Found) -> list[tuple[int, float, str]]:
    return [(t.number, t.point.latency, t.point.importance) for t in found.trials]


TRIALS = [
    trial(0, 0.5, 0.4), trial(1, 0.3, 0.9), trial(2, 0.4, 1.5), trial(3, 0.2, 3.0),
    trial(4, 0.1, None), trial(5, 0.6, 0.4),
]  # fmt: skip


def test_the_front_holds_what_nothing_beats_in_both() -> None:
    assert [t.number for t in front(TRIALS)] == [3, 1, 0]


def test_the_fastest_that_holds_the_gate_is_chosen_or_else_the_most_accurate() -> None:
    assert choose(TRIALS, 1.0)[0] == 1
    assert choose(TRIALS, 0.4)[0] == 0
    number, why = choose(TRIALS, 0.1)
    assert number == 0
    assert "loses 0.40 points" in why
    with pytest.raises(PruneFailed, match="none of its 1 points: too far"):
        choose([TRIALS[4]], 1.0)


@pytest.mark.long
def test_the_same_seed_tries_the_same_points_even_when_it_was_interrupted(tmp_path: Path) -> None:
    whole = search(7, 3, 1.0, tmp_path / "whole.db", Processes(made_up, 2))
    assert [t.number for t in whole.trials] == list(range(7))
    assert [t.point.latency for t in whole.trials[:4]] == [0.5, 0.3, 0.7, 0.2]
    search(4, 3, 1.0, tmp_path / "two.db", Processes(made_up, 2))
    assert numbers(search(7, 3, 1.0, tmp_path / "two.db", Processes(made_up, 2))) == numbers(whole)


class Unruly:
    """Runs trials in threads, and ends them in another order than they were begun in."""

    def __init__(self, at_once: int) -> None:
        self.at_once = at_once
        self._pool = ThreadPoolExecutor(at_once)
        self._begun = itertools.count()

    def submit(self, point: Point) -> Future[Outcome]:
        return self._pool.submit(self._run, point, next(self._begun))

    def _run(self, point: Point, number: int) -> Outcome:
        time.sleep(0.02 * (number * 7 % self.at_once))
        return made_up(point)

    def __enter__(self) -> Unruly:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()


@pytest.mark.long
def test_points_do_not_depend_on_how_many_run_at_a_time_or_which_ends_first(
    tmp_path: Path,
) -> None:
    one, many = (
        search(24, 3, 1.0, tmp_path / f"{at_once}.db", Unruly(at_once)) for at_once in (1, 9)
    )
    assert numbers(many) == numbers(one)
    assert front(many.trials) == front(one.trials)
    assert window(24) == 6


@pytest.mark.long
def test_a_search_whose_time_is_over_ends_with_what_it_has(tmp_path: Path) -> None:
    hurried = Reporter()
    hurried.allow(1e-9)
    found = search(40, 3, 100.0, tmp_path / "few.db", Processes(made_up, 2), reporter=hurried)
    assert len(found.trials) == 2
    assert found.why.endswith("2 of 40 trials fitted into the time that was given")


@pytest.mark.long
def test_a_killed_search_goes_on_and_leaves_no_process(tmp_path: Path) -> None:
    """Workers end when the one that started them is gone."""
    script = tmp_path / "killed.py"
    script.write_text(
        "import os, sys, time\nfrom pathlib import Path\n"
        "from pollard.compress.search import Outcome, search\n"
        "from pollard.compress.trials import Processes\n"
        "def evaluate(point):\n"
        "    (Path(sys.argv[1]) / f'worker-{os.getpid()}').touch()\n"
        "    time.sleep(0.2)\n"
        "    return Outcome('pruned-fp32', point.latency, 1 / point.latency, 1, 1, 0.0)\n"
        "if __name__ == '__main__':\n"
        "    runs = Processes(evaluate, 2)\n"
        "    search(1000, 0, 1.0, Path(sys.argv[1]) / 'trials.db', runs)\n"
    )
    process = subprocess.Popen([sys.executable, str(script), str(tmp_path)])
    done = "SELECT count(*) FROM trial_user_attributes WHERE key IN ('outcome', 'problem')"

    def completed() -> int:
        try:
            with sqlite3.connect(f"file:{tmp_path / 'trials.db'}?mode=ro", uri=True) as database:
                return int(database.execute(done).fetchone()[0])
        except sqlite3.OperationalError:
            return 0

    while completed() < 4:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    workers = [int(path.name.partition("-")[2]) for path in tmp_path.glob("worker-*")]
    assert workers
    deadline = time.monotonic() + 60
    while any(_alive(pid) for pid in workers):
        assert time.monotonic() < deadline, "a worker outlives its search"
        time.sleep(0.1)
    before = completed()
    found = search(before + 3, 0, 1.0, tmp_path / "trials.db", Processes(slow, 2))
    assert [t.number for t in found.trials] == list(range(before + 3))


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _by_work(table: LatencyTable, kernels: Iterable[Kernel], **_: Any) -> int:
    """Write down what operators would take on a machine on which only their work counts."""
    table.rows |= {"per run": 1.0, "per node": 0.2}
    for each in kernels:
        area = each.out_height * each.out_width * each.kernel[0] * each.kernel[1]
        table.rows[each.key] = 0.5 + each.in_channels * each.out_channels * area / 1e5
    table._save()
    return 0


@pytest.mark.long
def test_a_search_compresses_to_its_point(
    digits_parent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What can be reached of so small a network hangs on what else the machine does while the
    # table is measured; the trials, in processes of their own, read this one.
    monkeypatch.setenv("POLLARD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(LatencyTable, "measure", _by_work)
    recipe = Recipe(
        "zoo:small-cnn-28", "digits", str(digits_parent), "cpu-fp32", search=2, epochs=2,
        batch_size=64, max_drop=60.0, threads=2,
    )  # fmt: skip
    result = compress(recipe, tmp_path / "out", cache=tmp_path / "stages")
    found = result.report["search"]
    assert [t["point"]["latency"] for t in found["trials"]] == [0.5, 0.3]
    assert all(t["outcome"]["latency"] < 1 for t in found["trials"])
    point = found["trials"][found["chosen"]]["point"]
    assert result.report["pruning"]["search"]["budgets"] == [f"latency={point['latency']:.4f}"]
    assert result.report["recipe"]["search"] == 2
    assert "Search</h2>" in (tmp_path / "out" / "report.html").read_text()
    assert "search" in [done.name for done in result.stages.done]
    assert sorted(os.listdir(tmp_path)) == ["cache", "out", "stages"]


def test_a_search_has_no_budget_of_its_own(tmp_path: Path) -> None:
    with pytest.raises(UsageInvalid, match="exclude each other"):
        Recipe("m", "d", "w", search=5, budget=("latency=0.4",))
