"""A drill within its time: Ctrl-C and SIGTERM end it cleanly, and what was seen is kept."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Callable, Coroutine
from typing import Any

import uvloop

from pollard.client import PollardError
from pollard.services.drill.errors import DrillFailed
from pollard.services.drill.figures import Record

_INTERRUPTED = 130


def run_guarded(
    drill: Callable[[], Coroutine[Any, Any, None]], record: Record, max_seconds: float
) -> int:
    """Run a drill; return 0, or the exit code of what ended it before its time.

    Args:
        drill: What to run, on an event loop of its own.
        record: Gets the reason, if it did not come to its end.
        max_seconds: When it is stopped.
    """
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_guarded(drill, record, max_seconds))


async def _guarded(
    drill: Callable[[], Coroutine[Any, Any, None]], record: Record, max_seconds: float
) -> int:
    interrupted = False
    task = asyncio.ensure_future(drill())

    def interrupt() -> None:
        nonlocal interrupted
        interrupted = True
        task.cancel()

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, interrupt)
    done, _ = await asyncio.wait({task}, timeout=max_seconds)
    if not done:
        record.stopped = "Stopped by --max-time."
        task.cancel()
    try:
        await task
    except asyncio.CancelledError:
        if interrupted:
            record.stopped = "Interrupted; all processes have been stopped."
            return _INTERRUPTED
    except (DrillFailed, PollardError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        record.stopped = "It could not go on."
        return 1
    return 0
