"""The inference server, put together."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import structlog
from prometheus_client.registry import Collector

from pollard.models.v1 import fleet_service_pb2 as fleet_pb
from pollard.runtime import cuda, signing
from pollard.runtime.cuda_memory import CudaMemory
from pollard.runtime.errors import RuntimeFault
from pollard.runtime.keys import TrustedKeys
from pollard.runtime.machine import Machine
from pollard.services.common.auth import Gate
from pollard.services.common.auth.http import http_guard
from pollard.services.common.auth.own import OwnToken
from pollard.services.common.errors import StartupError
from pollard.services.common.fleet_agent import AgentOptions, FleetAgent
from pollard.services.common.http_server import HttpServer
from pollard.services.common.lifecycle import (
    GrpcServer,
    Listen,
    cancel,
    run_service,
    spawn,
    together,
)
from pollard.services.common.memory import freeze_heap, steady_heap
from pollard.services.common.metrics import Metrics
from pollard.services.common.telemetry import setup
from pollard.services.common.telemetry.interceptor import CallInterceptor
from pollard.services.common.telemetry.record import CallWatch
from pollard.services.inference.catalogue import Catalogue
from pollard.services.inference.engine import Engine
from pollard.services.inference.frontends import envoy
from pollard.services.inference.frontends.asgi import GrpcApplication
from pollard.services.inference.frontends.calls import ServerCalls
from pollard.services.inference.frontends.core import CoreFront, missing_from_core
from pollard.services.inference.frontends.envoy import EnvoyFront
from pollard.services.inference.frontends.experiments import begin_anew
from pollard.services.inference.loader import Loader
from pollard.services.inference.methods import ProtocolMethods, software_version
from pollard.services.inference.metrics import EngineMetrics
from pollard.services.inference.replicas import Replicas
from pollard.services.inference.repository import Limits, ModelRepository
from pollard.services.inference.servicer import SERVICE_NAME, InferenceServicer
from pollard.services.inference.settings import InferenceSettings
from pollard.services.inference.shared_memory import SharedMemory
from pollard.services.inference.standalone import StandaloneCatalogue
from pollard.services.inference.sync import InferenceMember
from pollard.services.inference.tuning import Tunings

_log = structlog.get_logger("pollard.inference")

MakeFront = Callable[[GrpcApplication], EnvoyFront]


class InferenceServer:
    """The parts of one inference server and the order in which they start and stop."""

    def __init__(
        self,
        engine: Engine,
        member: InferenceMember,
        agent: FleetAgent,
        grpc_server: GrpcServer | EnvoyFront | CoreFront,
        servicer: InferenceServicer | EnvoyFront | CoreFront,
        http: HttpServer,
        advertise: str,
    ) -> None:
        """Take the parts; see `build_server`."""
        self.http = http
        self.engine = engine
        self.member = member
        self.agent = agent
        self.grpc = grpc_server
        self._servicer = servicer
        self._advertise = advertise
        self._becoming_ready: asyncio.Task[Any] | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        engine.on_lost = self.device_lost

    @property
    def address(self) -> str:
        """Target under which this machine reaches the server."""
        return self.grpc.address

    def device_lost(self) -> None:
        """Tell health and the manager that revisions cannot run any more."""
        self.member.devices_changed()
        spawn(self._tasks, _set_health(self.grpc, self.engine, self.member.ready), "health")

    async def start(self) -> None:
        """Listen, run what the cache holds, then follow the manager.

        Health says SERVING once a first state has been applied; without a cached one that waits
        for the manager, this method does not.

        Raises:
            StartupError: the address cannot be had.
        """
        await self.grpc.start()
        self.agent.advertise(self._advertise or self.grpc.address)
        # What is loaded from the cache needs the interpreter less than the port's imports do.
        await together(self.agent.start(), self.http.start())
        self._becoming_ready = asyncio.create_task(self._become_ready())
        _log.info("listening", address=self.grpc.address, server_id=self.agent.server_id)

    async def stop(self, grace_seconds: float) -> None:
        """Say NOT_SERVING, finish the requests in flight, free everything."""
        await cancel(self._becoming_ready)
        self._servicer.stop_streams()
        await self.grpc.stop(grace_seconds)
        await self.agent.stop()
        await self.member.close()
        await self.engine.close()
        await self.http.stop()

    async def _become_ready(self) -> None:
        await self.agent.settled.wait()
        self.member.ready = True
        freeze_heap()
        await self.grpc.set_serving(True)


def build_server(
    settings: InferenceSettings, make_front: MakeFront | None = None
) -> InferenceServer:
    """Wire an inference server; must be called with the event loop running.

    Raises:
        StartupError: the cache is in use or cannot be written, onnxruntime is missing, or the
            address would be open to everybody.
    """
    gate = Gate(settings.gate_rules)
    machine = _detect(settings)
    engine = Engine(max_request_seconds=settings.max_request_seconds)
    tunings = Tunings(machine, settings.cache_dir / "tuning.json") if settings.measure else None
    loader = Loader(
        machine,
        settings.engine_options,
        tunings=tunings,
        busy=engine.busy,
        trusted=_trusted_keys(settings),
        replicas=Replicas(settings.replicas, settings.replicas_dir),
    )
    member = InferenceMember(engine, loader)
    calls = setup.watch_of(settings)
    grpc_server, servicer = _front(settings, engine, member, machine, make_front, gate, calls)
    agent = FleetAgent(
        member,
        AgentOptions(
            kind=fleet_pb.SERVER_KIND_INFERENCE,
            manager=settings.manager,
            cache_dir=settings.cache_dir,
            cache_bytes=settings.cache_bytes,
            server_id=settings.server_id,
            software_version=software_version(),
            capabilities=_capabilities(machine),
            tls=settings.tls,
            gate=gate,
            token=OwnToken(settings.token_file),
        ),
    )
    member.on_change = agent.report_soon
    http = _http(settings, grpc_server, gate, calls, EngineMetrics(engine, loader))
    return InferenceServer(engine, member, agent, grpc_server, servicer, http, settings.advertise)


class StandaloneServer:
    """An inference server over a repository, without a manager."""

    def __init__(
        self,
        engine: Engine,
        models: StandaloneCatalogue,
        grpc_server: GrpcServer | EnvoyFront | CoreFront,
        servicer: InferenceServicer | EnvoyFront | CoreFront,
        http: HttpServer,
    ) -> None:
        """Take the parts; see `build_standalone_server`."""
        self.http = http
        self.engine = engine
        self.models = models
        self.grpc = grpc_server
        self._servicer = servicer
        self._becoming_ready: asyncio.Task[Any] | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        engine.on_lost = self.device_lost

    @property
    def address(self) -> str:
        """Target under which this machine reaches the server."""
        return self.grpc.address

    def device_lost(self) -> None:
        """Tell health that models cannot run any more."""
        spawn(self._tasks, _set_health(self.grpc, self.engine, self.models.ready), "health")

    async def start(self) -> None:
        """Listen and load the models; health says SERVING once that is done.

        Raises:
            StartupError: the address cannot be had.
        """
        await self.grpc.start()
        await self.http.start()
        self._becoming_ready = asyncio.create_task(self._become_ready())
        _log.info("listening", address=self.grpc.address)

    async def stop(self, grace_seconds: float) -> None:
        """Say NOT_SERVING, finish the requests in flight, free everything."""
        await cancel(self._becoming_ready)
        self._servicer.stop_streams()
        await self.grpc.stop(grace_seconds)
        await self.models.close()
        await self.engine.close()
        await self.http.stop()

    async def _become_ready(self) -> None:
        await self.models.start()
        freeze_heap()
        await self.grpc.set_serving(True)
        _log.info("ready", models=sorted(self.engine.table.models))


def build_standalone_server(
    settings: InferenceSettings, make_front: MakeFront | None = None
) -> StandaloneServer:
    """Wire a server over a repository; must be called with the event loop running.

    Raises:
        StartupError: there is no such folder, onnxruntime is missing, or the address would be open
            to everybody.
    """
    assert settings.repository is not None  # noqa: S101 - whoever calls has looked
    if not settings.repository.is_dir():
        raise StartupError(f"there is no folder {settings.repository} to serve models from")
    machine = _detect(settings)
    engine = Engine(max_request_seconds=settings.max_request_seconds)
    tunings = Tunings(machine, settings.cache_dir / "tuning.json") if settings.measure else None
    loader = Loader(machine, settings.engine_options, tunings=tunings, busy=engine.busy)
    models = StandaloneCatalogue(
        engine,
        loader,
        ModelRepository(settings.repository),
        control=settings.model_control,
        load_at_start=settings.load_model,
        poll_seconds=settings.poll_seconds,
        limits=Limits(
            default_batch_size=settings.default_max_batch_size, max_queue=settings.max_queue
        ),
    )
    gate = Gate(settings.gate_rules)
    calls = setup.watch_of(settings)
    grpc_server, servicer = _front(settings, engine, models, machine, make_front, gate, calls)
    http = _http(settings, grpc_server, gate, calls, EngineMetrics(engine, loader))
    return StandaloneServer(engine, models, grpc_server, servicer, http)


def build(
    settings: InferenceSettings, make_front: MakeFront | None = None
) -> InferenceServer | StandaloneServer:
    """Wire the server that the settings ask for; see `build_server`, `build_standalone_server`.

    Args:
        settings: The settings.
        make_front: Makes what stands in for grpcio's server.
    """
    steady_heap()
    wire = build_server if settings.repository is None else build_standalone_server
    return wire(settings, make_front)


def _front(
    settings: InferenceSettings,
    engine: Engine,
    catalogue: Catalogue,
    machine: Machine,
    make_front: MakeFront | None,
    gate: Gate,
    watch: CallWatch,
) -> tuple[GrpcServer | EnvoyFront | CoreFront, InferenceServicer | EnvoyFront | CoreFront]:
    has_gpu = any(not target.startswith("cpu") for target in machine.targets)
    shared = SharedMemory(enabled=settings.shared_memory, gpu=CudaMemory() if has_gpu else None)
    methods = ProtocolMethods(engine, catalogue, shared)
    listen = Listen(
        host=settings.host,
        port=settings.port,
        max_message_bytes=settings.max_message_bytes,
        insecure=settings.insecure,
        unix_socket=settings.unix_socket,
        tls=settings.tls,
        known_callers=gate.enforced,
        health_port=settings.health_port,
    )
    if make_front is None and _by_grpcio(settings):
        grpc_server = GrpcServer(
            listen,
            [SERVICE_NAME],
            [CallInterceptor(watch)],
            gate=gate if gate.enforced else None,
        )
        servicer = InferenceServicer(engine, methods, shared, settings.restrictions)
        servicer.add_to(grpc_server.server)
        return grpc_server, servicer
    calls = ServerCalls(engine, methods, shared, settings.restrictions, gate, watch)
    front: EnvoyFront | CoreFront
    if make_front is None:
        front = CoreFront(listen, calls)
    else:
        front = make_front(GrpcApplication(calls, max_message_bytes=settings.max_message_bytes))
    return front, front


def _http(
    settings: InferenceSettings,
    front: GrpcServer | EnvoyFront | CoreFront,
    gate: Gate,
    watch: CallWatch,
    *collectors: Collector,
) -> HttpServer:
    http = HttpServer(settings.http, ready=lambda: front.serving, access=watch.access)
    certificate = settings.tls_certificate
    metrics = Metrics("inference", watch.metrics, *collectors, certificate=certificate)
    http.add(metrics.add_to)
    http.guard = http_guard(gate)
    return http


def _by_grpcio(settings: InferenceSettings) -> bool:
    if settings.frontend != "auto":
        return settings.frontend == "grpcio"
    missing = missing_from_core()
    if missing:
        _log.warning("grpcio's server is used: the core of this grpcio is another", lacks=missing)
    return bool(missing)


async def _set_health(
    front: GrpcServer | EnvoyFront | CoreFront, engine: Engine, ready: bool
) -> None:
    """Tell health whether anything that is loaded can still run."""
    await front.set_serving(ready and not engine.lost and not engine.stopping)


def _trusted_keys(settings: InferenceSettings) -> TrustedKeys | None:
    if settings.trusted_keys is None:
        return None
    try:
        trusted = TrustedKeys.load(settings.trusted_keys)
        # Now: a second of imports beside requests would be felt.
        signing.prepare()
    except (RuntimeFault, OSError) as error:
        raise StartupError(f"the trusted keys cannot be used: {error}") from error
    return trusted


def _detect(settings: InferenceSettings) -> Machine:
    try:
        machine = Machine.detect().without(settings.without_cpu_features)
        chosen = machine.with_provider(settings.provider, settings.device_id)
    except RuntimeFault as error:
        raise StartupError(error.message) from error
    built_for_gpu = "CUDAExecutionProvider" in machine.execution_providers
    if settings.provider == "auto" and built_for_gpu:
        for problem in cuda.problems(settings.device_id):
            _log.warning("models run on the processor, for CUDA cannot be used", reason=problem)
    # Replicas share the cores: as many workers each as there are cores would only get in the way.
    return replace(chosen, cores=max(1, machine.cores // settings.replicas))


def run(settings: InferenceSettings) -> int:
    """Serve until SIGTERM or SIGINT; return the exit code."""
    if settings.frontend == "envoy":
        return envoy.run(settings)
    if not _by_grpcio(settings):
        begin_anew()
    setup.configure("inference", settings)
    return run_service(lambda: build(settings), grace_seconds=settings.grace_seconds)


def _capabilities(machine: Machine) -> fleet_pb.Capabilities:
    return fleet_pb.Capabilities(
        targets=machine.targets,
        execution_providers=machine.execution_providers,
        cpu_features=sorted(machine.cpu_features),
        onnxruntime=machine.onnxruntime,
        memory_bytes=machine.memory_bytes,
        processor=machine.processor,
        cores=machine.cores,
    )
