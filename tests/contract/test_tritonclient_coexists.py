"""Triton's client and Pollard's contracts in one process, both talking to one server."""

from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.grpc.aio
from tritonclient.utils import InferenceServerException

from pollard.inference import grpc_service_pb2 as pb
from pollard.inference import grpc_service_pb2_grpc as pb_grpc
from pollard.models.v1 import fleet_service_pb2 as fleet_pb
from pollard.runtime.bundle import Bundle
from pollard.services.inference.main import InferenceServer, build_server
from pollard.services.inference.settings import InferenceSettings
from pollard.services.inference.sync import InferenceMember


class OnDisk:
    """Bundles that are already there."""

    def __init__(self, *bundles: Bundle) -> None:
        self._bundles = {bundle.digest: bundle for bundle in bundles}

    async def fetch(self, digest: str) -> Path:
        return self._bundles[digest].path

    async def discard(self, digest: str) -> None:
        raise AssertionError(digest)


async def serve(member: InferenceMember, bundle: Bundle) -> None:
    state = fleet_pb.DesiredState()
    model = state.models.add(model="linear")
    model.revisions.add(revision=3, bundle_sha256=bundle.digest, size_bytes=bundle.size_bytes)
    model.routes.add(alias="production").targets.add(revision=3, weight=1)
    applied = await member.apply(state, OnDisk(bundle))
    assert not applied.failures


@pytest.fixture
async def server(tmp_path: Path, make_bundle) -> AsyncIterator[InferenceServer]:
    settings = InferenceSettings.load(
        {"port": 0, "manager": "", "cache_dir": tmp_path / "cache", "memory_headroom_bytes": 0}
    )
    server = build_server(settings)
    await server.start()
    await serve(server.member, make_bundle())
    yield server
    await server.stop(1.0)


@pytest.fixture
def image() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (2, 8, 8, 1), dtype=np.uint8)


def triton_input(image: np.ndarray, aio: bool = False):
    module = tritonclient.grpc.aio if aio else tritonclient.grpc
    tensor = module.InferInput("image", list(image.shape), "UINT8")
    tensor.set_data_from_numpy(image)
    return tensor


async def ours(server: InferenceServer, image: np.ndarray) -> np.ndarray:
    request = pb.ModelInferRequest(model_name="linear", raw_input_contents=[image.tobytes()])
    request.inputs.add(name="image", datatype="UINT8", shape=image.shape)
    async with grpc.aio.insecure_channel(server.address) as channel:
        stub = pb_grpc.GRPCInferenceServiceStub(channel)
        response = await stub.ModelInfer(request, timeout=10)
    assert response.model_version == "3"
    return np.frombuffer(response.raw_output_contents[0], np.float32).reshape(2, 3)


async def test_the_asyncio_client_gets_the_same_answer(server, image) -> None:
    async with tritonclient.grpc.aio.InferenceServerClient(server.address) as client:
        assert await client.is_server_live()
        assert await client.is_server_ready()
        assert await client.is_model_ready("linear")
        assert not await client.is_model_ready("unknown")
        metadata = await client.get_model_metadata("linear", as_json=True)
        assert metadata["inputs"][0]["shape"] == ["-1", "8", "8", "1"]
        result = await client.infer(
            "linear", [triton_input(image, aio=True)], request_id="7", client_timeout=10
        )
        assert result.get_response().id == "7"
        assert result.get_response().model_version == "3"
        scores = result.as_numpy("scores")
        with pytest.raises(InferenceServerException, match="Request for unknown model: 'x'") as e:
            await client.infer("x", [triton_input(image, aio=True)])
        assert e.value.status() == "StatusCode.NOT_FOUND"
    assert np.array_equal(scores, await ours(server, image))


async def test_the_blocking_client_gets_the_same_answer(server, image) -> None:
    import asyncio

    def ask() -> np.ndarray:
        with tritonclient.grpc.InferenceServerClient(server.address) as client:
            output = tritonclient.grpc.InferRequestedOutput("scores")
            result = client.infer(
                "linear", [triton_input(image)], model_version="3", outputs=[output]
            )
            index = client.get_model_repository_index(as_json=True)
            assert index["models"][0]["state"] == "READY"
            return result.as_numpy("scores")

    scores = await asyncio.to_thread(ask)
    assert np.array_equal(scores, await ours(server, image))
