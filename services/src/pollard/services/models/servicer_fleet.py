"""FleetService over gRPC."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc

from pollard.models.v1 import fleet_service_pb2 as pb
from pollard.models.v1 import fleet_service_pb2_grpc as pb_grpc
from pollard.services.common.errors import InvalidRequest, ServiceError, Unavailable
from pollard.services.common.lifecycle import cancel
from pollard.services.models.fleet import Connection, Fleet
from pollard.services.models.leader import Leadership
from pollard.services.models.relay import Relay


class FleetServicer(pb_grpc.FleetServiceServicer):
    """Hands messages to the fleet and states to the servers.

    Where another manager leads, both go on to it.
    """

    def __init__(self, fleet: Fleet, leadership: Leadership, relay: Relay) -> None:
        self._fleet = fleet
        self._leadership = leadership
        self._relay = relay

    async def Sync(
        self,
        request_iterator: AsyncIterator[pb.SyncRequest],
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> AsyncIterator[pb.SyncResponse]:
        """Keep one server in step."""
        incoming = aiter(request_iterator)
        first = await self._first(incoming)
        if first is None or first.WhichOneof("message") != "hello":
            raise InvalidRequest(
                "the first message of a Sync stream is a Hello", reason="HELLO_MISSING"
            )
        leader = await self._leadership.leader()
        if leader:
            async for response in self._relay.sync(leader, first, incoming, context):
                yield response
            return
        connection = await self._fleet.connect(first.hello)

        # The stream may end while this generator waits to be asked for more.
        def ended(_: object) -> None:
            self._fleet.disconnect(connection)

        context.add_done_callback(ended)  # type: ignore[arg-type]  # typed as a class of its own
        listening = asyncio.create_task(self._listen(connection, incoming))
        try:
            async for message in connection.messages():
                yield message
        finally:
            self._fleet.disconnect(connection)
            await cancel(listening)

    async def _first(self, incoming: AsyncIterator[pb.SyncRequest]) -> pb.SyncRequest | None:
        try:
            async with asyncio.timeout(self._fleet.silence_seconds):
                return await anext(incoming, None)
        except TimeoutError:
            raise Unavailable(
                f"no Hello was heard for {self._fleet.silence_seconds:g} s",
                reason="SERVER_SILENT",
            ) from None

    async def _listen(
        self, connection: Connection, incoming: AsyncIterator[pb.SyncRequest]
    ) -> None:
        try:
            async for message in incoming:
                connection.received(message)
            connection.end(None)
        except ServiceError as error:
            connection.end(error)
        except asyncio.CancelledError:
            raise
        except Exception:
            # The transport broke; the RPC itself is at its end.
            connection.end(Unavailable("the stream broke", reason="STREAM_BROKEN"))

    async def ListServers(
        self,
        request: pb.ListServersRequest,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> pb.ListServersResponse:
        """List the servers by id."""
        leader = await self._leadership.leader()
        if leader:
            return await self._relay.list_servers(leader, request, context)
        servers, token = self._fleet.list_servers(
            page_size=request.page_size, page_token=request.page_token
        )
        return pb.ListServersResponse(servers=servers, next_page_token=token)
