"""What is small enough to be measured by itself: a token check, and the record of a call."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from pollard.services.common.auth.callers import Role
from pollard.services.common.auth.gate import Gate, GateRules
from pollard.services.common.auth.tokens import KnownToken, TokenTable, digest_of, id_of, make_token
from pollard.services.common.call_metrics import CallMetrics
from pollard.services.common.telemetry import traces
from pollard.services.common.telemetry.access_log import AccessLog
from pollard.services.common.telemetry.record import CallWatch

_PATH = "/inference.GRPCInferenceService/ModelInfer"


def _microseconds(work: Callable[[], object], times: int = 20_000, rounds: int = 9) -> float:
    """Return the shortest mean time of one, in microseconds: whatever else runs only adds to it."""
    found = []
    for _ in range(rounds):
        began = time.perf_counter()
        for _ in range(times):
            work()
        found.append((time.perf_counter() - began) / times * 1e6)
    return min(found)


def small(known: int = 10_000) -> dict[str, Any]:
    """Measure a check among so many known tokens, and what a call's record costs."""
    tokens = [make_token() for _ in range(known)]
    gate = Gate(GateRules(tokens=True))
    gate.know(
        TokenTable.of(
            KnownToken(id_of(token), f"caller {number}", digest_of(token), Role.PREDICTOR)
            for number, token in enumerate(tokens)
        )
    )
    header = f"Bearer {tokens[known // 2]}"

    def check() -> None:
        with gate.enter(_PATH, gate.admit(_PATH, header)):
            pass

    def counted() -> None:
        calls.end(calls.start())

    metrics = CallMetrics()
    calls = metrics.add(_PATH)
    watch = CallWatch(metrics, AccessLog("failures"))

    def recorded() -> None:
        record = watch.begin(_PATH, "", "", "", counts=calls)
        _ = record.trailing
        record.end()

    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    from pollard.services.common.telemetry.otel import OtelTracer

    found = {
        "tokens": known,
        "token_check_us": _microseconds(check),
        "count_us": _microseconds(counted),
        "record_us": _microseconds(recorded),
    }
    processor = SimpleSpanProcessor(InMemorySpanExporter())
    traces.use(OtelTracer("bench", "0", processor, ratio=0.0))
    try:
        found["record_with_traces_us"] = _microseconds(recorded)
    finally:
        traces.use(None)
    return found
