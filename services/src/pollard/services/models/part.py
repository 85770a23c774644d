"""What is on disk of an upload: each byte of the tar once, in the file that it belongs to.

``{id}.part/bundle/`` holds the files of the bundle, ``{id}.part/structure`` all other bytes of the
tar in their order. Following the structure again tells how far the upload is: so it goes on after
a kill at any point, without anything written down about it.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pollard.runtime.bundle import sync_directory
from pollard.runtime.writeback import begin_writeback
from pollard.services.common.errors import InvalidRequest
from pollard.services.models.tar_stream import Member, TarStream

_READ_BYTES = 1024 * 1024
_WRITEBACK_BYTES = 16 * 1024 * 1024


class Part:
    """An upload on disk.

    A stream that is cancelled leaves a thread behind that opens or writes; so `close` waits for
    that, and whoever comes after it finds the part closed.

    Args:
        directory: Where it lies; made when it does not exist.
        max_files: Most files of a bundle.
        max_total_bytes: Largest sum of their sizes.
        hash_tar: Also hash the tar as a whole.
    """

    def __init__(
        self, directory: Path, *, max_files: int, max_total_bytes: int, hash_tar: bool
    ) -> None:
        self.directory = directory
        self.bundle = directory / "bundle"
        """The files of the bundle, as far as they have come."""
        self.size = 0
        """Bytes of the tar that have come."""
        self.digests: dict[str, str] = {}
        """SHA-256 of the files that are whole, by path."""
        self._stream = TarStream(max_files=max_files, max_total_bytes=max_total_bytes)
        self._tar = hashlib.sha256() if hash_tar else None
        self._using = threading.Lock()
        self._closed = False
        self._structure: Any = None
        self._file: Any = None
        self._digest = hashlib.sha256()
        self._path = ""
        self._written = 0
        self._unsynced = 0

    @property
    def ended(self) -> bool:
        """Whether the tar says that nothing follows."""
        return self._stream.ended

    @property
    def tar_sha256(self) -> str:
        """SHA-256 of what has come of the tar; empty when it is not hashed."""
        return self._tar.hexdigest() if self._tar is not None else ""

    def open(self) -> None:
        """Read what is there, and be ready for what follows.

        Raises:
            InvalidRequest: what is there is no tar of a bundle.
            OSError: it cannot be read or written.
        """
        with self._using:
            if not self._closed:
                self._open()

    def _open(self) -> None:
        self.bundle.mkdir(parents=True, exist_ok=True)
        self._structure = (self.directory / "structure").open("a+b", buffering=0)
        self._structure.seek(0)
        content = memoryview(self._structure.read())
        done = 0
        while done < len(content) or self._stream.content_left:
            if self._stream.content_left:
                self._read_content()
                if self._stream.content_left:
                    break
                continue
            count, member = self._stream.take(content[done:])
            self._count(content[done : done + count])
            done += count
            if member is not None:
                self._begin(member, again=True)
        # After a crash of the machine, what follows a file that is not whole can be there
        # without it.
        self._structure.truncate(done)
        for folder, _, files in os.walk(self.bundle):
            for name in files:
                path = Path(folder) / name
                relative = path.relative_to(self.bundle).as_posix()
                if relative not in self.digests and (self._file is None or relative != self._path):
                    path.unlink()

    def append(self, chunks: Sequence[bytes]) -> None:
        """Write what came next.

        Raises:
            InvalidRequest: the tar is malformed or unsafe.
            OSError: it cannot be written, or the part is closed.
        """
        with self._using:
            if self._closed:
                raise OSError(errno.EBADF, "the upload is closed", str(self.directory))
            self._append(chunks)

    def _append(self, chunks: Sequence[bytes]) -> None:
        structure = bytearray()
        for chunk in chunks:
            data = memoryview(chunk)
            while data:
                if self._stream.content_left:
                    piece = data[: self._stream.content_left]
                    self._write_content(piece)
                    data = data[len(piece) :]
                    continue
                count, member = self._stream.take(data)
                self._count(data[:count])
                structure += data[:count]
                data = data[count:]
                if member is not None:
                    # Before the file: a file without its header would never be found.
                    _write_all(self._structure, structure)
                    structure.clear()
                    self._begin(member)
        _write_all(self._structure, structure)

    def sync(self) -> None:
        """Bring everything to the disk.

        Raises:
            OSError: it cannot be written.
        """
        for folder, _, files in os.walk(self.directory):
            for name in files:
                _sync(Path(folder) / name)
            sync_directory(Path(folder))
        sync_directory(self.directory.parent)

    def close(self) -> None:
        """Close the files; what was written stays."""
        with self._using:
            self._closed = True
            for file in (self._file, self._structure):
                if file is not None:
                    with contextlib.suppress(OSError):
                        file.close()
            self._file = self._structure = None

    def _count(self, data: memoryview) -> None:
        self.size += len(data)
        if self._tar is not None:
            self._tar.update(data)

    def _begin(self, member: Member, *, again: bool = False) -> None:
        """Begin with a file, or with what there is of it ``again``."""
        path = self.bundle / member.path
        self._path, self._digest = member.path, hashlib.sha256()
        self._written = self._unsynced = 0
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if not (again and path.exists()):
                self._file = path.open("xb", buffering=0)
            elif path.stat().st_size < member.size:
                self._file = path.open("r+b", buffering=0)
            else:
                # It may be a blob already, which nobody writes to.
                self._file = path.open("rb", buffering=0)
        except (FileExistsError, NotADirectoryError, IsADirectoryError):
            raise _unsafe(member.path, "lies below a file, or is a directory too") from None
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:
                raise _unsafe(member.path, "is too long for the disk of the store") from None
            raise
        if not member.size:
            self._end_file()

    def _read_content(self) -> None:
        buffer = bytearray(_READ_BYTES)
        view = memoryview(buffer)
        while self._stream.content_left:
            count = self._file.readinto(view[: self._stream.content_left])
            if not count:
                return
            self._took(view[:count])

    def _write_content(self, data: memoryview) -> None:
        _write_all(self._file, data)
        self._unsynced += len(data)
        if self._unsynced >= _WRITEBACK_BYTES:
            start = self._written + len(data) - self._unsynced
            begin_writeback(self._file.fileno(), start, self._unsynced)
            self._unsynced = 0
        self._took(data)

    def _took(self, data: memoryview) -> None:
        self._count(data)
        self._digest.update(data)
        self._written += len(data)
        self._stream.content_left -= len(data)
        if not self._stream.content_left:
            self._end_file()

    def _end_file(self) -> None:
        if self._unsynced:
            begin_writeback(self._file.fileno(), self._written - self._unsynced, self._unsynced)
        self._file.close()
        self._file = None
        self.digests[self._path] = self._digest.hexdigest()


def committed_bytes(directory: Path) -> int:
    """Return how many bytes of an upload are there, all of them on disk.

    Args:
        directory: Of the part.

    Raises:
        FileNotFoundError: there is no such part.
        OSError: it cannot be read.
    """
    total = (directory / "structure").stat().st_size
    for folder, _, files in os.walk(directory):
        for name in files:
            path = Path(folder) / name
            _sync(path)
            if path != directory / "structure":
                total += path.stat().st_size
    return total


def last_change(directory: Path) -> float:
    """Return when anything of a part was last written, in seconds since the epoch."""
    times = [0.0]
    for path in (directory, *directory.rglob("*")):
        with contextlib.suppress(FileNotFoundError):
            times.append(path.lstat().st_mtime)
    return max(times)


def remove(directory: Path) -> None:
    """Delete a part."""
    if directory.is_dir():
        shutil.rmtree(directory, ignore_errors=True)
    else:
        directory.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fdatasync(descriptor)
    finally:
        os.close(descriptor)


def _write_all(file: Any, data: bytes | bytearray | memoryview) -> None:
    left = memoryview(data)
    while left:
        left = left[file.write(left) :]


def _unsafe(path: str, why: str) -> InvalidRequest:
    return InvalidRequest(f"{path!r} in the tar {why}", reason="ARCHIVE_INVALID", path=path[:200])
