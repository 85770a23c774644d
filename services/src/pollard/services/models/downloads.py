"""Downloads: the files of a bundle in pieces, checked while they are read."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections import OrderedDict
from collections.abc import AsyncIterator, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import structlog
from sqlalchemy.orm import Session

from pollard.runtime.bundle import MANIFEST
from pollard.services.common.errors import DataLoss, NotFound
from pollard.services.models import bundle_rows, registry
from pollard.services.models.blobs import PIECE_BYTES, Blobs, BlobUrl, missing, unreadable
from pollard.services.models.schema import BundleFile
from pollard.services.models.store import Store

IN_FLIGHT_BYTES = 32 * 1024 * 1024
"""What the pieces of all downloads may come to: with many at a time, pieces are smaller. About four
of each download are in memory, from the one being read to the one that is on its way."""

LEAST_PIECE_BYTES = 16 * 1024

READERS = 16
"""Threads that read for downloads. They may wait for S3, and nothing else is to wait for them."""

SMALL_BYTES = 64 * 1024
"""Files up to this size are sent even to those who can fetch them elsewhere."""

_log = structlog.get_logger("pollard.downloads")


@dataclass(frozen=True)
class Piece:
    """Part of one file, or where all of it can be had."""

    path: str
    offset: int
    data: bytes
    total_bytes: int
    url: BlobUrl | None = None
    """Where the whole file is; `data` is empty then."""
    sha256: str = ""
    """The file's, where there is a URL."""


async def find_urls(blobs: Blobs, files: Sequence[BundleFile]) -> dict[str, BlobUrl]:
    """Return where files can be had without the manager, by digest; none where there is no way.

    Small ones are not worth a connection, and the manifest is what the others are checked by.
    """
    wanted = {
        file.sha256 for file in files if file.size_bytes > SMALL_BYTES and file.path != MANIFEST
    }
    return await asyncio.to_thread(blobs.urls, sorted(wanted)) if wanted else {}


class Pace:
    """How many downloads there are, and how large their pieces may be."""

    def __init__(self) -> None:
        self.threads = ThreadPoolExecutor(READERS, thread_name_prefix="downloads")
        self._downloads = 0

    def piece_bytes(self) -> int:
        """Return the size of the next piece of any download."""
        share = IN_FLIGHT_BYTES // max(1, self._downloads)
        return max(LEAST_PIECE_BYTES, min(PIECE_BYTES, share))

    @contextlib.contextmanager
    def download(self) -> Iterator[None]:
        """Count one."""
        self._downloads += 1
        try:
            yield
        finally:
            self._downloads -= 1

    def close(self) -> None:
        """Read nothing more."""
        self.threads.shutdown(wait=False, cancel_futures=True)


class SmallFiles:
    """Small files that were sent lately: many servers want the same ones at the same time."""

    def __init__(self, most_bytes: int = 16 * 1024 * 1024) -> None:
        self._most_bytes = most_bytes
        self._bytes = 0
        self._kept: OrderedDict[str, bytes] = OrderedDict()

    def get(self, sha256: str) -> bytes | None:
        """Return a file by its digest; None if it is not here."""
        content = self._kept.get(sha256)
        if content is not None:
            self._kept.move_to_end(sha256)
        return content

    def keep(self, sha256: str, content: bytes) -> None:
        """Keep a file that has been compared with its digest."""
        if len(content) > SMALL_BYTES or sha256 in self._kept:
            return
        self._kept[sha256] = content
        self._bytes += len(content)
        while self._bytes > self._most_bytes:
            _, oldest = self._kept.popitem(last=False)
            self._bytes -= len(oldest)


