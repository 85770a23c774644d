"""Servers that share a machine count each other's memory."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pollard.runtime.bundle import Bundle
from pollard.runtime.machine import Machine
from pollard.services.common.errors import StartupError
from pollard.services.inference import loader as loading
from pollard.services.inference.errors import MemoryShort
from pollard.services.inference.loader import EngineOptions, Loader
from pollard.services.inference.replicas import Replicas

_HOLDER = """
import sys
from pathlib import Path
from pollard.services.inference.replicas import Replicas
class Held: pass
held = Held()
Replicas(3, Path(sys.argv[1])).holds(sys.argv[2], held)
print("holds", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def other(tmp_path: Path) -> Iterator[Callable[[str], subprocess.Popen[str]]]:
    """A function that starts another server's process, which holds a model."""
    started: list[subprocess.Popen[str]] = []

    def start(model: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", _HOLDER, str(tmp_path / "marks"), model],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "holds\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


class Held:
    """Stands for a loaded revision."""


def test_all_have_to_load_what_nobody_holds(tmp_path: Path) -> None:
    assert Replicas(3, tmp_path / "marks").still_to_load("model") == 3
    assert Replicas().still_to_load("model") == 1
    # What only this server has, such as a model out of its own folder.
    assert Replicas(3, tmp_path / "marks").still_to_load("") == 1


def test_those_that_hold_it_are_not_counted_again(
    tmp_path: Path, other: Callable[[str], subprocess.Popen[str]]
) -> None:
    replicas = Replicas(3, tmp_path / "marks")
    process = other("model")
    assert replicas.still_to_load("model") == 2
    assert replicas.still_to_load("another") == 3
    other("model")
    assert replicas.still_to_load("model") == 1
    # Killed, it could not take its mark away.
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert replicas.still_to_load("model") == 2
    assert len(list((tmp_path / "marks").iterdir())) == 1


def test_a_mark_goes_with_what_it_stands_for(tmp_path: Path) -> None:
    replicas = Replicas(2, tmp_path / "marks")
    first, second = Held(), Held()
    replicas.holds("model", first)
    replicas.holds("model", second)
    assert len(list((tmp_path / "marks").iterdir())) == 2
    # This server's own do not count for it: it loads beside what it has.
    assert replicas.still_to_load("model") == 2
    del first, second
    assert list((tmp_path / "marks").iterdir()) == []


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StartupError, match="file/marks"):
        Replicas(2, tmp_path / "file" / "marks")


async def test_a_revision_is_loaded_only_where_there_is_memory_for_all(
    tmp_path: Path,
    make_bundle: Callable[..., Bundle],
    other: Callable[[str], subprocess.Popen[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bundle = make_bundle(1.0, memory_bytes=100 << 20)
    monkeypatch.setattr(loading, "available_memory_bytes", lambda: 250 << 20)
    options = EngineOptions(inline_seconds=0.0, memory_headroom_bytes=0)
    loader = Loader(Machine.detect(), options, replicas=Replicas(3, tmp_path / "marks"))
    told = ("adder", 1, bundle.digest, bundle.size_bytes, bundle.path)
    try:
        with pytest.raises(MemoryShort, match=r"loading it 3 times .* takes 300 MiB and 250 MiB"):
            await loader.load(*told)
        # Once one of the others has it, its share is gone from what is available, and two are left.
        other(bundle.digest)
        revision = await loader.load(*told)
        assert len(list((tmp_path / "marks").iterdir())) == 2
        await revision.retire()
        await revision.freed.wait()
    finally:
        loader.close()
