"""A drill from its first moment to its exit code.

It runs within its time, Ctrl-C and SIGTERM end it cleanly, and what was seen is shown and written
however it ended.
"""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import uvloop

from pollard.client import PollardError
from pollard.services.drill.errors import DrillFailed
from pollard.services.drill.figures import Record
from pollard.services.drill.room import working_room

_INTERRUPTED = 130


def run_drill_guarded(
    drill: Callable[[Path], Coroutine[Any, Any, None]],
    record: Record,
    max_seconds: float,
    json_file: Path | None,
    *,
    figures: Callable[[], dict[str, Any]],
    show: Callable[[dict[str, Any]], None],
    so_far: Callable[[], str] = lambda: "",
) -> int:
    """Run a drill and print what was seen; return the exit code.

    Args:
        drill: What to run, on an event loop of its own, in a directory that is gone afterwards.
        record: What it keeps; gets the reason, if the drill did not come to its end.
        max_seconds: When it is stopped.
        json_file: Where the figures are written, too.
        figures: Makes them, with "passed" and "problems", when it has ended.
        show: Prints them; not called where nothing was asked of anybody.
        so_far: How far it has come, as words behind "Stopped", such as " after 3 of 5 swaps".

    Returns:
        0 when everything was done and nothing went wrong, 130 when it was interrupted, else 1.
    """
    with working_room(json_file) as room:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            code = runner.run(_guarded(drill(room.directory), record, max_seconds, so_far))
        found = figures()
        if record.traffic.total:
            show(found)
        elif record.stopped:
            print(record.stopped, file=sys.stderr)
        if json_file is not None:
            json_file.parent.mkdir(parents=True, exist_ok=True)
            json_file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        code = code or (0 if found["passed"] else 1)
        room.failed = code == 1 or bool(found["problems"])
    return code


async def _guarded(
    drill: Coroutine[Any, Any, None],
    record: Record,
    max_seconds: float,
    so_far: Callable[[], str],
) -> int:
    interrupted = False
    task = asyncio.ensure_future(drill)

    def interrupt() -> None:
        nonlocal interrupted
        interrupted = True
        task.cancel()

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, interrupt)
    done, _ = await asyncio.wait({task}, timeout=max_seconds)
    if not done:
        record.stopped = f"Stopped by --max-time{so_far()}."
        task.cancel()
    try:
        await task
    except asyncio.CancelledError:
        if interrupted:
            record.stopped = f"Interrupted{so_far()}; all processes have been stopped."
            return _INTERRUPTED
    except (DrillFailed, PollardError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        record.stopped = "It could not go on."
        return 1
    return 0
