"""Handing the calls of servers on to the manager that leads.

A server may keep its stream to any manager on the database, or to a balancer before them; what it
says must come to the one that takes the steps.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc

from pollard.models.v1 import fleet_service_pb2 as pb
from pollard.models.v1 import fleet_service_pb2_grpc as pb_grpc
from pollard.services.common.auth.gate import AUTHORIZATION
from pollard.services.common.auth.own import OwnToken
from pollard.services.common.errors import Unavailable
from pollard.services.common.status import RelayedError
from pollard.services.common.tls import open_channel
from pollard.services.common.tls_files import PLAIN, TlsFiles

_MARK = "pollard-relayed"
"""Metadata of a call that was handed on: it is not handed on again."""

_OPTIONS = [
    ("grpc.max_receive_message_length", 64 * 1024 * 1024),
    ("grpc.max_send_message_length", 64 * 1024 * 1024),
    ("grpc.keepalive_time_ms", 5_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    # That is for the kernel. The answer to a ping a busy process may owe for seconds; gRPC
    # waits a minute for it unless told otherwise.
    ("grpc.http2.ping_timeout_ms", 10_000),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
]


class Relay:
    """Calls to the manager that leads."""

    def __init__(self, tls: TlsFiles = PLAIN, token: OwnToken | None = None) -> None:
        """Reach managers by `tls`, and show them `token` where the caller has shown none."""
        self._tls = tls
        self._token = token or OwnToken(None)
        self._address = ""
        self._channel: grpc.aio.Channel | None = None

    async def close(self) -> None:
        """End every call that is handed on."""
        channel, self._channel, self._address = self._channel, None, ""
        if channel is not None:
            await channel.close()

    async def sync(
        self,
        leader: str,
        first: pb.SyncRequest,
        incoming: AsyncIterator[pb.SyncRequest],
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> AsyncIterator[pb.SyncResponse]:
        """Hand on a stream, from its first message on.

        Raises:
            RelayedError: how the leader ended it.
            Unavailable: the call was handed on already; who leads is changing.
        """

        async def messages() -> AsyncIterator[pb.SyncRequest]:
            yield first
            async for message in incoming:
                yield message

        call: Any = (await self._stub(leader, context)).Sync(
            messages(), metadata=self._metadata(context)
        )
        # The stream may end while this generator waits to be asked for more.
        context.add_done_callback(lambda _: call.cancel())  # type: ignore[arg-type]  # typed as a class of its own
        try:
            async for response in call:
                yield response
        except grpc.aio.AioRpcError as error:
            raise RelayedError.of(error) from None
        except asyncio.CancelledError:
            if call.cancelled() and not context.cancelled():
                raise Unavailable(
                    "this manager is stopping, or another leads now; connect again",
                    reason="NOT_LEADER",
                ) from None
            raise
        finally:
            call.cancel()

    async def list_servers(
        self,
        leader: str,
        request: pb.ListServersRequest,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> pb.ListServersResponse:
        """Ask the leader.

        Raises:
            RelayedError: what the leader said.
            Unavailable: the call was handed on already; who leads is changing.
        """
        stub = await self._stub(leader, context)
        try:
            answer: pb.ListServersResponse = await stub.ListServers(
                request, timeout=context.time_remaining() or 10.0, metadata=self._metadata(context)
            )
        except grpc.aio.AioRpcError as error:
            raise RelayedError.of(error) from None
        return answer

    async def _stub(self, leader: str, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        if any(key == _MARK for key, _ in context.invocation_metadata() or ()):
            raise Unavailable("another manager leads now; connect again", reason="NOT_LEADER")
        if leader != self._address or self._channel is None:
            await self.close()
            self._address = leader
            self._channel = open_channel(leader, self._tls, _OPTIONS)
        return pb_grpc.FleetServiceStub(self._channel)

    def _metadata(
        self, context: grpc.aio.ServicerContext[Any, Any]
    ) -> tuple[tuple[str, str | bytes], ...]:
        kept = [
            (key, value)
            for key, value in context.invocation_metadata() or ()
            if key == AUTHORIZATION or key.startswith("pollard-")
        ]
        # A certificate cannot be handed on, and this manager has looked at it.
        shown = any(key == AUTHORIZATION for key, _ in kept)
        own = () if shown else self._token.metadata()
        return (*kept, *own, (_MARK, "1"))