async def find_files(
    store: Store, source: tuple[str, int | str] | str, paths: Sequence[str]
) -> list[BundleFile]:
    """Return the files to send, the manifest first.

    Args:
        store: Holds the registry.
        source: Model and revision or alias, or the digest of a bundle.
        paths: Only these and the manifest; empty for all.

    Raises:
        NotFound: there is no such bundle, or no such file in it.
    """

    def find(session: Session) -> list[BundleFile]:
        if isinstance(source, str):
            return bundle_rows.files_of(session, source)
        revision = registry.resolve(session, *source)
        return bundle_rows.files_of(session, revision.bundle_sha256)

    files = await store.read(find)
    if not paths:
        return files
    unknown = sorted(set(paths) - {file.path for file in files})
    if unknown:
        raise NotFound(
            f"the bundle has no file {unknown[0]!r}; it has "
            f"{', '.join(file.path for file in files[:20])}",
            reason="FILE_NOT_FOUND",
            path=unknown[0],
        )
    return [file for file in files if file.path in paths or file.path == MANIFEST]


async def read_files(
    blobs: Blobs,
    files: Sequence[BundleFile],
    urls: Mapping[str, BlobUrl] | None = None,
    small: SmallFiles | None = None,
    pace: Pace | None = None,
) -> AsyncIterator[Piece]:
    """Yield the files piece by piece; the next piece is read while one is on its way.

    The last piece of a file is held back until the digest is known to be
    right: who has all pieces has the file as it was stored.

    Args:
        blobs: Holds the files.
        files: What to send.
        urls: Where files can be had otherwise, by digest: of these only that is told.
        small: Small files that need not be read again.
        pace: What is shared with other downloads; None for one that is alone.

    Raises:
        DataLoss: a blob is missing or damaged.
    """
    loop, threads = asyncio.get_running_loop(), None if pace is None else pace.threads

    def read_next(pieces: Generator[Piece, None, None]) -> asyncio.Future[Piece | None]:
        return loop.run_in_executor(threads, next, pieces, None)

    with contextlib.nullcontext() if pace is None else pace.download():
        for file in files:
            url = (urls or {}).get(file.sha256)
            if url is not None:
                yield Piece(file.path, 0, b"", file.size_bytes, url, file.sha256)
                continue
            if small is not None and (content := small.get(file.sha256)) is not None:
                yield Piece(file.path, 0, content, len(content))
                continue
            pieces = _read(blobs, file, pace)
            reading = read_next(pieces)
            try:
                while (piece := await reading) is not None:
                    reading = read_next(pieces)
                    if small is not None and len(piece.data) == file.size_bytes:
                        # Its last piece: it has been compared with its digest.
                        small.keep(file.sha256, piece.data)
                    yield piece
            finally:
                # The thread must be out of the generator before that is closed.
                await asyncio.wait({reading})
                if not reading.cancelled():
                    reading.exception()
                pieces.close()


def _read(blobs: Blobs, file: BundleFile, pace: Pace | None) -> Generator[Piece, None, None]:
    digest = hashlib.sha256()
    offset = 0
    held: Piece | None = None
    try:
        size = pace.piece_bytes if pace is not None else lambda: PIECE_BYTES
        for data in blobs.pieces(file.sha256, size):
            digest.update(data)
            if held is not None:
                yield held
            held = Piece(file.path, offset, data, file.size_bytes)
            offset += len(data)
    except FileNotFoundError:
        raise missing(file.sha256) from None
    except OSError as error:
        _log.error("a blob cannot be read", sha256=file.sha256, path=file.path, error=str(error))
        raise unreadable(file.sha256, error) from error
    if digest.hexdigest() != file.sha256 or offset != file.size_bytes:
        _log.error("a blob is damaged", sha256=file.sha256, path=file.path)
        raise DataLoss(
            f"{file.path} is damaged in the store: the blob {file.sha256} has the SHA-256 "
            f"{digest.hexdigest()}. Restore it from a backup, or push the bundle again",
            reason="BLOB_DAMAGED",
            path=file.path,
            sha256=file.sha256,
        )
    yield held or Piece(file.path, 0, b"", 0)
