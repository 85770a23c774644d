"""What an inference server tells Prometheus, held against the requests that it got."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest

from pollard.inference import grpc_service_pb2_grpc as pb_grpc

SERVICE = {"grpc_service": "inference.GRPCInferenceService", "grpc_method": "ModelInfer"}
ONE = {"model": "adder", "version": "1"}
TWO = {"model": "adder", "version": "2"}


async def until(scrape: Any, url: str, name: str, expected: float, **labels: str) -> Any:
    """Metrics with a value that is counted after its answer was sent."""
    while True:
        scraped = await scrape(url)
        if scraped.value(name, **labels) == expected:
            return scraped
        await asyncio.sleep(0.02)


@pytest.mark.parametrize("frontend", ["core", "grpcio"])
async def test_requests_failures_and_swaps_are_counted_by_model_and_revision(
    manager, start_server, make_bundle, tensor_request, scrape, frontend: str
) -> None:
    first = make_bundle(1.0)
    manager.want("adder", {1: first}, {"production": {1: 1}})
    manager.send()
    server = await start_server(manager.address, inline_microseconds=0.0, frontend=frontend)
    assert (await manager.answer()).HasField("ack")
    async with grpc.aio.insecure_channel(server.address) as channel:
        stub = pb_grpc.GRPCInferenceServiceStub(channel)
        for _ in range(3):
            await stub.ModelInfer(tensor_request(), timeout=20)
        for broken, code in (
            (tensor_request(model_version="7"), "NOT_FOUND"),
            (tensor_request([[1.0]]), "INVALID_ARGUMENT"),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.ModelInfer(broken, timeout=20)
            assert caught.value.code().name == code
        with pytest.raises(grpc.aio.AioRpcError):
            await channel.unary_unary("/a.Service/Method%41")(b"", timeout=20)
        url = server.http.url
        scraped = await until(
            scrape, url, "grpc_server_handled_total", 3, grpc_code="OK", **SERVICE
        )
        assert scraped.value("grpc_server_started_total", **SERVICE) == 5
        for code in ("NOT_FOUND", "INVALID_ARGUMENT"):
            assert scraped.value("grpc_server_handled_total", grpc_code=code, **SERVICE) == 1
        assert scraped.value("grpc_server_handling_seconds_count", **SERVICE) == 5
        assert scraped.value("grpc_server_handling_seconds_bucket", le="+Inf", **SERVICE) == 5
        assert "Method%41" not in scraped.text
        assert scraped.value("nv_inference_request_success", **ONE) == 3
        assert scraped.value("nv_inference_count", **ONE) == 3
        assert scraped.value("nv_inference_exec_count", **ONE) == 3
        assert scraped.value("nv_inference_request_failure", reason="OTHER", **ONE) == 1
        assert scraped.value("nv_inference_pending_request_count", **ONE) == 0
        took = scraped.value("nv_inference_request_duration_us", **ONE)
        assert took >= scraped.value("nv_inference_queue_duration_us", **ONE) > 0
        assert took >= scraped.value("nv_inference_compute_infer_duration_us", **ONE) > 0
        assert scraped.value("pollard_inference_request_seconds_count", **ONE) == 3
        assert scraped.value("pollard_inference_request_seconds_sum", **ONE) * 1e6 == (
            pytest.approx(took, rel=0.5)
        )
        assert scraped.value("pollard_inference_batch_size_bucket", le="1.0", **ONE) == 3
        assert scraped.value("pollard_inference_loads_total", outcome="loaded") == 1
        assert scraped.value("nv_model_load_duration_secs", **ONE) > 0

        second = make_bundle(2.0)
        manager.want("adder", {1: first, 2: second}, {"production": {2: 1}})
        await manager.apply()
        manager.want("adder", {2: second}, {"production": {2: 1}})
        await manager.apply()
        await stub.ModelInfer(tensor_request(), timeout=20)
        scraped = await until(scrape, url, "nv_inference_request_success", 1, **TWO)
        assert scraped.value("nv_inference_count", **ONE) is None
        assert scraped.value("pollard_inference_switches_total", model="adder") == 3
        assert scraped.value("pollard_inference_route_weight", alias="production", **TWO) == 1

        del manager.models["adder"]
        await manager.apply()
        scraped = await scrape(url)
        assert "adder" not in scraped.text


async def test_a_full_queue_is_counted_as_rejected(
    manager, start_server, make_bundle, tensor_request, scrape, watch
) -> None:
    manager.want("adder", {1: make_bundle(1.0)}, {"production": {1: 1}})
    manager.send()
    server = await start_server(
        manager.address, inline_microseconds=0.0, max_queue=1, workers=1, joined_batch=1
    )
    assert (await manager.answer()).HasField("ack")
    revision = server.engine.table.models["adder"].revisions[1]
    held = revision._workers._session = watch(revision.session)
    held.gate.clear()
    async with grpc.aio.insecure_channel(server.address) as channel:
        stub = pb_grpc.GRPCInferenceServiceStub(channel)
        calls = [stub.ModelInfer(tensor_request(), timeout=30)]
        while not held.batches:
            await asyncio.sleep(0.01)
        calls += [stub.ModelInfer(tensor_request(), timeout=30) for _ in range(3)]
        scraped = await until(
            scrape,
            server.http.url,
            "nv_inference_request_failure",
            2,
            reason="REJECTED",
            **ONE,
        )
        assert scraped.value("nv_inference_pending_request_count", **ONE) == 1
        assert scraped.value("pollard_inference_in_flight", **ONE) == 2
        held.gate.set()
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
    refused = [each for each in outcomes if isinstance(each, grpc.aio.AioRpcError)]
    assert len(refused) == 2
