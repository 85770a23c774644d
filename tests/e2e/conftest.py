"""`pollard up` as a real process, for tests of the whole suite."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from pollard.client.load import Load

POLLARD = [sys.executable, "-m", "pollard.client.cli"]


class Up:
    """One `pollard up`."""

    def __init__(self, directory: Path, *arguments: str, data_dir: Path | None = None) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.data_dir = data_dir or directory / "data"
        self.ready_file = directory / "ready.json"
        self.log = directory / "log.txt"
        self.arguments = arguments
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> Up:
        self.ready_file.unlink(missing_ok=True)
        ports = () if any("port" in item for item in self.arguments) else ("--port-base", "0")
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [
                    *POLLARD,
                    "up",
                    "--stop-with-parent",
                    *ports,
                    *("--data-dir", str(self.data_dir)),
                    *("--ready-file", str(self.ready_file)),
                    *self.arguments,
                ],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        return self

    def wait_ready(self, *, after: dict[str, int] | None = None) -> Up:
        """Wait until all services are healthy, and none of the processes `after` runs any more."""
        give_up = time.monotonic() + 60
        while time.monotonic() < give_up:
            assert self.process is not None
            assert self.process.poll() is None, self.said()
            if self.ready_file.exists() and not (
                after and set(after.values()) & set(self.pids.values())
            ):
                return self
            time.sleep(0.05)
        raise AssertionError(f"not ready in time\n{self.said()}")

    @property
    def ready(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads(self.ready_file.read_text())
        return content

    def address(self, service: str) -> str:
        return str(self.ready["services"][service]["address"])

    @property
    def pids(self) -> dict[str, int]:
        return {name: service["pid"] for name, service in self.ready["services"].items()}

    def kill(self, service: str) -> dict[str, int]:
        """Kill -9 a service; return what was killed, for `wait_ready(after=…)`."""
        pid = self.pids[service]
        os.kill(pid, signal.SIGKILL)
        return {service: pid}

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        assert self.process is not None
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(timeout=60)

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def end(self) -> None:
        """Stop whatever still runs."""
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


@pytest.fixture
def start_up(tmp_path: Path) -> Iterator[Callable[..., Up]]:
    """A function that starts `pollard up`; everything it started is stopped after the test."""
    started: list[Up] = []

    def start(*arguments: str, data_dir: Path | None = None, wait: bool = True) -> Up:
        made = Up(tmp_path / f"up{len(started)}", *arguments, data_dir=data_dir)
        started.append(made)
        made.start()
        return made.wait_ready() if wait else made

    yield start
    for made in started:
        made.end()


@pytest.fixture(scope="module")
def make_up() -> Iterator[Callable[..., Up]]:
    """A function that starts `pollard up` for all the tests of a module."""
    started: list[Up] = []

    def start(directory: Path, *arguments: str) -> Up:
        started.append(Up(directory, *arguments))
        return started[-1].start().wait_ready()

    yield start
    for made in started:
        made.end()


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    """One `pollard up` for all the tests of a module that leave it running."""
    made = Up(tmp_path_factory.mktemp("up")).start()
    try:
        yield made.wait_ready()
    finally:
        made.end()


@pytest.fixture(scope="module")
def keep_port() -> Iterator[Callable[[], int]]:
    """Return a function that gives a free port of this machine; nobody gets it by chance.

    It is bound and not listened at, so that whoever asks for just this one can have it.
    """
    with contextlib.ExitStack() as stack:

        def keep() -> int:
            holder = stack.enter_context(socket.socket())
            holder.bind(("127.0.0.1", 0))
            holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            return int(holder.getsockname()[1])

        yield keep


@pytest.fixture
def more_answers() -> Callable[[Load], Awaitable[None]]:
    """Return a function that waits for a moment, and until a load has had more answers in it."""

    async def wait(load: Load) -> None:
        before = len(load.traffic.answered)
        await asyncio.sleep(0.2)
        async with asyncio.timeout(60):
            while len(load.traffic.answered) < before + 16:
                await asyncio.sleep(0.02)

    return wait


@pytest.fixture
def pollard() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs the `pollard` command."""

    def run(
        *arguments: str | Path, env: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*POLLARD, *map(str, arguments)],
            capture_output=True,
            text=True,
            env={**os.environ, **(env or {})},
            stdin=subprocess.DEVNULL,
            timeout=120,
            check=False,
        )

    return run


def family(pid: int) -> list[psutil.Process]:
    """A process and everything that it started."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    return []


@pytest.fixture
def processes_of() -> Callable[[int], list[psutil.Process]]:
    return family


def wait_gone(processes: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(processes, timeout=15)
    assert alive == []


@pytest.fixture
def gone() -> Callable[[list[psutil.Process]], None]:
    """Waits until processes have ended, and fails when they do not."""
    return wait_gone
