"""What the clients send: deadlines, retries, names, and arguments checked before sending."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import grpc
import numpy as np
import pytest

from pollard.client import (
    AsyncVisionClient,
    Cancelled,
    RetryPolicy,
    TuningPoint,
    Unavailable,
    VisionClient,
)
from pollard.inference import grpc_service_pb2
from pollard.models.v1 import fleet_service_pb2, model_service_pb2
from pollard.preprocess.v1 import preprocess_service_pb2
from pollard.vision.v1 import vision_service_pb2

ARRAY = np.arange(6, dtype=np.float32).reshape(2, 3)


def test_every_request_carries_a_deadline(runner: Any, address: str, scripted: Any) -> None:
    left: list[float] = []

    def answer(request: Any, context: grpc.ServicerContext) -> Any:
        left.append(context.time_remaining())
        return model_service_pb2.GetModelResponse()

    scripted.on("GetModel", answer)
    runner.call("models", address, "model", "digits")
    runner.call("models", address, "model", "digits", client={"timeout": 3.0})
    # A little more than asked for: grpc rounds deadlines up on the wire.
    assert 20.0 < left[0] < 31.0
    assert 0.0 < left[1] < 4.0


@pytest.mark.parametrize("timeout", [0, -1, float("inf"), float("nan")])
def test_a_deadline_cannot_be_left_out(runner: Any, timeout: float) -> None:
    with pytest.raises(ValueError, match="timeout"):
        runner.call("models", "127.0.0.1:1", "models", client={"timeout": timeout})


@pytest.mark.parametrize("timeout", [1e10, 1e300])
def test_a_deadline_beyond_what_grpc_knows_is_a_long_one(
    runner: Any, address: str, scripted: Any, timeout: float
) -> None:
    left = []

    def answer(request: Any, context: grpc.ServicerContext) -> Any:
        left.append(context.time_remaining())
        return vision_service_pb2.PredictResponse(model="digits", revision=7)

    scripted.on("Predict", answer)
    runner.call("vision", address, "predict", b"png", "digits", client={"timeout": timeout})
    assert left[0] > 1e7


def test_unavailable_is_tried_again(
    runner: Any, address: str, scripted: Any, abort_with: Callable[..., None]
) -> None:
    def answer(request: Any, context: grpc.ServicerContext) -> Any:
        if len(scripted.calls) < 3:
            abort_with(context, grpc.StatusCode.UNAVAILABLE, "starting")
        return vision_service_pb2.PredictResponse(model="digits", revision=7)

    scripted.on("Predict", answer)
    assert runner.call("vision", address, "predict", b"png", "digits").revision == 7
    assert len(scripted.calls) == 3


def test_without_retries_the_first_failure_comes_through(
    runner: Any, address: str, scripted: Any, abort_with: Callable[..., None]
) -> None:
    scripted.on("Predict", lambda r, c: abort_with(c, grpc.StatusCode.UNAVAILABLE, "no"))
    with pytest.raises(Unavailable):
        runner.call("vision", address, "predict", b"png", "m", client={"retry": RetryPolicy.none()})
    assert scripted.calls == ["Predict"]


def test_other_failures_are_not_tried_again(
    runner: Any, address: str, scripted: Any, abort_with: Callable[..., None]
) -> None:
    from pollard.client import Internal

    scripted.on("Predict", lambda r, c: abort_with(c, grpc.StatusCode.INTERNAL, "no"))
    with pytest.raises(Internal):
        runner.call("vision", address, "predict", b"png", "m")
    assert scripted.calls == ["Predict"]


@pytest.mark.parametrize(
    ("given", "revision", "alias"),
    [({}, 0, ""), ({"revision": 3}, 3, ""), ({"alias": "canary"}, 0, "canary")],
)
def test_predict_names_model_and_choice(
    runner: Any, address: str, scripted: Any, given: dict[str, Any], revision: int, alias: str
) -> None:
    seen: list[vision_service_pb2.PredictRequest] = []
    response = vision_service_pb2.PredictResponse(model="digits", revision=2)
    response.classification.labels.add(index=7, label="seven", score=0.5)
    response.timings.inference.nanos = 2_000_000

    def answer(request: Any, context: Any) -> Any:
        seen.append(request)
        return response

    scripted.on("Predict", answer)
    found = runner.call(
        "vision", address, "predict", b"png", "digits", top_k=2, sticky_key="me", **given
    )
    assert (seen[0].model.model, seen[0].model.revision, seen[0].model.alias) == (
        "digits",
        revision,
        alias,
    )
    assert seen[0].image.content == b"png"
    assert seen[0].options.top_k == 2
    assert seen[0].model.sticky_key == "me"
    assert (found.labels[0].index, found.labels[0].label, found.labels[0].score) == (
        7,
        "seven",
        0.5,
    )
    assert found.timings.inference_seconds == pytest.approx(0.002)


def test_transform_gives_the_tensor_and_where_each_image_went(
    runner: Any, address: str, scripted: Any
) -> None:
    pixels = np.arange(8, dtype=np.uint8).reshape(2, 2, 2, 1)
    response = preprocess_service_pb2.TransformResponse(model="m", revision=4)
    response.tensor.name = "image"
    response.tensor.datatype = "UINT8"
    response.tensor.shape.extend(pixels.shape)
    response.tensor.content = pixels.tobytes()
    response.geometries.add(width=10, height=20, scale_x=0.5, scale_y=0.25)
    scripted.on("Transform", lambda request, context: response)
    found = runner.call("vision", address, "transform", [b"a", b"b"], "m")
    assert (found.revision, found.name) == (4, "image")
    np.testing.assert_array_equal(found.tensor, pixels)
    assert (found.geometries[0].width, found.geometries[0].scale_y) == (10, 0.25)


def test_infer_sends_raw_tensors_and_reads_raw_outputs(
    runner: Any, address: str, scripted: Any
) -> None:
    seen: list[tuple[Any, dict[str, Any]]] = []

    def answer(request: Any, context: grpc.ServicerContext) -> Any:
        seen.append((request, dict(context.invocation_metadata())))
        response = grpc_service_pb2.ModelInferResponse(
            model_name="m", model_version="5", id=request.id
        )
        response.outputs.add(name="y", datatype="FP32", shape=[2, 3])
        response.raw_output_contents.append((ARRAY * 2).tobytes())
        return response

    scripted.on("ModelInfer", answer)
    found = runner.call(
        "inference", address, "infer", "m", {"x": ARRAY}, alias="canary", request_id="r1"
    )
    request, metadata = seen[0]
    assert (request.model_name, request.model_version) == ("m", "")
    assert metadata["pollard-alias"] == "canary"
    assert (request.inputs[0].datatype, list(request.inputs[0].shape)) == ("FP32", [2, 3])
    assert request.raw_input_contents[0] == ARRAY.tobytes()
    assert (found.version, found.id) == (5, "r1")
    np.testing.assert_array_equal(found.outputs["y"], ARRAY * 2)


def test_lists_are_read_to_their_last_page(runner: Any, address: str, scripted: Any) -> None:
    def models(request: Any, context: Any) -> Any:
        page = int(request.page_token or "0")
        return model_service_pb2.ListModelsResponse(
            models=[model_service_pb2.Model(name=f"models/m{page}")],
            next_page_token=str(page + 1) if page < 2 else "",
        )

    scripted.on("ListModels", models)
    assert [model.name for model in runner.call("models", address, "models")] == ["m0", "m1", "m2"]


def test_servers_come_with_what_they_run(runner: Any, address: str, scripted: Any) -> None:
    server = fleet_service_pb2.Server(name="servers/a", connected=True, acked_version=3)
    server.hello.server_id = "a"
    server.hello.kind = fleet_service_pb2.SERVER_KIND_INFERENCE
    server.report.revisions.add(
        model="digits", revision=2, state=fleet_service_pb2.REVISION_STATE_READY, variant="cpu-int8"
    )
    scripted.on("ListServers", lambda r, c: fleet_service_pb2.ListServersResponse(servers=[server]))
    (found,) = runner.call("models", address, "servers")
    assert (found.server_id, found.kind, found.acked_version) == ("a", "INFERENCE", 3)
    assert found.revisions[0].state == "READY"
    assert found.revisions[0].tuning is None


def test_servers_tell_how_they_run_a_revision(runner: Any, address: str, scripted: Any) -> None:
    server = fleet_service_pb2.Server(name="servers/a", connected=True)
    status = server.report.revisions.add(model="digits", revision=2)
    status.tuning.CopyFrom(
        fleet_service_pb2.Tuning(
            workers=2,
            threads=1,
            joined_batch=8,
            set_by_hand=["workers"],
            aim="throughput",
            processor="a processor",
            cores=2,
            onnxruntime="1.31.1",
            points=[
                fleet_service_pb2.TuningPoint(
                    threads=1, callers=2, batch_size=8, rows_per_second=400.0, latency_us=40e3
                )
            ],
        )
    )
    status.tuning.measured_time.FromSeconds(1_700_000_000)
    unmeasured = server.report.revisions.add(model="digits", revision=1)
    unmeasured.tuning.CopyFrom(fleet_service_pb2.Tuning(workers=1, threads=2, joined_batch=1))
    scripted.on("ListServers", lambda r, c: fleet_service_pb2.ListServersResponse(servers=[server]))
    (found,) = runner.call("models", address, "servers")
    measured, not_yet = (revision.tuning for revision in found.revisions)
    assert (measured.workers, measured.threads, measured.joined_batch) == (2, 1, 8)
    assert (measured.set_by_hand, measured.aim) == (("workers",), "throughput")
    assert measured.measured_time == datetime.fromtimestamp(1_700_000_000, UTC)
    assert (measured.processor, measured.cores) == ("a processor", 2)
    assert measured.points == (TuningPoint(1, 2, 8, 400.0, 40e3),)
    assert (not_yet.measured_time, not_yet.points) == (None, ())


@pytest.mark.parametrize(
    ("kind", "method", "args", "kwargs"),
    [
        ("models", "model", ("No Such",), {}),
        ("models", "model", ("",), {}),
        ("models", "model", ("a" * 64,), {}),
        ("models", "set_alias", ("m", "12", 1), {}),
        ("models", "set_alias", ("m", "production", 0), {}),
        ("models", "revision", ("m",), {"revision": 1, "alias": "x"}),
        ("models", "delete", ("m",), {"revision": 1, "force": True}),
        ("models", "events", (), {"limit": 0}),
        ("vision", "predict", (b"x", "m"), {"revision": 1, "alias": "x"}),
        ("vision", "predict", (b"x", "m"), {"top_k": 0}),
        ("inference", "infer", ("m", {"x": ARRAY}), {"version": 1, "alias": "x"}),
    ],
)
def test_impossible_arguments_are_refused_before_anything_is_sent(
    runner: Any,
    address: str,
    scripted: Any,
    kind: str,
    method: str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    with pytest.raises(ValueError, match=r"."):
        runner.call(kind, address, method, *args, **kwargs)
    assert scripted.calls == []


@pytest.mark.parametrize(
    "address", ["", "localhost", "localhost:", "http://localhost:80", "localhost:0", "a:70000"]
)
def test_addresses_that_gRPC_cannot_dial_are_refused(runner: Any, address: str) -> None:
    with pytest.raises(ValueError, match="address"):
        runner.call("models", address, "models")


def test_messages_larger_than_grpcs_own_limit_pass(
    runner: Any, address: str, scripted: Any
) -> None:
    big = np.zeros((8, 1024, 1024), np.uint8)

    def answer(request: Any, context: Any) -> Any:
        response = grpc_service_pb2.ModelInferResponse(model_name="m", model_version="1")
        response.outputs.add(name="y", datatype="UINT8", shape=list(big.shape))
        response.raw_output_contents.append(big.tobytes())
        return response

    scripted.on("ModelInfer", answer)
    found = runner.call("inference", address, "infer", "m", {"x": ARRAY})
    assert found.outputs["y"].nbytes == big.nbytes


def test_an_asyncio_client_outside_a_coroutine_is_refused_in_words() -> None:
    with pytest.raises(RuntimeError, match="inside a coroutine"):
        AsyncVisionClient("127.0.0.1:1")


def test_a_closed_client_says_so() -> None:
    client = VisionClient("127.0.0.1:1")
    client.close()
    client.close()
    with pytest.raises(RuntimeError, match="closed"):
        client.predict(b"x", "m")


def test_what_a_stopping_server_cancelled_is_sent_again(
    runner: Any, address: str, scripted: Any, abort_with: Callable[..., None]
) -> None:
    def answer(request: Any, context: grpc.ServicerContext) -> Any:
        if len(scripted.calls) < 3:
            abort_with(context, grpc.StatusCode.CANCELLED, "stopping")
        return model_service_pb2.GetModelResponse()

    scripted.on("GetModel", answer)
    runner.call("models", address, "model", "digits")
    assert len(scripted.calls) == 3
    scripted.calls.clear()
    none = {"retry": RetryPolicy.none()}
    with pytest.raises(Cancelled):
        runner.call("models", address, "model", "digits", client=none)
    assert len(scripted.calls) == 1
