"""What a service tells of itself, switched on when it starts and off when it has ended."""

from __future__ import annotations

import importlib.util
import os
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import structlog

from pollard.services.common.errors import StartupError
from pollard.services.common.logs import configure_logging
from pollard.services.common.metrics import software_version
from pollard.services.common.telemetry import traces
from pollard.services.common.telemetry.access_log import AccessLog
from pollard.services.common.telemetry.record import CallWatch

if TYPE_CHECKING:
    from pollard.services.common.settings import ServiceSettings

_log = structlog.get_logger("pollard.traces")
_log_start = structlog.get_logger("pollard.settings")

_LAST_SECONDS = 2.0
"""How long the end of a process waits until the last spans are sent."""

_DEFAULT_RATIO = 0.01

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")


def configure(service: str, settings: ServiceSettings) -> None:
    """Set up the log and the traces of this process.

    Args:
        service: "inference", "preprocess" or "models".
        settings: Of that service.

    Raises:
        StartupError: traces are wanted and cannot be had.
    """
    configure_logging(service, level=settings.log_level, form=settings.log_format)
    if unknown := settings.unknown_variables():
        _log_start.warning(
            "variables of the environment that are no settings, or another program's",
            variables=unknown,
        )
    if not _wanted(settings):
        return
    if not _installed():
        words = "traces need OpenTelemetry; install pollard-services[tracing]"
        if settings.traces == "otlp":
            raise StartupError(f"{words}, or leave --traces out")
        _log.warning(f"{words}. The environment asks for them, so going on without")
        return
    from pollard.services.common.telemetry.otel import OtelTracer, exporting

    endpoint = settings.traces_endpoint
    if endpoint and "://" not in endpoint:
        endpoint = f"http://{endpoint}"
    ratio = settings.traces_ratio
    if ratio is None and not os.environ.get("OTEL_TRACES_SAMPLER"):
        ratio = _DEFAULT_RATIO
    traces.use(
        OtelTracer(
            f"pollard-{service}",
            software_version(),
            exporting(endpoint),
            ratio=ratio,
            details=settings.traces_details,
        )
    )
    _log.info(
        "traces are sent over OTLP",
        # A URL may hold a password.
        to=urlsplit(endpoint or _from_environment() or "//localhost").hostname,
        share="OTEL_TRACES_SAMPLER" if ratio is None else ratio,
    )


def shut_down() -> None:
    """Send the last spans, and make no more."""
    tracer = traces.tracer()
    if tracer is not None:
        traces.use(None)
        tracer.shut_down(_LAST_SECONDS)


def watch_of(settings: ServiceSettings) -> CallWatch:
    """Return what makes the records of a server's calls."""
    return CallWatch(access=AccessLog(settings.access_log, settings.access_log_per_second))


def _installed() -> bool:
    try:
        return importlib.util.find_spec("opentelemetry.exporter.otlp.proto.grpc") is not None
    except ModuleNotFoundError:
        return False


def _from_environment() -> str:
    return next((os.environ[name] for name in _ENDPOINTS if os.environ.get(name)), "")


def _wanted(settings: ServiceSettings) -> bool:
    if settings.traces != "auto":
        return settings.traces == "otlp"
    environ = os.environ
    if (
        environ.get("OTEL_SDK_DISABLED", "").lower() == "true"
        or environ.get("OTEL_TRACES_EXPORTER", "otlp") != "otlp"
        or not (settings.traces_endpoint or _from_environment())
    ):
        return False
    protocol = next((environ[name] for name in _PROTOCOLS if environ.get(name)), "grpc")
    if protocol != "grpc":
        _log.warning("traces are sent over OTLP/gRPC only, so none are", asked=protocol)
        return False
    return True
