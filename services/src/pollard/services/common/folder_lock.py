"""A folder that one process uses at a time."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from pathlib import Path


class FolderInUse(Exception):
    """Another process holds the folder."""

    def __init__(self, holder: str) -> None:
        super().__init__(f"in use by the process {holder}")
        self.holder = holder
        """Its number; "unknown" where that is not known."""


class FolderLock:
    """Holds a folder until it is closed, or the process ends."""

    def __init__(self, folder: Path) -> None:
        """Take the folder.

        Raises:
            FolderInUse: another process holds it.
            OSError: the file `lock` in it cannot be written.
        """
        self._held: list[int] = []
        try:
            self._take(folder)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let another process have the folder."""
        while self._held:
            os.close(self._held.pop())

    def _take(self, folder: Path) -> None:
        descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self._held.append(descriptor)
        free = _lock(descriptor)
        with contextlib.suppress(OSError):
            # Somebody may take the file for one that was left, and delete it. Network disks lock
            # no directories.
            self._held.append(os.open(folder, os.O_RDONLY | os.O_CLOEXEC))
            free &= _lock(self._held[-1])
        if not free:
            holder = os.read(descriptor, 32).decode("ascii", "replace").strip()
            raise FolderInUse(holder or "unknown")
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)


def _lock(descriptor: int) -> bool:
    """Take a lock; tell whether nobody else has it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            raise
        return False
    return True
