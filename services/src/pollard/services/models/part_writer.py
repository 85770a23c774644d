"""The chunks of an upload on their way into its part."""

from __future__ import annotations

import asyncio
from typing import Any

from pollard.services.common.errors import InvalidRequest
from pollard.services.models.part import Part

MAX_CHUNK_BYTES = 4 * 1024 * 1024
_WRITE_BYTES = 4 * 1024 * 1024


class PartWriter:
    """Appends to a part, one block behind the network.

    A block is written while the next one arrives; so no more than two are in memory.
    """

    def __init__(self, part: Part, total_bytes: int) -> None:
        self._part = part
        self._total = total_bytes
        self._size = part.size
        self._waiting: list[bytes] = []
        self._waiting_bytes = 0
        self._writing: asyncio.Future[None] | None = None

    async def write(self, chunk: bytes) -> None:
        """Take one chunk.

        Raises:
            InvalidRequest: it is too large, or goes beyond the end, or is no tar of a bundle.
            OSError: what came before cannot be written.
        """
        if len(chunk) > MAX_CHUNK_BYTES:
            raise InvalidRequest(
                f"a chunk of {len(chunk)} bytes is longer than {MAX_CHUNK_BYTES}",
                reason="CHUNK_TOO_LARGE",
                length=len(chunk),
                limit=MAX_CHUNK_BYTES,
            )
        self._size += len(chunk)
        if self._size > self._total:
            raise InvalidRequest(
                f"more than the {self._total} bytes that the header says",
                reason="UPLOAD_TOO_LONG",
                total_bytes=self._total,
            )
        self._waiting.append(chunk)
        self._waiting_bytes += len(chunk)
        if self._waiting_bytes >= _WRITE_BYTES:
            await self._write_out()

    async def _write_out(self) -> None:
        if self._writing is not None:
            await asyncio.shield(self._writing)
        blocks, self._waiting, self._waiting_bytes = self._waiting, [], 0
        self._writing = asyncio.ensure_future(asyncio.to_thread(self._part.append, blocks))

    async def flush(self) -> None:
        """Write everything that has come."""
        await self._write_out()
        assert self._writing is not None  # noqa: S101 - just set
        await asyncio.shield(self._writing)

    async def close(self) -> None:
        """Wait until nothing is being written; never raises."""
        if self._writing is not None:
            await settled(self._writing)


async def settled(future: asyncio.Future[Any]) -> None:
    """Wait for the end of what cannot be cancelled; its error is raised where it matters."""
    await asyncio.wait({future})
    if not future.cancelled():
        future.exception()
