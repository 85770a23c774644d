"""Bundles as the client meets them: to send one, and to write one that was fetched.

The client knows of a bundle only what it must: `manifest.json` lists every other file with its
SHA-256. What the files mean is the business of `pollard.runtime`, which this package does not need.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tarfile
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import BinaryIO, Self

from google.protobuf import json_format

from pollard.bundle.v1 import bundle_pb2
from pollard.client.errors import InvalidBundle

MANIFEST = "manifest.json"
SIGNATURE = "signature"
MAX_MANIFEST_BYTES = 4 * 1024 * 1024
CHUNK_BYTES = 1 << 20
"""Size of the pieces in which a bundle is sent."""


@dataclass(frozen=True)
class _Segment:
    """A run of bytes of the tar: a header, padding, or (with a path) a file."""

    size: int
    data: bytes = b""
    path: Path | None = None
    sha256: str = ""
    """Of the file, as the manifest says; empty when it says nothing."""


class BundleTar:
    """The tar of a bundle directory, made while it is read and the same every time.

    So a broken upload can go on at any byte without the tar ever lying on disk.
    """

    def __init__(self, directory: Path, manifest: bytes, segments: list[_Segment]) -> None:
        self.directory = directory
        self.bundle_sha256 = hashlib.sha256(manifest).hexdigest()
        self.total_bytes = sum(segment.size for segment in segments)
        self._segments = segments

    @classmethod
    def open(cls, directory: str | os.PathLike[str]) -> BundleTar:
        """Look at a bundle, but not into its files; their digests are compared as they are read.

        Raises:
            InvalidBundle: If a file is missing, has another size than the manifest says or is not
                listed in it.
            OSError: If a file cannot be read.
        """
        directory = Path(directory)
        raw = _read_manifest(directory)
        manifest = parse_manifest(raw, str(directory / MANIFEST))
        listed = {entry.path: entry for entry in manifest.files}
        _refuse_unlisted(directory, set(listed))
        names = [MANIFEST]
        if (directory / SIGNATURE).is_file():
            names.append(SIGNATURE)
        names += sorted(listed)

        segments: list[_Segment] = []
        for name in names:
            path = directory / name
            if not path.is_file():
                raise InvalidBundle(f"{path} is missing, but {MANIFEST} lists it")
            info = tarfile.TarInfo(name)
            info.size = path.stat().st_size
            info.mode = 0o644
            header = info.tobuf(tarfile.PAX_FORMAT)
            entry = listed.get(name)
            if entry is not None and info.size != entry.size_bytes:
                raise _differs(path, f"it has {info.size} bytes and not {entry.size_bytes}")
            digest = hashlib.sha256(raw).hexdigest() if entry is None else entry.sha256
            segments += [
                _Segment(len(header), header),
                _Segment(info.size, path=path, sha256="" if name == SIGNATURE else digest),
            ]
            if padding := -info.size % tarfile.BLOCKSIZE:
                segments.append(_Segment(padding, bytes(padding)))
        end = 2 * tarfile.BLOCKSIZE
        end += -(sum(segment.size for segment in segments) + end) % tarfile.RECORDSIZE
        segments.append(_Segment(end, bytes(end)))
        return cls(directory, raw, segments)

    def chunks(self, offset: int, size: int = CHUNK_BYTES) -> Iterator[bytes]:
        """Yield the bytes of the tar from `offset` on in pieces of at most `size`.

        The next piece is read and hashed, in a thread, while the caller sends the one before. The
        end of a file comes only when the file is what the manifest says; the server compares too,
        also a file of which only the end was still to be sent.

        Raises:
            InvalidBundle: If a file differs from the manifest.
            OSError: If a file cannot be read.
        """
        joined = self._joined(offset, size)
        with ThreadPoolExecutor(1, "pollard-bundle") as reading:
            ahead = reading.submit(next, joined, None)
            while (piece := ahead.result()) is not None:
                ahead = reading.submit(next, joined, None)
                yield piece

    def _joined(self, offset: int, size: int) -> Iterator[bytes]:
        waiting = b""
        for piece in self._pieces(offset, size):
            # Blocks of files go out as they were read; only what is small is joined.
            if waiting and len(waiting) + len(piece) > size:
                yield waiting
                waiting = b""
            waiting = waiting + piece if waiting else piece
        if waiting:
            yield waiting

    def _pieces(self, offset: int, size: int) -> Iterator[bytes]:
        skip = offset
        for segment in self._segments:
            if skip >= segment.size:
                skip -= segment.size
                continue
            digest = hashlib.sha256()
            left = segment.size - skip
            for piece in _read(segment, skip, size):
                digest.update(piece)
                left -= len(piece)
                if not left and not skip and segment.path is not None and segment.sha256:
                    actual = digest.hexdigest()
                    if actual != segment.sha256:
                        raise _differs(segment.path, f"its SHA-256 is {actual}")
                yield piece
            skip = 0


def _differs(path: Path, how: str) -> InvalidBundle:
    return InvalidBundle(
        f"{path} is not the file that {MANIFEST} lists: {how}; make the bundle again"
    )


def _read(segment: _Segment, offset: int, size: int) -> Iterator[bytes]:
    if segment.path is None:
        for start in range(offset, segment.size, size):
            yield segment.data[start : start + size]
        return
    left = segment.size - offset
    with segment.path.open("rb") as file:
        file.seek(offset)
        while left:
            chunk = file.read(min(size, left))
            if not chunk:
                raise InvalidBundle(f"{segment.path} became shorter while it was read")
            left -= len(chunk)
            yield chunk


def _read_manifest(directory: Path) -> bytes:
    if not directory.is_dir():
        raise InvalidBundle(f"{directory} is not a directory; name the directory of a bundle")
    path = directory / MANIFEST
    if not path.is_file():
        raise InvalidBundle(
            f"{directory} holds no {MANIFEST}, so it is not a bundle; "
            "`pollard compress` and `pollard bundle` make one"
        )
    if path.stat().st_size > MAX_MANIFEST_BYTES:
        raise InvalidBundle(f"{path} is longer than {MAX_MANIFEST_BYTES} bytes")
    return path.read_bytes()


def parse_manifest(raw: bytes, where: str) -> bundle_pb2.Manifest:
    """Read a manifest as far as the client needs it, and refuse unsafe paths."""
    manifest = bundle_pb2.Manifest()
    try:
        json_format.Parse(raw.decode(), manifest, ignore_unknown_fields=True)
    except (UnicodeDecodeError, json_format.ParseError) as error:
        raise InvalidBundle(f"{where} is no readable manifest: {error}") from None
    seen = set()
    for entry in manifest.files:
        if not is_safe_path(entry.path) or entry.path in (MANIFEST, SIGNATURE):
            raise InvalidBundle(f"{where} lists the unsafe path {entry.path!r}")
        if entry.path in seen:
            raise InvalidBundle(f"{where} lists {entry.path!r} twice")
        seen.add(entry.path)
    return manifest


def is_safe_path(path: str) -> bool:
    """Say whether a path of a bundle stays within it on this system."""
    parts = PurePosixPath(path).parts
    return (
        bool(parts)
        and len(path) <= 255
        and not path.startswith("/")
        and "\\" not in path
        and "\0" not in path
        and not (os.name == "nt" and ":" in path)
        and not {".", ".."} & set(parts)
        and PurePosixPath(path).as_posix() == path
    )


def _refuse_unlisted(directory: Path, listed: set[str]) -> None:
    for folder, _, files in os.walk(directory):
        for file in files:
            name = (Path(folder) / file).relative_to(directory).as_posix()
            if name not in listed and name not in (MANIFEST, SIGNATURE):
                raise InvalidBundle(
                    f"{directory / name} is not listed in {MANIFEST}; a bundle holds nothing else. "
                    "Move it out of the directory"
                )


class BundleWriter:
    """Writes a bundle that comes in pieces, beside its place, and renames it when it is whole.

    So the directory either holds a complete, checked bundle or does not exist.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(directory)
        self._partial = self.directory.with_name(
            f".{self.directory.name}.{uuid.uuid4().hex[:8]}.partial"
        )
        self._file: BinaryIO | None = None
        self._name = ""
        self._left = 0
        self._hash = hashlib.sha256()
        self._digests: dict[str, str] = {}

    def __enter__(self) -> Self:
        if self.directory.exists() and (
            not self.directory.is_dir() or any(self.directory.iterdir())
        ):
            raise FileExistsError(f"{self.directory} exists and is not empty; name a new directory")
        self._partial.mkdir(parents=True)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
        shutil.rmtree(self._partial, ignore_errors=True)

    def write(self, path: str, offset: int, data: bytes, total_bytes: int) -> None:
        """Take one piece of a file. Files come one after another, each from its first byte.

        Raises:
            InvalidBundle: If the pieces do not fit together.
        """
        if offset == 0 and path != self._name:
            self._begin(path, total_bytes)
        if path != self._name or total_bytes - self._left != offset or len(data) > self._left:
            raise InvalidBundle(
                f"the server sent {len(data)} bytes of {path!r} at {offset}, which do not follow "
                "what came before"
            )
        assert self._file is not None  # noqa: S101 - _begin opened it
        self._file.write(data)
        self._hash.update(data)
        self._left -= len(data)
        if self._left == 0:
            self._end()

    def finish(self, expected_sha256: str | None = None) -> str:
        """Check every digest and move the bundle to its place; return its digest.

        Raises:
            InvalidBundle: If a file is missing or differs from the manifest, or the bundle is not
                the expected one.
        """
        if self._left or MANIFEST not in self._digests:
            raise InvalidBundle("the server's answer ended before the bundle was whole")
        digest = self._digests[MANIFEST]
        if expected_sha256 is not None and digest != expected_sha256:
            raise InvalidBundle(f"the server sent the bundle {digest} instead of {expected_sha256}")
        raw = (self._partial / MANIFEST).read_bytes()
        listed = {entry.path: entry.sha256 for entry in parse_manifest(raw, MANIFEST).files}
        for name in (self._digests.keys() | listed.keys()) - {MANIFEST, SIGNATURE}:
            if self._digests.get(name) != listed.get(name):
                raise InvalidBundle(f"{name!r} came damaged or not at all; pull again")
        if self.directory.exists():
            self.directory.rmdir()  # empty, as __enter__ saw; rename would refuse it
        self._partial.rename(self.directory)
        return digest

    def _begin(self, path: str, total_bytes: int) -> None:
        if self._left:
            raise InvalidBundle(f"the server left {self._name!r} before its end")
        if not is_safe_path(path) or path in self._digests:
            raise InvalidBundle(f"the server sent the unsafe or repeated path {path!r}")
        target = self._partial / path
        target.parent.mkdir(parents=True, exist_ok=True)
        self._file = target.open("xb")
        self._name, self._left, self._hash = path, total_bytes, hashlib.sha256()

    def _end(self) -> None:
        assert self._file is not None  # noqa: S101 - called by write
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._file = None
        self._digests[self._name] = self._hash.hexdigest()
