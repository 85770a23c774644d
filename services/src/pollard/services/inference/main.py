"""The inference server, put together."""

from __future__ import annotations

import asyncio
from typing import Any

import structlog

from pollard.models.v1 import fleet_service_pb2 as fleet_pb
from pollard.runtime.errors import RuntimeFault
from pollard.runtime.machine import Machine
from pollard.services.common.errors import StartupError
from pollard.services.common.fleet_agent import AgentOptions, FleetAgent
from pollard.services.common.lifecycle import GrpcServer, Listen, cancel, run_service
from pollard.services.common.logs import configure_logging
from pollard.services.inference.engine import Engine
from pollard.services.inference.loader import Loader
from pollard.services.inference.methods import ProtocolMethods, software_version
from pollard.services.inference.servicer import SERVICE_NAME, InferenceServicer
from pollard.services.inference.settings import InferenceSettings
from pollard.services.inference.shared_memory import SharedMemory
from pollard.services.inference.sync import InferenceMember

_log = structlog.get_logger("pollard.inference")


class InferenceServer:
    """The parts of one inference server and the order in which they start and stop."""

    def __init__(
        self,
        engine: Engine,
        member: InferenceMember,
        agent: FleetAgent,
        grpc_server: GrpcServer,
        servicer: InferenceServicer,
        advertise: str,
    ) -> None:
        """Take the parts; see `build_server`."""
        self.engine = engine
        self.member = member
        self.agent = agent
        self.grpc = grpc_server
        self._servicer = servicer
        self._advertise = advertise
        self._becoming_ready: asyncio.Task[Any] | None = None

    @property
    def address(self) -> str:
        """Target under which this machine reaches the server."""
        return self.grpc.address

    async def start(self) -> None:
        """Listen, run what the cache holds, then follow the manager.

        Health says SERVING once a first state has been applied; without a cached one that waits
        for the manager, this method does not.

        Raises:
            StartupError: the address cannot be had.
        """
        await self.grpc.start()
        self.agent.advertise(self._advertise or self.grpc.address)
        await self.agent.start()
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

    async def _become_ready(self) -> None:
        await self.agent.settled.wait()
        self.member.ready = True
        await self.grpc.set_serving(True)


def build_server(settings: InferenceSettings) -> InferenceServer:
    """Wire an inference server; must be called with the event loop running.

    Raises:
        StartupError: the cache is in use or cannot be written, onnxruntime is missing, or the
            address would be open to everybody.
    """
    try:
        machine = Machine.detect()
    except RuntimeFault as error:
        raise StartupError(error.message) from error
    engine = Engine(max_request_seconds=settings.max_request_seconds)
    member = InferenceMember(engine, Loader(machine, settings.engine_options))
    grpc_server = GrpcServer(
        Listen(
            host=settings.host,
            port=settings.port,
            max_message_bytes=settings.max_message_bytes,
            insecure=settings.insecure,
            unix_socket=settings.unix_socket,
        ),
        [SERVICE_NAME],
    )
    shared = SharedMemory(enabled=settings.shared_memory)
    servicer = InferenceServicer(engine, ProtocolMethods(engine, member, shared), shared)
    servicer.add_to(grpc_server.server)
    agent = FleetAgent(
        member,
        AgentOptions(
            kind=fleet_pb.SERVER_KIND_INFERENCE,
            manager=settings.manager,
            cache_dir=settings.cache_dir,
            server_id=settings.server_id,
            software_version=software_version(),
            capabilities=_capabilities(machine),
        ),
    )
    member.on_change = agent.report_soon
    return InferenceServer(engine, member, agent, grpc_server, servicer, settings.advertise)


def run(settings: InferenceSettings) -> int:
    """Serve until SIGTERM or SIGINT; return the exit code."""
    configure_logging("inference", level=settings.log_level, form=settings.log_format)
    return run_service(lambda: build_server(settings), grace_seconds=settings.grace_seconds)


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
