"""The structure of a bundle's tar, followed while it arrives; it trusts nothing.

Only regular files with safe relative paths are taken. Nothing is written here: whoever
feeds it decides where the contents go, and can follow the same tar again from what it kept.
"""

from __future__ import annotations

import tarfile
from dataclasses import dataclass

from pollard.runtime.bundle import (
    MANIFEST,
    MAX_MANIFEST_BYTES,
    MAX_SIGNATURE_BYTES,
    SIGNATURE,
    is_safe_path,
)
from pollard.services.common.errors import InvalidRequest

_BLOCK = tarfile.BLOCKSIZE
_LARGEST = {MANIFEST: MAX_MANIFEST_BYTES, SIGNATURE: MAX_SIGNATURE_BYTES}
_MAX_EXTRA_BYTES = 16 * 1024
"""Longest record of extended attributes: paths have at most 255 characters."""
_MAX_END_BYTES = 1024 * 1024
"""Longest run of zeros at the end: that of the largest blocking factor in use."""


@dataclass(frozen=True)
class Member:
    """A file that begins in the tar."""

    path: str
    size: int


class TarStream:
    """Follows a tar byte by byte.

    While ``content_left`` is above 0, the next bytes belong to the file that began last, and
    the caller counts them down; all others go through :meth:`take`.

    Args:
        max_files: Most files.
        max_total_bytes: Largest sum of their sizes.
    """

    def __init__(self, *, max_files: int, max_total_bytes: int) -> None:
        self.content_left = 0
        """Bytes of the current file that are yet to come."""
        self.ended = False
        """Whether the tar is whole; only zeros may follow."""
        self._max_files = max_files
        self._max_total_bytes = max_total_bytes
        self._total_bytes = 0
        self._paths: set[str] = set()
        self._padding = 0
        self._end_bytes = 0
        self._header = bytearray()
        self._extra = bytearray()
        self._extra_left = 0
        self._extra_type = b""
        self._long_path: str | None = None
        self._long_size: int | None = None

    def take(self, data: memoryview) -> tuple[int, Member | None]:
        """Read bytes that belong to no file.

        Args:
            data: What comes next; not empty.

        Returns:
            How many of the bytes were read, at least one, and the file that begins after them,
            if one does.

        Raises:
            InvalidRequest: the tar is malformed, compressed, unsafe or too large.
        """
        if self.ended:
            return self._take_end(data), None
        if self._extra_left:
            return self._take_extra(data), None
        if self._padding:
            count = min(self._padding, len(data))
            self._padding -= count
            return count, None
        count = min(_BLOCK - len(self._header), len(data))
        self._header += data[:count]
        if len(self._header) < _BLOCK:
            return count, None
        block, self._header = bytes(self._header), bytearray()
        return count, self._read_header(block)

    def _take_end(self, data: memoryview) -> int:
        self._end_bytes += len(data)
        if self._end_bytes > _MAX_END_BYTES or any(data):
            raise _malformed("something follows the end of the tar")
        return len(data)

    def _take_extra(self, data: memoryview) -> int:
        count = min(self._extra_left, len(data))
        self._extra += data[:count]
        self._extra_left -= count
        if not self._extra_left:
            content, self._extra = bytes(self._extra), bytearray()
            self._padding = -len(content) % _BLOCK
            try:
                self._read_extra(content)
            except (ValueError, IndexError) as error:
                raise _malformed(f"a record of extended attributes is malformed: {error}") from None
        return count

    def _read_extra(self, content: bytes) -> None:
        if self._extra_type == tarfile.GNUTYPE_LONGNAME:
            self._long_path = content.rstrip(b"\0").decode()
            return
        while content:
            length = int(content[: content.index(b" ")])
            record, content = content[:length], content[length:]
            if len(record) < length or not record.endswith(b"\n"):
                raise ValueError("a length is wrong")
            key, _, value = record[record.index(b" ") + 1 : -1].partition(b"=")
            if key.startswith(b"GNU.sparse"):
                raise _unsafe("a sparse file", "is not a regular file")
            if key in (b"path", b"size") and self._extra_type == tarfile.XGLTYPE:
                raise ValueError(f"{key.decode()} for all files")
            if key == b"path":
                self._long_path = value.decode()
            elif key == b"size":
                self._long_size = int(value)

    def _read_header(self, block: bytes) -> Member | None:
        try:
            info = tarfile.TarInfo.frombuf(block, "utf-8", "strict")
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # missing in the stubs
            self.ended = True
            return None
        except (tarfile.HeaderError, ValueError) as error:
            raise _malformed(str(error)) from None
        if info.size < 0:
            raise _malformed(f"a file has {info.size} bytes")
        if info.type in (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME):
            if not 0 < info.size <= _MAX_EXTRA_BYTES:
                raise _malformed(f"a record of extended attributes has {info.size} bytes")
            self._extra_type, self._extra_left = info.type, info.size
            return None
        path = self._long_path if self._long_path is not None else info.name
        size = self._long_size if self._long_size is not None else info.size
        self._long_path = self._long_size = None
        return self._begin(info, path, size)

    def _begin(self, info: tarfile.TarInfo, path: str, size: int) -> Member | None:
        name = path.removeprefix("./").rstrip("/") if info.isdir() else path.removeprefix("./")
        if info.isdir() and size == 0 and (name in ("", ".") or is_safe_path(name)):
            return None
        if info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
            raise _unsafe(path, "is not a regular file")
        if not is_safe_path(name):
            raise _unsafe(path, "is not a safe path")
        if name in self._paths:
            raise _unsafe(path, "occurs twice")
        if size < 0:
            raise _malformed(f"a file has {size} bytes")
        self._total_bytes += size
        if len(self._paths) >= self._max_files:
            raise _malformed(f"it has more than {self._max_files} files")
        if self._total_bytes > self._max_total_bytes:
            raise _malformed(f"its files have more than {self._max_total_bytes} bytes")
        most = _LARGEST.get(name)
        if most is not None and size > most:
            raise _unsafe(name, f"has {size} bytes, more than {most}")
        self._paths.add(name)
        self.content_left = size
        self._padding = -size % _BLOCK
        return Member(name, size)


def _malformed(why: str) -> InvalidRequest:
    return InvalidRequest(
        f"not a readable uncompressed tar of a bundle: {why}", reason="ARCHIVE_INVALID"
    )


def _unsafe(path: str, why: str) -> InvalidRequest:
    return InvalidRequest(f"{path!r} in the tar {why}", reason="ARCHIVE_INVALID", path=path[:200])
