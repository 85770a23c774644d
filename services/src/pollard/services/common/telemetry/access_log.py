"""The access log: a line for a call, and never more of them than a disk can take."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import structlog

from pollard.services.common.telemetry.codes import NAMES

if TYPE_CHECKING:
    from pollard.services.common.telemetry.record import CallRecord

Wanted = Literal["off", "failures", "all"]
"""Of which calls a line is written."""

_log = structlog.get_logger("pollard.access")

_OURS = frozenset(
    {
        "UNKNOWN",
        "DEADLINE_EXCEEDED",
        "RESOURCE_EXHAUSTED",
        "UNIMPLEMENTED",
        "INTERNAL",
        "UNAVAILABLE",
        "DATA_LOSS",
    }
)
"""Statuses that may be the server's fault; the others are those of its callers."""

_TOLD_ELSEWHERE = frozenset({"OK", "CANCELLED", "UNAUTHENTICATED", "PERMISSION_DENIED"})
"""Statuses of calls that end well, by their client's will, or at the gate, which tells the
cause."""


class AccessLog:
    """Writes a line for a call that has ended, if it is wanted and not too many were written."""

    def __init__(
        self,
        wanted: Wanted = "failures",
        per_second: float = 20.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begin with nothing written.

        Args:
            wanted: "all", or "failures" without those that callers bring about by going, and those
                that the gate tells of.
            per_second: Lines that may be written a second, over some seconds; what is left out is
                counted in the next line.
            clock: Seconds.
        """
        self.everything = wanted == "all"
        """Whether calls that succeeded are told of, too."""
        self._off = wanted == "off"
        self._rate = per_second
        self._most = max(1.0, 5 * per_second)
        self._level = self._most
        self._clock = clock
        self._filled = clock()
        self._left_out = 0
        self._lock = threading.Lock()

    def note(self, call: CallRecord, code: int, seconds: float) -> None:
        """Tell of a call that has ended.

        Args:
            call: The call.
            code: Its status.
            seconds: How long it took.
        """
        name = NAMES.get(code, str(code))
        if self._off or (name in _TOLD_ELSEWHERE and not self.everything):
            return
        more = self._place()
        if more is None:
            return
        about: dict[str, object] = {
            "method": call.path[:200],
            "code": name,
            "milliseconds": round(1000 * seconds, 2),
            "request_id": call.request_id,
        }
        if call.trace_id:
            about["trace_id"] = call.trace_id
        if call.caller:
            about["caller"] = call.caller
        if call.reason:
            about["reason"] = call.reason
        if call.why:
            about["why"] = call.why
        if more:
            about["left_out_before"] = more
        if not code:
            _log.info("answered", **about)
        elif name in _OURS:
            _log.warning("failed", **about)
        else:
            _log.info("failed", **about)

    def note_http(
        self, method: str, path: str, status: int, seconds: float, request_id: str
    ) -> None:
        """Tell of an HTTP request that has ended."""
        if self._off or (status < 400 and not self.everything) or status in (401, 403):
            return
        more = self._place()
        if more is None:
            return
        about: dict[str, object] = {
            "method": method[:16],
            "path": path[:200],
            "status": status,
            "milliseconds": round(1000 * seconds, 2),
            "request_id": request_id,
        }
        if more:
            about["left_out_before"] = more
        tell = _log.warning if status >= 500 else _log.info
        tell("answered over HTTP" if status < 400 else "failed over HTTP", **about)

    def _place(self) -> int | None:
        """Return how many lines were left out since the last one; None if this one is, too."""
        with self._lock:
            now = self._clock()
            self._level = min(self._most, self._level + (now - self._filled) * self._rate)
            self._filled = now
            if self._level < 1.0:
                self._left_out += 1
                return None
            self._level -= 1.0
            more, self._left_out = self._left_out, 0
            return more
