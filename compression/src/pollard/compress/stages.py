"""Stages of a run, kept on disk by what they were made from.

A stage is a folder whose name holds a digest of everything that went into it: what came
before it, the data, its part of the recipe, the versions of the tools, the processor. It
is made under another name and renamed when it is whole, so that a run that is killed at
any moment leaves only whole stages and one half-made one; the next run with the same
inputs takes the whole ones as they are and lets the half-made one go on.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from pollard.compress.codec import encode
from pollard.compress.errors import CacheUnusable, DiskFull
from pollard.compress.progress import Reporter
from pollard.runtime.bundle import sync_directory, write_durably
from pollard.runtime.digests import sha256_file
from pollard.runtime.disk import disk_full

T = TypeVar("T")

SCHEMA_VERSION = 1

# In a stage's folder: what it was made from, and what is thrown away when it is whole.
_RECORD, _SCRATCH = "stage.json", "scratch"

# Stages that have not been used for longest go when all of them take more than this.
LIMIT_BYTES = 20 * 1024**3


@dataclass(frozen=True)
class Done(Generic[T]):
    """A whole stage."""

    name: str
    key: str
    """Digest of everything that went into it; goes into what is made from it."""
    value: T
    folder: Path
    reused: bool
    """Whether it was there already."""
    seconds: float
    """What making it took, whenever that was."""


@dataclass
class Stages:
    """Makes stages, or finds them made."""

    folder: Path
    base: Mapping[str, Any] = field(default_factory=dict)
    """Goes into every key."""
    fresh: bool = False
    """Make everything anew."""
    reporter: Reporter = field(default_factory=Reporter)
    done: list[Done[Any]] = field(default_factory=list)
    """What this run has asked for so far, in that order."""

    def __post_init__(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not os.access(self.folder, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, "it is not writable", str(self.folder))
        except OSError as error:
            raise CacheUnusable(
                f"finished stages cannot be kept in {self.folder}: {error.strerror or error}; "
                "choose another place with --cache, or POLLARD_CACHE"
            ) from error

    def run(
        self,
        name: str,
        inputs: Mapping[str, Any],
        make: Callable[[Path], None],
        load: Callable[[Path], T],
    ) -> Done[T]:
        """Return a stage, made now or earlier.

        Args:
            name: Of the stage.
            inputs: What goes into it beside `base`.
            make: Fills the folder that it is given. What it leaves in the subfolder
                `scratch` is there again if it is killed and called anew, and goes when
                the stage is whole.
            load: Reads the result from the folder.

        Raises:
            DiskFull: there is no space; what is whole is kept.
            CompressionError, OSError: whatever ``make`` raises.
        """
        told = encode({"schema_version": SCHEMA_VERSION, "stage": name, **self.base, **inputs})
        key = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
        whole = self.folder / f"{name}-{key[:24]}"
        half = whole.with_name(f"{whole.name}.partial")
        with self._alone(whole, name):
            record = None if self.fresh else _read(whole)
            reused = record is not None
            if record is None:
                record = self._make(name, told, make, whole, half)
            else:
                # What is used stays longest.
                os.utime(whole / _RECORD)
                self.reporter.say(f"Stage {name}: finished earlier, in {record['seconds']:.1f} s")
            result = Done(name, key, load(whole), whole, reused, float(record["seconds"]))
        self.done.append(result)
        return result

    def forget(self, done: Done[Any]) -> None:
        """Remove a stage, so that it is made anew next time."""
        shutil.rmtree(done.folder, ignore_errors=True)

    @property
    def size_bytes(self) -> int:
        """What all stages take on disk, those of other runs, too."""
        return sum(_size(path) for path in self.folder.iterdir() if path.is_dir())

    def trim(self, limit_bytes: int = LIMIT_BYTES) -> None:
        """Remove the stages that have not been used for longest, until the rest fits."""
        found = []
        for record in self.folder.glob(f"*/{_RECORD}"):
            with contextlib.suppress(OSError):
                found.append((record.stat().st_mtime, record.parent))
        own = {done.folder for done in self.done}
        total = self.size_bytes
        for _, folder in sorted(found):
            if total <= limit_bytes:
                return
            if folder not in own:
                total -= _size(folder)
                shutil.rmtree(folder, ignore_errors=True)

    def _make(
        self,
        name: str,
        told: Mapping[str, Any],
        make: Callable[[Path], None],
        whole: Path,
        half: Path,
    ) -> dict[str, Any]:
        if self.fresh:
            shutil.rmtree(half, ignore_errors=True)
        before = _seconds_so_far(half)
        started = time.monotonic()
        try:
            half.mkdir(exist_ok=True)
            _clear(half)
            make(half)
            shutil.rmtree(half / _SCRATCH, ignore_errors=True)
            record = {
                "inputs": told,
                "seconds": before + time.monotonic() - started,
                "files": {str(p.relative_to(half)): sha256_file(p) for p in _files(half)},
            }
            write_durably(half / _RECORD, (json.dumps(record, indent=1) + "\n").encode())
            shutil.rmtree(whole, ignore_errors=True)
            half.rename(whole)
            sync_directory(self.folder)
        except OSError as error:
            _clear(half)
            if not disk_full(error):
                raise
            raise DiskFull(
                f"there is no space for the stage {name}: {error}. What was finished before it is "
                f"kept in {self.folder}: free some space and run the same again, or choose another "
                "place with --cache"
            ) from error
        finally:
            # For what goes on later: how long it has taken until now.
            if half.is_dir() and (half / _SCRATCH).is_dir():
                with contextlib.suppress(OSError):
                    told_so_far = before + time.monotonic() - started
                    (half / _SCRATCH / "seconds").write_text(f"{told_so_far:.3f}")
        return record

    @contextmanager
    def _alone(self, whole: Path, name: str) -> Iterator[None]:
        """Keep other processes from the same stage; a killed one lets go by itself."""
        with (whole.with_name(f"{whole.name}.lock")).open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self.reporter.say(f"Another run makes the same stage {name}; waiting for it")
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield


@contextmanager
def temporary_stages(reporter: Reporter | None = None) -> Iterator[Stages]:
    """Give stages that are gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="pollard-stages-") as folder:
        yield Stages(Path(folder), reporter=reporter or Reporter())


def scratch(folder: Path) -> Path:
    """Return the part of a stage's folder that is only there until the stage is whole."""
    path = folder / _SCRATCH
    path.mkdir(exist_ok=True)
    return path


def write_json(path: Path, content: Any) -> None:
    """Write what :func:`read_json` reads."""
    write_durably(path, (json.dumps(content, indent=1) + "\n").encode())


def read_json(path: Path) -> Any:
    """Return what a file of a whole stage holds."""
    return json.loads(path.read_text(encoding="utf-8"))


def _read(folder: Path) -> dict[str, Any] | None:
    """Return a whole stage's record; None if it is absent, or not as it was written."""
    try:
        record: dict[str, Any] = read_json(folder / _RECORD)
        if all(sha256_file(folder / name) == told for name, told in record["files"].items()):
            return record
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        pass
    return None


def _seconds_so_far(half: Path) -> float:
    try:
        return float((half / _SCRATCH / "seconds").read_text())
    except (OSError, ValueError):
        return 0.0


def _clear(half: Path) -> None:
    """Remove what was half made, but not what one can go on from."""
    for path in half.iterdir() if half.is_dir() else ():
        if path.name != _SCRATCH:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _size(folder: Path) -> int:
    total = 0
    for path in _files(folder):
        with contextlib.suppress(OSError):
            total += path.stat().st_size
    return total
