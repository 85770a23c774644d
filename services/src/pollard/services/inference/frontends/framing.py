"""gRPC's framing on HTTP/2: messages, timeouts, encodings, statuses. Knows no server."""

from __future__ import annotations

import base64
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable
from urllib.parse import quote

from pollard.services.common import errors
from pollard.services.inference.errors import FeatureNotOffered, RequestInvalid

Receive = Callable[[], Awaitable[dict[str, object]]]

_PREFIX = 5

_MOST_DIGITS = 8

_UNITS = {b"H": 3600.0, b"M": 60.0, b"S": 1.0, b"m": 1e-3, b"u": 1e-6, b"n": 1e-9}

# Everything that may stand in the header as it is: printable ASCII without "%".
_PLAIN = "".join(map(chr, range(0x20, 0x7F))).replace("%", "")


class MessageTooLarge(errors.ResourceExhausted):
    """A message is larger than the server takes."""

    def __init__(self, message: str, **metadata: object) -> None:
        super().__init__(message, reason="MESSAGE_TOO_LARGE", **metadata)


class CallerGone(Exception):
    """The client closed the call; nobody waits for an answer."""


def seconds_of(timeout: bytes) -> float | None:
    """Return the seconds that a "grpc-timeout" header gives; None if it is malformed."""
    unit, digits = _UNITS.get(timeout[-1:]), timeout[:-1]
    # At most eight, says the protocol; thousands of them would be no number that floats hold.
    if unit is None or not digits.isdigit() or len(digits) > _MOST_DIGITS:
        return None
    return int(digits) * unit


def frame(message: bytes) -> bytes:
    """Return a message with its prefix, uncompressed."""
    return b"\0" + len(message).to_bytes(4, "big") + message


def trailers(code: int, message: str, details: bytes) -> list[tuple[bytes, bytes]]:
    """Return the headers that end a call with an error."""
    ending = [
        (b"grpc-status", str(code).encode()),
        (b"grpc-message", quote(message, safe=_PLAIN).encode()),
    ]
    if details:
        ending.append((b"grpc-status-details-bin", base64.b64encode(details).rstrip(b"=")))
    return ending


class Messages:
    """The messages of a request's body, as they come."""

    def __init__(
        self,
        receive: Receive,
        encoding: bytes,
        max_bytes: int,
    ) -> None:
        """Read from `receive`.

        Args:
            receive: ASGI's.
            encoding: The "grpc-encoding" header; empty if there is none.
            max_bytes: Largest message, also after decompression.
        """
        self._receive = receive
        self._encoding = encoding
        self._max_bytes = max_bytes
        self._parts: list[bytes] = []
        self._size = 0
        self._ended = False

    async def only(self) -> bytes:
        """Return the message of a call that has one.

        Raises:
            RequestInvalid: there is none, more than one, or half of one.
            MessageTooLarge: it is too large.
            CallerGone: the client closed the call.
        """
        while not self._ended:
            await self._more()
            if self._size > _PREFIX + self._max_bytes:
                raise self._too_large(self._size - _PREFIX)
        body = b"".join(self._take())
        if len(body) < _PREFIX or len(body) != _PREFIX + int.from_bytes(body[1:_PREFIX], "big"):
            raise RequestInvalid("the call has not exactly one whole message")
        return self._content(body[0], body[_PREFIX:])

    async def each(self) -> AsyncIterator[bytes]:
        """Yield message after message.

        Raises:
            RequestInvalid: the last one is not whole.
            MessageTooLarge: one is too large.
            CallerGone: the client closed the call.
        """
        body, start = b"", 0
        while True:
            needed = _PREFIX
            if len(body) - start >= _PREFIX:
                length = int.from_bytes(body[start + 1 : start + _PREFIX], "big")
                if length > self._max_bytes:
                    raise self._too_large(length)
                needed += length
                if len(body) - start >= needed:
                    yield self._content(body[start], body[start + _PREFIX : start + needed])
                    start += needed
                    continue
            if self._ended:
                if len(body) > start:
                    raise RequestInvalid("the stream ends within a message")
                return
            # All that the next message lacks, so that a large one is joined only once.
            while len(body) - start + self._size < needed and not self._ended:
                await self._more()
            body, start = b"".join((body[start:], *self._take())), 0

    async def _more(self) -> None:
        event = await self._receive()
        if event["type"] == "http.disconnect":
            raise CallerGone
        part = event.get("body", b"")
        assert isinstance(part, bytes)  # noqa: S101 - as ASGI says
        self._parts.append(part)
        self._size += len(part)
        if not event.get("more_body", False):
            self._ended = True

    def _take(self) -> list[bytes]:
        parts, self._parts, self._size = self._parts, [], 0
        return parts

    def _content(self, compressed: int, message: bytes) -> bytes:
        if not compressed:
            if len(message) > self._max_bytes:
                raise self._too_large(len(message))
            return message
        window = {b"gzip": 31, b"deflate": 15}.get(self._encoding)
        if window is None:
            raise FeatureNotOffered(
                f"messages compressed with {self._encoding.decode('ascii', 'replace')!r} are not "
                "offered; use gzip or deflate"
            )
        unpacking = zlib.decompressobj(window)
        try:
            # One byte more than allowed tells a message that is too large from one that just fits.
            message = unpacking.decompress(message, self._max_bytes + 1)
        except zlib.error as error:
            raise RequestInvalid(f"a message cannot be decompressed: {error}") from None
        if len(message) > self._max_bytes:
            raise self._too_large(len(message))
        return message

    def _too_large(self, size: int) -> MessageTooLarge:
        return MessageTooLarge(
            f"received a message of at least {size} bytes, larger than the limit of "
            f"{self._max_bytes}; raise --max-message-bytes",
            max_message_bytes=self._max_bytes,
        )
