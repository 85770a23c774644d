"""A disk that is full, and one that is slow, for services of the drill's own.

No disk of the user's is filled: as root the services' data lie on a small file system in memory.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path

from pollard.services.drill.errors import DrillFailed

_MEBIBYTE = 1 << 20
_SPARE_BYTES = 64 * _MEBIBYTE
_MODELS_KEPT = 12
"""Room for so many: each revision lies with the manager, with a server, and on its way between."""

_LARGEST_FILE_BYTES = _MEBIBYTE // 2
"""Where no file system can be mounted: no file of the manager's may grow beyond this. Its bundles
are larger, and its database is smaller."""

_FILL_BYTES = 4096
_SLOW_CALLS = "fsync,fdatasync,pwrite64,openat,rename,unlink"
_PROBE_SECONDS = 0.3
_STRACE_SECONDS = 10.0


class SmallDisk:
    """A file system in memory, mounted where the services keep their data."""

    def __init__(self, directory: Path, model_mb: float) -> None:
        """Prepare; `mount` mounts it.

        Args:
            directory: Where; made if it is not there.
            model_mb: Size of the models that it holds, in MB.
        """
        self._directory = directory
        self._bytes = _SPARE_BYTES + int(model_mb * 1e6) * _MODELS_KEPT
        self._mounted = False

    @property
    def mounted(self) -> bool:
        """Whether it is there."""
        return self._mounted

    def mount(self) -> str:
        """Mount it; return why it cannot be mounted, empty if it was."""
        if os.geteuid() != 0:
            return "mounting a small file system takes root"
        self._directory.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(
            [
                *("mount", "-t", "tmpfs", "-o", f"size={self._bytes},mode=700"),
                *("tmpfs", str(self._directory)),
            ],
            capture_output=True,
            text=True,
            check=False,
        )
        self._mounted = done.returncode == 0
        return "" if self._mounted else done.stderr.strip()

    def unmount(self) -> None:
        """Take it away, with all that lies on it."""
        if self._mounted:
            # Lazily: a process that has just been killed may still hold a file.
            subprocess.run(["umount", "--lazy", str(self._directory)], check=False)
            self._mounted = False

    def fill(self) -> int:
        """Leave no room at all; return how many bytes that took."""
        taken = 0
        with (self._directory / "filler").open("ab", buffering=0) as file:
            piece = bytes(_MEBIBYTE)
            while piece:
                try:
                    taken += file.write(piece)
                except OSError:
                    # Smaller pieces until not even the smallest finds room.
                    piece = piece[: len(piece) // 2] if len(piece) > _FILL_BYTES else b""
        return taken

    def empty(self) -> None:
        """Give the room back."""
        (self._directory / "filler").unlink(missing_ok=True)


class FileLimit:
    """A limit on the size of files of a process, where no file system can be mounted."""

    def __init__(self) -> None:
        self._limited: list[tuple[int, tuple[int, int]]] = []

    def set(self, pid: int) -> None:
        """Let no file of the process grow beyond half a megabyte."""
        before = resource.prlimit(pid, resource.RLIMIT_FSIZE)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (_LARGEST_FILE_BYTES, before[1]))
        self._limited.append((pid, before))

    def lift(self) -> None:
        """Put back what was allowed before."""
        for pid, before in self._limited:
            with contextlib.suppress(ProcessLookupError):
                resource.prlimit(pid, resource.RLIMIT_FSIZE, before)
        self._limited.clear()


class SlowDisk:
    """Holds up what a process asks of its disk, by strace's injection of delays."""

    def __init__(self) -> None:
        self._tracer: subprocess.Popen[bytes] | None = None

    @staticmethod
    def why_not() -> str:
        """Return why it cannot be done here; empty if it can."""
        if shutil.which("strace") is None:
            return "strace is not installed: apt-get install strace"
        with subprocess.Popen(["sleep", "60"]) as sleeping:
            tracer = _trace(sleeping.pid, 0)
            try:
                code = tracer.wait(_PROBE_SECONDS)
            except subprocess.TimeoutExpired:
                return ""
            finally:
                sleeping.kill()
                tracer.wait()
        return f"strace may not attach to processes here (exit code {code})"

    def begin(self, pid: int, seconds: float) -> None:
        """Let each call that reaches the disk take so much longer.

        Raises:
            DrillFailed: strace ended at once.
        """
        self._tracer = _trace(pid, seconds)
        time.sleep(_PROBE_SECONDS / 3)
        if self._tracer.poll() not in (None, 0):
            raise DrillFailed(f"strace ended with exit code {self._tracer.returncode}")

    async def end(self) -> None:
        """Let go of the process."""
        tracer, self._tracer = self._tracer, None
        if tracer is None:
            return
        tracer.send_signal(signal.SIGTERM)
        try:
            await asyncio.to_thread(tracer.wait, _STRACE_SECONDS)
        except subprocess.TimeoutExpired:
            # The kernel lets go of what a dead tracer held.
            tracer.kill()
            await asyncio.to_thread(tracer.wait)


def _trace(pid: int, seconds: float) -> subprocess.Popen[bytes]:
    delay = f"inject={_SLOW_CALLS}:delay_enter={round(seconds * 1e6)}"
    return subprocess.Popen(
        [
            *("strace", "-f", "-qq", "-o", os.devnull, "-p", str(pid)),
            *("-e", f"trace={_SLOW_CALLS}", "-e", delay),
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        process_group=0,
    )
