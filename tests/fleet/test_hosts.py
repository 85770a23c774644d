"""Hosts of this machine's own: what runs on them, their cables, and what a killed owner leaves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import sys
from pathlib import Path
from pollard.services.drill.hosts import Network
network = Network()
host = network.add("h1", cores=0.5)
process = host.start(["sleep", "1000"], Path(sys.argv[1]))
print(network.name, process.pid, flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def hosts_can_be_made() -> None:
    if str(ROOT) not in sys.path:
        sys.path.append(str(ROOT))
    from pollard.services.drill.hosts import why_not

    if reason := why_not():
        pytest.skip(reason)


def listed() -> str:
    shown = [["netns", "list"], ["-o", "link"]]
    return "".join(
        subprocess.run(["ip", *words], capture_output=True, text=True, check=True).stdout
        for words in shown
    )


def test_what_a_killed_owner_left_is_swept_away(tmp_path: Path) -> None:
    from pollard.services.drill.hosts import sweep

    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "log")],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as owner:
        assert owner.stdout is not None
        name, pid = owner.stdout.readline().split()
        sweep()
        assert f"{name}-h1" in listed()  # it lives, so nothing of it is touched
        os.kill(owner.pid, signal.SIGKILL)
    left = psutil.Process(int(pid))
    sweep()
    assert name not in listed()
    assert psutil.wait_procs([left], timeout=30)[1] == []
    assert not list(Path("/sys/fs/cgroup").glob(f"**/{name}*"))


def test_a_cable_is_pulled_and_put_back(tmp_path: Path) -> None:
    from pollard.services.drill.hosts import Network

    def reaches(address: str) -> bool:
        ping = "import socket,sys; socket.create_connection((sys.argv[1], 7000), 2)"
        done = subprocess.run(
            [sys.executable, "-c", ping, address], capture_output=True, check=False
        )
        return done.returncode == 0

    def until_reached(address: str) -> None:
        until = time.monotonic() + 60
        while not reaches(address):
            assert time.monotonic() < until

    with Network() as network:
        host = network.add("h1")
        server = host.start(
            [sys.executable, "-m", "http.server", "7000", "--bind", host.address],
            tmp_path / "log",
        )
        until_reached(host.address)
        host.cut()
        assert not reaches(host.address)
        assert host.run("echo", "still here") == "still here"
        host.plug()
        until_reached(host.address)
        host.kill()
        server.wait()
        assert not reaches(host.address)
    assert network.name not in listed()
