"""Traces by OpenTelemetry's SDK, sent over OTLP. Imported once they are wanted."""

from __future__ import annotations

import inspect
import os
import random
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import structlog
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanLimits, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ALWAYS_ON, ParentBased
from opentelemetry.trace import Link, SpanKind, Status, StatusCode, TraceState
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from pollard.services.common.telemetry.traces import Attributes, Pairs, Span, Value

_log = structlog.get_logger("pollard.traces")

_PROPAGATOR = TraceContextTextMapPropagator()

_KINDS = {"internal": SpanKind.INTERNAL, "client": SpanKind.CLIENT, "server": SpanKind.SERVER}

_PREFIX = "pollard."

_MOST_LINKS = 64
"""Beyond them a span's links are left out: a batch of many would tell each of all the others."""

_CALLERS_FAULTS = frozenset((3, 5, 6, 7, 9, 10, 11, 16))
"""Statuses that are no error of the server that answers with them, as OpenTelemetry has it."""

_NONE: Attributes = {}


def _nanoseconds(moment: int) -> int:
    """Return a moment of `perf_counter_ns` in nanoseconds since the epoch."""
    return time.time_ns() - time.perf_counter_ns() + moment


class _Unrecorded:
    """A call of a trace that is not kept: what is called for it is not kept either."""

    __slots__ = ("_parent", "_state")

    recorded = False

    def __init__(self, parent: str = "", state: str = "") -> None:
        self._parent, self._state = parent, state

    @property
    def trace_id(self) -> str:
        return self.headers()[0][1][3:35]

    def headers(self) -> Pairs:
        if not self._parent:
            bits = random.getrandbits(192) | 1 << 64 | 1
            self._parent = f"00-{bits >> 64:032x}-{bits & (1 << 64) - 1:016x}-00"
        if self._state:
            return (("traceparent", self._parent), ("tracestate", self._state))
        return (("traceparent", self._parent),)

    def begin(self, name: str, kind: str = "internal", attributes: Attributes = _NONE) -> Span:
        return self

    def draw(
        self,
        name: str,
        began: int,
        ended: int,
        attributes: Attributes = _NONE,
        links: Sequence[Span] = (),
        marks: Sequence[tuple[str, int]] = (),
    ) -> None:
        return

    def set(self, **attributes: Value) -> None:
        return

    def mark(self, name: str) -> None:
        return

    def end(self, failed: str = "", code: int | None = None) -> None:
        return


class _Recorded:
    """A span of the SDK."""

    __slots__ = ("_kind", "_span", "_tracer")

    recorded = True

    def __init__(self, tracer: OtelTracer, span: trace.Span, kind: str) -> None:
        self._tracer, self._span, self._kind = tracer, span, kind

    @property
    def context(self) -> trace.SpanContext:
        """What the SDK knows it by."""
        return self._span.get_span_context()

    @property
    def trace_id(self) -> str:
        return f"{self.context.trace_id:032x}"

    def headers(self) -> Pairs:
        carrier: dict[str, str] = {}
        _PROPAGATOR.inject(carrier, trace.set_span_in_context(self._span))
        return tuple(carrier.items())

    def begin(self, name: str, kind: str = "internal", attributes: Attributes = _NONE) -> Span:
        made = self._tracer.otel.start_span(
            name,
            trace.set_span_in_context(self._span),
            _KINDS[kind],
            self._tracer.allowed(attributes),
        )
        return _Recorded(self._tracer, made, kind)

    def draw(
        self,
        name: str,
        began: int,
        ended: int,
        attributes: Attributes = _NONE,
        links: Sequence[Span] = (),
        marks: Sequence[tuple[str, int]] = (),
    ) -> None:
        made = self._tracer.otel.start_span(
            name,
            trace.set_span_in_context(self._span),
            SpanKind.INTERNAL,
            self._tracer.allowed(attributes),
            [Link(each.context) for each in links[:_MOST_LINKS] if isinstance(each, _Recorded)],
            start_time=_nanoseconds(began),
        )
        for what, when in marks:
            made.add_event(what, timestamp=_nanoseconds(when))
        made.end(_nanoseconds(ended))

    def set(self, **attributes: Value) -> None:
        named = {_PREFIX + key: value for key, value in attributes.items()}
        self._span.set_attributes(self._tracer.allowed(named))

    def mark(self, name: str) -> None:
        self._span.add_event(name)

    def end(self, failed: str = "", code: int | None = None) -> None:
        if code is not None:
            self._span.set_attribute("rpc.grpc.status_code", code)
        # A server is not to blame for what its callers do wrong; a client always says that it
        # failed.
        if failed and not (self._kind == "server" and code in _CALLERS_FAULTS):
            self._span.set_status(Status(StatusCode.ERROR, failed))
        if failed:
            self._span.set_attribute("error.type", failed)
        self._span.end()


