"""Bundles as uncompressed tars: packing that is the same every time, and
unpacking that trusts nothing."""

from __future__ import annotations

import hashlib
import os
import shutil
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from pollard.runtime.bundle import (
    MANIFEST,
    MAX_MANIFEST_BYTES,
    MAX_SIGNATURE_BYTES,
    SIGNATURE,
    Bundle,
    is_safe_path,
    sync_directory,
)
from pollard.runtime.errors import ArchiveInvalid
from pollard.runtime.writeback import begin_writeback

_BLOCK_BYTES = 1 << 20
_WRITEBACK_BYTES = 16 << 20


@dataclass(frozen=True)
class ArchiveLimits:
    """What a tar may hold."""

    max_files: int = 4096
    """Most members."""
    max_total_bytes: int = 16 * 1024**3
    """Largest sum of the sizes of all members, in bytes."""


def pack(bundle: Bundle, file: BinaryIO) -> None:
    """Write ``bundle`` as a tar: manifest first, then the files by path.

    Owners, times and modes are fixed, so the same bundle always gives the same
    bytes.
    """
    names = [MANIFEST]
    if (bundle.path / SIGNATURE).is_file():
        names.append(SIGNATURE)
    names += sorted(entry.path for entry in bundle.manifest.files)
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name in names:
            path = bundle.path / name
            info = tarfile.TarInfo(name)
            info.size = path.stat().st_size
            info.mode = 0o644
            with path.open("rb") as source:
                tar.addfile(info, source)


def unpack(file: BinaryIO, directory: Path, limits: ArchiveLimits | None = None) -> Bundle:
    """Unpack a tar into ``directory``, which must not exist or be empty, and check it.

    Only regular files with safe relative paths are taken. Each is written once,
    hashed on the way, and on disk when this returns. On any error the directory
    is removed.

    Args:
        file: The tar; it must be seekable. It may still be growing, if reading
            waits for what is missing.
        directory: Where to.
        limits: What the tar may hold.

    Raises:
        ArchiveInvalid: the tar is malformed, compressed, unsafe or too large.
        BundleError: what it holds is not a valid bundle.
        OSError: it cannot be written.
    """
    limits = limits or ArchiveLimits()
    directory.mkdir(parents=True, exist_ok=True)
    if any(directory.iterdir()):
        raise FileExistsError(f"{directory} is not empty")
    try:
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                digests = _extract(tar, file, directory, limits)
        except (tarfile.TarError, EOFError, UnicodeError) as error:
            raise ArchiveInvalid(f"not a readable uncompressed tar of a bundle: {error}") from error
        bundle = Bundle.open(directory, verify=False)
        bundle.verify(digests)
        return bundle
    except BaseException:
        shutil.rmtree(directory, ignore_errors=True)
        raise


def _extract(
    tar: tarfile.TarFile, file: BinaryIO, directory: Path, limits: ArchiveLimits
) -> dict[str, str]:
    """Write the members, and return the SHA-256 of each by path."""
    total = 0
    digests: dict[str, str] = {}
    for member in tar:
        name = member.name.removeprefix("./")
        if member.isdir() and (name in ("", ".") or is_safe_path(name)):
            continue
        if not member.isreg() or member.issparse():
            raise ArchiveInvalid(f"{member.name!r} is not a regular file", path=member.name)
        if not is_safe_path(name):
            raise ArchiveInvalid(f"{member.name!r} is not a safe path", path=member.name)
        if name in digests:
            raise ArchiveInvalid(f"{member.name!r} occurs twice", path=member.name)
        total += member.size
        if len(digests) >= limits.max_files:
            raise ArchiveInvalid(f"more than {limits.max_files} files", limit=limits.max_files)
        if total > limits.max_total_bytes:
            raise ArchiveInvalid(
                f"more than {limits.max_total_bytes} bytes", limit=limits.max_total_bytes
            )
        if name == MANIFEST and member.size > MAX_MANIFEST_BYTES:
            raise ArchiveInvalid(
                f"{MANIFEST} is longer than {MAX_MANIFEST_BYTES} bytes", limit=MAX_MANIFEST_BYTES
            )
        if name == SIGNATURE and member.size > MAX_SIGNATURE_BYTES:
            raise ArchiveInvalid(
                f"{SIGNATURE} is longer than {MAX_SIGNATURE_BYTES} bytes",
                limit=MAX_SIGNATURE_BYTES,
            )
        path = directory / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise ArchiveInvalid(f"{member.name!r} lies below a file", path=member.name) from None
        file.seek(member.offset_data)
        digests[name] = _write(file, member.size, path)
    for found, _, _ in os.walk(directory):
        sync_directory(Path(found))
    return digests


def _write(source: BinaryIO, size: int, path: Path) -> str:
    """Write the next ``size`` bytes of ``source`` to a new file; return their SHA-256."""
    digest = hashlib.sha256()
    done = synced = 0
    with path.open("xb", buffering=0) as target:
        while done < size:
            block = source.read(min(_BLOCK_BYTES, size - done))
            if not block:
                raise ArchiveInvalid("the tar ends in the middle of a file", path=path.name)
            _write_all(target, block)
            digest.update(block)
            done += len(block)
            if done - synced >= _WRITEBACK_BYTES:
                begin_writeback(target.fileno(), synced, done - synced)
                synced = done
        os.fsync(target.fileno())
    return digest.hexdigest()


def _write_all(target: Any, block: bytes) -> None:
    left = memoryview(block)
    while left:
        left = left[target.write(left) :]
