"""Which requests are sent again, how often, and when."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import grpc

# Methods without side effects, and those whose request_id makes a second sending harmless.
# UploadBundle is not among them: the client resumes it by itself, from what is on disk.
_RETRIED: Mapping[str, Sequence[str]] = {
    "inference.GRPCInferenceService": (
        "ServerLive",
        "ServerReady",
        "ServerMetadata",
        "ModelReady",
        "ModelMetadata",
        "ModelInfer",
        "RepositoryIndex",
    ),
    "pollard.vision.v1.VisionService": ("Predict", "PredictBatch"),
    "pollard.preprocess.v1.PreprocessService": ("Transform",),
    "pollard.models.v1.ModelService": (
        "GetUpload",
        "GetModel",
        "ListModels",
        "UpdateModel",
        "DeleteModel",
        "UndeleteModel",
        "GetRevision",
        "ListRevisions",
        "UpdateRevision",
        "DeleteRevision",
        "UndeleteRevision",
        "GetAlias",
        "ListAliases",
        "SetAlias",
        "RollbackAlias",
        "DeleteAlias",
        "CreateRollout",
        "GetRollout",
        "ListRollouts",
        "PauseRollout",
        "ResumeRollout",
        "PromoteRollout",
        "AbortRollout",
        "ListEvents",
        "DownloadBundle",
    ),
    "pollard.models.v1.FleetService": ("ListServers",),
}

_METHODS = frozenset(
    f"/{service}/{method}" for service, methods in _RETRIED.items() for method in methods
)

_PASSING = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)

_LEAST_SECONDS = 0.001
"""Left for an attempt whose deadline is here: gRPC is to say that it has passed."""


@dataclass(frozen=True)
class RetryPolicy:
    """How often a request that met UNAVAILABLE is sent again, within its deadline.

    CANCELLED by the server counts as UNAVAILABLE: that is what gRPC answers while it stops, to what
    has not begun.
    """

    max_attempts: int = 4
    """Attempts in all, 1 to 5; 1 means never again."""
    initial_backoff_seconds: float = 0.1
    """Upper end of the first random pause."""
    max_backoff_seconds: float = 2.0
    """Upper end of any pause."""
    backoff_multiplier: float = 2.0
    """Growth of the pauses."""

    def __post_init__(self) -> None:
        # As in gRPC, where a larger number means 5.
        if not 1 <= self.max_attempts <= 5:
            raise ValueError(f"max_attempts must be 1 to 5, not {self.max_attempts}")
        if self.initial_backoff_seconds <= 0 or self.max_backoff_seconds <= 0:
            raise ValueError("backoffs must be longer than 0 seconds")
        if self.backoff_multiplier <= 0:
            raise ValueError(f"backoff_multiplier must be above 0, not {self.backoff_multiplier}")

    @classmethod
    def none(cls) -> RetryPolicy:
        """Never send a request again: every failure reaches the caller."""
        return cls(max_attempts=1)


class Attempts:
    """The attempts at one request.

    Args:
        policy: How often it is sent.
        method: Its path, such as "/a.package.Service/Method".
        timeout: Seconds that all attempts have together.
    """

    def __init__(self, policy: RetryPolicy, method: str, timeout: float) -> None:
        self._policy = policy
        self._until = time.monotonic() + timeout
        self._left = policy.max_attempts if method in _METHODS else 1
        self._backoff = policy.initial_backoff_seconds

    @property
    def timeout(self) -> float:
        """Seconds that the next attempt has."""
        return max(_LEAST_SECONDS, self._until - time.monotonic())

    def pause(self, error: grpc.RpcError) -> float | None:
        """Return the seconds until the next attempt, or None where there is none.

        Args:
            error: What the last one met. What a caller cancels itself must not come here.
        """
        self._left -= 1
        # All errors of calls can tell, though not that of their type.
        code = getattr(error, "code", lambda: None)()
        if self._left < 1 or code not in _PASSING:
            return None
        pause = min(self._backoff, self._policy.max_backoff_seconds) * random.uniform(0.6, 1.0)
        self._backoff *= self._policy.backoff_multiplier
        return pause if time.monotonic() + pause < self._until else None
