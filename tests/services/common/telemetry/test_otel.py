"""Which calls are traced, and what becomes of a trace's context."""

from __future__ import annotations

import contextlib
import resource
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from pollard.services.common.telemetry.otel import OtelTracer, exporting

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
KEPT, DROPPED = f"00-{TRACE}-{SPAN}-01", f"00-{TRACE}-{SPAN}-00"
NAME = "pollard.vision.v1.VisionService/Predict"


@pytest.fixture
def spans() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def make(spans: InMemorySpanExporter) -> Callable[..., OtelTracer]:
    def tracer(ratio: float | None = 1.0, **more: Any) -> OtelTracer:
        return OtelTracer("pollard-test", "1", SimpleSpanProcessor(spans), ratio=ratio, **more)

    return tracer


def test_a_trace_that_began_elsewhere_goes_on(make: Any, spans: InMemorySpanExporter) -> None:
    call = make(0.0).call(NAME, KEPT, "vendor=1")
    assert call.recorded
    assert call.trace_id == TRACE
    below = call.begin("ask", "client")
    headers = dict(below.headers())
    assert headers["traceparent"][:36] == KEPT[:36]
    assert headers["traceparent"].endswith("-01")
    assert headers["traceparent"] != KEPT
    assert headers["tracestate"] == "vendor=1"
    below.end()
    call.end(code=0)
    ask, root = spans.get_finished_spans()
    assert ask.parent.span_id == root.context.span_id
    assert f"{root.parent.span_id:016x}" == SPAN
    assert root.attributes["rpc.method"] == "Predict"
    assert root.resource.attributes["service.name"] == "pollard-test"


def test_a_trace_that_is_not_kept_elsewhere_is_not_kept_here(
    make: Any, spans: InMemorySpanExporter
) -> None:
    call = make(1.0).call(NAME, DROPPED, "vendor=1")
    assert not call.recorded
    assert call.headers() == (("traceparent", DROPPED), ("tracestate", "vendor=1"))
    call.begin("ask").end()
    call.draw("queue", 1, 2)
    call.set(model="m")
    call.end("WHY", 13)
    assert spans.get_finished_spans() == ()


@pytest.mark.parametrize("parent", [KEPT, DROPPED])
@pytest.mark.parametrize(
    "state",
    [
        b"vendor=\x80\xff",
        "vendor=ü",
        "vendor=1\r\nauthorization: Bearer x",
        "vendor=\x00",
        "no state at all",
        "vendor=" + "x" * 8000,
        ",".join(f"vendor{number}=1" for number in range(200)),
    ],
)
def test_a_state_that_no_header_may_hold_goes_no_further(
    make: Any, parent: str, state: str | bytes
) -> None:
    call = make(1.0).call(NAME, parent, state)
    headers = dict(call.begin("ask", "client").headers())
    assert headers["traceparent"][3:35] == TRACE
    # What gRPC would refuse to send would fail a call that is well otherwise.
    passed_on = headers.get("tracestate", "")
    assert passed_on.isascii()
    assert passed_on == "" or passed_on.isprintable()
    assert len(passed_on) <= 512


def test_the_share_decides_where_a_trace_begins(make: Any) -> None:
    assert make(1.0).call(NAME, "", "").recorded
    tracer = make(0.25)
    kept = sum(tracer.call(NAME, "", "").recorded for _ in range(4000))
    assert 800 < kept < 1200
    call = make(0.0).call(NAME, "", "")
    assert not call.recorded
    (name, value), *_ = call.headers()
    assert (name, len(value), value[-3:]) == ("traceparent", 55, "-00")
    assert int(value[3:35], 16) > 0
    assert int(value[36:52], 16) > 0
    assert call.headers() == call.headers()


@pytest.mark.parametrize(
    "header", ["x", f"ff-{TRACE}-{SPAN}-01", f"00-{'0' * 32}-{SPAN}-00", f"00-{TRACE}-01", "é" * 55]
)
def test_what_names_no_trace_is_none(make: Any, header: str) -> None:
    call = make(1.0).call(NAME, header, "")
    assert call.recorded
    assert call.trace_id != TRACE
    assert not make(0.0).call(NAME, header.encode("latin-1"), "").recorded


