"""What a preprocess server tells Prometheus, held against the images that it got."""

from __future__ import annotations

import grpc
import pytest

from pollard.preprocess.v1 import preprocess_service_pb2 as preprocess_pb
from pollard.vision.v1 import vision_service_pb2 as vision_pb

ONE = {"model": "linear", "version": "1"}


def question(content: bytes) -> vision_pb.PredictRequest:
    return vision_pb.PredictRequest(
        model=preprocess_pb.ModelSelector(model="linear"),
        image=preprocess_pb.Image(content=content),
    )


async def test_images_decoders_and_revisions_are_counted(suite, make_picture, scrape) -> None:
    for seed in range(2):
        await suite.vision.Predict(question(make_picture(seed)), timeout=30)
    with pytest.raises(grpc.aio.AioRpcError):
        await suite.vision.Predict(question(b"no image"), timeout=30)
    scraped = await scrape(suite.server.http.url)
    assert scraped.value("pollard_decode_images_total", outcome="decoded") == 2
    assert scraped.value("pollard_decode_images_total", outcome="refused") == 1
    assert scraped.value("pollard_decode_seconds_count") == 3
    assert scraped.value("pollard_decode_workers") == 1
    assert scraped.value("pollard_decode_waiting") == 0
    assert scraped.value("pollard_vision_requests_total", outcome="succeeded", **ONE) == 2
    assert scraped.value("pollard_vision_requests_total", outcome="rejected", **ONE) == 1
    assert scraped.value("pollard_vision_requests_total", outcome="failed", **ONE) == 0
    assert scraped.value("pollard_vision_request_seconds_count", **ONE) == 2
    method = {"grpc_service": "pollard.vision.v1.VisionService", "grpc_method": "Predict"}
    assert scraped.value("grpc_server_handled_total", grpc_code="OK", **method) == 2
    assert scraped.value("grpc_server_handled_total", grpc_code="INVALID_ARGUMENT", **method) == 1
    assert scraped.value("grpc_server_started_total", grpc_type="unary", **method) == 3
