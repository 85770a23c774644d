"""Who gets in by each front end, and how much they may use."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)

from pollard.inference import grpc_service_pb2 as pb
from pollard.inference import grpc_service_pb2_grpc as pb_grpc

_numbers = itertools.count()


@pytest.fixture(scope="module")
def issuer(make_issuer) -> Any:
    """Somebody who signs JSON Web Tokens."""
    return make_issuer("login")


@pytest.fixture(scope="module", params=["core", "envoy", "grpcio"])
def guarded(request, serve, tmp_path_factory, issuer) -> Iterator[tuple[str, list[str]]]:
    """A server that knows callers by the issuer's tokens; each may have two requests in flight and
    one stream. Gives its address and what it logs."""
    if request.param == "envoy":
        pytest.importorskip("pyvoy", reason="the extra [envoy] is not installed")
    log: list[str] = []
    settings = {
        "jwt_keys": str(issuer.file),
        "jwt_audience": "pollard",
        "max_concurrent_requests": 2,
        "max_caller_streams": 1,
    }
    with serve(tmp_path_factory.mktemp("repository"), request.param, log, **settings) as found:
        yield found[1], log


@pytest.fixture
def stub(guarded) -> Iterator[pb_grpc.GRPCInferenceServiceStub]:
    with grpc.insecure_channel(guarded[0]) as channel:
        yield pb_grpc.GRPCInferenceServiceStub(channel)


@pytest.fixture
def bearer(issuer) -> Any:
    """Returns a function that makes the metadata of a caller who was not here before."""

    def make(role: str = "predictor", **claims: Any) -> tuple[tuple[str, str], ...]:
        given = {"sub": f"caller-{next(_numbers)}"} | claims
        return (("authorization", f"Bearer {issuer.sign(pollard_role=role, **given)}"),)

    return make


def refused(call: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return told(caught.value)


def told(error: Any) -> tuple[grpc.StatusCode, str]:
    """Return code and reason of an error."""
    found = dict(error.trailing_metadata())["grpc-status-details-bin"]
    info = error_details_pb2.ErrorInfo()
    assert status_pb2.Status.FromString(found).details[0].Unpack(info)
    return error.code(), info.reason


def test_who_is_known_is_answered(stub, bearer, ask) -> None:
    response = stub.ModelInfer(ask(value=3.0), metadata=bearer(), timeout=20)
    assert np.frombuffer(response.raw_output_contents[0], np.float32) == [3.0]
    answers = list(stub.ModelStreamInfer(iter([ask(), ask()]), metadata=bearer(), timeout=20))
    assert [answer.error_message for answer in answers] == ["", ""]
    assert stub.ServerMetadata(pb.ServerMetadataRequest(), metadata=bearer("viewer"), timeout=20)


def test_who_is_not_known_is_refused(stub, bearer, ask) -> None:
    unknown = grpc.StatusCode.UNAUTHENTICATED
    infer = stub.ModelInfer
    assert refused(lambda: infer(ask(), timeout=20)) == (unknown, "TOKEN_MISSING")
    for metadata, reason in (
        ((("authorization", "Bearer nonsense"),), "TOKEN_MALFORMED"),
        ((("authorization", "Basic x"),), "TOKEN_MALFORMED"),
        ((*bearer(), *bearer()), "TOKEN_MALFORMED"),
        (bearer(aud="others"), "TOKEN_FOREIGN"),
        (bearer(exp=1), "TOKEN_EXPIRED"),
    ):
        assert refused(lambda m=metadata: infer(ask(), metadata=m, timeout=20)) == (unknown, reason)
    streaming = stub.ModelStreamInfer(iter([ask()]), timeout=20)
    assert refused(lambda: next(streaming)) == (unknown, "TOKEN_MISSING")
    assert (
        refused(lambda: stub.ServerMetadata(pb.ServerMetadataRequest(), timeout=20))[0] is unknown
    )


def test_who_may_not_is_told_what_it_needs(stub, bearer, ask) -> None:
    denied = (grpc.StatusCode.PERMISSION_DENIED, "ROLE_MISSING")
    assert refused(lambda: stub.ModelInfer(ask(), metadata=bearer("viewer"), timeout=20)) == denied
    load = pb.RepositoryModelLoadRequest(model_name="quick")
    assert refused(lambda: stub.RepositoryModelLoad(load, metadata=bearer(), timeout=20)) == denied


def test_health_is_for_everybody_and_reflection_is_not(guarded) -> None:
    with grpc.insecure_channel(guarded[0]) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        answer = health.Check(health_pb2.HealthCheckRequest(), timeout=20)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        watching = health.Watch(health_pb2.HealthCheckRequest(), timeout=20)
        assert next(watching).status == health_pb2.HealthCheckResponse.SERVING
        watching.cancel()
        with pytest.raises(grpc.RpcError) as caught:
            ProtoReflectionDescriptorDatabase(channel).get_services()
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


def test_what_was_shown_is_in_no_log(guarded, stub, issuer, ask) -> None:
    marked = issuer.sign(sub="planted")
    shown = [marked[:-8] + "AAAAAAAA", "plrd_" + "a" * 10 + "_" + "marked" * 8 + "aaaa", "marked-x"]
    for text in (*shown, marked):
        metadata = (("authorization", f"Bearer {text}"),)
        call = stub.ModelInfer.future(ask(), metadata=metadata, timeout=20)
        assert text not in str(call.exception())
    lines = _log_of(guarded, "TOKEN_FOREIGN")
    assert not [line for line in lines for text in (*shown, marked) if text in line]
    assert not [line for line in lines if "marked" in line or marked.split(".")[1] in line]


def _log_of(guarded: tuple[str, list[str]], word: str) -> list[str]:
    """What was logged, once it holds a word: lines come by a pipe."""
    give_up = time.monotonic() + 20
    while not any(word in line for line in guarded[1]) and time.monotonic() < give_up:
        time.sleep(0.02)
    assert any(word in line for line in guarded[1])
    return guarded[1]


def test_requests_in_flight_are_limited_for_each_caller(stub, bearer, ask) -> None:
    mine = bearer()
    slow = [stub.ModelInfer.future(ask("slow"), metadata=mine, timeout=60) for _ in range(6)]
    answered, reasons = 0, set()
    for call in slow:
        try:
            call.result()
            answered += 1
        except grpc.RpcError as error:
            reasons.add(told(error)[1])
    assert answered >= 2
    assert reasons <= {"CONCURRENCY_LIMIT"}
    # All places are free again, whatever became of the calls.
    for _ in range(3):
        assert stub.ModelInfer(ask(), metadata=mine, timeout=20).raw_output_contents


def test_a_call_that_is_given_up_frees_its_place(stub, bearer, ask) -> None:
    mine = bearer()
    for _ in range(3):
        with pytest.raises(grpc.RpcError):
            stub.ModelInfer(ask("slow"), metadata=mine, timeout=0.01)
        with pytest.raises(grpc.RpcError):
            stub.ModelInfer(ask("nothing"), metadata=mine, timeout=20)
    give_up = time.monotonic() + 30
    while True:
        try:
            stub.ModelInfer(ask(), metadata=mine, timeout=20)
            break
        except grpc.RpcError:
            assert time.monotonic() < give_up
            time.sleep(0.05)


def test_streams_are_limited(stub, bearer, ask) -> None:
    mine = bearer()
    hold = threading.Event()

    def requests() -> Iterator[pb.ModelInferRequest]:
        yield ask()
        hold.wait(20)

    first = stub.ModelStreamInfer(requests(), metadata=mine, timeout=30)
    next(first)
    second = stub.ModelStreamInfer(iter([ask()]), metadata=mine, timeout=20)
    assert refused(lambda: next(second)) == (
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        "STREAM_LIMIT",
    )
    hold.set()
    assert list(first) == []
    assert list(stub.ModelStreamInfer(iter([ask()]), metadata=mine, timeout=20))


def test_an_open_stream_ends_when_its_token_does(stub, bearer, ask) -> None:
    """Also one on which nothing is sent; five seconds are allowed for clocks that differ."""
    hold = threading.Event()

    def requests() -> Iterator[pb.ModelInferRequest]:
        yield ask()
        hold.wait(60)

    answers = stub.ModelStreamInfer(requests(), metadata=bearer(exp=time.time() - 2), timeout=60)
    assert refused(lambda: list(answers)) == (grpc.StatusCode.UNAUTHENTICATED, "TOKEN_EXPIRED")
    hold.set()
    # Others go on, and its place is free again.
    assert list(stub.ModelStreamInfer(iter([ask()]), metadata=bearer(), timeout=20))


def test_a_certificate_is_enough_where_its_name_has_a_role(
    serve, tmp_path: Path, make_authority, ask
) -> None:
    ours = make_authority("ours")
    certificate, key = ours.issue("server")
    settings = {
        "tls_certificate": str(certificate),
        "tls_key": str(key),
        "tls_client_ca": str(ours.ca),
        "certificate_role": ["robot=predictor"],
    }
    with serve(tmp_path / "repository", "core", **settings) as (_, address):
        for name in ("robot", "stranger"):
            pair = [file.read_bytes() for file in reversed(ours.issue(name))]
            credentials = grpc.ssl_channel_credentials(ours.ca.read_bytes(), *pair)
            options = [("grpc.use_local_subchannel_pool", 1)]
            with grpc.secure_channel(address, credentials, options) as channel:
                stub = pb_grpc.GRPCInferenceServiceStub(channel)
                if name == "robot":
                    assert stub.ModelInfer(ask(), timeout=20).raw_output_contents
                    stub.ModelReady(pb.ModelReadyRequest(name="quick"), timeout=20)
                else:
                    assert refused(lambda s=stub: s.ModelInfer(ask(), timeout=20)) == (
                        grpc.StatusCode.UNAUTHENTICATED,
                        "TOKEN_MISSING",
                    )
