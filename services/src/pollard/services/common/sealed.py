"""Small files that hold the SHA-256 of what is in them, so that damage is found.

The digest stands at the start, where nothing that cuts a file off can take it away and leave the
rest. It is put so that versions which know nothing of it read the files all the same: in JSON as a
member, in a message as a field that nobody has. Their files, without a digest, are read as well.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pollard.runtime.bundle import write_durably
from pollard.runtime.digests import sha256_bytes

_MEMBER = "sha256"
_JSON = f'{{"{_MEMBER}": "'.encode()
_MESSAGE = b"\xfa\xff\xff\xff\x0f\x40"
"""The highest number that a field can have, and 64 bytes of it."""
_DIGITS = 64


class FileDamaged(Exception):
    """A file cannot be read, or is not what was written."""


def write_json(path: Path, text: str) -> None:
    """Write an object, durably.

    Args:
        path: The file.
        text: Its JSON, which begins with the brace.

    Raises:
        OSError: it cannot be written.
    """
    members = text[1:]
    comma = "" if members.strip() == "}" else ","
    _write(path, _JSON, f'"{comma}{members}'.encode())


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a file.

    Raises:
        FileNotFoundError: there is no such file.
        FileDamaged: it cannot be read, or is not what was written.
    """
    head, rest = _read(path, _JSON)
    try:
        found = json.loads((head + rest).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise FileDamaged(f"it is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise FileDamaged("it is not an object of JSON")
    found.pop(_MEMBER, None)
    return found


def write_message(path: Path, message: bytes) -> None:
    """Write a serialized message, durably.

    Raises:
        OSError: it cannot be written.
    """
    _write(path, _MESSAGE, message)


def read_message(path: Path) -> bytes:
    """Return the serialized message in a file; of an older version it may be damaged.

    Raises:
        FileNotFoundError: there is no such file.
        FileDamaged: it cannot be read, or is not what was written.
    """
    return _read(path, _MESSAGE)[1]


def _write(path: Path, head: bytes, rest: bytes) -> None:
    write_durably(path, head + sha256_bytes(rest).encode() + rest)


def _read(path: Path, head: bytes) -> tuple[bytes, bytes]:
    """Return what stands before the content in a file, and the content."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise FileDamaged(str(error)) from error
    end = len(head) + _DIGITS
    digest, rest = data[len(head) : end], data[end:]
    if digest == sha256_bytes(rest).encode():
        return head + digest, rest
    if data.startswith(head):
        raise FileDamaged("what is in it has another SHA-256 than it says")
    if not data.strip():
        raise FileDamaged("it is empty")
    return b"", data
