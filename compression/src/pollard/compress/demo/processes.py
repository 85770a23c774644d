"""The processes that the demo starts: the commands that a user would type, and the services."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shlex
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from pollard.compress.demo.errors import DemoFailed

_STOP_SECONDS = 30.0


async def run_command(console: Console, arguments: Sequence[str]) -> None:
    """Run `pollard ARGUMENTS…` as a user would, with its output shown.

    Raises:
        DemoFailed: It ended with another exit code than 0.
    """
    console.print(
        f"\n$ pollard {shlex.join(arguments)}", style="bold", markup=False, soft_wrap=True
    )
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "pollard.client.cli", *arguments, stdin=asyncio.subprocess.DEVNULL
    )
    try:
        code = await process.wait()
    except asyncio.CancelledError:
        await _stop(process, signal.SIGTERM, 5.0)
        raise
    if code != 0:
        raise DemoFailed(f"`pollard {arguments[0]}` ended with exit code {code}; see above")


@dataclass(frozen=True)
class Suite:
    """The running services."""

    inference: str
    """Address of the inference service."""
    vision: str
    """Address of the preprocess and vision service."""
    models: str
    """Address of the model management service."""
    log: Path
    """What the services said."""
    pids: dict[str, int]
    """Process ids by service."""


@asynccontextmanager
async def running_services(directory: Path, *, drain_seconds: float) -> AsyncIterator[Suite]:
    """Start `pollard up` on free ports, and stop it whatever happens.

    Args:
        directory: Where registry, caches and the log lie.
        drain_seconds: How long a revision that is no longer served stays loaded.

    Raises:
        DemoFailed: The services did not start, or did not stop cleanly.
    """
    ready, log = directory / "ready.json", directory / "services.log"
    with log.open("wb") as file:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "pollard.client.cli", "up", "--stop-with-parent"),
            *("--port-base", "0", "--data-dir", str(directory / "data")),
            *("--ready-file", str(ready)),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=file,
            stderr=asyncio.subprocess.STDOUT,
            env={**os.environ, "POLLARD_MODELS_DRAIN_SECONDS": str(drain_seconds)},
            # Ctrl-C reaches the demo alone; it stops the services itself, after its requests.
            start_new_session=True,
        )
    try:
        found = await _until_ready(process, ready, log)
        services = found["services"]
        yield Suite(
            inference=services["inference"]["address"],
            vision=services["preprocess"]["address"],
            models=services["models"]["address"],
            log=log,
            pids={name: service["pid"] for name, service in services.items()},
        )
    except BaseException:
        await _stop(process, signal.SIGTERM, _STOP_SECONDS)
        raise
    code = await _stop(process, signal.SIGTERM, _STOP_SECONDS)
    if code != 0:
        raise DemoFailed(f"the services did not stop cleanly (exit code {code})\n{tail(log)}")


async def _until_ready(process: asyncio.subprocess.Process, ready: Path, log: Path) -> Any:
    while not ready.exists():
        if process.returncode is not None:
            raise DemoFailed(f"the services did not start\n{tail(log)}")
        await asyncio.sleep(0.05)
    return json.loads(ready.read_text())


def tail(log: Path, lines: int = 15) -> str:
    """Return the last lines of a log."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


async def _stop(process: asyncio.subprocess.Process, number: signal.Signals, wait: float) -> int:
    """Ask a process to stop, and kill it when it does not; return its exit code."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(number)
        try:
            await asyncio.wait_for(process.wait(), wait)
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
    return await process.wait()
