"""Tools that know nothing of Pollard work against the live services as they are."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import json_format
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)

SERVICES = {
    "inference": "inference.GRPCInferenceService",
    "preprocess": "pollard.vision.v1.VisionService",
    "models": "pollard.models.v1.ModelService",
}


def call_by_reflection(address: str, service: str, method: str, request: str) -> dict[str, Any]:
    """Call a method with JSON and without any generated code, as grpcurl does."""
    with grpc.insecure_channel(address) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        assert service in database.get_services()
        found = DescriptorPool(database).FindServiceByName(service).FindMethodByName(method)
        send = channel.unary_unary(
            f"/{service}/{method}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=GetMessageClass(found.output_type).FromString,
        )
        message = json_format.Parse(request, GetMessageClass(found.input_type)())
        answer: dict[str, Any] = json_format.MessageToDict(send(message, timeout=20))
        return answer


def test_models_are_listed_by_reflection(live: Any) -> None:
    answer = call_by_reflection(
        live.address("models"), SERVICES["models"], "ListModels", '{"pageSize": 10}'
    )
    assert "models/digits" in [model["name"] for model in answer["models"]]


def test_a_tensor_is_answered_by_reflection(live: Any) -> None:
    tensor = {"name": "image", "datatype": "UINT8", "shape": [1, 8, 8, 1]}
    request = {
        "modelName": "digits",
        "inputs": [tensor],
        "rawInputContents": [base64.b64encode(bytes(64)).decode()],
    }
    answer = call_by_reflection(
        live.address("inference"), SERVICES["inference"], "ModelInfer", json.dumps(request)
    )
    assert answer["outputs"][0]["shape"] == ["1", "3"]
    assert base64.b64decode(answer["rawOutputContents"][0]) == bytes(12)


def test_an_image_is_answered_by_reflection(live: Any) -> None:
    request = {"model": {"model": "digits"}, "image": {"content": BITMAP}}
    answer = call_by_reflection(
        live.address("preprocess"), SERVICES["preprocess"], "Predict", json.dumps(request)
    )
    assert answer["revision"] == "1"
    assert len(answer["classification"]["labels"]) == 3


@pytest.mark.parametrize("kind", SERVICES)
def test_the_standard_health_probe_is_answered(live: Any, kind: str) -> None:
    with grpc.insecure_channel(live.address(kind)) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for name in ("", SERVICES[kind]):
            answer = health.Check(health_pb2.HealthCheckRequest(service=name), timeout=20)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING, name
        with pytest.raises(grpc.RpcError) as caught:
            health.Check(health_pb2.HealthCheckRequest(service="no.such.Service"), timeout=20)
        assert caught.value.code() == grpc.StatusCode.NOT_FOUND


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

from pollard.client import NotFound, VisionClient

with VisionClient(sys.argv[1]) as vision:
    vision.predict(sys.argv[2], "digits")
    try:
        vision.predict(sys.argv[2], "nothing")
    except NotFound as error:
        assert error.reason == "REVISION_UNKNOWN"
spans = kept.get_finished_spans()
print(json.dumps([[s.name, s.status.status_code.name, dict(s.attributes)] for s in spans]))
"""


def test_opentelemetry_instruments_the_python_client(live: Any, tmp_path: Path) -> None:
    image = tmp_path / "image.bmp"
    image.write_bytes(base64.b64decode(BITMAP))
    # In a process of its own: instrumentation replaces functions of grpc.
    done = subprocess.run(
        [sys.executable, "-c", INSTRUMENTED, live.address("preprocess"), str(image)],
        capture_output=True,
        text=True,
        env={**os.environ, "GRPC_VERBOSITY": "NONE"},
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    spans = json.loads(done.stdout)
    assert [span[0] for span in spans] == ["/pollard.vision.v1.VisionService/Predict"] * 2
    assert [span[1] for span in spans] == ["UNSET", "ERROR"]
    assert [span[2]["rpc.grpc.status_code"] for span in spans] == [0, 5]


def _bitmap() -> str:
    vectors = Path(__file__).parent / "vectors" / "predict.json"
    cases = {case["name"]: case for case in json.loads(vectors.read_text())["cases"]}
    known = cases["a bitmap is answered like the same picture as PNG"]
    return str(known["arguments"]["image_base64"])


BITMAP = _bitmap()
