"""What systemd is told of a service that it started with ``Type=notify``."""

from __future__ import annotations

import os
import socket

import structlog

_log = structlog.get_logger("pollard.systemd")


def notify(state: str) -> bool:
    """Send systemd a state, such as ``READY=1``; without systemd nothing happens.

    Returns:
        Whether it was sent. That it cannot be is no reason to stop serving.
    """
    where = os.environ.get("NOTIFY_SOCKET", "")
    if not where:
        return False
    # A name that begins with @ is of the abstract namespace, which the kernel writes with a zero.
    address = f"\0{where[1:]}" if where.startswith("@") else where
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as to:
            to.sendto(state.encode(), address)
    except OSError as error:
        _log.warning("systemd cannot be told", state=state, socket=where, error=str(error))
        return False
    return True
