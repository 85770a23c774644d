from __future__ import annotations

import subprocess
import sys
from pathlib import Path

# A process of its own, because what is left behind is told when the last one ends.
_PROGRAM = """
import multiprocessing
import sys
import time

from pollard.compress.trials import Processes

KEPT = []


def trial(seconds):
    # Libraries make such locks, which live as long as their process.
    KEPT.append(multiprocessing.get_context("spawn").RLock())
    time.sleep(seconds)
    return seconds


if __name__ == "__main__":
    with Processes(trial, 2) as trials:
        print([one.result() for one in [trials.submit(0), trials.submit(0.01)]])
        if len(sys.argv) > 1:
            trials.submit(3600)
"""


def run(path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    path.write_text(_PROGRAM)
    command = [sys.executable, str(path), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)


def test_processes_leave_nothing_behind_when_all_trials_have_ended(tmp_path: Path) -> None:
    done = run(tmp_path / "program.py")
    assert done.stdout == "[0, 0.01]\n"
    assert done.stderr == ""


def test_a_trial_that_is_not_wanted_any_more_is_not_waited_for(tmp_path: Path) -> None:
    assert run(tmp_path / "program.py", "busy").stdout == "[0, 0.01]\n"
