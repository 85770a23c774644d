"""Which role each method of every service needs: the one table.

`docs/security.md` shows it; tests compare it with the contracts and with the page.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from pollard.services.common.auth.callers import Caller, Role


@dataclass(frozen=True, slots=True)
class Access:
    """Who may call a method."""

    role: Role | None
    """Least role; None is everybody, also who shows nothing."""
    servers: bool = False
    """Whether the other services may, too."""
    metered: bool = False
    """Whether each message of the client's counts as a request, not only the call."""

    def allows(self, caller: Caller) -> bool:
        """Whether `caller` may."""
        if self.role is None or caller.kind == "open":
            return True
        if caller.role is Role.SERVER:
            return self.servers
        return caller.role.includes(self.role)

    @property
    def words(self) -> str:
        """The access for people."""
        if self.role is None:
            return "everybody"
        if self.role is Role.SERVER:
            return "server"
        return f"{self.role.value}, server" if self.servers else self.role.value


_OPEN = Access(None)
_VIEW = Access(Role.VIEWER)
_VIEW_S = Access(Role.VIEWER, servers=True)
_PREDICT = Access(Role.PREDICTOR)
_PREDICT_S = Access(Role.PREDICTOR, servers=True)
_PREDICT_STREAM = Access(Role.PREDICTOR, metered=True)
_PUBLISH = Access(Role.PUBLISHER)
_PUBLISH_S = Access(Role.PUBLISHER, servers=True)
_ADMIN = Access(Role.ADMIN)
_SERVERS = Access(Role.SERVER, servers=True)

_SERVICES: Mapping[str, Mapping[str, Access]] = {
    "grpc.health.v1.Health": {"Check": _OPEN, "Watch": _OPEN, "List": _OPEN},
    "grpc.reflection.v1alpha.ServerReflection": {"ServerReflectionInfo": _VIEW},
    "grpc.channelz.v1.Channelz": dict.fromkeys(
        (
            *("GetTopChannels", "GetServers", "GetServer", "GetServerSockets"),
            *("GetChannel", "GetSubchannel", "GetSocket"),
        ),
        _ADMIN,
    ),
    "inference.GRPCInferenceService": {
        "ServerLive": _OPEN,
        "ServerReady": _OPEN,
        "ServerMetadata": _VIEW_S,
        "ModelReady": _VIEW_S,
        "ModelMetadata": _VIEW_S,
        "ModelConfig": _VIEW_S,
        "ModelStatistics": _VIEW_S,
        "RepositoryIndex": _VIEW_S,
        "ModelInfer": _PREDICT_S,
        "ModelStreamInfer": _PREDICT_STREAM,
        "SystemSharedMemoryStatus": _PREDICT,
        "SystemSharedMemoryRegister": _PREDICT,
        "SystemSharedMemoryUnregister": _PREDICT,
        "CudaSharedMemoryStatus": _PREDICT,
        "CudaSharedMemoryRegister": _PREDICT,
        "CudaSharedMemoryUnregister": _PREDICT,
        "RepositoryModelLoad": _PUBLISH,
        "RepositoryModelUnload": _PUBLISH,
        "TraceSetting": _ADMIN,
        "LogSettings": _ADMIN,
    },
    "pollard.preprocess.v1.PreprocessService": {
        "Transform": _PREDICT,
        "TransformStream": _PREDICT_STREAM,
    },
    "pollard.vision.v1.VisionService": {
        "Predict": _PREDICT,
        "PredictBatch": _PREDICT,
        "PredictStream": _PREDICT_STREAM,
        "Explain": _PREDICT,
    },
    "pollard.models.v1.ModelService": {
        **dict.fromkeys(
            (
                *("GetModel", "ListModels", "GetRevision", "ListRevisions"),
                *("GetAlias", "ListAliases", "GetRollout", "ListRollouts"),
                *("WatchEvents", "ListEvents"),
            ),
            _VIEW,
        ),
        # What a bundle holds is worth more than to see that there is one.
        "DownloadBundle": _PUBLISH_S,
        **dict.fromkeys(
            (
                *("UploadBundle", "GetUpload"),
                *("UpdateModel", "DeleteModel", "UndeleteModel"),
                *("UpdateRevision", "DeleteRevision", "UndeleteRevision"),
                *("SetAlias", "RollbackAlias", "DeleteAlias"),
                *("CreateRollout", "PauseRollout", "ResumeRollout"),
                *("PromoteRollout", "AbortRollout"),
            ),
            _PUBLISH,
        ),
        "VerifyStore": _ADMIN,
    },
    "pollard.models.v1.FleetService": {"Sync": _SERVERS, "ListServers": _VIEW_S},
    "pollard.models.v1.TokenService": {
        "CreateToken": _ADMIN,
        "ListTokens": _ADMIN,
        "RevokeToken": _ADMIN,
        "GetCaller": _VIEW_S,
    },
}

ACCESS: Mapping[str, Access] = MappingProxyType(
    {
        f"/{service}/{method}": access
        for service, methods in _SERVICES.items()
        for method, access in methods.items()
    }
)
"""Who may call a method, by its path. What is not in it, nobody may."""
