"""Tensors in, tensors out: the Open Inference Protocol."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from numpy.typing import NDArray

from pollard.client import _channel, _convert
from pollard.client._async._base import AsyncBaseClient
from pollard.client._names import checked_alias, checked_model, checked_revision
from pollard.client._retrying import RetryPolicy
from pollard.client.types import InferResult, ModelMetadata, RepositoryEntry, ServerMetadata
from pollard.inference import grpc_service_pb2, grpc_service_pb2_grpc

_SERVICE = "/inference.GRPCInferenceService"


class AsyncInferenceClient(AsyncBaseClient):
    """Asks an inference server."""

    def __init__(
        self,
        address: str = _channel.DEFAULT_INFERENCE_ADDRESS,
        *,
        timeout: float = _channel.DEFAULT_TIMEOUT_SECONDS,
        retry: RetryPolicy | None = None,
        max_message_bytes: int = _channel.DEFAULT_MAX_MESSAGE_BYTES,
        tls: _channel.Tls | None = None,
        token: str | None = None,
        connections: int = 1,
    ) -> None:
        """Make a client; the arguments are those of every client (`AsyncBaseClient`)."""
        super().__init__(
            address,
            timeout=timeout,
            retry=retry,
            max_message_bytes=max_message_bytes,
            tls=tls,
            token=token,
            connections=connections,
        )
        self._stub = grpc_service_pb2_grpc.GRPCInferenceServiceStub(self._channel)

    async def infer(
        self,
        model: str,
        inputs: Mapping[str, NDArray[Any]],
        *,
        version: int | None = None,
        alias: str | None = None,
        outputs: Sequence[str] | None = None,
        request_id: str = "",
        sticky_key: str | None = None,
        timeout: float | None = None,
    ) -> InferResult:
        """Run a model once.

        Args:
            model: Model name.
            inputs: A value for every input, by name; the first dimension is the batch.
            version: Revision to run; by default the one that the alias points at.
            alias: Alias to ask; by default "production".
            outputs: Outputs wanted, by name; by default all.
            request_id: Given back in the answer.
            sticky_key: Requests with the same key get the same revision of a rollout.
            timeout: Deadline in seconds; by default the client's.

        Raises:
            InvalidArgument: An input does not fit the model.
            NotFound: There is no such model, version or alias.
            Unavailable: The model is not ready, or the server's queue is full.
            RequestFailed: Anything else that the server answers.
            TypeError, ValueError: An argument is nothing of the kind.
        """
        if version is not None and alias is not None:
            raise ValueError("give a version or an alias, not both")
        metadata: tuple[tuple[str, str], ...] = ()
        if alias is not None:
            metadata += ((_convert.ALIAS_METADATA_KEY, checked_alias(alias)),)
        if sticky_key is not None:
            metadata += ((_convert.STICKY_METADATA_KEY, _convert.sticky_metadata(sticky_key)),)
        request = _convert.infer_request(model, inputs, version, outputs, request_id)
        response = await self._call(
            f"{_SERVICE}/ModelInfer", self._stub.ModelInfer, request, timeout, metadata
        )
        return _convert.infer_result(response)

    async def server_live(
        self,
        *,
        timeout: float | None = None,
    ) -> bool:
        """Say whether the server answers requests. Raises RequestFailed when it does not."""
        request = grpc_service_pb2.ServerLiveRequest()
        return (
            await self._call(f"{_SERVICE}/ServerLive", self._stub.ServerLive, request, timeout)
        ).live

    async def server_ready(
        self,
        *,
        timeout: float | None = None,
    ) -> bool:
        """Say whether the server takes inference requests."""
        request = grpc_service_pb2.ServerReadyRequest()
        return (
            await self._call(f"{_SERVICE}/ServerReady", self._stub.ServerReady, request, timeout)
        ).ready

    async def server_metadata(
        self,
        *,
        timeout: float | None = None,
    ) -> ServerMetadata:
        """Describe the server."""
        request = grpc_service_pb2.ServerMetadataRequest()
        response = await self._call(
            f"{_SERVICE}/ServerMetadata", self._stub.ServerMetadata, request, timeout
        )
        return ServerMetadata(response.name, response.version, tuple(response.extensions))

    async def model_ready(
        self,
        model: str,
        *,
        version: int | None = None,
        timeout: float | None = None,
    ) -> bool:
        """Say whether a model, or one revision of it, can be run now."""
        request = grpc_service_pb2.ModelReadyRequest(
            name=checked_model(model), version=_version(version)
        )
        return (
            await self._call(f"{_SERVICE}/ModelReady", self._stub.ModelReady, request, timeout)
        ).ready

    async def model_metadata(
        self,
        model: str,
        *,
        version: int | None = None,
        timeout: float | None = None,
    ) -> ModelMetadata:
        """Describe a model's inputs and outputs.

        Raises:
            NotFound: There is no such model or version.
            Unavailable: It is known but not ready.
        """
        request = grpc_service_pb2.ModelMetadataRequest(
            name=checked_model(model), version=_version(version)
        )
        return _convert.model_metadata(
            await self._call(
                f"{_SERVICE}/ModelMetadata", self._stub.ModelMetadata, request, timeout
            )
        )

    async def repository_index(
        self,
        *,
        ready: bool = False,
        timeout: float | None = None,
    ) -> list[RepositoryEntry]:
        """List the models that the server knows of; with `ready`, only those it can run."""
        request = grpc_service_pb2.RepositoryIndexRequest(ready=ready)
        response = await self._call(
            f"{_SERVICE}/RepositoryIndex", self._stub.RepositoryIndex, request, timeout
        )
        return [
            RepositoryEntry(entry.name, entry.version, entry.state, entry.reason)
            for entry in response.models
        ]


def _version(version: int | None) -> str:
    return "" if version is None else str(checked_revision(version))
