"""Where a drill works: a temporary directory, of which the services' log outlives a failure."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

LOG_NAME = "services.log"
"""What the drill's own services write."""


@dataclass
class Room:
    """The place of one drill."""

    directory: Path
    """For everything that it makes; gone at its end."""
    failed: bool = True
    """Whether the log is worth keeping; as it is until the drill says that all went well."""


@contextlib.contextmanager
def working_room(json_file: Path | None) -> Iterator[Room]:
    """Make a directory and take it away; keep the log of a drill that failed, and say where.

    Args:
        json_file: Where the figures are written: the log is kept beside them, or without them in
            the directory for temporary files.
    """
    with tempfile.TemporaryDirectory(prefix="pollard-drill-") as name:
        room = Room(Path(name))
        try:
            yield room
        finally:
            log = room.directory / LOG_NAME
            if room.failed and log.is_file():
                _keep(log, json_file)


def _keep(log: Path, json_file: Path | None) -> None:
    try:
        if json_file is None:
            descriptor, name = tempfile.mkstemp(prefix="pollard-drill-", suffix=f".{LOG_NAME}")
            os.close(descriptor)
            kept = Path(name)
        else:
            kept = json_file.with_suffix(f".{LOG_NAME}")
            kept.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(log, kept)
    except OSError as error:
        print(f"The services' log could not be kept: {error}", file=sys.stderr)
    else:
        print(f"The services' log is kept in {kept}", file=sys.stderr)