def test_the_environment_may_say_which_are_kept(make: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "always_off")
    assert not make(None).call(NAME, KEPT, "").recorded
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_always_off")
    assert make(None).call(NAME, KEPT, "").recorded
    assert not make(None).call(NAME, "", "").recorded
    monkeypatch.setenv("OTEL_SERVICE_NAME", "mine")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "site=berlin")
    assert make(1.0).otel.resource.attributes["service.name"] == "mine"
    assert make(1.0).otel.resource.attributes["site"] == "berlin"


def test_what_has_ended_is_drawn_at_its_time(make: Any, spans: InMemorySpanExporter) -> None:
    tracer = make()
    call, other = tracer.call(NAME, "", ""), tracer.call(NAME, "", "")
    now = time.perf_counter_ns()
    call.draw(
        "batch",
        now - 3_000_000,
        now - 1_000_000,
        {"pollard.rows": 2},
        [call, other],
        [("ran", now)],
    )
    call.end()
    other.end()
    batch = spans.get_finished_spans()[0]
    assert batch.end_time - batch.start_time == pytest.approx(2_000_000, abs=500_000)
    assert {link.context.trace_id for link in batch.links} == {
        int(call.trace_id, 16),
        int(other.trace_id, 16),
    }
    assert [event.name for event in batch.events] == ["ran"]


def test_an_error_is_the_servers_only_if_it_is_to_blame(
    make: Any, spans: InMemorySpanExporter
) -> None:
    tracer = make()
    for code, reason in ((0, ""), (5, "MODEL_UNKNOWN"), (13, "INTERNAL")):
        tracer.call(NAME, "", "").end(reason, code)
    client = tracer.call(NAME, "", "").begin("ask", "client")
    client.end("NOT_FOUND", 5)
    found = [span.status.status_code.name for span in spans.get_finished_spans()]
    assert found == ["UNSET", "UNSET", "ERROR", "ERROR"]
    assert spans.get_finished_spans()[1].attributes["error.type"] == "MODEL_UNKNOWN"


def test_details_are_left_out_if_they_are_not_wanted(
    make: Any, spans: InMemorySpanExporter
) -> None:
    tracer = make(details=False)
    call = tracer.call(NAME, "", "")
    call.set(model="secret-project", revision=3, request_id="r1")
    call.draw("batch", 1, 2, {"pollard.model": "secret-project", "pollard.requests": 2})
    call.end()
    tracer.root("step", 1, 2, {"pollard.resource": "models/secret-project"})
    assert "secret-project" not in "".join(span.to_json() for span in spans.get_finished_spans())
    assert spans.get_finished_spans()[1].attributes["pollard.request_id"] == "r1"


def test_the_end_does_not_wait_for_a_collector_that_is_away(make: Any, spans: Any) -> None:
    tracer = make()

    class Stuck(SimpleSpanProcessor):
        def shutdown(self) -> None:
            released.wait(60)

    import threading

    released = threading.Event()
    tracer._provider.add_span_processor(Stuck(spans))
    tracer.shut_down(0.05)
    released.set()


def test_a_collector_that_gives_each_connection_up_at_once_takes_no_memory(
    make: Any, spans: InMemorySpanExporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By gRPC's own retries the call would be sent again without a pause, until its deadline."""
    settings = bytes.fromhex("000000 04 00 00000000")
    goaway = bytes.fromhex("000008 07 00 00000000 7fffffff 00000000")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "3")
    call = make(1.0).call(NAME, "", "")
    call.end(code=0)
    opened = []

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                opened.append(listener.accept()[0])
                opened[-1].sendall(settings + goaway)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        processor = exporting(f"http://127.0.0.1:{listener.getsockname()[1]}")
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for span in spans.get_finished_spans():
            processor.on_end(span)
        processor.force_flush(10_000)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        processor.shutdown()
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()
        assert opened
        for connection in opened:
            connection.close()
    assert grown < 200_000  # kB
