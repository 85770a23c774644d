"""Several servers on one machine that load the same models: how much memory they need together.

Each marks in a shared folder what it holds. One that is to load a model can then tell how many have
to do that yet: memory that the others have taken is gone already, memory that they are about to
take is not. Marks name a process, so those of one that has died say nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import weakref
from pathlib import Path

import psutil

from pollard.services.common.errors import StartupError


class Replicas:
    """This server's place among those that run the same models on this machine."""

    def __init__(self, count: int = 1, folder: Path | None = None) -> None:
        """Take the shared folder; it is made if it is not there.

        Args:
            count: Servers in all, this one included.
            folder: Where they mark what they hold; without it all count as if they held nothing.

        Raises:
            StartupError: the folder cannot be made.
        """
        self.count = count
        self._folder = folder
        if folder is not None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise StartupError(
                    f"cannot make the folder {folder}, where replicas mark what they hold: "
                    f"{error.strerror}"
                ) from error

    def still_to_load(self, model: str) -> int:
        """Return how many have to load a model yet, this server always included.

        Args:
            model: What is the same for all of them, such as a bundle's digest; empty for a model
                that only this server has.
        """
        if self.count <= 1 or not model:
            return 1
        return max(1, self.count - self._holders(model))

    def holds(self, model: str, holder: object) -> None:
        """Mark that this server holds a model, for as long as `holder` lives."""
        if self.count <= 1 or self._folder is None or not model:
            return
        mark = self._mark(model, os.getpid(), id(holder))
        # A mark that cannot be written makes the others more careful than they need to be.
        with contextlib.suppress(OSError):
            mark.touch()
            weakref.finalize(holder, mark.unlink, missing_ok=True)

    def _holders(self, model: str) -> int:
        """Return how many other living servers hold a model."""
        if self._folder is None:
            return 0
        found: set[int] = set()
        for mark in self._folder.glob(f"{_key(model)}.*"):
            process = mark.name.split(".")[1]
            if process == str(os.getpid()) or not process.isdigit():
                continue
            if psutil.pid_exists(int(process)):
                found.add(int(process))
            else:
                mark.unlink(missing_ok=True)
        return len(found)

    def _mark(self, model: str, process: int, number: int) -> Path:
        assert self._folder is not None  # noqa: S101 - whoever calls has looked
        return self._folder / f"{_key(model)}.{process}.{number}"


def _key(model: str) -> str:
    return hashlib.sha256(model.encode()).hexdigest()[:32]
