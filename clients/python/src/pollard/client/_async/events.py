"""The audit log: the newest changes, and every change from a point on as it happens."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable

import grpc

from pollard.client import _channel, _convert
from pollard.client._async import _io
from pollard.client._async._manager import SERVICE, AsyncManagerClient
from pollard.client._names import model_name
from pollard.client._watching import (
    FIRST_PAUSE_SECONDS,
    RENEW_SECONDS,
    Position,
    longer,
    may_resume,
    was_ended,
)
from pollard.client.errors import DeadlineExceeded, RequestFailed, from_rpc_error
from pollard.client.types import Event
from pollard.models.v1 import model_service_pb2


class EventMethods(AsyncManagerClient):
    """Methods of the models client that concern the audit log."""

    async def events(self, model: str | None = None, *, limit: int = 50) -> list[Event]:
        """List the newest changes in the registry, at most 1000, newest first."""
        if not 1 <= limit <= 1000:
            raise ValueError(f"limit must be 1 to 1000, not {limit}")
        request = model_service_pb2.ListEventsRequest(
            page_size=limit, model="" if model is None else model_name(model)
        )
        response = await self._call(f"{SERVICE}/ListEvents", self._stub.ListEvents, request, None)
        return [_convert.event(item) for item in response.events]

    async def watch_events(
        self,
        model: str | None = None,
        *,
        start: int | None = None,
        patience: float | None = None,
        on_connection: Callable[[RequestFailed | None], None] | None = None,
    ) -> AsyncGenerator[Event, None]:
        """Yield every change in the registry as it happens, once and in order.

        A connection that breaks is made again, and the watch goes on where it stood: nothing is
        lost and nothing comes twice. Leaving the loop ends the watch.

        Args:
            model: Only changes of this model; None for all.
            start: Sequence of the first event wanted, such as one above the last that was seen
                (`Event.sequence`); None for what happens from now on.
            patience: Seconds to go on trying while the manager cannot be reached; None for without
                end. At the beginning there is none: a manager that is not there is an error at
                once.
            on_connection: Called with None when the watch has begun, with the failure when the
                connection breaks, and with None when it stands again.

        Raises:
            ValueError: `start` is not 1 or more.
            Unavailable: The manager could not be reached at the beginning, or not within
                `patience`.
            OutOfRange: Events that the watch has not seen are no longer kept, or `start` lies in
                the future. List again what you follow, and watch from where the message says.
        """
        position = Position(start)
        name = "" if model is None else model_name(model)
        if patience is not None:
            _channel.checked_timeout(patience, patience)
        method = f"{SERVICE}/WatchEvents"
        began = connected = False
        broken_since = 0.0
        pause = FIRST_PAUSE_SECONDS
        while True:
            if self._closed:
                raise RuntimeError(f"this {type(self).__name__} is closed")
            request = model_service_pb2.WatchEventsRequest(start_sequence=position.next, model=name)
            # Each call has an end, so that a connection that died without a word is noticed: the
            # manager gives a sign of life every 30 s.
            call = self._stub.WatchEvents(
                request, timeout=RENEW_SECONDS if connected else self._timeout
            )
            heard = False
            try:
                async for response in call:
                    heard = True
                    if not connected:
                        began = connected = True
                        pause = FIRST_PAUSE_SECONDS
                        if on_connection is not None:
                            on_connection(None)
                    if position.is_new(response):
                        yield _convert.event(response.event)
                failure: RequestFailed = was_ended(self.address, method)
            except grpc.RpcError as error:
                failure = from_rpc_error(error, address=self.address, method=method)
            finally:
                call.cancel()
            if heard and isinstance(failure, DeadlineExceeded):
                continue
            if self._closed or not began or not may_resume(failure):
                raise failure
            if connected:
                connected = False
                broken_since = time.monotonic()
                if on_connection is not None:
                    on_connection(failure)
            if patience is not None and time.monotonic() - broken_since >= patience:
                raise failure
            await _io.sleep(pause)
            pause = longer(pause)
