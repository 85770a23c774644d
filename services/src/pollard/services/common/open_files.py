"""Whether this process can open more files: once it cannot, it takes no connections, in silence."""

from __future__ import annotations

import asyncio
import errno
import os
import resource

import structlog

_log = structlog.get_logger("pollard.lifecycle")

_EVERY_SECONDS = 2.0


def none_left(count: int = 1) -> str:
    """Say that so many files more cannot be opened, and what to do; empty if they can.

    Args:
        count: How many are wanted.
    """
    opened: list[int] = []
    try:
        for _ in range(count):
            opened.append(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
    except OSError as error:
        if error.errno == errno.ENFILE:
            return "this machine has as many files open as it may (fs.file-max)"
        if error.errno != errno.EMFILE:
            return ""
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        return (
            f"this process may have {most} files open at a time, and has; allow it more "
            "(LimitNOFILE, ulimit -n)"
        )
    finally:
        for descriptor in opened:
            os.close(descriptor)
    return ""


async def watch_open_files() -> None:
    """Log when connections and files cannot be opened any more, and when they can again."""
    full = False
    while True:
        why = none_left()
        if why and not full:
            _log.error("no connection is taken and no file opened", why=why)
        elif full and not why:
            _log.warning("connections are taken and files opened again")
        full = bool(why)
        await asyncio.sleep(_EVERY_SECONDS)
