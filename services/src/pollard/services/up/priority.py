"""The models service makes way for those that answer requests, where they share a machine."""

from __future__ import annotations

import contextlib
import os

NICENESS = 10
"""Of the models service, added to that of its supervisor.

It is at work for an instant of each swap, while the others load the revision and answer; on two
cores at 70 % load it then stood in their way: the 99th percentile of their latency fell by a third.
"""

_MOST = 19


def make_way(pid: int) -> None:
    """Lower the priority of a process that serves: of all its threads, and what these start.

    Not before it serves: where a machine has much to do, its start would take a minute, and all
    wait for it.

    Args:
        pid: Of a child of this process; one that has ended is left alone.
    """
    wanted = min(_MOST, os.getpriority(os.PRIO_PROCESS, 0) + NICENESS)
    changed = True
    # A thread inherits its priority from the one that starts it, perhaps while these are looked at.
    while changed:
        changed = False
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            for name in os.listdir(f"/proc/{pid}/task"):
                changed = _lower(int(name), wanted) or changed


def _lower(thread: int, wanted: int) -> bool:
    """Lower the priority of a thread; say whether there was one, and it was higher."""
    # On Linux niceness belongs to the thread.
    with contextlib.suppress(ProcessLookupError):
        if os.getpriority(os.PRIO_PROCESS, thread) < wanted:
            os.setpriority(os.PRIO_PROCESS, thread, wanted)
            return True
    return False
