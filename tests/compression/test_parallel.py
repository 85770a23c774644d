"""Processes that train together."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

JOIN = """
import sys, torch
from pollard.compress.errors import UsageInvalid
from pollard.compress.parallel import team

try:
    with team(torch.device(sys.argv[1])) as found:
        print(f"{found.size} together: {found.sum(found.rank + 1.0):g}")
except UsageInvalid as error:
    print(error)
"""


def joined(*devices: str) -> list[str]:
    """Return what processes say that compute on these devices."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    common = {"WORLD_SIZE": str(len(devices)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", JOIN, device], stdout=subprocess.PIPE, text=True,
            env={**os.environ, **common, "RANK": str(rank)},
        )
        for rank, device in enumerate(devices)
    ]  # fmt: skip
    told = [process.communicate()[0].strip() for process in processes]
    assert [process.returncode for process in processes] == [0] * len(devices)
    return told


def test_processes_on_one_kind_of_device_add_up() -> None:
    assert joined("cpu", "cpu") == ["2 together: 3"] * 2


def test_processes_on_different_kinds_of_devices_are_refused_and_do_not_wait() -> None:
    told = joined("cpu", "meta")
    assert told[0] == told[1]
    assert "2 processes compute on different kinds of devices (1 on cpu, 1 on meta)" in told[0]
    assert "give --device cpu, or --device cuda, to all of them" in told[0]
