"""What Prometheus is told: one registry for each server, asked only when somebody scrapes."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, PlatformCollector, ProcessCollector
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from pollard.services.common.errors import StartupError
from pollard.services.common.tls_expiry import ends

if TYPE_CHECKING:
    from aiohttp import web


class Metrics:
    """The metrics of one server."""

    def __init__(
        self, service: str, *collectors: Collector, certificate: Path | None = None
    ) -> None:
        """Make the registry, with what is known of every process.

        Args:
            service: "inference", "preprocess" or "models".
            collectors: What else is told; they are asked at each scrape, on the event loop.
            certificate: The one that the service shows.
        """
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        for collector in (_Build(service), _CertificateEnds(certificate), *collectors):
            self.registry.register(collector)
        self._before: list[Callable[[], Awaitable[None]]] = []

    def before(self, prepare: Callable[[], Awaitable[None]]) -> None:
        """Have `prepare` fetch, before each scrape, what a collector cannot wait for."""
        self._before.append(prepare)

    def add_to(self, application: web.Application) -> None:
        """Answer ``/metrics``."""
        application.router.add_get("/metrics", self._answer)

    async def _answer(self, request: web.Request) -> web.Response:
        from aiohttp import web

        encode, content_type = choose_encoder(request.headers.get("Accept", ""))
        for prepare in self._before:
            await prepare()
        # Collected here, where nothing changes meanwhile; written elsewhere, for requests to go on.
        collected = _Collected(list(self.registry.collect()))
        body = await asyncio.to_thread(encode, collected)
        return web.Response(body=body, headers={"Content-Type": content_type})


class _Collected:
    """What was collected, in the place of a registry."""

    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


class _Build(Collector):
    """Which version of which service this is."""

    def __init__(self, service: str) -> None:
        self._service = service

    def collect(self) -> Iterable[Metric]:
        family = GaugeMetricFamily(
            "pollard_build_info",
            "1, with the service and the version of Pollard.",
            labels=["service", "version"],
        )
        family.add_metric([self._service, software_version()], 1)
        yield family


class _CertificateEnds(Collector):
    """The end of the certificate that is in the file now."""

    def __init__(self, certificate: Path | None) -> None:
        self._certificate = certificate

    def collect(self) -> Iterable[Metric]:
        family = GaugeMetricFamily(
            "pollard_certificate_ends_timestamp_seconds",
            "When this service's certificate ends, in seconds since 1970; without TLS, nothing.",
            labels=[],
        )
        if self._certificate is not None:
            # Whoever reads it to show it has said so.
            with contextlib.suppress(StartupError):
                family.add_metric([], ends(self._certificate))
        yield family


def software_version() -> str:
    """Return the version of the installed distribution."""
    try:
        return version("pollard-services")
    except PackageNotFoundError:
        # Run from a source tree that is not installed.
        return "0+unknown"
