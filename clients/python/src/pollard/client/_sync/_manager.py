# Made by clients/python/generate_sync.py from _async/_manager.py; change that file instead.
"""What all methods that ask the model management server share."""

from __future__ import annotations

from pollard.client import _channel
from pollard.client._retrying import RetryPolicy
from pollard.client._sync._base import BaseClient
from pollard.models.v1 import (
    fleet_service_pb2_grpc,
    model_service_pb2_grpc,
    token_service_pb2_grpc,
)

SERVICE = "/pollard.models.v1.ModelService"
PAGE = 200


class ManagerClient(BaseClient):
    """A channel to the model management server."""

    def __init__(
        self,
        address: str = _channel.DEFAULT_MODELS_ADDRESS,
        *,
        timeout: float = _channel.DEFAULT_TIMEOUT_SECONDS,
        retry: RetryPolicy | None = None,
        max_message_bytes: int = _channel.DEFAULT_MAX_MESSAGE_BYTES,
        tls: _channel.Tls | None = None,
        token: str | None = None,
        connections: int = 1,
    ) -> None:
        """Make a client; the arguments are those of every client (`BaseClient`)."""
        super().__init__(
            address,
            timeout=timeout,
            retry=retry,
            max_message_bytes=max_message_bytes,
            tls=tls,
            token=token,
            connections=connections,
        )
        self._stub = model_service_pb2_grpc.ModelServiceStub(self._channel)
        self._fleet = fleet_service_pb2_grpc.FleetServiceStub(self._channel)
        self._token_stub = token_service_pb2_grpc.TokenServiceStub(self._channel)
