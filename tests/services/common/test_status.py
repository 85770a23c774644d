from __future__ import annotations

import contextlib
import errno
import threading
from collections.abc import AsyncIterator
from types import ModuleType

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from pollard.runtime import errors as runtime_errors
from pollard.services.common import errors, status
from pollard.services.common.lifecycle import GrpcServer, Listen
from pollard.services.common.retries import may_pass
from pollard.vision.v1 import vision_service_pb2 as vision_pb
from pollard.vision.v1 import vision_service_pb2_grpc as vision_grpc


def _raised(module: ModuleType, root: type) -> list[type]:
    found = [kind for kind in vars(module).values() if isinstance(kind, type)]
    return [kind for kind in found if issubclass(kind, root) and kind is not root]


@pytest.mark.parametrize("kind", _raised(errors, errors.ServiceError))
def test_every_service_error_has_a_status(kind):
    outcome = status.describe(kind("words", reason="REASON", model="m"))
    assert outcome.code is not grpc.StatusCode.UNKNOWN
    assert (outcome.message, outcome.reason, outcome.metadata) == (
        "words",
        "REASON",
        {"model": "m"},
    )


@pytest.mark.parametrize("kind", _raised(runtime_errors, runtime_errors.RuntimeFault))
def test_every_runtime_error_has_a_status_and_its_own_reason(kind):
    outcome = status.describe(kind("words", path="p"))
    assert outcome.code is not grpc.StatusCode.INTERNAL
    assert outcome.reason == kind.reason
    assert outcome.metadata == {"path": "p"}


def test_a_full_disk_is_resource_exhausted():
    outcome = status.describe(OSError(errno.ENOSPC, "No space left on device"))
    assert outcome.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert outcome.reason == "DISK_FULL"


def test_files_that_cannot_be_opened_are_resource_exhausted():
    outcome = status.describe(OSError(errno.EMFILE, "Too many open files"))
    assert outcome.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert outcome.reason == "OUT_OF_FILES"


def test_threads_that_cannot_be_had_are_resource_exhausted_and_may_be_had_later():
    before = threading.stack_size(2**46)
    try:
        # More than there can be: the system refuses it as it refuses one thread too many.
        with pytest.raises(RuntimeError) as caught:
            threading.Thread(target=print).start()
    finally:
        threading.stack_size(before)
    outcome = status.describe(caught.value)
    assert outcome.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert outcome.reason == "OUT_OF_THREADS"
    assert may_pass(caught.value)


def test_an_unexpected_error_gives_nothing_away():
    outcome = status.describe(RuntimeError("the password is hunter2"))
    assert outcome.code is grpc.StatusCode.INTERNAL
    assert "hunter2" not in outcome.message
    assert outcome.metadata["request_id"] in outcome.message


def test_a_status_carries_exactly_one_error_info():
    proto = status.to_proto(errors.NotFound("no", reason="MODEL_NOT_FOUND", model="m"))
    assert proto.code == grpc.StatusCode.NOT_FOUND.value[0]
    (detail,) = proto.details
    info = error_details_pb2.ErrorInfo()
    assert detail.Unpack(info)
    assert (info.reason, info.domain, dict(info.metadata)) == (
        "MODEL_NOT_FOUND",
        "pollard.ai",
        {"model": "m"},
    )


class _Named(vision_grpc.VisionServiceServicer):
    """Answers with the name of the model asked for."""

    async def Predict(self, request, context):
        return vision_pb.PredictResponse(model=request.model.model)

    async def PredictStream(self, request_iterator, context):
        async for request in request_iterator:
            yield vision_pb.PredictStreamResponse(id=request.id)


@contextlib.asynccontextmanager
async def _serving() -> AsyncIterator[grpc.aio.Channel]:
    server = GrpcServer(Listen(), ["pollard.vision.v1.VisionService"], [status.ErrorInterceptor()])
    vision_grpc.add_VisionServiceServicer_to_server(_Named(), server.server)
    await server.start()
    try:
        async with grpc.aio.insecure_channel(server.address) as channel:
            yield channel
    finally:
        await server.stop(0)


NO_MESSAGE = b"\xff\xff"


def _reason(error: grpc.aio.AioRpcError) -> str:
    found = status_pb2.Status()
    (details,) = [v for k, v in error.trailing_metadata() if k == "grpc-status-details-bin"]
    found.ParseFromString(details)
    info = error_details_pb2.ErrorInfo()
    assert found.details[0].Unpack(info)
    return info.reason


async def test_a_request_that_is_no_message_is_refused_as_the_callers_doing(capfd):
    async with _serving() as channel:
        call = channel.unary_unary("/pollard.vision.v1.VisionService/Predict")
        with pytest.raises(grpc.aio.AioRpcError, match="cannot be read") as caught:
            await call(NO_MESSAGE, timeout=20)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert _reason(caught.value) == "REQUEST_INVALID"
        request = vision_pb.PredictRequest()
        request.model.model = "m"
        answer = await call(request.SerializeToString(), timeout=20)
        assert vision_pb.PredictResponse.FromString(answer).model == "m"
    assert "Traceback" not in "".join(capfd.readouterr())


async def test_a_stream_is_answered_up_to_what_is_no_message(capfd):
    good = vision_pb.PredictStreamRequest(id="1").SerializeToString()
    async with _serving() as channel:
        call = channel.stream_stream("/pollard.vision.v1.VisionService/PredictStream")(timeout=20)
        await call.write(good)
        assert vision_pb.PredictStreamResponse.FromString(await call.read()).id == "1"
        await call.write(NO_MESSAGE)
        with pytest.raises(grpc.aio.AioRpcError, match="cannot be read") as caught:
            await call.read()
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert _reason(caught.value) == "REQUEST_INVALID"
    assert "Traceback" not in "".join(capfd.readouterr())
