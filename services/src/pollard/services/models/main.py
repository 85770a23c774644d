"""Wiring of the model management service."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import structlog

from pollard.models.v1 import (
    fleet_service_pb2_grpc,
    model_service_pb2_grpc,
    token_service_pb2_grpc,
)
from pollard.services.common.auth import Gate
from pollard.services.common.auth.http import http_guard
from pollard.services.common.auth.own import OwnToken
from pollard.services.common.errors import ServiceError, StartupError
from pollard.services.common.http_server import HttpServer
from pollard.services.common.lifecycle import (
    GrpcServer,
    Listen,
    cancel,
    run_service,
    spawn,
)
from pollard.services.common.memory import freeze_heap
from pollard.services.common.metrics import Metrics
from pollard.services.common.status import ErrorInterceptor
from pollard.services.common.telemetry import setup
from pollard.services.common.telemetry.interceptor import CallInterceptor
from pollard.services.models import ownership, signatures
from pollard.services.models.access import AccessKeeper
from pollard.services.models.blobs import open_blobs
from pollard.services.models.checks import CheckLimits
from pollard.services.models.collector import Collector
from pollard.services.models.fleet import Fleet
from pollard.services.models.leader import Leadership
from pollard.services.models.metrics import ManagerMetrics
from pollard.services.models.relay import Relay
from pollard.services.models.servicer_fleet import FleetServicer
from pollard.services.models.servicer_models import ModelServicer
from pollard.services.models.servicer_tokens import TokenServicer
from pollard.services.models.settings import ModelsSettings
from pollard.services.models.signatures import SignaturePolicy
from pollard.services.models.store import Store
from pollard.services.models.switch import Switch
from pollard.services.models.uploads import Uploads
from pollard.services.models.watch import EventFeed, forget

if TYPE_CHECKING:
    # Imported when the HTTP port is opened: it brings aiohttp and Jinja.
    from pollard.services.models.web.page import WebPage

SERVICES = (
    "pollard.models.v1.ModelService",
    "pollard.models.v1.FleetService",
    "pollard.models.v1.TokenService",
)

CLEAN_EVERY_SECONDS = 3600.0
CLEAN_STOP_SECONDS = 10.0
"""How long a manager that stops waits for its cleaning to end."""

_log = structlog.get_logger("pollard.models")


class ModelsService:
    """The manager: registry, uploads, switches and the fleet, over gRPC."""

    def __init__(self, settings: ModelsSettings) -> None:
        self.settings = settings
        self.gate = Gate(settings.gate_rules)
        self.store = Store(settings.store, settings.database_url)
        self.blobs = open_blobs(
            settings.blobs, settings.blobs_endpoint, self.store.blobs, settings.url_rules
        )
        self.collector = Collector(self.store, self.blobs)
        self.signatures = SignaturePolicy.load(settings.signature_mode, settings.trusted_keys)
        self.uploads = Uploads(
            self.store,
            self.blobs,
            self.collector,
            limits=CheckLimits(
                timeout_seconds=settings.check_timeout_seconds,
                memory_bytes=settings.check_memory_bytes,
                max_unpacked_bytes=settings.max_bundle_bytes,
            ),
            max_bundle_bytes=settings.max_bundle_bytes,
            parallel_checks=settings.parallel_checks,
            policy=self.signatures,
        )
        self.fleet = Fleet(
            self.store,
            Switch(
                drain_seconds=settings.drain_seconds,
                load_timeout_seconds=settings.load_timeout_seconds,
            ),
            lease_seconds=settings.server_lease_seconds,
            report_interval_seconds=settings.report_interval_seconds,
            check=lambda session: self.leadership.check(session),
        )
        self.access = AccessKeeper(self.store, self.gate, self.fleet.tell_access)
        self.relay = Relay(settings.tls, OwnToken(settings.token_file))
        self.leadership = Leadership(
            self.store,
            begin=lambda after_another: self.fleet.start(after_another=after_another),
            end=self.fleet.stop,
            changed=self.fleet.poke,
        )
        self.events = EventFeed(self.store)
        calls = setup.watch_of(settings)
        self.grpc = GrpcServer(
            Listen(
                host=settings.host,
                port=settings.port,
                max_message_bytes=settings.max_message_bytes,
                insecure=settings.insecure,
                tls=settings.tls,
                known_callers=self.gate.enforced,
                health_port=settings.health_port,
            ),
            service_names=SERVICES,
            interceptors=[CallInterceptor(calls), ErrorInterceptor()],
            gate=self.gate,
        )
        self._models = ModelServicer(
            self.store, self.blobs, self.uploads, self.fleet, self.events, self.signatures
        )
        self._fleet_methods = FleetServicer(self.fleet, self.leadership, self.relay)
        model_service_pb2_grpc.add_ModelServiceServicer_to_server(self._models, self.grpc.server)
        fleet_service_pb2_grpc.add_FleetServiceServicer_to_server(
            self._fleet_methods, self.grpc.server
        )
        token_service_pb2_grpc.add_TokenServiceServicer_to_server(
            TokenServicer(self.store, self.access), self.grpc.server
        )
        registry = ManagerMetrics(self.store, self.fleet, self.leadership)
        self.metrics = Metrics(
            "models", calls.metrics, registry, certificate=settings.tls_certificate
        )
        self.metrics.before(registry.prepare)
        self.http = HttpServer(settings.http, ready=lambda: self.grpc.serving, access=calls.access)
        self.http.add(self.metrics.add_to)
        self.http.guard = http_guard(self.gate)
        self.page: WebPage | None = None
        self._tasks: set[asyncio.Task[Any]] = set()

    @property
    def address(self) -> str:
        """gRPC target, once started."""
        return self.grpc.address

    async def start(self) -> None:
        """Open the store, go on where the last manager ended, and serve.

        Raises:
            StartupError: the store or the port cannot be had; nothing is left open.
        """
        await asyncio.to_thread(self.store.open)
        try:
            await asyncio.to_thread(self.blobs.check)
            await asyncio.to_thread(ownership.claim, self.store, self.blobs)
            await asyncio.to_thread(self.uploads.clean, starting=True)
            await asyncio.to_thread(
                signatures.review, self.store, self.blobs, self.signatures.trusted
            )
            await self.access.start(self.settings.first_tokens)
            if not self.store.database.shared:
                await self.leadership.start("")
            self.events.start()
            await self.grpc.start()
            if self.settings.http_port != "off":
                self.page = await asyncio.to_thread(self._make_page)
                self.http.add(self.page.add_to, knows_visitors=True)
            await self.http.start()
            if self.store.database.shared:
                # The others are told where this manager is reached, which is known only now.
                await self.leadership.start(self.settings.advertise or self.address)
        except BaseException as error:
            await self.events.stop()
            await self.access.stop()
            await self.leadership.stop()
            await self.http.stop()
            await self.grpc.stop(0)
            await asyncio.to_thread(self.store.close)
            if isinstance(error, OSError):
                raise StartupError(
                    f"the store {self.settings.store} cannot be used: {error}. See that its disk "
                    "can be written and has room"
                ) from error
            if isinstance(error, ServiceError):
                raise StartupError(
                    f"the store {self.settings.store} cannot be used: {error}"
                ) from error
            raise
        spawn(self._tasks, self._clean_now_and_then(), "clean")
        freeze_heap()
        await self.grpc.set_serving(True)
        _log.info("serving", address=self.address, store=str(self.settings.store))

    async def stop(self, grace_seconds: float) -> None:
        """End the streams, finish the requests in flight, and close the store."""
        await self.grpc.set_serving(False)
        await cancel(*self._tasks)
        # Watches and Sync streams never end by themselves.
        await self.events.stop()
        await self.access.stop()
        await self.leadership.stop()
        await self.relay.close()
        await self.grpc.stop(grace_seconds)
        self._models.pace.close()
        await self.http.stop()
        if self.page is not None:
            await self.page.close()
        await asyncio.to_thread(self.store.close)

    def _make_page(self) -> WebPage:
        from pollard.services.models.web.page import WebPage
        from pollard.services.models.web.vision import Vision

        return WebPage(
            self._models,
            self._fleet_methods,
            self.store,
            self.blobs,
            self.fleet,
            self.events,
            self.gate,
            Vision(self.settings.vision_address, self.settings.tls),
            tuple(self.settings.page_hosts.split(",")),
        )

    async def forget_events(self) -> None:
        """Forget the events that are older than the retention."""
        days = self.settings.event_retention_days
        while days and await self.store.write(lambda session: forget(session, days)):
            pass

    async def _clean_now_and_then(self) -> None:
        while True:
            # Also at once: a manager that was killed may have left blobs that nobody needs.
            cleaning = asyncio.ensure_future(asyncio.to_thread(self.uploads.clean))
            try:
                await asyncio.shield(cleaning)
                await self.forget_events()
            except asyncio.CancelledError:
                # Its thread would go on, and the store is about to be closed.
                self.collector.stop()
                await asyncio.wait({cleaning}, timeout=CLEAN_STOP_SECONDS)
                raise
            except Exception:
                _log.exception("cleaning failed; it is tried again later")
            await asyncio.sleep(CLEAN_EVERY_SECONDS)


def build_server(settings: ModelsSettings) -> ModelsService:
    """Return the service, not started; call it inside a running event loop."""
    return ModelsService(settings)


def run(settings: ModelsSettings) -> int:
    """Serve until SIGTERM or SIGINT; return the exit code."""
    setup.configure("models", settings)
    return run_service(lambda: build_server(settings), grace_seconds=settings.grace_seconds)
