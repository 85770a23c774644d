"""A process makes way with all of its threads, and with what these start."""

from __future__ import annotations

import os
import subprocess
import sys

from pollard.services.up.priority import NICENESS, make_way

PROGRAM = """
import os, subprocess, sys, threading

def priority():
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

asked, found = threading.Event(), []

def look():
    asked.wait()
    found.append(priority())
    late = threading.Thread(target=lambda: found.append(priority()))
    late.start()
    late.join()
    command = [sys.executable, "-c", "import os; print(os.nice(0))"]
    found.append(int(subprocess.run(command, capture_output=True, check=True).stdout))

threads = [threading.Thread(target=look) for _ in range(3)]
for thread in threads:
    thread.start()
print(priority(), flush=True)
sys.stdin.readline()
asked.set()
for thread in threads:
    thread.join()
print(priority(), *found, flush=True)
"""


def test_threads_those_to_come_and_child_processes_make_way() -> None:
    own = os.getpriority(os.PRIO_PROCESS, 0)
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert int(process.stdout.readline()) == own
        make_way(process.pid)
        make_way(process.pid)  # of a service that is healthy again
        process.stdin.write("\n")
        process.stdin.flush()
        found = [int(part) for part in process.stdout.readline().split()]
    assert found == [min(19, own + NICENESS)] * 10


def test_a_process_that_has_ended_is_left_alone() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    make_way(process.pid)
