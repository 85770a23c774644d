"""Streams that are open while their caller's token ends: they end with it."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Callable

from pollard.services.common.auth.callers import Caller
from pollard.services.common.errors import ServiceError

Ended = Callable[[Caller], ServiceError | None]
"""Says why a caller is not known any more; None if it is."""

_LONGEST_TIMER_SECONDS = 86400.0


class OpenCalls:
    """Calls that may last long, and how to end them."""

    def __init__(self, ended: Ended) -> None:
        """Begin with none."""
        self._ended = ended
        self._open: dict[object, tuple[Caller, Callable[[ServiceError], None]]] = {}
        self._lock = threading.Lock()

    def check(self) -> None:
        """End the calls of those who are not known any more; from any thread."""
        with self._lock:
            found = list(self._open.values())
        for caller, end in found:
            error = self._ended(caller)
            if error is not None:
                end(error)

    @contextlib.asynccontextmanager
    async def lasting(self, caller: Caller) -> AsyncIterator[None]:
        """Run a block as long as `caller` is known; its awaits are cancelled when that ends.

        Raises:
            ServiceError: the caller's token was revoked, or has expired.
        """
        task, loop = asyncio.current_task(), asyncio.get_running_loop()
        assert task is not None  # noqa: S101 - coroutines run in tasks
        why: list[ServiceError] = []
        mark, over = object(), False
        timer: asyncio.TimerHandle | None = None

        def stop(error: ServiceError) -> None:
            if not why and not over:
                why.append(error)
                task.cancel()

        def look() -> None:
            nonlocal timer
            error = self._ended(caller)
            if error is not None:
                stop(error)
            else:
                timer = self._timer(loop, caller, look)

        def end(error: ServiceError) -> None:
            # A loop that has been closed has no calls any more.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(stop, error)

        with self._lock:
            self._open[mark] = caller, end
        timer = self._timer(loop, caller, look)
        try:
            # The token may have ended after the gate and before there was a call to end.
            error = self._ended(caller)
            if error is not None:
                raise error
            yield
        except asyncio.CancelledError:
            if not why:
                raise
            task.uncancel()
            raise why[0] from None
        finally:
            over = True
            with self._lock:
                del self._open[mark]
            if timer is not None:
                timer.cancel()

    @staticmethod
    def _timer(
        loop: asyncio.AbstractEventLoop, caller: Caller, look: Callable[[], None]
    ) -> asyncio.TimerHandle | None:
        if caller.expires is None:
            return None
        left = min(max(0.0, caller.expires - time.time()) + 0.01, _LONGEST_TIMER_SECONDS)
        return loop.call_later(left, look)
