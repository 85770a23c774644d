"""The clock of the drill's own services, which can be set: libfaketime lies between."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from pathlib import Path

_PLACES = (
    "/usr/lib/*/faketime/libfaketimeMT.so.1",
    "/usr/lib*/faketime/libfaketimeMT.so.1",
    "/usr/local/lib/faketime/libfaketimeMT.so.1",
)
_SHARED = Path("/dev/shm")  # noqa: S108 - where libfaketime itself puts its pieces


def find_library() -> Path | None:
    """Return libfaketime for programs with threads; None where it is not installed."""
    for pattern in _PLACES:
        for path in sorted(Path("/").glob(pattern.removeprefix("/"))):
            return path
    return None


def why_not() -> str:
    """Return why no clock can be set here; empty if one can."""
    return "" if find_library() else "libfaketime is not installed: apt-get install faketime"


class Clock:
    """What processes that were started with its environment take for the time of day.

    The monotonic clock goes on as it is, as it does where an operator sets the time.
    """

    def __init__(self, file: Path) -> None:
        """Begin with the right time.

        Args:
            file: Says how far off it is; the processes read it every second.
        """
        self._file = file
        self.set(0)

    def set(self, seconds: int) -> None:
        """Step so far off the right time; 0 for back to it."""
        written = self._file.with_suffix(".new")
        written.write_text(f"{seconds:+d}\n")
        written.replace(self._file)

    def environment(self) -> Mapping[str, str]:
        """Return the variables that make a process see it; empty without the library."""
        library = find_library()
        if library is None:
            return {}
        return {
            "LD_PRELOAD": str(library),
            "FAKETIME_TIMESTAMP_FILE": str(self._file),
            "FAKETIME_CACHE_DURATION": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "DONT_FAKE_MONOTONIC": "1",
        }


def sweep(pids: Iterable[int]) -> None:
    """Take away what libfaketime leaves of processes that were killed."""
    for pid in pids:
        for name in (f"faketime_shm_{pid}", f"sem.faketime_sem_{pid}"):
            with contextlib.suppress(OSError):
                (_SHARED / name).unlink()
