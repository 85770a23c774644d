"""Where the files of the bundles are kept: content-addressed, ``sha256/ab/abcdef…``.

A blob has its name only when all of it is there. Nothing that is read is trusted: who
passes it on compares its digest first.
"""

from __future__ import annotations

import abc
import errno
import hashlib
import re
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pollard.runtime.digests import sha256_bytes
from pollard.services.common.errors import DataLoss, StartupError
from pollard.services.common.redact import without_secrets

PIECE_BYTES = 1024 * 1024
"""Size of the pieces in which a blob is read."""

OWNER = "owner"
"""Path of the mark that says whose blobs these are."""

_NAME = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class BlobUrl:
    """Where others can get a blob by themselves. It lets in whoever knows it."""

    url: str
    expires: float
    """When it ends, in seconds since the epoch."""


@dataclass(frozen=True)
class UrlRules:
    """How URLs of blobs are made, where a store can make them."""

    seconds: float
    """How long each is good."""
    endpoint: str = ""
    """URL under which those who get them reach the store; empty for the one that is used here."""


class Blobs(abc.ABC):
    """A store of blobs. Every method may be called from any thread, and may take long."""

    name: str
    """How messages call it."""
    shared: bool
    """Whether others than this manager may reach it."""

    @abc.abstractmethod
    def check(self) -> None:
        """Find out whether it can be used.

        Raises:
            StartupError: it cannot; the message says why.
        """

    @abc.abstractmethod
    def owner(self) -> str:
        """Return which installation's blobs these are; empty when nobody has said so."""

    @abc.abstractmethod
    def set_owner(self, installation: str) -> None:
        """Say whose blobs these are, unless somebody has already."""

    @abc.abstractmethod
    def disown(self) -> None:
        """Take back what was said of whose blobs these are."""

    @abc.abstractmethod
    def adopt(self, file: Path, sha256: str) -> None:
        """Keep a file as the blob of ``sha256``, durably; the file itself stays as it is.

        The digest must be held (see :mod:`.collector`), and the file on disk. A damaged blob of
        that name is replaced.

        Raises:
            OSError: it cannot be written here.
            Unavailable: the store does not answer.
        """

    @abc.abstractmethod
    def pieces(
        self, sha256: str, size: Callable[[], int] = lambda: PIECE_BYTES
    ) -> Generator[bytes, None, None]:
        """Yield the content of a blob piece by piece, not compared with its digest.

        Args:
            sha256: The blob's.
            size: Returns how large the next piece may be, in bytes.

        Raises:
            FileNotFoundError: it is not there.
            OSError: it cannot be read.
            Unavailable: the store does not answer.
        """

    def urls(self, sha256s: Sequence[str]) -> dict[str, BlobUrl]:
        """Return where others can get blobs by themselves; none where there is no such way.

        Whether the blobs are there is not looked at.
        """
        return {}

    @abc.abstractmethod
    def __iter__(self) -> Iterator[str]:
        """Yield the digests of all blobs."""

    @abc.abstractmethod
    def delete(self, sha256: str) -> None:
        """Delete a blob; none is as good."""

    @abc.abstractmethod
    def remove_leftovers(self, older_than: float) -> None:
        """Delete what was begun and never ended before a time, in seconds since the epoch."""

    def read(self, sha256: str) -> bytes:
        """Return a whole blob, a small one.

        Raises:
            DataLoss: it is not there, or damaged.
            Unavailable: the store does not answer.
        """
        try:
            content = b"".join(self.pieces(sha256))
        except FileNotFoundError:
            raise missing(sha256) from None
        except OSError as error:
            raise unreadable(sha256, error) from error
        actual = sha256_bytes(content)
        if actual != sha256:
            raise damaged(sha256, actual)
        return content

    def rehash(self, sha256: str) -> str:
        """Read a blob again from where it is kept; return its SHA-256.

        Raises:
            FileNotFoundError: it is not there.
            OSError: it cannot be read.
            Unavailable: the store does not answer.
        """
        digest = hashlib.sha256()
        for piece in self.pieces(sha256):
            digest.update(piece)
        return digest.hexdigest()


def blob_path(sha256: str) -> str:
    """Return the path of a blob within its store."""
    return f"sha256/{sha256[:2]}/{sha256}"


def blob_of(path: str) -> str | None:
    """Return the digest of the blob at a path; None when the path is not one of a blob."""
    name = path.rsplit("/", 1)[-1]
    return name if _NAME.fullmatch(name) else None


def missing(sha256: str) -> DataLoss:
    """Return the error that a blob is not there."""
    return DataLoss(
        f"the blob {sha256} is missing from the store; restore it from a backup, or push "
        "its bundle again",
        reason="BLOB_MISSING",
        sha256=sha256,
    )


def damaged(sha256: str, actual: str) -> DataLoss:
    """Return the error that a blob is not what its name says."""
    return DataLoss(
        f"the blob {sha256} is damaged: its SHA-256 is {actual}. Restore it from a backup, or "
        "push its bundle again",
        reason="BLOB_DAMAGED",
        sha256=sha256,
    )


def unreadable(sha256: str, error: OSError) -> BaseException:
    """Return the error that a blob is there and cannot be read."""
    if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
        # Nothing is wrong with the blob.
        return error
    return DataLoss(
        f"the blob {sha256} cannot be read: {error.strerror}. See that its disk is well and may be "
        "read; or restore it from a backup, or push its bundle again",
        reason="BLOB_DAMAGED",
        sha256=sha256,
    )


def open_blobs(where: str, endpoint: str, default: Path, urls: UrlRules | None = None) -> Blobs:
    """Return the store of blobs that a setting names; nothing is read or written yet.

    Args:
        where: ``s3://BUCKET/PREFIX``, or a directory; empty for the default.
        endpoint: URL of an S3 that is not Amazon's; empty for Amazon's.
        default: Directory to use when nothing is named.
        urls: How URLs of blobs are made for others; None makes none.

    Raises:
        StartupError: it names something else, or what S3 needs is not installed.
    """
    if where.startswith("s3://"):
        try:
            from pollard.services.models.blobs_s3 import S3Blobs
        except ImportError as error:
            raise StartupError(
                f"blobs in S3 need more packages ({error}): pip install 'pollard-services[s3]'"
            ) from error
        return S3Blobs(where, endpoint, urls=urls)
    if "://" in where and not where.startswith("file://"):
        raise StartupError(
            f"--blobs {without_secrets(where)!r} is neither s3://BUCKET/PREFIX nor a directory"
        )
    if endpoint:
        raise StartupError("--blobs-endpoint is for a --blobs s3://BUCKET/PREFIX")
    from pollard.services.models.blobs_local import LocalBlobs

    if not where:
        return LocalBlobs(default)
    return LocalBlobs(Path(where.removeprefix("file://")), shared=True)
