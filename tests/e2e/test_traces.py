"""One trace from a client that OpenTelemetry instruments to the model's answer."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pollard.client import ModelsClient

INSTRUMENTED = """
import json, sys
from opentelemetry import trace
from opentelemetry.instrumentation.grpc import GrpcInstrumentorClient
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

kept, provider = InMemorySpanExporter(), TracerProvider()
provider.add_span_processor(SimpleSpanProcessor(kept))
trace.set_tracer_provider(provider)
GrpcInstrumentorClient().instrument()

from pollard.client import VisionClient

with VisionClient(sys.argv[1]) as vision:
    vision.predict(sys.argv[2], "linear")
(span,) = kept.get_finished_spans()
print(json.dumps([f"{span.context.trace_id:032x}", f"{span.context.span_id:016x}"]))
"""

NOTES = "notes that are nobody's business"


@pytest.fixture
def traced(start_up: Any, collector: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`pollard up` in an environment that names a collector, and a share of 0 of its own."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
    for service in ("INFERENCE", "PREPROCESS"):
        monkeypatch.setenv(f"POLLARD_{service}_TRACES_RATIO", "0")
    monkeypatch.setenv("POLLARD_MODELS_TRACES_RATIO", "1")
    return start_up()


def test_one_trace_shows_the_whole_way(
    traced: Any, collector: Any, make_bundle: Any, tmp_path: Path
) -> None:
    bundle = make_bundle()
    with ModelsClient(traced.address("models")) as models:
        models.push(bundle.path, "linear", notes=NOTES)
        models.set_alias("linear", "production", 1)
    image = tmp_path / "image.png"
    buffer = io.BytesIO()
    Image.new("L", (20, 20), 77).save(buffer, "PNG")
    image.write_bytes(buffer.getvalue())
    done = subprocess.run(
        [sys.executable, "-c", INSTRUMENTED, traced.address("preprocess"), str(image)],
        capture_output=True,
        text=True,
        env={**os.environ, "GRPC_VERBOSITY": "NONE"},
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    trace_id, client_span = json.loads(done.stdout)
    collector.wait(lambda _: len(collector.trace(trace_id)) >= 8)
    found = {(span.service, span.name): span for span in collector.trace(trace_id)}
    vision = found["pollard-preprocess", "pollard.vision.v1.VisionService/Predict"]
    asked = found["pollard-preprocess", "inference.GRPCInferenceService/ModelInfer"]
    infer = found["pollard-inference", "inference.GRPCInferenceService/ModelInfer"]
    batch = found["pollard-inference", "batch"]
    assert vision.parent_id == client_span
    assert found["pollard-preprocess", "preprocess"].parent_id == vision.span_id
    assert asked.parent_id == vision.span_id
    assert (asked.kind, infer.kind) == (3, 2)
    assert infer.parent_id == asked.span_id
    assert found["pollard-inference", "queue"].parent_id == infer.span_id
    assert batch.parent_id == infer.span_id
    assert batch.links == {infer.span_id}
    assert found["pollard-inference", "answer"].parent_id == infer.span_id
    assert found["pollard-preprocess", "answer"].parent_id == vision.span_id
    assert vision.attributes["pollard.model"] == "linear"
    assert vision.attributes["pollard.request_id"] == infer.attributes["pollard.request_id"]

    # What the manager does is there, too, and the switch that nobody waits for.
    collector.wait(lambda spans: any("ALIAS_SWITCHED" in str(span.attributes) for span in spans))
    (upload,) = [span for span in collector.spans if span.name.endswith("/UploadBundle")]
    below = {span.name for span in collector.spans if span.parent_id == upload.span_id}
    assert below == {"receive", "check", "publish"}
    # Nothing of what was sent, and nothing that the manager's streams would tell only at their end.
    assert NOTES.encode() not in collector.raw
    assert buffer.getvalue()[:60] not in collector.raw
    assert not any(span.name.endswith(("/Sync", "/Check")) for span in collector.spans)
