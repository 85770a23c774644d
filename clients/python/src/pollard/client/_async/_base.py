"""What all clients share: channels, deadlines, typed errors."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from types import TracebackType
from typing import Any, Self, TypeVar

import grpc

from pollard.client import _channel
from pollard.client._async import _io
from pollard.client._retrying import Attempts, RetryPolicy
from pollard.client.errors import from_rpc_error

T = TypeVar("T")


class AsyncBaseClient:
    """A connection to a server. Use it as a context manager, or call `close()`.

    Many requests may be in flight at once over one client.
    """

    def __init__(
        self,
        address: str,
        *,
        timeout: float = _channel.DEFAULT_TIMEOUT_SECONDS,
        retry: RetryPolicy | None = None,
        max_message_bytes: int = _channel.DEFAULT_MAX_MESSAGE_BYTES,
        tls: _channel.Tls | None = None,
        token: str | None = None,
        connections: int = 1,
    ) -> None:
        """Make a client. It connects with the first request.

        Args:
            address: "HOST:PORT" or "unix:/path". Several servers are "1.2.3.4:PORT,1.2.3.5:PORT",
                or "dns:///NAME:PORT" for all that the name stands for: requests go in turn to
                those that are there, and a retry to another.
            timeout: Deadline in seconds of requests that give none.
            retry: How often idempotent requests that meet UNAVAILABLE are sent again; by default
                three times more. `RetryPolicy.none()` lets every failure through.
            max_message_bytes: Largest message in either direction.
            tls: Encrypt the connection; None for a plain one.
            token: Sent with every request as "authorization: Bearer …"; needs `tls`, unless the
                address is this machine's.
            connections: Channels that requests take in turn, 1 to 64; more than one where a single
                connection is the limit.

        Raises:
            ValueError: If an argument is out of its range, a token would be sent to another machine
                without `tls`, or there are several addresses with it: certificates are for names.
            OSError: If a file of `tls` cannot be read.
        """
        self.address = _channel.checked_address(address)
        self._timeout = _channel.checked_timeout(timeout, timeout)
        if tls is not None and "," in self.address:
            raise _channel.ConnectionInvalid(
                f"with tls give one name for all servers, as dns:///NAME:PORT, not {address!r}"
            )
        self._retry = retry or RetryPolicy()
        options = _channel.channel_options(
            max_message_bytes, spread=_channel.is_several(self.address)
        )
        self._channel = _io.open_channels(
            _channel.checked_connections(connections),
            self.address,
            options,
            _channel.channel_credentials(tls, token, self.address),
            _channel.plain_token(tls, token),
        )
        self._closed = False

    async def close(self) -> None:
        """Close the channel; requests in flight are cancelled. More than once does no harm."""
        if not self._closed:
            self._closed = True
            await _io.close_channels(self._channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def _call(
        self,
        name: str,
        method: Callable[..., Awaitable[T]],
        request: object,
        timeout: float | None,
        metadata: tuple[tuple[str, str], ...] = (),
    ) -> T:
        if self._closed:
            raise RuntimeError(f"this {type(self).__name__} is closed")
        deadline = _channel.checked_timeout(timeout, self._timeout)
        attempts = Attempts(self._retry, name, deadline)
        while True:
            try:
                return await method(request, timeout=attempts.timeout, metadata=metadata)
            except grpc.RpcError as error:
                failure = from_rpc_error(error, address=self.address, method=name)
                pause = attempts.pause(error)
            if pause is not None and not self._closed:
                await _io.sleep(pause)
            if pause is None or self._closed:
                raise failure

    async def _stream(
        self,
        name: str,
        method: Callable[..., Any],
        images: _io.Images,
        make: Callable[[Any], object],
        convert: Callable[[Any], T],
        timeout: float,
    ) -> AsyncIterator[T]:
        """Send a request for each image and yield the answers; closing cancels the call."""
        if self._closed:
            raise RuntimeError(f"this {type(self).__name__} is closed")
        deadline = _channel.checked_timeout(timeout, timeout)
        failures: list[BaseException] = []
        call = method(_io.requests_of(images, make, failures), timeout=deadline)
        try:
            async for response in call:
                yield convert(response)
        except grpc.RpcError as error:
            raise from_rpc_error(error, address=self.address, method=name) from None
        finally:
            call.cancel()
        if failures:
            raise failures[0]
