"""Requests that run together are linked in their traces."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import numpy as np
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from pollard.runtime.machine import Machine
from pollard.services.common.telemetry import traces
from pollard.services.common.telemetry.otel import OtelTracer
from pollard.services.inference.loader import EngineOptions, Loader
from pollard.services.inference.revision import LoadedRevision


async def test_the_batch_is_linked_to_all_its_requests(make_bundle: Any, watch: Any) -> None:
    bundle = make_bundle(1.0)
    loader = Loader(Machine.detect(), EngineOptions(memory_headroom_bytes=0))
    loaded = await loader.load("adder", 1, bundle.digest, bundle.size_bytes, bundle.path)
    inner = loaded._workers._session
    await loaded.retire()
    loader.close()
    session = watch(inner)
    revision = LoadedRevision(loaded.info, session, workers=1, joined_batch=8, max_queue=16)
    kept = InMemorySpanExporter()
    tracer = OtelTracer("pollard-test", "1", SimpleSpanProcessor(kept), ratio=1.0)

    async def ask(traced: bool) -> None:
        call = tracer.call("inference.GRPCInferenceService/ModelInfer", "", "")
        traces.set_span(call if traced else None)
        feeds = {"x": np.full((1, 4), 1, np.float32)}
        await revision.infer(feeds, revision.info.outputs, time.monotonic() + 10)
        if traced:
            call.end()

    session.gate.clear()
    first = asyncio.create_task(ask(False))
    while not session.batches:
        await asyncio.sleep(0.005)
    others = [asyncio.create_task(ask(traced)) for traced in (True, False, True)]
    while revision.waiting < 3:
        await asyncio.sleep(0.005)
    session.gate.set()
    await asyncio.gather(first, *others)
    await revision.retire()

    spans = kept.get_finished_spans()
    calls = [span for span in spans if span.parent is None]
    batches = [span for span in spans if span.name == "batch"]
    assert len(calls) == len(batches) == 2
    for batch in batches:
        assert batch.attributes["pollard.requests"] == 3
        assert batch.attributes["pollard.rows"] == 3
        assert {link.context.span_id for link in batch.links} == {
            call.context.span_id for call in calls
        }
    assert batches[0].context.trace_id != batches[1].context.trace_id
    assert (batches[0].start_time, batches[0].end_time) != (0, 0)
    assert sum(span.name == "queue" for span in spans) == 2
