"""Live updates: the parts of a page that changed, as server-sent events.

The registry's own watch says when something has changed; what changes without an event – counters,
servers that come and go – is looked at now and then.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable

import structlog
from aiohttp import web

from pollard.services.common.errors import ServiceError
from pollard.services.common.lifecycle import cancel
from pollard.services.models.watch import EventFeed
from pollard.services.models.web.asking import Visitor
from pollard.services.models.web.guard import PAGE_HEADERS
from pollard.services.models.web.rendering import Renderer
from pollard.services.models.web.views import View

MOST = 64
"""Streams at a time; further visitors see the page as it was when they loaded it."""

SIGN_OF_LIFE_SECONDS = 15.0

RETRY_MS = 2000
"""How soon a browser comes back after a stream broke."""

_SETTLE_SECONDS = 0.05
"""Changes that come together are shown together."""

_log = structlog.get_logger("pollard.page")


class Live:
    """Sends changes to those who look.

    Args:
        feed: Says when something has changed.
        renderer: Makes the parts.
    """

    def __init__(self, feed: EventFeed, renderer: Renderer) -> None:
        self._feed = feed
        self._renderer = renderer
        self._streams = 0

    @property
    def streams(self) -> int:
        """How many look now."""
        return self._streams

    async def serve(
        self,
        request: web.Request,
        visitor: Visitor,
        look: Callable[[], Awaitable[View]],
        is_still_in: Callable[[], bool],
    ) -> web.StreamResponse:
        """Send the live parts of a page now and whenever they change, until the visitor goes.

        Args:
            request: What is answered.
            visitor: Who looks.
            look: Makes the view anew.
            is_still_in: Whether the visitor may still look.
        """
        if self._streams >= MOST:
            raise web.HTTPServiceUnavailable(
                text=f"{MOST} pages are followed live already; load this one again to see what is "
                "new.",
                headers={"Retry-After": "30"},
            )
        self._streams += 1
        try:
            response = web.StreamResponse(
                headers={
                    **PAGE_HEADERS,
                    "Content-Type": "text/event-stream; charset=utf-8",
                    # Proxies that collect answers would hold the events back.
                    "X-Accel-Buffering": "no",
                }
            )
            await response.prepare(request)
            await response.write(f"retry: {RETRY_MS}\n\n".encode())
            await response.write(_event("version", self._renderer.assets.version))
            with contextlib.suppress(ConnectionError):
                async for message in self._messages(visitor, look, is_still_in):
                    await response.write(message)
            return response
        finally:
            self._streams -= 1

    async def _messages(
        self,
        visitor: Visitor,
        look: Callable[[], Awaitable[View]],
        is_still_in: Callable[[], bool],
    ) -> AsyncIterator[bytes]:
        changed = asyncio.Event()
        watching = asyncio.ensure_future(self._watch(changed))
        sent: dict[str, str] = {}
        told = time.monotonic()
        try:
            while is_still_in() and not watching.done():
                changed.clear()
                try:
                    view = await look()
                    parts = list(self._renderer.live(view, visitor))
                except ServiceError as error:
                    # The page is about something that is gone: it says so when it is loaded again.
                    _log.debug("a page cannot be shown", error=error.message)
                    yield _event("gone", error.message)
                    return
                for name, html in parts:
                    if sent.get(name) != html:
                        sent[name] = html
                        told = time.monotonic()
                        yield _event("part", {"id": name, "html": html})
                if time.monotonic() - told > SIGN_OF_LIFE_SECONDS:
                    told = time.monotonic()
                    yield b": \n\n"
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(view.tick_seconds):
                        await changed.wait()
                        await asyncio.sleep(_SETTLE_SECONDS)
            if not is_still_in():
                yield _event("gone", "you are no longer signed in")
        finally:
            await cancel(watching)

    async def _watch(self, changed: asyncio.Event) -> None:
        """Note every change, until the manager stops."""
        with contextlib.suppress(ServiceError):
            async for step in self._feed.watch(0, ""):
                if step.event is not None:
                    changed.set()


def _event(name: str, data: object) -> bytes:
    # As JSON, so that it has no line breaks.
    return f"event: {name}\ndata: {json.dumps(data)}\n\n".encode()
