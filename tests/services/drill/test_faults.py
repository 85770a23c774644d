"""What `pollard drill chaos` does to clocks and disks."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pollard.client import InvalidArgument, Unavailable
from pollard.client.errors import ErrorDetails
from pollard.services.drill import clocks
from pollard.services.drill.chaos import Chaos, ChaosOptions, Turn
from pollard.services.drill.clocks import Clock
from pollard.services.drill.disks import FileLimit, SlowDisk, SmallDisk

_TIMES = "import time; print(time.time(), time.monotonic())"
_WRITES = """
import os, sys
print("ready", flush=True)
for line in sys.stdin:
    try:
        with open(line.strip(), "wb") as file:
            file.write(bytes(1 << 20))
            file.flush()
        print("written", flush=True)
    except OSError as error:
        print(error.strerror, flush=True)
"""


@pytest.mark.skipif(bool(clocks.why_not()), reason=clocks.why_not() or "it is there")
def test_a_step_of_the_clock_is_seen_by_the_time_of_day_and_not_by_the_monotonic_clock(
    tmp_path: Path,
) -> None:
    clock = Clock(tmp_path / "clock")

    def times() -> tuple[float, float]:
        told = subprocess.run(
            [sys.executable, "-c", _TIMES],
            env={**os.environ, **clock.environment()},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        day, monotonic = map(float, told.split())
        return day - time.time(), monotonic - time.monotonic()

    clock.set(-86_400)
    day, monotonic = times()
    assert day == pytest.approx(-86_400, abs=600)
    assert monotonic == pytest.approx(0, abs=600)
    clock.set(0)
    assert times()[0] == pytest.approx(0, abs=600)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting takes root")
def test_a_small_disk_is_filled_to_the_last_byte_emptied_and_taken_away(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    disk = SmallDisk(folder, 0.1)
    why = disk.mount()
    if why:
        pytest.skip(why)
    try:
        assert disk.fill() > 32 << 20
        with pytest.raises(OSError, match="No space left"):
            (folder / "more").write_bytes(b"x" * 8192)
        disk.empty()
        (folder / "more").write_bytes(b"x" * 8192)
    finally:
        disk.unmount()
    assert list(folder.iterdir()) == []


def test_files_of_a_process_may_not_grow_until_the_limit_is_lifted(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", _WRITES], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"

        def write() -> str:
            print(tmp_path / "file", file=process.stdin, flush=True)
            return process.stdout.readline().strip()

        limit = FileLimit()
        assert write() == "written"
        limit.set(process.pid)
        assert write() == "File too large"
        limit.lift()
        assert write() == "written"
        process.stdin.close()


@pytest.mark.skipif(bool(SlowDisk.why_not()), reason=SlowDisk.why_not() or "it is there")
async def test_a_slow_disk_holds_up_and_lets_go(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", _WRITES], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdout.readline()
        disk = SlowDisk()
        disk.begin(process.pid, 0.5)
        began = time.monotonic()
        print(tmp_path / "file", file=process.stdin, flush=True)
        assert process.stdout.readline() == "written\n"
        assert time.monotonic() - began >= 0.5
        await disk.end()
        assert "TracerPid:\t0\n" in Path(f"/proc/{process.pid}/status").read_text()
        process.stdin.close()


def test_a_failure_is_excused_only_while_something_is_broken_and_if_it_may_be_sent_again() -> None:
    def failed(kind: type[Unavailable] | type[InvalidArgument]) -> Unavailable | InvalidArgument:
        return kind("no", details=ErrorDetails(), address="a:1", method="/a/B")

    chaos = Chaos(ChaosOptions())
    now = time.monotonic()
    assert not chaos.excused("image", now, failed(Unavailable))
    turn = Turn("kill", now - 100)
    chaos.turns.append(turn)
    assert chaos.excused("image", now, failed(Unavailable))
    assert not chaos.excused("image", now, failed(InvalidArgument))
    turn.healed = now - 90
    assert not chaos.excused("image", now, failed(Unavailable))
    assert chaos.excused("image", now - 91, failed(Unavailable))
