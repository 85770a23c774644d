"""Content-addressed files: ``sha256/ab/abcdef…``.

A file appears under its name only when all of it is on disk: temporary name,
fsync, rename, fsync of the directory. Reading goes through fsspec.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

import fsspec

from pollard.runtime.bundle import sync_directory
from pollard.runtime.digests import sha256_bytes
from pollard.services.common.errors import DataLoss

_NAME = re.compile(r"[0-9a-f]{64}")
_BLOCK_BYTES = 1024 * 1024


class Blobs:
    """Blobs in a local directory. Every method may be called from any thread."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._files = fsspec.filesystem("file")
        # Digests that an upload in progress is about to refer to.
        self._pinned: Counter[str] = Counter()
        self._lock = threading.Lock()

    def path(self, sha256: str) -> Path:
        """Return where the blob of that digest lies or would lie."""
        return self.directory / "sha256" / sha256[:2] / sha256

    @contextmanager
    def pinned(self, digests: Iterable[str]) -> Iterator[None]:
        """Keep blobs from being collected until something refers to them."""
        held = list(digests)
        with self._lock:
            self._pinned.update(held)
        try:
            yield
        finally:
            with self._lock:
                self._pinned.subtract(held)

    def adopt(self, file: Path, sha256: str) -> None:
        """Move a file, already checked and on the same disk, in as the blob of ``sha256``.

        The digest must be pinned. A blob that is there already is replaced: were it
        damaged, it would be whole again.

        Raises:
            OSError: it cannot be moved.
        """
        target = self.path(sha256)
        if not target.parent.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            sync_directory(target.parent.parent)
            sync_directory(self.directory)
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.fchmod(descriptor, 0o444)
        finally:
            os.close(descriptor)
        # Both names lie in the store, so this is one step: all or nothing.
        file.replace(target)
        sync_directory(target.parent)

    def open(self, sha256: str) -> BinaryIO:
        """Open a blob for reading.

        Raises:
            DataLoss: it is not there.
        """
        try:
            return cast(BinaryIO, self._files.open(str(self.path(sha256)), "rb"))
        except FileNotFoundError:
            raise DataLoss(
                f"the blob {sha256} is missing from the store; restore it from a backup, or push "
                "its bundle again",
                reason="BLOB_MISSING",
                sha256=sha256,
            ) from None

    def read(self, sha256: str) -> bytes:
        """Return a whole blob.

        Raises:
            DataLoss: it is not there, or damaged.
        """
        with self.open(sha256) as file:
            content = file.read()
        actual = sha256_bytes(content)
        if actual != sha256:
            raise DataLoss(
                f"the blob {sha256} is damaged: its SHA-256 is {actual}. Restore it from a "
                "backup, or push its bundle again",
                reason="BLOB_DAMAGED",
                sha256=sha256,
            )
        return content

    def rehash(self, sha256: str) -> str:
        """Read a blob from the disk, not from the system's memory of it; return its SHA-256.

        Raises:
            OSError: it is missing or cannot be read.
        """
        digest = hashlib.sha256()
        with self.path(sha256).open("rb", buffering=0) as file:
            # A bit that flipped on the disk would not show in what is cached.
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            while block := file.read(_BLOCK_BYTES):
                digest.update(block)
        return digest.hexdigest()

    def __iter__(self) -> Iterator[str]:
        """Yield the digests of all blobs."""
        root = self.directory / "sha256"
        if root.is_dir():
            for entry in self._files.find(str(root)):
                name = Path(entry).name
                if _NAME.fullmatch(name):
                    yield name

    def collect(
        self, is_referenced: Callable[[str], bool], among: Iterable[str] | None = None
    ) -> list[str]:
        """Delete the blobs that nothing refers to; safe beside running uploads.

        Args:
            is_referenced: Asks the registry; called again right before each deletion.
            among: Digests to look at; None for all.

        Returns:
            The digests that were deleted.
        """
        deleted = []
        for digest in list(self if among is None else among):
            # An upload pins before it looks whether a blob is there, and lets go
            # after the registry refers to it: with the lock held, a blob that is
            # neither pinned nor referred to is needed by nobody.
            with self._lock:
                if self._pinned[digest] > 0 or is_referenced(digest):
                    continue
                self.path(digest).unlink(missing_ok=True)
            deleted.append(digest)
        return deleted


def remove_leftovers(directory: Path, older_than: float) -> list[str]:
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
