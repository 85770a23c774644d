"""What cannot be written costs lines, and never whoever writes them."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from pollard.services.common.log_stream import LogStream, stream_of


class Pipe:
    """A pipe with room for one page."""

    def __init__(self) -> None:
        self.read_end, self.write_end = os.pipe()
        fcntl.fcntl(self.write_end, fcntl.F_SETPIPE_SZ, 4096)
        self._streams: list[LogStream] = []

    def stream(self, most_bytes: int = 1 << 20) -> LogStream:
        """Return what writes into it."""
        self._streams.append(LogStream(self.write_end, most_bytes=most_bytes))
        return self._streams[-1]

    def read_until(self, last: bytes) -> list[bytes]:
        """Read up to the line that ends so."""
        said = b""
        while not said.endswith(last + b"\n"):
            more = os.read(self.read_end, 65536)
            assert more, said[-200:]
            said += more
        return said.splitlines()

    def close(self) -> None:
        for stream in self._streams:
            # Its thread would go on with this number, whatever is open under it then.
            stream.descriptor = None
        for end in (self.read_end, self.write_end):
            if end >= 0:
                os.close(end)


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    made = Pipe()
    yield made
    made.close()


def test_lines_come_whole_and_in_order_whoever_writes_them(pipe: Pipe) -> None:
    stream = pipe.stream()

    def write(name: str) -> None:
        for number in range(50):
            print(name, number, "x" * 100, file=stream)

    threads = [threading.Thread(target=write, args=(name,)) for name in "abc"]
    for thread in threads:
        thread.start()
    lines: list[bytes] = []
    while len(lines) < 150:
        lines += pipe.read_until(b"x")
    for thread in threads:
        thread.join()
    for name in "abc":
        mine = [line for line in lines if line.startswith(name.encode())]
        assert mine == [f"{name} {number} {'x' * 100}".encode() for number in range(50)]


def test_nobody_waits_for_a_pipe_that_nobody_reads_and_what_is_lost_is_told(pipe: Pipe) -> None:
    stream = pipe.stream(10_000)
    for number in range(1000):
        stream.write(f"{number:099}\n")
    assert not stream.drain(0.01)
    numbers: list[int] = []
    lost = 0
    while len(numbers) + lost < 1000:
        for line in pipe.read_until(b""):
            words = line.split()
            if words[1:]:
                assert words[1:7] == b"lines of the log were lost:".split()
                lost += int(words[0])
            else:
                # In order, and where some are missing that was told before.
                assert int(line) == len(numbers) or lost >= int(line) - len(numbers) > 0
                numbers.append(int(line))
    assert len(numbers) >= 100
    assert lost > 0
    stream.write("what comes later\n")
    assert pipe.read_until(b"later") == [b"what comes later"]
    assert stream.drain()


def test_a_pipe_that_somebody_made_one_that_does_not_wait(pipe: Pipe) -> None:
    os.set_blocking(pipe.write_end, False)
    stream = pipe.stream()
    for number in range(100):
        stream.write(f"{number:099}\n")
    stream.write("end\n")
    lines = pipe.read_until(b"end")
    assert [int(line) for line in lines[:-1]] == list(range(100))


def test_a_reader_that_comes_back_is_told_what_it_missed(tmp_path: Path) -> None:
    fifo = tmp_path / "log"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    writer = os.open(fifo, os.O_WRONLY)
    stream = LogStream(writer, most_bytes=1000)
    os.close(reader)
    for number in range(100):
        stream.write(f"{number:099}\n")
    assert not stream.drain(60)
    with fifo.open("rb") as back:
        said = [back.readline().decode() for _ in range(11)]
        lost = [line.split(" ", 1) for line in said[10:]]
        while sum(int(number) for number, _ in lost) < 90:
            lost.append(back.readline().decode().split(" ", 1))
    assert [int(line) for line in said[:10]] == list(range(10))
    assert lost[0][1] == "lines of the log were lost: Broken pipe\n"
    assert stream.drain()
    stream.descriptor = None
    os.close(writer)


def test_a_full_disk_is_no_error_of_whoever_writes() -> None:
    with open("/dev/full", "wb", buffering=0) as full:
        stream = LogStream(full.fileno(), most_bytes=1000)
        for _ in range(100):
            stream.write(f"{'x' * 99}\n")
            stream.flush()
        # A failure is not waited for.
        assert not stream.drain(600)
        stream.descriptor = None


def test_what_is_no_text_of_the_encoding_is_written_escaped(pipe: Pipe) -> None:
    stream = pipe.stream()
    stream.write("a name \udcff\n")
    assert pipe.read_until(b"udcff") == [b"a name \\udcff"]


def test_which_files_are_written_so(pipe: Pipe) -> None:
    assert stream_of(io.StringIO()) is None
    nowhere = stream_of(None)
    assert nowhere is not None
    assert nowhere.write("to nobody\n") == 10
    assert nowhere.drain()
    with open(pipe.write_end, "w", closefd=False) as file:
        stream = stream_of(file)
        assert stream is not None
        assert stream_of(file) is stream is stream_of(stream)
        assert stream.fileno() == pipe.write_end
        assert not stream.isatty()


_PROGRAM = """
import sys, warnings
import structlog
from pollard.services.common.logs import configure_logging

configure_logging("test", level="error", form="json")
sys.stderr.most_bytes = 10_000
for number in range(1000):
    structlog.get_logger("test").error("something", number=number)
warnings.warn("what a library says")
print("ready", flush=True)
sys.stdin.read()
raise RuntimeError("the end")
"""


def _run(stderr: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", _PROGRAM],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=stderr,
    )


def test_a_process_ends_though_nobody_reads_its_log(pipe: Pipe) -> None:
    with _run(pipe.write_end) as process:
        assert process.communicate(timeout=60) == (b"ready\n", None)
        assert process.returncode == 1


def test_what_was_said_last_is_written_at_the_end(pipe: Pipe) -> None:
    with _run(pipe.write_end) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        os.close(pipe.write_end)
        pipe.write_end = -1
        with open(pipe.read_end, "rb", closefd=False) as rest:
            said = b""
            while b"were lost" not in said:
                said += rest.readline()
            assert process.stdin is not None
            process.stdin.close()
            said += rest.read()
    lines = [json.loads(line) for line in said.splitlines() if line.startswith(b"{")]
    numbers = [line["number"] for line in lines if "number" in line]
    assert numbers == sorted(numbers)
    told = [line for line in lines if line["event"] == "lines of this log were lost"]
    assert {(line["service"], line["level"]) for line in told} == {("test", "error")}
    # The warning, of two lines, may be among them.
    assert 1000 <= len(numbers) + sum(line["lines"] for line in told) <= 1002
    assert "the end" in lines[-1]["exception"]


_LATE = """
import sys
from pollard.services.common.log_stream import take_over

take_over()
stream = sys.stderr

class Late:
    def __del__(self, stream=stream):
        stream.write("the very last\\n")

late = Late()
print("ready")
"""


def test_what_is_said_while_the_interpreter_is_taken_down_is_written() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _LATE], capture_output=True, timeout=60, check=True
    )
    assert done.stdout == b"ready\n"
    assert done.stderr == b"the very last\n"


def test_a_full_pipe_holds_up_no_interpreter_that_is_taken_down(pipe: Pipe) -> None:
    os.set_blocking(pipe.write_end, False)
    with contextlib.suppress(BlockingIOError):
        while os.write(pipe.write_end, b"x"):
            pass
    os.set_blocking(pipe.write_end, True)
    subprocess.run([sys.executable, "-c", _LATE], stderr=pipe.write_end, timeout=60, check=True)
