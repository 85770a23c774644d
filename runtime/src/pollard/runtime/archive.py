"""Bundles as uncompressed tars: packing that is the same every time, and
unpacking that trusts nothing."""

from __future__ import annotations

import io
import os
import shutil
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from pollard.runtime.bundle import (
    MANIFEST,
    MAX_MANIFEST_BYTES,
    SIGNATURE,
    Bundle,
    is_safe_path,
    sync_directory,
)
from pollard.runtime.errors import ArchiveInvalid


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

    Only regular files with safe relative paths are taken. On any error the
    directory is removed.

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
                _extract(tar, directory, limits)
        except (tarfile.TarError, EOFError, UnicodeError) as error:
            raise ArchiveInvalid(f"not a readable uncompressed tar of a bundle: {error}") from error
        return Bundle.open(directory, verify=True)
    except BaseException:
        shutil.rmtree(directory, ignore_errors=True)
        raise


def _extract(tar: tarfile.TarFile, directory: Path, limits: ArchiveLimits) -> None:
    total = 0
    seen: set[str] = set()
    for member in tar:
        name = member.name.removeprefix("./")
        if member.isdir() and (name in ("", ".") or is_safe_path(name)):
            continue
        if not member.isreg():
            raise ArchiveInvalid(f"{member.name!r} is not a regular file", path=member.name)
        if not is_safe_path(name):
            raise ArchiveInvalid(f"{member.name!r} is not a safe path", path=member.name)
        if name in seen:
            raise ArchiveInvalid(f"{member.name!r} occurs twice", path=member.name)
        seen.add(name)
        total += member.size
        if len(seen) > limits.max_files:
            raise ArchiveInvalid(f"more than {limits.max_files} files", limit=limits.max_files)
        if total > limits.max_total_bytes:
            raise ArchiveInvalid(
                f"more than {limits.max_total_bytes} bytes", limit=limits.max_total_bytes
            )
        if name == MANIFEST and member.size > MAX_MANIFEST_BYTES:
            raise ArchiveInvalid(
                f"{MANIFEST} is longer than {MAX_MANIFEST_BYTES} bytes", limit=MAX_MANIFEST_BYTES
            )
        source = tar.extractfile(member)
        if source is None:
            raise ArchiveInvalid(f"{member.name!r} has no content", path=member.name)
        path = directory / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise ArchiveInvalid(f"{member.name!r} lies below a file", path=member.name) from None
        with source, path.open("xb") as target:
            shutil.copyfileobj(source, target, io.DEFAULT_BUFFER_SIZE * 16)
            target.flush()
            os.fsync(target.fileno())
    for found, _, _ in os.walk(directory):
        sync_directory(Path(found))
