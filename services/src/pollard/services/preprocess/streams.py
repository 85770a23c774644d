"""Streams: items come in, are worked on side by side, and leave in their order."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

T = TypeVar("T")
R = TypeVar("R")

MAX_IN_WORK = 16


async def in_order(
    items: AsyncIterator[T],
    work: Callable[[T], Awaitable[R]],
    limit: int = MAX_IN_WORK,
) -> AsyncIterator[R]:
    """Yield ``work(item)`` for each item, in the order of the items.

    No more items are taken than ``limit`` before the first of them has left,
    so a reader that is slow slows the sender down. When the generator is
    closed or fails, everything that is in work is cancelled.

    Raises:
        Exception: what ``items`` or ``work`` raises, after the answers before it.
    """
    free = asyncio.Semaphore(limit)
    # Never full: the semaphore is the limit.
    queue: asyncio.Queue[asyncio.Task[R] | None] = asyncio.Queue()
    tasks: set[asyncio.Task[Any]] = set()

    async def read() -> None:
        try:
            while True:
                await free.acquire()
                try:
                    item = await anext(items)
                except StopAsyncIteration:
                    return
                task: asyncio.Task[R] = asyncio.ensure_future(_run(work, item))
                tasks.add(task)
                queue.put_nowait(task)
        finally:
            queue.put_nowait(None)

    reader = asyncio.create_task(read())
    try:
        while (task := await queue.get()) is not None:
            result = await task
            tasks.discard(task)
            yield result
            free.release()
        await reader
    finally:
        for pending in (reader, *tasks):
            pending.cancel()
        await asyncio.gather(reader, *tasks, return_exceptions=True)


async def _run(work: Callable[[T], Awaitable[R]], item: T) -> R:
    return await work(item)
