"""How much each caller uses, and when that is enough.

A token bucket for requests a second, counts for what is in flight. Everything is of one server:
nothing is asked of others, so it costs microseconds, and N servers give a caller N times as much.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from pollard.services.common.auth.callers import UNLIMITED, Caller, Limits
from pollard.services.common.auth.errors import LimitReached

_FORGET_SECONDS = 600.0
_SWEEP_EVERY = 4096


class _Use:
    """What one caller uses now."""

    __slots__ = ("calls", "filled", "level", "streams")

    def __init__(self, level: float, now: float) -> None:
        self.level = level
        """Requests that may come at once."""
        self.filled = now
        self.calls = 0
        self.streams = 0


class Lease:
    """One call that is counted as in flight until it is closed."""

    __slots__ = ("_book", "_caller", "_stream", "_use")

    def __init__(self, book: UsageBook, caller: Caller, use: _Use | None, stream: bool) -> None:
        self._book, self._caller, self._use, self._stream = book, caller, use, stream

    def close(self) -> None:
        """The call has ended; more than once does no harm."""
        use, self._use = self._use, None
        if use is not None:
            self._book._leave(use, self._stream)

    def check_size(self, size: int) -> None:
        """Look at the size of a message, in bytes.

        Raises:
            LimitReached: the caller may not send so much at once.
        """
        limit = self._caller.limits.message_bytes
        if limit and size > limit:
            raise LimitReached(
                f"the message has {size} bytes, and {self._caller.name} may send {limit} at once",
                reason="MESSAGE_LIMIT",
                size=size,
                limit=limit,
                caller=self._caller.key,
            )

    def pause(self) -> float:
        """Count one more message of a stream; return how long to wait before it is worked on.

        A stream that sends too fast is slowed, not ended: whoever sends it is held up by HTTP/2's
        flow control.
        """
        return self._book.pause(self._caller)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class UsageBook:
    """Who uses how much of this server."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Begin with nobody."""
        self._clock = clock
        self._uses: dict[str, _Use] = {}
        self._lock = threading.Lock()
        self._since_sweep = 0

    def enter(self, caller: Caller, *, stream: bool = False) -> Lease:
        """Count a call.

        Args:
            caller: Who makes it.
            stream: Whether one of its sides is a stream.

        Raises:
            LimitReached: the caller uses as much as it may.
        """
        limits = caller.limits
        if limits is UNLIMITED or limits == UNLIMITED:
            return Lease(self, caller, None, stream)
        with self._lock:
            now = self._clock()
            use = self._use(caller, limits, now)
            if limits.streams and stream and use.streams >= limits.streams:
                raise _reached(
                    caller, "STREAM_LIMIT", f"has {use.streams} streams open, as many as it may"
                )
            if limits.concurrent_requests and use.calls >= limits.concurrent_requests:
                raise _reached(
                    caller,
                    "CONCURRENCY_LIMIT",
                    f"has {use.calls} requests in flight, as many as it may",
                    retry_seconds=0.05,
                )
            if limits.requests_per_second:
                lacking = 1.0 - use.level
                if lacking > 1e-9:
                    raise _reached(
                        caller,
                        "RATE_LIMIT",
                        f"may send {limits.requests_per_second:g} requests a second",
                        retry_seconds=lacking / limits.requests_per_second,
                    )
                use.level -= 1.0
            use.calls += 1
            use.streams += stream
        return Lease(self, caller, use, stream)

    def pause(self, caller: Caller) -> float:
        """Count a message of a stream; return how many seconds it comes too early."""
        limits = caller.limits
        if not limits.requests_per_second:
            return 0.0
        with self._lock:
            use = self._use(caller, limits, self._clock())
            use.level -= 1.0
            return max(0.0, -use.level / limits.requests_per_second)

    def _use(self, caller: Caller, limits: Limits, now: float) -> _Use:
        most = limits.burst or max(1.0, limits.requests_per_second)
        use = self._uses.get(caller.key)
        if use is None:
            self._sweep(now)
            use = self._uses[caller.key] = _Use(most, now)
        else:
            use.level = min(most, use.level + (now - use.filled) * limits.requests_per_second)
            use.filled = now
        return use

    def _sweep(self, now: float) -> None:
        """Forget who has not been here for long: names of callers must not fill the memory."""
        self._since_sweep += 1
        if self._since_sweep < _SWEEP_EVERY:
            return
        self._since_sweep = 0
        self._uses = {
            key: use
            for key, use in self._uses.items()
            if use.calls or now - use.filled < _FORGET_SECONDS
        }

    def _leave(self, use: _Use, stream: bool) -> None:
        with self._lock:
            use.calls -= 1
            use.streams -= stream


def _reached(
    caller: Caller, reason: str, words: str, retry_seconds: float | None = None
) -> LimitReached:
    return LimitReached(
        f"{caller.name or 'the caller'} {words}; slow down, or ask for a higher limit",
        reason=reason,
        retry_seconds=retry_seconds,
        caller=caller.key,
    )
