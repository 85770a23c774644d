"""Asking the vision service about an image."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import grpc

from pollard.models.v1 import fleet_service_pb2 as fleet_pb
from pollard.preprocess.v1 import preprocess_service_pb2 as preprocess_pb
from pollard.services.common.errors import Unavailable
from pollard.services.common.status import RelayedError
from pollard.services.common.tls import open_channel
from pollard.services.common.tls_files import PLAIN, TlsFiles
from pollard.services.models import names
from pollard.vision.v1 import vision_service_pb2 as pb
from pollard.vision.v1 import vision_service_pb2_grpc as pb_grpc

PREDICT = "/pollard.vision.v1.VisionService/Predict"

TOP = 5
"""Labels of a classification that are shown."""

TIMEOUT_SECONDS = 30.0

_OPTIONS = [
    ("grpc.max_receive_message_length", 64 * 1024 * 1024),
    ("grpc.max_send_message_length", 64 * 1024 * 1024),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
]


class Vision:
    """Calls to one vision service.

    Args:
        address: Its gRPC target; empty for any preprocess server of the fleet.
        tls: How it is reached.
    """

    def __init__(self, address: str = "", tls: TlsFiles = PLAIN) -> None:
        self._given = address
        self._tls = tls
        self._address = ""
        self._channel: grpc.aio.Channel | None = None

    async def close(self) -> None:
        """End every call."""
        channel, self._channel, self._address = self._channel, None, ""
        if channel is not None:
            await channel.close()

    def address(self, servers: Sequence[fleet_pb.Server]) -> str:
        """Return where the vision service is; empty where none is known."""
        if self._given:
            return self._given
        joined = [
            server.hello.address
            for server in servers
            if server.connected and server.hello.kind == fleet_pb.SERVER_KIND_PREPROCESS
        ]
        # The one that was asked before, so that the connection is kept.
        return self._address if self._address in joined else joined[0] if joined else ""

    async def predict(
        self,
        address: str,
        model: str,
        choice: str,
        image: bytes,
        metadata: Sequence[tuple[str, str]] = (),
    ) -> pb.PredictResponse:
        """Ask about an image.

        Args:
            address: From :meth:`address`.
            model: Name of the model.
            choice: A revision's number, or an alias.
            image: The file.
            metadata: Who asks.

        Raises:
            InvalidRequest: the choice is neither.
            RelayedError: what the service says.
            Unavailable: it cannot be reached.
        """
        selector = preprocess_pb.ModelSelector(model=model)
        if choice.isascii() and choice.isdigit():
            selector.revision = names.check_number(choice, "revision")
        else:
            selector.alias = names.check_alias_id(choice)
        request = pb.PredictRequest(
            model=selector,
            image=preprocess_pb.Image(content=image),
            options=pb.PredictOptions(top_k=TOP, mask_encoding=pb.MASK_ENCODING_RUN_LENGTH),
        )
        call: Any = self._stub(address).Predict(
            request, timeout=TIMEOUT_SECONDS, metadata=tuple(metadata)
        )
        try:
            answer: pb.PredictResponse = await call
        except grpc.aio.AioRpcError as error:
            relayed = RelayedError.of(error)
            if relayed.outcome.reason == "UNREACHABLE":
                raise Unavailable(
                    f"the vision service at {address} does not answer: {error.details()}",
                    reason="VISION_UNREACHABLE",
                    address=address,
                ) from None
            raise relayed from None
        except asyncio.CancelledError:
            call.cancel()
            raise
        return answer

    def _stub(self, address: str) -> Any:
        if address != self._address or self._channel is None:
            # Calls in flight on the old one keep it until they end.
            self._address = address
            self._channel = open_channel(address, self._tls, _OPTIONS)
        return pb_grpc.VisionServiceStub(self._channel)
