"""The token that a service shows to the others."""

from __future__ import annotations

import os
import re
from pathlib import Path

import structlog

from pollard.services.common.auth.callers import current_caller
from pollard.services.common.auth.gate import AUTHORIZATION, BEHALF, behalf_of

_log = structlog.get_logger("pollard.auth")

_FORM = re.compile(r"[A-Za-z0-9_.-]{20,16384}")
"""Of tokens, and of JSON Web Tokens."""

Pairs = tuple[tuple[str, str], ...]


class OwnToken:
    """Reads the token from its file, again whenever that changes."""

    def __init__(self, file: Path | None) -> None:
        """Show what is in `file`; nothing without one."""
        self._file = file
        self._seen: tuple[int, int, int] | None = None
        self._pairs: Pairs = ()

    def metadata(self) -> Pairs:
        """Return what a call to another service carries."""
        if self._file is None:
            return ()
        try:
            stat = os.stat(self._file)
            seen = (stat.st_mtime_ns, stat.st_size, stat.st_ino)
            if seen != self._seen:
                self._seen, self._pairs = seen, self._read()
        except OSError as error:
            if self._seen != (0, 0, 0):
                self._seen = (0, 0, 0)
                _log.error(
                    "the token for other services cannot be read",
                    file=str(self._file),
                    why=error.strerror,
                )
        return self._pairs

    def on_behalf(self) -> Pairs:
        """Return what a call carries that is made for whoever calls this service now."""
        own = self.metadata()
        caller = current_caller()
        if caller.kind == "open":
            return own
        return (*own, (BEHALF, behalf_of(caller)))

    def _read(self) -> Pairs:
        assert self._file is not None  # noqa: S101 - whoever calls has looked
        text = self._file.read_text().strip()
        if not _FORM.fullmatch(text):
            _log.error("the file of the token for other services holds none", file=str(self._file))
            return ()
        return ((AUTHORIZATION, f"Bearer {text}"),)
