"""One call while it is answered: its id, its span, and what is told when it has ended."""

from __future__ import annotations

import time
from contextvars import ContextVar

from pollard.services.common.call_metrics import CallMetrics, MethodCalls
from pollard.services.common.telemetry import traces
from pollard.services.common.telemetry.access_log import AccessLog
from pollard.services.common.telemetry.codes import OK
from pollard.services.common.telemetry.request_ids import REQUEST_ID, request_id_of

_MOST_WORDS = 300


class CallRecord:
    """One call. Made by `CallWatch.begin`; `end` belongs to the thread that ends the call."""

    __slots__ = (
        "_access",
        "_began",
        "_counts",
        "_ended",
        "caller",
        "path",
        "reason",
        "request_id",
        "span",
        "why",
    )

    def __init__(
        self,
        counts: MethodCalls,
        access: AccessLog | None,
        path: str,
        request_id: str,
        span: traces.Span | None,
    ) -> None:
        self.path = path
        self.request_id = request_id
        self.span = span
        """None while traces are off, and for calls that are never traced."""
        self.caller = ""
        """Name of who calls, where that is known."""
        self.reason = ""
        self.why = ""
        self._counts = counts
        self._access = access
        self._ended = False
        self._began = counts.start()

    @property
    def trailing(self) -> tuple[tuple[str, str], ...]:
        """What is sent with the call's status."""
        return ((REQUEST_ID, self.request_id),)

    @property
    def trace_id(self) -> str:
        """The trace's id; empty if it is not recorded."""
        span = self.span
        return span.trace_id if span is not None and span.recorded else ""

    def failed(self, reason: str, why: str) -> None:
        """Note why the call fails."""
        self.reason, self.why = reason, why[:_MOST_WORDS]

    def end(self, code: int = OK) -> None:
        """Count the end of the call, and tell of it; the first time counts."""
        if self._ended:
            return
        self._ended = True
        began, access = self._began, self._access
        self._counts.end(began, code)
        span = self.span
        if span is not None and span.recorded:
            span.end(self.reason or ("STATUS" if code else ""), code)
        if access is not None and (code or access.everything):
            access.note(self, code, time.perf_counter() - began)


_current: ContextVar[CallRecord | None] = ContextVar("pollard_call", default=None)


def current_call() -> CallRecord | None:
    """Return the call that this task answers; None outside of calls."""
    return _current.get()


def set_call(call: CallRecord | None) -> None:
    """Say which call this task, or thread, answers from now on."""
    _current.set(call)
    traces.set_span(call.span if call is not None else None)


class CallWatch:
    """Makes the records of one server's calls."""

    def __init__(self, metrics: CallMetrics | None = None, access: AccessLog | None = None) -> None:
        """Begin.

        Args:
            metrics: Where calls are counted.
            access: Where they are told of; None tells of none.
        """
        self.metrics = metrics or CallMetrics()
        self.access = access

    def begin(
        self,
        path: str,
        request_id: str | bytes = "",
        traceparent: str | bytes = "",
        tracestate: str | bytes = "",
        *,
        counts: MethodCalls | None = None,
    ) -> CallRecord:
        """Return the record of a call that has just come.

        Args:
            path: "/package.Service/Method".
            request_id: The header of that name; empty if there is none.
            traceparent: The header; empty if there is none.
            tracestate: The header; empty if there is none.
            counts: What `CallMetrics.of` says of the path, where that is known already.
        """
        counts = counts or self.metrics.of(path)
        tracer = traces.tracer()
        span = None
        if tracer is not None and counts.traced:
            span = tracer.call(counts.span_name, traceparent, tracestate)
        made = CallRecord(
            counts,
            self.access if counts.told else None,
            path,
            request_id_of(request_id),
            span,
        )
        if span is not None and span.recorded:
            span.set(request_id=made.request_id)
        return made


def outgoing() -> tuple[tuple[str, str], ...]:
    """Return what a call of another service carries, so that it belongs to the current one."""
    call = _current.get()
    if call is None:
        return ()
    span = traces.current_span()
    if span is None:
        return call.trailing
    return (*call.trailing, *span.headers())
