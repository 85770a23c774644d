"""What doctor says of processor, memory, disk and ports."""

from __future__ import annotations

import dataclasses
import os
import socket
from pathlib import Path

import pytest

from pollard.runtime.machine import Machine
from pollard.services.doctor import machine as hardware
from pollard.services.doctor.findings import State


@pytest.fixture(scope="module")
def machine() -> Machine:
    return Machine.detect()


def test_a_processor_without_vnni_is_noted(machine: Machine) -> None:
    with_it = dataclasses.replace(machine, cpu_features=frozenset({"avx2", "avx_vnni"}))
    assert [each.state for each in hardware.processor(with_it)] == [State.GOOD]
    without = dataclasses.replace(machine, cpu_features=frozenset({"avx2"}))
    assert [each.state for each in hardware.processor(without)] == [State.GOOD, State.NOTE]


def test_little_memory_is_noted(machine: Machine) -> None:
    (finding, *_) = hardware.memory(machine, 1 << 30)
    assert finding.state is State.NOTE
    assert finding.found.startswith("1.0 of ")


def test_a_directory_that_is_not_there_yet_can_be_made(tmp_path: Path) -> None:
    (finding, *_) = hardware.disk(tmp_path / "a" / "b")
    assert finding.state in (State.GOOD, State.NOTE)
    assert not (tmp_path / "a").exists()


def test_a_directory_below_a_file_is_bad(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (finding,) = hardware.disk(tmp_path / "file" / "b")
    assert finding.state is State.BAD
    assert "--data-dir" in finding.cure


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_without_rights_is_bad(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    (finding,) = hardware.disk(tmp_path / "b")
    assert finding.state is State.BAD


@pytest.mark.parametrize(("serving", "state"), [(True, State.GOOD), (False, State.NOTE)])
def test_a_port_in_use_is_looked_at(serving: bool, state: State) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        asked: list[str] = []

        def serves(address: str) -> bool:
            asked.append(address)
            return serving

        (finding,) = hardware.ports([("models", port)], "127.0.0.1", serves)
        assert finding.state is state
        assert asked == [f"127.0.0.1:{port}"]
    (finding,) = hardware.ports([("models", port)], "127.0.0.1", serves)
    assert (finding.state, finding.found) == (State.GOOD, "free for models")
