"""The protocol's methods over gRPC: decode, call, encode."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Protocol, TypeVar

import grpc
from google.protobuf.message import Message

from pollard.inference import grpc_service_pb2 as pb
from pollard.models.v1 import fleet_service_pb2 as fleet_pb
from pollard.services.common.errors import NotFound, Unavailable
from pollard.services.common.routing import ALIAS_METADATA, STICKY_METADATA
from pollard.services.common.status import abort
from pollard.services.inference import protocol
from pollard.services.inference.engine import Engine
from pollard.services.inference.errors import FeatureNotOffered

SERVICE_NAME = "inference.GRPCInferenceService"

Context = grpc.aio.ServicerContext[Any, Any]

_Request = TypeVar("_Request", bound=Message)

_INDEX_STATES = {
    fleet_pb.REVISION_STATE_PENDING: "LOADING",
    fleet_pb.REVISION_STATE_FETCHING: "LOADING",
    fleet_pb.REVISION_STATE_LOADING: "LOADING",
    fleet_pb.REVISION_STATE_READY: "READY",
    fleet_pb.REVISION_STATE_FAILED: "UNAVAILABLE",
    fleet_pb.REVISION_STATE_DRAINING: "UNLOADING",
}


class Catalogue(Protocol):
    """What the servicer needs to know of the revisions beyond the engine."""

    @property
    def ready(self) -> bool:
        """Whether all that the server was told to run was loaded or refused."""

    def statuses(self) -> list[fleet_pb.RevisionStatus]:
        """Return the state of every revision that is wanted or still there."""


class InferenceServicer:
    """Answers `inference.GRPCInferenceService`."""

    def __init__(self, engine: Engine, catalogue: Catalogue) -> None:
        """Serve `engine`, with states from `catalogue`."""
        self._engine = engine
        self._catalogue = catalogue

    async def model_infer(self, data: bytes, context: Context) -> bytes:
        """Run a model. Takes and gives bytes: the domain decodes them once."""
        alias = sticky_key = ""
        for key, value in context.invocation_metadata() or ():
            if key == ALIAS_METADATA:
                alias = str(value)
            elif key == STICKY_METADATA:
                sticky_key = str(value)
        return await protocol.model_infer(
            self._engine,
            data,
            alias=alias,
            sticky_key=sticky_key,
            seconds_left=context.time_remaining(),
        )

    async def server_live(self, _: pb.ServerLiveRequest, __: Context) -> pb.ServerLiveResponse:
        """Answer that the server answers."""
        return pb.ServerLiveResponse(live=True)

    async def server_ready(self, _: pb.ServerReadyRequest, __: Context) -> pb.ServerReadyResponse:
        """Tell whether requests are taken."""
        return pb.ServerReadyResponse(ready=self._catalogue.ready)

    async def server_metadata(
        self, _: pb.ServerMetadataRequest, __: Context
    ) -> pb.ServerMetadataResponse:
        """Describe the server."""
        return pb.ServerMetadataResponse(
            name="pollard", version=software_version(), extensions=protocol.EXTENSIONS
        )

    async def model_ready(
        self, request: pb.ModelReadyRequest, context: Context
    ) -> pb.ModelReadyResponse:
        """Tell whether a request for this model and version would be run now."""
        try:
            self._engine.resolve(request.name, request.version, _alias(context))
        except (NotFound, Unavailable):
            return pb.ModelReadyResponse(ready=False)
        return pb.ModelReadyResponse(ready=True)

    async def model_metadata(
        self, request: pb.ModelMetadataRequest, context: Context
    ) -> pb.ModelMetadataResponse:
        """Describe a model's tensors."""
        revision = self._engine.resolve(request.name, request.version, _alias(context))
        return protocol.model_metadata(self._engine, revision)

    async def repository_index(
        self, request: pb.RepositoryIndexRequest, _: Context
    ) -> pb.RepositoryIndexResponse:
        """List revisions and their states."""
        if request.repository_name:
            raise FeatureNotOffered(
                "there is one repository; leave repository_name empty",
                repository_name=request.repository_name,
            )
        response = pb.RepositoryIndexResponse()
        for status in self._catalogue.statuses():
            state = _INDEX_STATES.get(status.state, "UNAVAILABLE")
            if state == "READY" or not request.ready:
                response.models.add(
                    name=status.model,
                    version=str(status.revision),
                    state=state,
                    reason=status.error.message,
                )
        return response


def software_version() -> str:
    """Return the version of the installed distribution."""
    try:
        return version("pollard-services")
    except PackageNotFoundError:
        # Run from a source tree that is not installed.
        return "0+unknown"


def add_to_server(servicer: InferenceServicer, server: grpc.aio.Server) -> None:
    """Register the methods; those that are not offered answer UNIMPLEMENTED with words."""
    offered: dict[str, tuple[Callable[..., Awaitable[Any]], type[Message]]] = {
        "ServerLive": (servicer.server_live, pb.ServerLiveRequest),
        "ServerReady": (servicer.server_ready, pb.ServerReadyRequest),
        "ServerMetadata": (servicer.server_metadata, pb.ServerMetadataRequest),
        "ModelReady": (servicer.model_ready, pb.ModelReadyRequest),
        "ModelMetadata": (servicer.model_metadata, pb.ModelMetadataRequest),
        "RepositoryIndex": (servicer.repository_index, pb.RepositoryIndexRequest),
    }
    handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
        # No serialisers: this path takes and gives bytes.
        "ModelInfer": grpc.unary_unary_rpc_method_handler(_guarded(servicer.model_infer)),
    }
    for name, (method, kind) in offered.items():
        handlers[name] = grpc.unary_unary_rpc_method_handler(
            _guarded(method),
            request_deserializer=kind.FromString,
            response_serializer=_serialize,
        )
    for name, descriptor in pb.DESCRIPTOR.services_by_name[
        "GRPCInferenceService"
    ].methods_by_name.items():
        if name in handlers:
            continue
        refuse = functools.partial(_refuse, name)
        if descriptor.client_streaming:
            handlers[name] = grpc.stream_stream_rpc_method_handler(refuse)
        else:
            handlers[name] = grpc.unary_unary_rpc_method_handler(refuse)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE_NAME, handlers),))


def _serialize(message: Message) -> bytes:
    return message.SerializeToString()


def _guarded(method: Callable[[Any, Context], Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    # In place of common.status.ErrorInterceptor, which builds a handler anew for every request:
    # that costs more than the rest of the servicer.
    async def guarded(request: Any, context: Context) -> Any:
        try:
            return await method(request, context)
        except Exception as error:
            if isinstance(error, grpc.aio.AbortError):
                raise
            await abort(context, error)

    return guarded


async def _refuse(name: str, _: Any, context: Context) -> None:
    await abort(
        context,
        FeatureNotOffered(
            f"{name} is not offered by this server; ServerMetadata lists the extensions that are",
            method=name,
        ),
    )


def _alias(context: Context) -> str:
    for key, value in context.invocation_metadata() or ():
        if key == ALIAS_METADATA:
            return str(value)
    return ""
