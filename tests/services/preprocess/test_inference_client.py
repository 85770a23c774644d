"""Tensors find a server that runs them, and errors say what happened."""

import asyncio
import contextlib

import grpc
import numpy as np
import pytest

from pollard.inference import grpc_service_pb2 as pb
from pollard.runtime.tensors import FROM_NUMPY
from pollard.services.preprocess.errors import (
    InferenceFailed,
    InferenceUnavailable,
    RequestExpired,
    RevisionGone,
    TensorRefused,
)
from pollard.services.preprocess.inference_client import InferenceClient, Work, _encode

WORK = Work("m", 3, "x", np.arange(6, dtype=np.uint8).reshape(1, 6), ["y"])


@pytest.mark.parametrize("shape", [(1, 224, 224, 3), (2, 64), (1, 1), (1, 0, 3)])
@pytest.mark.parametrize("dtype", [np.uint8, np.float16, np.float32])
def test_requests_are_what_protobuf_would_write(shape, dtype):
    array = (np.arange(np.prod(shape)) % 251).astype(dtype).reshape(shape)
    for each in (array, np.flip(array, -1)):
        request = pb.ModelInferRequest.FromString(_encode(Work("m", 3, "x", each, ["y", "z"])))
        plain = pb.ModelInferRequest(model_name="m", model_version="3")
        plain.inputs.add(name="x", datatype=FROM_NUMPY[array.dtype], shape=shape)
        plain.outputs.add(name="y")
        plain.outputs.add(name="z")
        plain.raw_input_contents.append(each.tobytes())
        assert request == plain


class Server:
    """Answers ModelInfer with twice the input, or as it was told."""

    def __init__(self) -> None:
        self.calls = 0
        self.refuse: tuple[grpc.StatusCode, str] | None = None
        self.delay = 0.0
        self.version = ""
        self.gone = asyncio.Event()

    async def start(self, port: int = 0) -> None:
        self._server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        handler = grpc.unary_unary_rpc_method_handler(
            self._infer,
            request_deserializer=pb.ModelInferRequest.FromString,
            response_serializer=pb.ModelInferResponse.SerializeToString,
        )
        self._server.add_generic_rpc_handlers(
            (
                grpc.method_handlers_generic_handler(
                    "inference.GRPCInferenceService", {"ModelInfer": handler}
                ),
            )
        )
        self.port = self._server.add_insecure_port(f"127.0.0.1:{port}")
        self.address = f"127.0.0.1:{self.port}"
        await self._server.start()

    async def stop(self) -> None:
        await self._server.stop(None)

    async def _infer(self, request, context):
        self.calls += 1
        if self.refuse:
            await context.abort(*self.refuse)
        try:
            await asyncio.sleep(self.delay)
        except asyncio.CancelledError:
            self.gone.set()
            raise
        array = np.frombuffer(request.raw_input_contents[0], np.uint8) * 2
        response = pb.ModelInferResponse(
            model_name=request.model_name, model_version=self.version or request.model_version
        )
        response.outputs.add(name="y", datatype="UINT8", shape=request.inputs[0].shape)
        response.raw_output_contents.append(array.tobytes())
        return response


@pytest.fixture
async def servers():
    servers = [Server(), Server()]
    for server in servers:
        await server.start()
    yield servers
    for server in servers:
        await server.stop()


@pytest.fixture
async def client():
    client = InferenceClient()
    yield client
    await client.close()


async def infer(client, *servers, seconds=10.0):
    addresses = [server.address for server in servers]
    deadline = asyncio.get_running_loop().time() + seconds
    return await client.infer(WORK, lambda: addresses, deadline)


async def test_servers_take_turns(client, servers):
    for _ in range(10):
        outputs = await infer(client, *servers)
        assert np.array_equal(outputs["y"], WORK.array * 2)
    assert [server.calls for server in servers] == [5, 5]


async def test_a_server_that_is_away_is_passed_over(client, servers):
    await servers[0].stop()
    for _ in range(6):
        await infer(client, *servers)
    assert servers[1].calls == 6


async def test_a_server_that_comes_back_in_time_is_waited_for(client, servers):
    await infer(client, servers[0])
    await servers[0].stop()
    request = asyncio.create_task(infer(client, servers[0]))
    await asyncio.sleep(0.2)
    again = Server()
    await again.start(servers[0].port)
    await request
    assert again.calls == 1
    await again.stop()


async def test_nobody_in_time(client, servers):
    for server in servers:
        server.refuse = (grpc.StatusCode.UNAVAILABLE, "the queue is full")
    with pytest.raises(InferenceUnavailable, match="the queue is full"):
        await infer(client, *servers, seconds=0.5)
    with pytest.raises(InferenceUnavailable, match="no inference server is known"):
        await infer(client)


async def test_one_that_lacks_the_revision_is_passed_over_and_all_mean_it_is_gone(client, servers):
    servers[0].refuse = (grpc.StatusCode.NOT_FOUND, "no such version")
    for _ in range(4):
        await infer(client, *servers)
    servers[1].refuse = servers[0].refuse
    with pytest.raises(RevisionGone):
        await infer(client, *servers)


async def test_a_refusal_is_not_tried_elsewhere(client, servers):
    for server in servers:
        server.refuse = (grpc.StatusCode.INVALID_ARGUMENT, "wrong shape")
    with pytest.raises(TensorRefused, match="wrong shape"):
        await infer(client, *servers)
    assert sum(server.calls for server in servers) == 1


async def test_a_failure_and_an_answer_for_another_revision(client, servers):
    servers[0].refuse = (grpc.StatusCode.INTERNAL, "broken")
    with pytest.raises(InferenceFailed, match="INTERNAL: broken"):
        await infer(client, servers[0])
    servers[1].version = "2"
    with pytest.raises(InferenceFailed, match="names version"):
        await infer(client, servers[1])


async def test_the_deadline_goes_along_and_ends_the_call(client, servers):
    servers[0].delay = 30
    with pytest.raises(RequestExpired):
        await infer(client, servers[0], seconds=0.3)
    async with asyncio.timeout(10):
        await servers[0].gone.wait()
    calls = servers[0].calls
    with pytest.raises(RequestExpired):
        await infer(client, servers[0], seconds=0)
    assert servers[0].calls == calls


async def test_a_cancelled_caller_cancels_the_call(client, servers):
    servers[0].delay = 30
    request = asyncio.create_task(infer(client, servers[0]))
    while not servers[0].calls:
        await asyncio.sleep(0.01)
    request.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await request
    async with asyncio.timeout(10):
        await servers[0].gone.wait()


async def test_channels_to_servers_that_left_are_closed_after_their_calls(client, servers):
    servers[0].delay = 0.3
    request = asyncio.create_task(infer(client, servers[0]))
    while not servers[0].calls:
        await asyncio.sleep(0.01)
    client.retain([servers[1].address])
    assert np.array_equal((await request)["y"], WORK.array * 2)
