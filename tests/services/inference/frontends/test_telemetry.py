"""Request ids, the access log and traces by every front end, in a process as it is deployed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from pollard.inference import grpc_service_pb2 as pb
from pollard.inference import grpc_service_pb2_grpc as pb_grpc

INFER = "inference.GRPCInferenceService/ModelInfer"
SPAN = "b7ad6b7169203331"


def parent(number: int, flags: str = "01") -> tuple[str, str]:
    """The header of a trace of this number, and its id."""
    trace_id = f"{number:032x}"
    return f"00-{trace_id}-{SPAN}-{flags}", trace_id


@pytest.fixture(params=["grpcio", "core", "envoy"])
def watched(
    request: pytest.FixtureRequest,
    serve: Any,
    collector: Any,
    tmp_path_factory: Any,
    monkeypatch: Any,
) -> Iterator[tuple[str, Any, list[str]]]:
    """A server that is traced: its address, the collector and its log."""
    if request.param == "envoy":
        pytest.importorskip("pyvoy")
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
    log: list[str] = []
    with serve(
        tmp_path_factory.mktemp("repository"),
        request.param,
        log,
        traces_endpoint=collector.url,
        traces_ratio=0,
        access_log="all",
    ) as (_, address):
        yield address, collector, log


def test_calls_are_named_told_and_traced(
    watched: Any, ask: Callable[..., pb.ModelInferRequest]
) -> None:
    address, collector, log = watched
    with grpc.insecure_channel(address) as channel:
        stub = pb_grpc.GRPCInferenceServiceStub(channel)

        def infer(model: str, *metadata: tuple[str, str]) -> dict[str, Any]:
            _, call = stub.ModelInfer.with_call(ask(model), timeout=20, metadata=metadata)
            return dict(call.trailing_metadata())

        # A name is kept, or made; a trace that is not kept elsewhere leaves nothing here.
        kept, trace_id = parent(1)
        dropped, dropped_id = parent(2, "00")
        assert infer("quick", ("x-request-id", "r-77"))["x-request-id"] == "r-77"
        assert len(infer("quick", ("x-request-id", 'r"78'))["x-request-id"]) == 16
        infer("quick", ("traceparent", dropped))
        infer("quick", ("traceparent", kept), ("x-request-id", "r-79"))
        slow, slow_id = parent(3)
        infer("slow", ("traceparent", slow))
        wrong, wrong_id = parent(4)
        with pytest.raises(grpc.RpcError) as raised:
            infer("nothing", ("traceparent", wrong), ("x-request-id", "r-80"))
        assert dict(raised.value.trailing_metadata())["x-request-id"] == "r-80"
        with pytest.raises(grpc.RpcError) as raised:
            channel.unary_unary("/inference.GRPCInferenceService/Nothing")(
                b"", timeout=20, metadata=[("x-request-id", "r-81")]
            )
        stream, stream_id = parent(5)
        answers = stub.ModelStreamInfer(
            iter([ask("quick"), ask("quick")]),
            timeout=20,
            metadata=[("traceparent", stream), ("x-request-id", "r-82")],
        )
        assert len([answer for answer in answers if not answer.error_message]) == 2
        assert dict(answers.trailing_metadata())["x-request-id"] == "r-82"
        _, checked = health_pb2_grpc.HealthStub(channel).Check.with_call(
            health_pb2.HealthCheckRequest(), timeout=20, metadata=[("x-request-id", "r-83")]
        )
        assert dict(checked.trailing_metadata())["x-request-id"] == "r-83"

    wanted = {trace_id: 4, slow_id: 4, wrong_id: 1, stream_id: 7}
    collector.wait(lambda _: all(len(collector.trace(t)) >= n for t, n in wanted.items()))
    assert {span.trace_id for span in collector.spans} == set(wanted)
    assert dropped_id not in wanted

    for trace in (trace_id, slow_id):
        call, queue, batch, answer = collector.trace(trace)
        assert (call.name, call.kind, call.parent_id) == (INFER, 2, SPAN)
        assert call.service == "pollard-inference"
        assert [span.name for span in (queue, batch, answer)] == ["queue", "batch", "answer"]
        assert {span.parent_id for span in (queue, batch, answer)} == {call.span_id}
        assert batch.links == {call.span_id}
        assert call.attributes["pollard.revision"] == 1
        assert call.began <= queue.began <= queue.ended <= batch.ended <= call.ended
    assert collector.trace(trace_id)[0].attributes["pollard.request_id"] == "r-79"
    (refused,) = collector.trace(wrong_id)
    assert refused.attributes["error.type"] == "MODEL_UNKNOWN"
    assert refused.attributes["rpc.grpc.status_code"] == 5
    assert not refused.failed
    names = sorted(span.name for span in collector.trace(stream_id))
    assert names == sorted(
        ["inference.GRPCInferenceService/ModelStreamInfer", *["answer", "batch", "queue"] * 2]
    )

    said = "".join(log)
    for name in ("r-77", "r-79", "r-80", "r-81", "r-82"):
        assert f"request_id={name}" in said
    assert 'r"78' not in said
    assert "r-83" not in said
    (line,) = [line for line in log if "r-80" in line]
    assert "reason=MODEL_UNKNOWN" in line
    assert f"trace_id={wrong_id}" in line
