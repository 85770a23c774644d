"""The gate before grpcio's server: every kind of method, over real connections."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc

from pollard.services.common.auth import Gate, GateRules, Limits, Role, current_caller
from pollard.services.common.lifecycle import GrpcServer, Listen
from pollard.services.common.status import ErrorInterceptor
from pollard.services.common.tls import open_channel
from pollard.services.common.tls_files import TlsFiles
from pollard.vision.v1 import vision_service_pb2 as pb
from pollard.vision.v1 import vision_service_pb2_grpc as pb_grpc

VISION = "pollard.vision.v1.VisionService"


class Vision(pb_grpc.VisionServiceServicer):
    """Answers with the name of who calls, as the model's."""

    def __init__(self) -> None:
        self.entered = asyncio.Event()
        self.release = asyncio.Event()
        self.before_answer: Callable[[], None] = lambda: None

    async def Predict(self, request: pb.PredictRequest, context: Any) -> pb.PredictResponse:
        if request.model.model == "slow":
            self.entered.set()
            await self.release.wait()
        return pb.PredictResponse(model=current_caller().name)

    async def PredictStream(self, request_iterator: Any, context: Any) -> Any:
        async for request in request_iterator:
            answer = pb.PredictStreamResponse(id=request.id)
            answer.result.response.model = current_caller().name
            self.before_answer()
            yield answer


@pytest.fixture
async def serve() -> Any:
    """Returns a function that starts the service behind a gate."""
    servers: list[GrpcServer] = []

    async def start(gate: Gate, tls: TlsFiles = TlsFiles()) -> GrpcServer:  # noqa: B008 - frozen
        server = GrpcServer(Listen(tls=tls), [VISION], [ErrorInterceptor()], gate)
        server.vision = Vision()
        pb_grpc.add_VisionServiceServicer_to_server(server.vision, server.server)
        await server.start()
        await server.set_serving(True)
        servers.append(server)
        return server

    yield start
    for server in servers:
        await server.stop(0)


@pytest.fixture
async def guarded(serve, tokens) -> Any:
    """The service, a stub, and a function that makes the metadata of a new token."""
    gate = Gate(GateRules(tokens=True))

    def metadata(role: Role = Role.PREDICTOR, **limits: Any) -> tuple[tuple[str, str], ...]:
        own = Limits(**limits) if limits else None
        token = tokens.make(role, "camera", limits=own)
        gate.know(tokens.table)
        return (("authorization", f"Bearer {token}"),)

    gate.know(tokens.table)
    server = await serve(gate)
    async with grpc.aio.insecure_channel(server.address) as channel:
        yield server, pb_grpc.VisionServiceStub(channel), metadata


def request(model: str = "m", size: int = 0) -> pb.PredictRequest:
    made = pb.PredictRequest()
    made.model.model = model
    made.image.content = b"x" * size
    return made


async def stream(count: int) -> Any:
    for number in range(count):
        yield pb.PredictStreamRequest(id=str(number))


