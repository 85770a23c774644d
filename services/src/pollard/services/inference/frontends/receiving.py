"""Noticing at once that a client has gone.

ASGI tells it among the events of the request's body, so whoever does not read does not hear it.

A `receive` that waits is never cancelled: pyvoy would then set the outcome of a future that has one
already. It ends when the call does.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
from collections.abc import Awaitable, Callable
from typing import Any

Receive = Callable[[], Awaitable[dict[str, Any]]]

_WATCH_AFTER_SECONDS = 0.01
"""Most calls are over before it pays to listen whether the client goes."""

_AHEAD_BYTES = 1 << 20
"""What is read of a stream before it is needed. A client that has sent more than this, and more
than is worked on, is noticed when the next answer cannot be sent to it."""

_GONE = "http.disconnect"


class ClientWatch:
    """Cancels the task that made it if the client closes a call whose body has been read."""

    def __init__(self, receive: Receive) -> None:
        """Watch the client from whom `receive` has what it sends."""
        self._receive = receive
        self._task = asyncio.current_task()
        self._timer: asyncio.TimerHandle | None = None
        self._listening: asyncio.Task[None] | None = None

    def listen_later(self) -> None:
        """Listen in a moment."""
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(_WATCH_AFTER_SECONDS, self._listen)

    def stop(self) -> None:
        """Listen no more."""
        self._task = None
        if self._timer is not None:
            self._timer.cancel()

    def _listen(self) -> None:
        self._listening = asyncio.ensure_future(self._until_gone())

    async def _until_gone(self) -> None:
        with contextlib.suppress(OSError):
            while (await self._receive())["type"] != _GONE:
                pass
        if self._task is not None:
            self._task.cancel()


class ReadAhead:
    """Reads a body before it is asked for; cancels the task that made it if the client goes."""

    def __init__(self, receive: Receive, limit: int = _AHEAD_BYTES) -> None:
        """Begin to read.

        Args:
            receive: ASGI's.
            limit: Bytes that may wait to be asked for; then reading rests.
        """
        self._receive = receive
        self._limit = limit
        self._events: collections.deque[dict[str, Any]] = collections.deque()
        self._waiting = 0
        self._task = asyncio.current_task()
        self._come = asyncio.Event()
        self._room = asyncio.Event()
        self._reading = asyncio.ensure_future(self._read())

    async def receive(self) -> dict[str, Any]:
        """Return the next event, as ASGI's `receive`."""
        while not self._events:
            self._come.clear()
            await self._come.wait()
        event = self._events.popleft()
        self._waiting -= len(event.get("body", b""))
        if self._waiting < self._limit:
            self._room.set()
        return event

    def stop(self) -> None:
        """Read no more."""
        self._task = None
        self._events.clear()
        self._room.set()

    async def _read(self) -> None:
        gone = False
        while not gone and self._task is not None:
            try:
                event = await self._receive()
            except OSError:
                event = {"type": _GONE}
            gone = event["type"] == _GONE
            if self._task is None:
                return
            self._events.append(event)
            self._waiting += len(event.get("body", b""))
            self._come.set()
            while self._waiting >= self._limit and self._task is not None:
                self._room.clear()
                await self._room.wait()
        if self._task is not None:
            self._task.cancel()
