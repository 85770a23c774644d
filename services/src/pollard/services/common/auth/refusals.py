"""What was refused, in the log: at once when it begins, then summed up.

Whoever knocks a thousand times a second must not fill the disk with it.
"""

from __future__ import annotations

import threading
import time

import structlog

from pollard.services.common.errors import ServiceError

_log = structlog.get_logger("pollard.auth")

QUIET_SECONDS = 10.0
"""How long the same refusal is only counted after it was told."""

_MOST_KINDS = 1000


class RefusalLog:
    """Tells of refusals, each kind once in a while."""

    def __init__(self, quiet_seconds: float = QUIET_SECONDS) -> None:
        """Begin with nothing told."""
        self._quiet = quiet_seconds
        self._told: dict[tuple[str, str, str], tuple[float, int]] = {}
        self._lock = threading.Lock()

    def note(self, method: str, error: ServiceError) -> None:
        """Tell of one refusal, or count it."""
        who = error.metadata.get("token") or error.metadata.get("caller", "")
        key = (method, error.reason, who)
        now = time.monotonic()
        with self._lock:
            last, silent = self._told.get(key, (0.0, 0))
            if last and now - last < self._quiet:
                self._told[key] = (last, silent + 1)
                return
            if len(self._told) >= _MOST_KINDS:
                self._told.clear()
            self._told[key] = (now, 0)
        more = {"and_before": silent} if silent else {}
        _log.warning("refused", method=method, reason=error.reason, why=error.message, **more)
