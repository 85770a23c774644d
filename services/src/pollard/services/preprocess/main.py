"""The preprocess server, put together."""

from __future__ import annotations

import asyncio
from typing import Any

import structlog

from pollard.models.v1 import fleet_service_pb2 as fleet_pb
from pollard.preprocess.v1 import preprocess_service_pb2_grpc as preprocess_grpc
from pollard.services.common.auth import Gate
from pollard.services.common.auth.http import http_guard
from pollard.services.common.auth.own import OwnToken
from pollard.services.common.fleet_agent import AgentOptions, FleetAgent
from pollard.services.common.http_server import HttpServer
from pollard.services.common.lifecycle import (
    GrpcServer,
    Listen,
    cancel,
    run_service,
    together,
)
from pollard.services.common.memory import freeze_heap, steady_heap
from pollard.services.common.metrics import Metrics, software_version
from pollard.services.common.status import ErrorInterceptor
from pollard.services.common.telemetry import setup
from pollard.services.common.telemetry.interceptor import CallInterceptor
from pollard.services.preprocess.contents import ImageContents
from pollard.services.preprocess.counts import Counts
from pollard.services.preprocess.decode_pool import DecodePool
from pollard.services.preprocess.explaining import Explainer
from pollard.services.preprocess.fetching import Fetcher
from pollard.services.preprocess.inference_client import InferenceClient
from pollard.services.preprocess.metrics import PreprocessMetrics
from pollard.services.preprocess.prediction import Predictor
from pollard.services.preprocess.servicer import (
    PREPROCESS_SERVICE,
    VISION_SERVICE,
    PreprocessServicer,
    VisionServicer,
)
from pollard.services.preprocess.settings import PreprocessSettings
from pollard.services.preprocess.shadowing import ImageShadows
from pollard.services.preprocess.snapshot import Current
from pollard.services.preprocess.sync import PreprocessMember
from pollard.vision.v1 import vision_service_pb2_grpc as vision_grpc

_log = structlog.get_logger("pollard.preprocess")


class PreprocessServer:
    """The parts of one preprocess server and the order in which they start and stop."""

    def __init__(
        self,
        pool: DecodePool,
        client: InferenceClient,
        member: PreprocessMember,
        agent: FleetAgent,
        shadows: ImageShadows,
        fetcher: Fetcher,
        grpc_server: GrpcServer,
        http: HttpServer,
        advertise: str,
    ) -> None:
        """Take the parts; see `build_server`."""
        self.shadows = shadows
        self.fetcher = fetcher
        self.pool = pool
        self.client = client
        self.member = member
        self.agent = agent
        self.grpc = grpc_server
        self.http = http
        self._advertise = advertise
        self._becoming_ready: asyncio.Task[Any] | None = None

    @property
    def address(self) -> str:
        """Target under which this machine reaches the server."""
        return self.grpc.address

    async def start(self) -> None:
        """Listen, start the decode workers, serve what the cache holds, follow the manager.

        Health says SERVING once a first state has been applied; without a cached one that waits
        for the manager, this method does not.

        Raises:
            StartupError: the address cannot be had, or a worker cannot be started.
        """
        await self.grpc.start()
        # The workers are processes, which import while this one does.
        await together(self.pool.start(), self.http.start())
        self.agent.advertise(self._advertise or self.grpc.address)
        await self.agent.start()
        self._becoming_ready = asyncio.create_task(self._become_ready())
        _log.info(
            "listening",
            address=self.grpc.address,
            server_id=self.agent.server_id,
            decode_workers=self.pool.workers,
        )

    async def stop(self, grace_seconds: float) -> None:
        """Say NOT_SERVING, finish the requests in flight, free everything."""
        await cancel(self._becoming_ready)
        await self.grpc.stop(grace_seconds)
        await self.agent.stop()
        await self.shadows.close()
        await self.fetcher.close()
        await self.client.close()
        await self.pool.close()
        await self.http.stop()

    async def _become_ready(self) -> None:
        await self.agent.settled.wait()
        freeze_heap()
        await self.grpc.set_serving(True)


def build_server(settings: PreprocessSettings) -> PreprocessServer:
    """Wire a preprocess server; must be called with the event loop running.

    Raises:
        StartupError: the cache is in use or cannot be written, or the address would be open to
            everybody.
    """
    steady_heap()
    gate = Gate(settings.gate_rules)
    current = Current()
    pool = DecodePool(settings.decode_workers, settings.worker_limits, settings.max_waiting_bytes)
    client = InferenceClient(
        settings.max_message_bytes,
        drain_seconds=settings.max_request_seconds,
        tls=settings.tls,
        token=OwnToken(settings.token_file),
    )
    counts = Counts()
    member = PreprocessMember(current, client, settings.worker_limits.image_limits, counts=counts)
    predictor = Predictor(current, pool, client, settings.max_message_bytes, counts)
    fetcher = Fetcher(settings.fetch_rules)
    contents = ImageContents(fetcher, settings.max_message_bytes)
    explainer = Explainer(current, pool, client, settings.explain_masks)
    calls = setup.watch_of(settings)
    grpc_server = GrpcServer(
        Listen(
            host=settings.host,
            port=settings.port,
            max_message_bytes=settings.max_message_bytes,
            insecure=settings.insecure,
            unix_socket=settings.unix_socket,
            tls=settings.tls,
            known_callers=gate.enforced,
            health_port=settings.health_port,
        ),
        [PREPROCESS_SERVICE, VISION_SERVICE],
        [CallInterceptor(calls), ErrorInterceptor()],
        gate,
    )
    preprocess_grpc.add_PreprocessServiceServicer_to_server(
        PreprocessServicer(predictor, contents, settings.max_request_seconds), grpc_server.server
    )
    vision_grpc.add_VisionServiceServicer_to_server(
        VisionServicer(predictor, explainer, contents, settings.max_request_seconds),
        grpc_server.server,
    )
    agent = FleetAgent(
        member,
        AgentOptions(
            kind=fleet_pb.SERVER_KIND_PREPROCESS,
            manager=settings.manager,
            cache_dir=settings.cache_dir,
            server_id=settings.server_id,
            software_version=software_version(),
            tls=settings.tls,
            gate=gate,
            token=OwnToken(settings.token_file),
        ),
    )
    member.on_change = agent.report_soon
    http = HttpServer(settings.http, ready=lambda: grpc_server.serving, access=calls.access)
    metrics = Metrics(
        "preprocess",
        calls.metrics,
        PreprocessMetrics(pool, current, counts),
        certificate=settings.tls_certificate,
    )
    http.add(metrics.add_to)
    http.guard = http_guard(gate)
    return PreprocessServer(
        pool,
        client,
        member,
        agent,
        predictor.shadows,
        fetcher,
        grpc_server,
        http,
        settings.advertise,
    )


def run(settings: PreprocessSettings) -> int:
    """Serve until SIGTERM or SIGINT; return the exit code."""
    setup.configure("preprocess", settings)
    return run_service(lambda: build_server(settings), grace_seconds=settings.grace_seconds)
