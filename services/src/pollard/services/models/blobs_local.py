"""Blobs in a directory."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import fsspec

from pollard.runtime.bundle import sync_directory, write_durably
from pollard.services.common.errors import StartupError
from pollard.services.models.blobs import OWNER, PIECE_BYTES, Blobs, blob_of, blob_path

_NOT_LINKABLE = (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP)


class LocalBlobs(Blobs):
    """Blobs in a local directory: temporary name, fsync, rename, fsync of the directory."""

    def __init__(self, directory: Path, *, shared: bool = False) -> None:
        self.directory = directory
        self.shared = shared
        self.name = f"the directory {directory}"
        self._new = directory / "new"
        self._files = fsspec.filesystem("file", skip_instance_cache=True)

    def path(self, sha256: str) -> Path:
        """Return where the blob of that digest lies or would lie."""
        return self.directory / blob_path(sha256)

    def check(self) -> None:
        """Make the directories."""
        try:
            self._new.mkdir(parents=True, exist_ok=True)
            if not os.access(self._new, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        except OSError as error:
            raise StartupError(
                f"the blobs in {self.directory} cannot be used: {error.strerror}; see that its "
                "disk can be written and has room"
            ) from error

    def owner(self) -> str:
        """Read the owner's mark."""
        try:
            return (self.directory / OWNER).read_text("ascii").strip()
        except FileNotFoundError:
            return ""

    def set_owner(self, installation: str) -> None:
        """Write the owner's mark in one step, unless there is one."""
        new = self._new / f"owner-{secrets.token_hex(4)}"
        write_durably(new, f"{installation}\n".encode("ascii"))
        try:
            with contextlib.suppress(FileExistsError):
                os.link(new, self.directory / OWNER)
        except OSError as error:
            if error.errno not in _NOT_LINKABLE:
                raise
            new.rename(self.directory / OWNER)
        finally:
            new.unlink(missing_ok=True)
        sync_directory(self.directory)

    def disown(self) -> None:
        """Remove the owner's mark."""
        (self.directory / OWNER).unlink(missing_ok=True)

    def adopt(self, file: Path, sha256: str) -> None:
        """Link the file, or copy one from another disk, and give it the blob's name."""
        target = self.path(sha256)
        if not target.parent.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            sync_directory(target.parent.parent)
            sync_directory(self.directory)
        new = self._new / f"{sha256}-{secrets.token_hex(4)}"
        try:
            try:
                os.link(file, new)
            except OSError as error:
                if error.errno not in _NOT_LINKABLE:
                    raise
                _copy(file, new)
            new.chmod(0o444)
            # Whatever had the name is replaced in one step. A name that leads to the very same
            # file already is left alone by the system, and so is the new one.
            new.replace(target)
        finally:
            new.unlink(missing_ok=True)
        sync_directory(target.parent)

    def pieces(
        self, sha256: str, size: Callable[[], int] = lambda: PIECE_BYTES
    ) -> Generator[bytes, None, None]:
        """Read the file."""
        with self.path(sha256).open("rb", buffering=0) as file:
            while piece := file.read(size()):
                yield piece

    def rehash(self, sha256: str) -> str:
        """Read from the disk itself: a bit that flipped there does not show in what is cached."""
        with self.path(sha256).open("rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return super().rehash(sha256)

    def __iter__(self) -> Iterator[str]:
        """Yield what lies below ``sha256``."""
        root = self.directory / "sha256"
        if root.is_dir():
            for entry in self._files.find(str(root)):
                if digest := blob_of(entry):
                    yield digest

    def delete(self, sha256: str) -> None:
        """Remove the name."""
        self.path(sha256).unlink(missing_ok=True)

    def remove_leftovers(self, older_than: float) -> None:
        """Remove what never got its name."""
        remove_old(self._new, older_than)


def _copy(source: Path, target: Path) -> None:
    with source.open("rb") as reading, target.open("xb") as writing:
        shutil.copyfileobj(reading, writing, PIECE_BYTES)
        writing.flush()
        os.fsync(writing.fileno())


def remove_old(directory: Path, older_than: float) -> list[str]:
    """Delete the entries of ``directory`` last changed before ``older_than``.

    Args:
        directory: Holds files and directories of work in progress.
        older_than: Seconds since the epoch.

    Returns:
        Names of what was deleted.
    """
    removed = []
    for entry in directory.iterdir():
        if entry.lstat().st_mtime >= older_than:
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)
        removed.append(entry.name)
    return removed