class OtelTracer:
    """Makes spans of one service with the SDK."""

    def __init__(
        self,
        service: str,
        version: str,
        processor: SpanProcessor,
        *,
        ratio: float | None,
        details: bool = True,
    ) -> None:
        """Begin.

        Args:
            service: Name that the spans carry where OTEL_SERVICE_NAME says no other.
            version: Of the service.
            processor: Takes the spans that have ended.
            ratio: Share of the traces that begin here that is kept; None leaves that to
                OTEL_TRACES_SAMPLER. A trace that began elsewhere is kept if it is there.
            details: Whether spans say of which model and how large something is.
        """
        about = {"service.version": version}
        if not _names_service():
            about["service.name"] = service
        self._ratio = ratio
        self._details = details
        self._provider = TracerProvider(
            sampler=None if ratio is None else ParentBased(ALWAYS_ON),
            resource=Resource.create(about),
            # The end of a process must not wait for a collector that is away; see `shut_down`.
            shutdown_on_exit=False,
            span_limits=SpanLimits(max_attribute_length=256),
        )
        self._provider.add_span_processor(processor)
        self.otel = self._provider.get_tracer("pollard", version)
        self._random = random.Random(random.SystemRandom().getrandbits(64)).random

    def call(self, name: str, traceparent: str | bytes, tracestate: str | bytes) -> Span:
        """Begin the span of a call that has come; see `Tracer.call`."""
        parent = _text(traceparent)
        if self._ratio is not None:
            # Decided here where nothing is to be kept, for that is nearly always so.
            if parent[-3:] == "-00" and len(parent) == 55:
                if trace.get_current_span(_extract(parent, "")).get_span_context().is_valid:
                    return _Unrecorded(parent, _state(tracestate))
            elif not parent and self._random() >= self._ratio:
                return _Unrecorded()
        context = _extract(parent, _text(tracestate)) if parent else None
        if (
            self._ratio is not None
            and context is not None
            and not trace.get_current_span(context).get_span_context().is_valid
        ):
            # Not a trace's name, so this is where the trace begins.
            if self._random() >= self._ratio:
                return _Unrecorded()
            context = None
        service, _, method = name.partition("/")
        attributes = {"rpc.system": "grpc", "rpc.service": service, "rpc.method": method}
        span = self.otel.start_span(
            name,
            context or trace.set_span_in_context(trace.INVALID_SPAN),
            SpanKind.SERVER,
            attributes,
        )
        if not span.is_recording():
            carrier: dict[str, str] = {}
            _PROPAGATOR.inject(carrier, trace.set_span_in_context(span))
            return _Unrecorded(carrier.get("traceparent", ""), carrier.get("tracestate", ""))
        return _Recorded(self, span, "server")

    def root(
        self, name: str, began: int, ended: int, attributes: Attributes, failed: str = ""
    ) -> None:
        """Add a trace of something that nobody has asked for; see `Tracer.root`."""
        if self._ratio == 0:
            return
        span = self.otel.start_span(
            name,
            trace.set_span_in_context(trace.INVALID_SPAN),
            SpanKind.INTERNAL,
            self.allowed(attributes),
            start_time=_nanoseconds(began),
        )
        if failed:
            span.set_status(Status(StatusCode.ERROR, failed))
        span.end(_nanoseconds(ended))

    def allowed(self, attributes: Attributes) -> Mapping[str, Value]:
        """Return those attributes that spans may have."""
        if self._details:
            return attributes
        return {key: value for key, value in attributes.items() if key not in _DETAILS}

    def flush(self) -> None:
        """Send what has ended."""
        self._provider.force_flush()

    def shut_down(self, seconds: float) -> None:
        """Send what was not sent yet; see `Tracer.shut_down`."""
        # In a thread, for the SDK's own limit does not hold where a collector does not answer.
        thread = threading.Thread(target=self._provider.shutdown, name="traces-end", daemon=True)
        thread.start()
        thread.join(seconds)
        if thread.is_alive():
            _log.warning("the last spans could not be sent in time", seconds=seconds)


_DETAILS = frozenset(
    _PREFIX + name
    for name in ("model", "revision", "resource", "bytes", "rows", "image_bytes", "views")
)


def exporting(endpoint: str) -> SpanProcessor:
    """Return what sends spans over OTLP/gRPC, in batches, from a thread of its own.

    Args:
        endpoint: "http://HOST:PORT", or https; empty for what OTEL_EXPORTER_OTLP_ENDPOINT says, or
            a collector on this machine. Headers, certificates and limits come from OTEL_… too.
    """
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

    given: dict[str, Any] = {"endpoint": endpoint} if endpoint else {}
    if "channel_options" in inspect.signature(OTLPSpanExporter.__init__).parameters:
        # The exporter tries again by itself; why gRPC must not, `tls.open_channel` says.
        given["channel_options"] = (("grpc.enable_retries", 0),)
    return BatchSpanProcessor(OTLPSpanExporter(**given))


def _text(value: str | bytes) -> str:
    return value if isinstance(value, str) else value.decode("latin-1")


def _state(value: str | bytes) -> str:
    """Return what of a `tracestate` may go further: gRPC sends no call with a header it may not."""
    return TraceState.from_header([_text(value)]).to_header() if value else ""


def _extract(parent: str, state: str) -> Context:
    carrier = {"traceparent": parent}
    if state:
        carrier["tracestate"] = state
    # An empty context, not the thread's: the SDK's own may be used by others in this process.
    return _PROPAGATOR.extract(carrier, trace.set_span_in_context(trace.INVALID_SPAN))


def _names_service() -> bool:
    return bool(os.environ.get("OTEL_SERVICE_NAME")) or "service.name=" in os.environ.get(
        "OTEL_RESOURCE_ATTRIBUTES", ""
    )