async def refused(call: Any) -> tuple[grpc.StatusCode, str, float | None]:
    """Code, reason and pause of a call that must be refused."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    found = dict(caught.value.trailing_metadata())["grpc-status-details-bin"]
    info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    seconds = None
    for detail in status_pb2.Status.FromString(found).details:
        if detail.Unpack(retry):
            seconds = retry.retry_delay.ToNanoseconds() / 1e9
        else:
            detail.Unpack(info)
    return caught.value.code(), info.reason, seconds


async def test_the_servicer_learns_who_calls(guarded) -> None:
    _, stub, metadata = guarded
    mine = metadata()
    answers = await asyncio.gather(
        *(stub.Predict(request(), metadata=mine, timeout=20) for _ in range(8))
    )
    assert {answer.model for answer in answers} == {"camera"}
    streamed = [
        answer.result.response.model
        async for answer in stub.PredictStream(stream(3), metadata=mine, timeout=20)
    ]
    assert streamed == ["camera"] * 3


async def test_who_is_not_known_or_may_not_gets_the_status_for_it(guarded) -> None:
    _, stub, metadata = guarded
    code, reason, _ = await refused(stub.Predict(request(), timeout=20))
    assert (code, reason) == (grpc.StatusCode.UNAUTHENTICATED, "TOKEN_MISSING")
    # Nothing is sent: grpc.aio forgets the status where a write meets a call that has just ended.
    code, reason, _ = await refused(
        stub.PredictStream(metadata=(("authorization", "Bearer x"),), timeout=20).read()
    )
    assert (code, reason) == (grpc.StatusCode.UNAUTHENTICATED, "TOKEN_MALFORMED")
    code, reason, _ = await refused(
        stub.Predict(request(), metadata=metadata(Role.VIEWER), timeout=20)
    )
    assert (code, reason) == (grpc.StatusCode.PERMISSION_DENIED, "ROLE_MISSING")


async def test_a_second_header_makes_both_worthless(guarded) -> None:
    _, stub, metadata = guarded
    mine = metadata()
    code, _, _ = await refused(
        stub.Predict(request(), metadata=(*mine, ("authorization", "Bearer x")), timeout=20)
    )
    assert code is grpc.StatusCode.UNAUTHENTICATED
    code, _, _ = await refused(
        stub.Predict(request(), metadata=(("authorization", "Bearer x"), *mine), timeout=20)
    )
    assert code is grpc.StatusCode.UNAUTHENTICATED


async def test_health_and_unknown_methods_ask_for_nothing(guarded) -> None:
    server, _, _ = guarded
    async with grpc.aio.insecure_channel(server.address) as channel:
        answer = await health_pb2_grpc.HealthStub(channel).Check(
            health_pb2.HealthCheckRequest(), timeout=20
        )
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await channel.unary_unary("/pollard.vision.v1.VisionService/No")(b"", timeout=20)
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_requests_in_flight_are_limited_and_free_their_place(guarded) -> None:
    server, stub, metadata = guarded
    mine = metadata(concurrent_requests=1)
    slow = stub.Predict(request("slow"), metadata=mine, timeout=20)
    await asyncio.wait_for(server.vision.entered.wait(), 20)
    code, reason, seconds = await refused(stub.Predict(request(), metadata=mine, timeout=20))
    assert (code, reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "CONCURRENCY_LIMIT")
    assert seconds
    # Another caller is not in the way of that.
    assert (await stub.Predict(request(), metadata=metadata(), timeout=20)).model == "camera"
    slow.cancel()
    for _ in range(200):
        try:
            await stub.Predict(request(), metadata=mine, timeout=20)
            break
        except grpc.aio.AioRpcError:
            await asyncio.sleep(0.05)
    assert (await stub.Predict(request(), metadata=mine, timeout=20)).model == "camera"


async def test_rate_streams_and_sizes_are_limited(guarded) -> None:
    _, stub, metadata = guarded
    mine = metadata(requests_per_second=0.01, burst=1)
    await stub.Predict(request(), metadata=mine, timeout=20)
    _, reason, seconds = await refused(stub.Predict(request(), metadata=mine, timeout=20))
    assert reason == "RATE_LIMIT"
    assert seconds == pytest.approx(100, rel=0.1)

    mine = metadata(streams=1)
    first = stub.PredictStream(metadata=mine, timeout=20)
    await first.write(pb.PredictStreamRequest(id="1"))
    await first.read()
    _, reason, _ = await refused(stub.PredictStream(metadata=mine, timeout=20).read())
    assert reason == "STREAM_LIMIT"
    first.cancel()

    mine = metadata(message_bytes=100)
    assert (await stub.Predict(request(size=10), metadata=mine, timeout=20)).model
    _, reason, _ = await refused(stub.Predict(request(size=1000), metadata=mine, timeout=20))
    assert reason == "MESSAGE_LIMIT"


async def test_a_stream_that_is_too_fast_is_slowed_and_answered(guarded) -> None:
    _, stub, metadata = guarded
    mine = metadata(requests_per_second=200, burst=1)
    answers = [
        answer.id async for answer in stub.PredictStream(stream(10), metadata=mine, timeout=60)
    ]
    assert answers == [str(number) for number in range(10)]


async def test_a_certificate_is_enough_where_its_name_has_a_role(
    serve, tokens, make_authority
) -> None:
    ours = make_authority("ours")
    gate = Gate(GateRules(tokens=True, certificates=(("robot", Role.PREDICTOR),)))
    gate.know(tokens.table)
    server = await serve(gate, TlsFiles(*ours.issue("server"), client_ca=ours.ca))
    for name, code in (("robot", None), ("stranger", grpc.StatusCode.UNAUTHENTICATED)):
        options = [("grpc.use_local_subchannel_pool", 1)]
        files = TlsFiles(*ours.issue(name), ca=ours.ca)
        async with open_channel(server.address, files, options) as channel:
            stub = pb_grpc.VisionServiceStub(channel)
            if code is None:
                assert (await stub.Predict(request(), timeout=20)).model == name
            else:
                assert (await refused(stub.Predict(request(), timeout=20)))[0] is code


async def test_an_open_stream_ends_with_its_callers_token(serve, tokens) -> None:
    """Also one on which nothing is sent: nobody else's, and with its cause."""
    gate = Gate(GateRules(tokens=True))
    token, other = tokens.make(Role.PREDICTOR, "lost"), tokens.make(Role.PREDICTOR, "other")
    gate.know(tokens.table)
    server = await serve(gate)
    silent = asyncio.Event()

    async def requests() -> Any:
        yield pb.PredictStreamRequest(id="first")
        await silent.wait()

    async with grpc.aio.insecure_channel(server.address) as channel:
        stub = pb_grpc.VisionServiceStub(channel)
        mine, others = (
            stub.PredictStream(requests(), metadata=(("authorization", f"Bearer {each}"),))
            for each in (token, other)
        )
        for call in (mine, others):
            assert (await asyncio.wait_for(call.read(), 20)).id == "first"
        tokens.change(token, revoked=True)
        gate.know(tokens.table)
        code, reason, _ = await asyncio.wait_for(refused(mine.read()), 20)
        assert (code, reason) == (grpc.StatusCode.UNAUTHENTICATED, "TOKEN_REVOKED")
        gate.know(tokens.table)
        silent.set()
        assert await asyncio.wait_for(others.read(), 20) is grpc.aio.EOF


