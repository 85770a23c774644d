"""Groups of methods that need a key, through Triton's clients."""

from __future__ import annotations

import queue
from collections.abc import Iterator

import grpc
import pytest
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tritonclient.utils import InferenceServerException

PREFIX = "triton-grpc-protocol-"


@pytest.fixture(scope="module")
def restricted(serve, zoo, tmp_path_factory) -> Iterator[str]:
    """Address of a server where inference needs one key, and control and logging another."""
    root = tmp_path_factory.mktemp("restricted")
    zoo["put"](root, "adder", {1: zoo["adder"](1)})
    with serve(
        root,
        model_control="explicit",
        load_model=["adder"],
        restricted_protocol=["inference:user=let me=in", "model-repository,logging:admin=s3cret"],
    ) as address:
        yield address


@pytest.fixture
def client(restricted) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(restricted) as client:
        yield client


USER = {f"{PREFIX}user": "let me=in"}
ADMIN = {f"{PREFIX}admin": "s3cret"}


@pytest.mark.parametrize(
    "headers",
    [None, ADMIN, {f"{PREFIX}user": "let me"}, {f"{PREFIX}user": ""}, {"user": "let me=in"}],
)
async def test_a_call_without_the_key_is_unavailable(restricted, client, inputs, headers) -> None:
    answers: queue.Queue = queue.Queue()
    # A stream is refused before its first request.
    client.start_stream(lambda result, error: answers.put((result, error)), headers=headers)
    _, error = answers.get(timeout=30)
    client.stop_stream()
    errors = [error]
    with pytest.raises(InferenceServerException) as caught:
        client.infer("adder", [inputs["x"]()], headers=headers)
    errors.append(caught.value)
    async with triton_aio.InferenceServerClient(restricted) as other:
        with pytest.raises(InferenceServerException) as caught:
            await other.infer("adder", [inputs["x"]()], headers=headers)
    errors.append(caught.value)
    for error in errors:
        assert error.status() == "StatusCode.UNAVAILABLE"
        assert f"This protocol is restricted, expecting header '{PREFIX}user'" in error.message()


def test_a_call_with_the_key_is_answered(client, inputs) -> None:
    # Keys of other groups may come along.
    result = client.infer("adder", [inputs["x"]()], headers={**ADMIN, **USER})
    assert (result.as_numpy("y") == 1).all()
    answers: queue.Queue = queue.Queue()
    client.start_stream(lambda result, error: answers.put((result, error)), headers=USER)
    client.async_stream_infer("adder", [inputs["x"]()])
    result, error = answers.get(timeout=30)
    assert error is None
    assert (result.as_numpy("y") == 1).all()
    client.stop_stream()


def test_each_group_has_its_key(client) -> None:
    for call, arguments in (
        (client.load_model, ("adder",)),
        (client.unload_model, ("adder",)),
        (client.get_model_repository_index, ()),
        (client.get_log_settings, ()),
    ):
        for headers in (None, USER):
            with pytest.raises(InferenceServerException, match=f"header '{PREFIX}admin'"):
                call(*arguments, headers=headers)
    client.load_model("adder", headers=ADMIN)
    assert len(client.get_model_repository_index(headers=ADMIN).models) == 1
    assert client.get_log_settings(headers=ADMIN).settings


def test_what_is_not_restricted_needs_no_key(restricted, client) -> None:
    assert client.is_server_ready()
    assert client.is_model_ready("adder")
    assert client.get_model_metadata("adder").name == "adder"
    assert client.get_model_config("adder").config.name == "adder"
    assert client.get_inference_statistics("adder").model_stats
    # Probes of other systems cannot send a key.
    with grpc.insecure_channel(restricted) as channel:
        answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
    assert answer.status == health_pb2.HealthCheckResponse.SERVING
