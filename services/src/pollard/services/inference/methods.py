"""The methods of the protocol beside inference, from message to message.

Nothing here knows gRPC: a front end looks a method up in `ProtocolMethods.unary` by name, parses
its request, calls it and serialises its answer.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from google.protobuf.message import Message

from pollard.inference import grpc_service_pb2 as pb
from pollard.runtime.sessions import TensorInfo
from pollard.services.common.errors import NotFound, Unavailable
from pollard.services.inference.catalogue import Catalogue, LoadParameter
from pollard.services.inference.config import config_of
from pollard.services.inference.engine import Engine, parse_version
from pollard.services.inference.errors import FeatureNotOffered, RequestInvalid
from pollard.services.inference.log_settings import log_settings, trace_settings
from pollard.services.inference.revision import LoadedRevision
from pollard.services.inference.shared_memory import CudaRegion, SharedMemory

PLATFORM = "onnxruntime_onnx"

_EXTENSIONS = (
    "classification",
    "model_configuration",
    "model_repository",
    "model_repository(unload_dependents)",
    "parameters",
    "schedule_policy",
    "statistics",
    "logging",
)


@dataclass(frozen=True, slots=True)
class Call:
    """What comes with a request beside its message."""

    alias: str = ""
    """Alias to follow where no version is named; empty means "production"."""


Unary = Callable[[Any, Call], Awaitable[Message]]


class ProtocolMethods:
    """Everything that the protocol offers beside inference."""

    def __init__(self, engine: Engine, catalogue: Catalogue, shared: SharedMemory) -> None:
        """Answer about `engine`, with states and control from `catalogue`."""
        self._engine = engine
        self._catalogue = catalogue
        self._shared = shared
        self.unary: Mapping[str, tuple[type[Message], Unary]] = {
            "ServerLive": (pb.ServerLiveRequest, self.server_live),
            "ServerReady": (pb.ServerReadyRequest, self.server_ready),
            "ServerMetadata": (pb.ServerMetadataRequest, self.server_metadata),
            "ModelReady": (pb.ModelReadyRequest, self.model_ready),
            "ModelMetadata": (pb.ModelMetadataRequest, self.model_metadata),
            "ModelConfig": (pb.ModelConfigRequest, self.model_config),
            "ModelStatistics": (pb.ModelStatisticsRequest, self.model_statistics),
            "RepositoryIndex": (pb.RepositoryIndexRequest, self.repository_index),
            "RepositoryModelLoad": (pb.RepositoryModelLoadRequest, self.model_load),
            "RepositoryModelUnload": (pb.RepositoryModelUnloadRequest, self.model_unload),
            "SystemSharedMemoryStatus": (pb.SystemSharedMemoryStatusRequest, self.shm_status),
            "SystemSharedMemoryRegister": (
                pb.SystemSharedMemoryRegisterRequest,
                self.shm_register,
            ),
            "SystemSharedMemoryUnregister": (
                pb.SystemSharedMemoryUnregisterRequest,
                self.shm_unregister,
            ),
            "CudaSharedMemoryStatus": (pb.CudaSharedMemoryStatusRequest, self.cuda_status),
            "CudaSharedMemoryRegister": (pb.CudaSharedMemoryRegisterRequest, self.cuda_register),
            "CudaSharedMemoryUnregister": (
                pb.CudaSharedMemoryUnregisterRequest,
                self.cuda_unregister,
            ),
            "TraceSetting": (pb.TraceSettingRequest, self.trace_setting),
            "LogSettings": (pb.LogSettingsRequest, self.log_settings),
        }
        """Type of the request and the method, by name."""

    async def server_live(self, _: pb.ServerLiveRequest, __: Call) -> pb.ServerLiveResponse:
        """Answer that the server answers."""
        return pb.ServerLiveResponse(live=True)

    async def server_ready(self, _: pb.ServerReadyRequest, __: Call) -> pb.ServerReadyResponse:
        """Tell whether requests are taken."""
        return pb.ServerReadyResponse(
            ready=self._catalogue.ready and not self._engine.stopping and not self._engine.lost
        )

    async def server_metadata(
        self, _: pb.ServerMetadataRequest, __: Call
    ) -> pb.ServerMetadataResponse:
        """Describe the server."""
        extensions = [*_EXTENSIONS]
        if self._shared.enabled:
            extensions.append("system_shared_memory")
            if self._shared.has_gpu:
                extensions.append("cuda_shared_memory")
        return pb.ServerMetadataResponse(
            name="pollard", version=software_version(), extensions=extensions
        )

    async def model_ready(self, request: pb.ModelReadyRequest, call: Call) -> pb.ModelReadyResponse:
        """Tell whether a request for this model and version would be run now."""
        try:
            self._engine.resolve(request.name, request.version, call.alias)
        except (NotFound, Unavailable):
            return pb.ModelReadyResponse(ready=False)
        return pb.ModelReadyResponse(ready=True)

    async def model_metadata(
        self, request: pb.ModelMetadataRequest, call: Call
    ) -> pb.ModelMetadataResponse:
        """Describe a loaded revision and the revisions beside it."""
        revision = self._engine.resolve(request.name, request.version, call.alias)
        info = revision.info
        served = self._engine.table.models[info.model]
        return pb.ModelMetadataResponse(
            name=info.model,
            versions=[str(number) for number in sorted(served.revisions)],
            platform=PLATFORM,
            inputs=[_tensor(tensor) for tensor in info.inputs],
            outputs=[_tensor(tensor) for tensor in info.outputs],
            properties={
                "revision": str(info.revision),
                "bundle_sha256": info.digest,
                "variant": info.variant,
                "target": info.target,
                "max_batch_size": str(info.max_batch_size),
                "workers": str(revision.workers),
                "threads": str(info.threads),
                "joined_batch": str(revision.joined_batch),
            },
        )

    async def model_config(
        self, request: pb.ModelConfigRequest, call: Call
    ) -> pb.ModelConfigResponse:
        """Give the configuration that a revision runs with."""
        revision = self._engine.resolve(request.name, request.version, call.alias)
        return pb.ModelConfigResponse(config=config_of(revision))

    async def model_statistics(
        self, request: pb.ModelStatisticsRequest, _: Call
    ) -> pb.ModelStatisticsResponse:
        """Give counts and durations of one version, of all of a model's, or of all there are."""
        models = self._engine.table.models
        wanted = [request.name] if request.name else sorted(models)
        number = parse_version(request.version) if request.version else None
        found: list[LoadedRevision] = []
        for name in wanted:
            served = models.get(name)
            if served is not None:
                found += [
                    revision
                    for version_, revision in sorted(served.revisions.items())
                    if number in (None, version_)
                ]
        if request.name and not found:
            raise RequestInvalid(
                f"requested model '{request.name}'"
                + (f", version {number}," if number else "")
                + " is not available",
                model=request.name,
            )
        return pb.ModelStatisticsResponse(
            model_stats=[
                revision.statistics.to_proto(revision.info.model, str(revision.info.revision))
                for revision in found
            ]
        )

    async def repository_index(
        self, request: pb.RepositoryIndexRequest, _: Call
    ) -> pb.RepositoryIndexResponse:
        """List versions and their states."""
        _one_repository(request.repository_name)
        return pb.RepositoryIndexResponse(
            models=[
                pb.RepositoryIndexResponse.ModelIndex(
                    name=entry.model, version=entry.version, state=entry.state, reason=entry.reason
                )
                for entry in self._catalogue.index()
                if entry.state == "READY" or not request.ready
            ]
        )

    async def model_load(
        self, request: pb.RepositoryModelLoadRequest, _: Call
    ) -> pb.RepositoryModelLoadResponse:
        """Load a model and answer when it is ready."""
        _one_repository(request.repository_name)
        await self._catalogue.load_model(request.model_name, _values(request.parameters))
        return pb.RepositoryModelLoadResponse()

    async def model_unload(
        self, request: pb.RepositoryModelUnloadRequest, _: Call
    ) -> pb.RepositoryModelUnloadResponse:
        """Unload a model; its requests in flight are answered."""
        _one_repository(request.repository_name)
        await self._catalogue.unload_model(request.model_name, _values(request.parameters))
        return pb.RepositoryModelUnloadResponse()

    async def shm_status(
        self, request: pb.SystemSharedMemoryStatusRequest, _: Call
    ) -> pb.SystemSharedMemoryStatusResponse:
        """List regions of shared memory."""
        response = pb.SystemSharedMemoryStatusResponse()
        for region in self._shared.status(request.name):
            response.regions[region.name].CopyFrom(region)
        return response

    async def shm_register(
        self, request: pb.SystemSharedMemoryRegisterRequest, _: Call
    ) -> pb.SystemSharedMemoryRegisterResponse:
        """Register a region of shared memory."""
        self._shared.register(request.name, request.key, request.offset, request.byte_size)
        return pb.SystemSharedMemoryRegisterResponse()

    async def shm_unregister(
        self, request: pb.SystemSharedMemoryUnregisterRequest, _: Call
    ) -> pb.SystemSharedMemoryUnregisterResponse:
        """Forget one region or all."""
        self._shared.unregister(request.name)
        return pb.SystemSharedMemoryUnregisterResponse()

    async def cuda_status(
        self, request: pb.CudaSharedMemoryStatusRequest, _: Call
    ) -> pb.CudaSharedMemoryStatusResponse:
        """List regions of CUDA memory."""
        response = pb.CudaSharedMemoryStatusResponse()
        for region in self._shared.cuda_status(request.name):
            response.regions[region.name].CopyFrom(region)
        return response

    async def cuda_register(
        self, request: pb.CudaSharedMemoryRegisterRequest, _: Call
    ) -> pb.CudaSharedMemoryRegisterResponse:
        """Register a region of CUDA memory."""
        self._shared.register_cuda(
            request.name, request.raw_handle, request.device_id, request.byte_size
        )
        return pb.CudaSharedMemoryRegisterResponse()

    async def cuda_unregister(
        self, request: pb.CudaSharedMemoryUnregisterRequest, _: Call
    ) -> pb.CudaSharedMemoryUnregisterResponse:
        """Forget one region of CUDA memory, or all."""
        self._shared.unregister(request.name, CudaRegion)
        return pb.CudaSharedMemoryUnregisterResponse()

    async def trace_setting(
        self, request: pb.TraceSettingRequest, _: Call
    ) -> pb.TraceSettingResponse:
        """Give the trace settings."""
        if request.model_name:
            self._engine.resolve(request.model_name)
        return trace_settings(request)

    async def log_settings(self, request: pb.LogSettingsRequest, _: Call) -> pb.LogSettingsResponse:
        """Change and give the log settings."""
        return log_settings(request)


def software_version() -> str:
    """Return the version of the installed distribution."""
    try:
        return version("pollard-services")
    except PackageNotFoundError:
        # Run from a source tree that is not installed.
        return "0+unknown"


def _tensor(info: TensorInfo) -> pb.ModelMetadataResponse.TensorMetadata:
    return pb.ModelMetadataResponse.TensorMetadata(
        name=info.name, datatype=info.datatype, shape=info.shape
    )


def _one_repository(name: str) -> None:
    if name:
        raise FeatureNotOffered(
            f"'repository_name' specification is not supported, got '{name}': there is one "
            "repository",
            repository_name=name,
        )


def _values(parameters: Mapping[str, pb.ModelRepositoryParameter]) -> dict[str, LoadParameter]:
    values: dict[str, LoadParameter] = {}
    for name, parameter in parameters.items():
        kind = parameter.WhichOneof("parameter_choice")
        if kind is None:
            raise RequestInvalid(f"parameter '{name}' has no value", parameter=name)
        values[name] = getattr(parameter, kind)
    return values