async def test_a_stream_ends_whose_token_is_revoked_while_its_first_answer_is_on_its_way(
    serve, tokens
) -> None:
    gate = Gate(GateRules(tokens=True))
    token = tokens.make(Role.PREDICTOR, "lost")
    gate.know(tokens.table)
    server = await serve(gate)

    def revoke() -> None:
        tokens.change(token, revoked=True)
        gate.know(tokens.table)

    server.vision.before_answer = revoke

    async def requests() -> Any:
        yield pb.PredictStreamRequest(id="first")
        await asyncio.Event().wait()

    async with grpc.aio.insecure_channel(server.address) as channel:
        call = pb_grpc.VisionServiceStub(channel).PredictStream(
            requests(), metadata=(("authorization", f"Bearer {token}"),)
        )

        async def until_refused() -> None:
            while True:
                assert await call.read() is not grpc.aio.EOF

        code, reason, _ = await asyncio.wait_for(refused(until_refused()), 20)
    assert (code, reason) == (grpc.StatusCode.UNAUTHENTICATED, "TOKEN_REVOKED")


async def test_an_open_stream_ends_when_its_callers_token_expires(serve, tokens) -> None:
    gate = Gate(GateRules(tokens=True))
    token = tokens.make(Role.PREDICTOR, "visitor")
    gate.know(tokens.table)
    server = await serve(gate)
    tokens.change(token, expires=time.time() + 1.5)
    gate.know(tokens.table)

    async def requests() -> Any:
        yield pb.PredictStreamRequest(id="first")
        await asyncio.Event().wait()

    async with grpc.aio.insecure_channel(server.address) as channel:
        call = pb_grpc.VisionServiceStub(channel).PredictStream(
            requests(), metadata=(("authorization", f"Bearer {token}"),)
        )

        async def until_refused() -> None:
            while True:
                assert await call.read() is not grpc.aio.EOF

        code, reason, _ = await asyncio.wait_for(refused(until_refused()), 20)
    assert (code, reason) == (grpc.StatusCode.UNAUTHENTICATED, "TOKEN_EXPIRED")
