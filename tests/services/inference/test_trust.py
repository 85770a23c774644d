"""A server with trusted keys loads only what one of them has signed."""

from __future__ import annotations

import shutil

import grpc
import pytest

from pollard.inference import grpc_service_pb2_grpc as pb_grpc
from pollard.models.v1 import fleet_service_pb2 as fleet_pb
from pollard.runtime.bundle import SIGNATURE
from pollard.runtime.keys import create_key_pair
from pollard.runtime.signing import sign_bundle
from pollard.services.common.errors import StartupError


@pytest.fixture
def keys(tmp_path):
    return create_key_pair(tmp_path / "team")


@pytest.fixture
def trusted(tmp_path, keys):
    directory = tmp_path / "trusted"
    directory.mkdir()
    shutil.copy(keys.public, directory)
    return directory


async def test_a_signed_bundle_is_loaded_and_an_unsigned_one_is_refused(
    manager, start_server, make_bundle, keys, trusted, tensor_request
) -> None:
    signed, unsigned = make_bundle(1.0), make_bundle(2.0)
    sign_bundle(signed.path, keys.private)
    manager.want("adder", {1: signed}, {"production": {1: 1}})
    manager.send()
    server = await start_server(manager.address, trusted_keys=trusted)
    assert (await manager.answer()).HasField("ack")
    manager.want("adder", {1: signed, 2: unsigned}, {"production": {2: 1}})
    answer = await manager.apply()
    assert "is not signed" in answer.nack.status.message
    # It was fetched once, and asked for a signature once.
    assert [paths for digest, paths in manager.downloads if digest == unsigned.digest] == [
        (),
        (SIGNATURE,),
    ]
    async with grpc.aio.insecure_channel(server.address) as channel:
        stub = pb_grpc.GRPCInferenceServiceStub(channel)
        assert (await stub.ModelInfer(tensor_request(), timeout=10)).model_version == "1"
    assert server.agent.cache.bundle_path(signed.digest).joinpath(SIGNATURE).exists()


async def test_a_bundle_that_was_signed_since_is_loaded_without_fetching_it_again(
    manager, start_server, make_bundle, keys, trusted
) -> None:
    bundle = make_bundle(1.0)
    manager.want("adder", {1: bundle}, {"production": {1: 1}})
    manager.send()
    await start_server(manager.address, trusted_keys=trusted)
    assert (await manager.answer()).HasField("nack")
    manager.downloads.clear()
    sign_bundle(bundle.path, keys.private)
    assert (await manager.apply()).HasField("ack")
    assert manager.downloads == [(bundle.digest, (SIGNATURE,))]


async def test_a_signature_damaged_in_the_cache_is_fetched_again(
    manager, start_server, make_bundle, keys, trusted
) -> None:
    bundle = make_bundle(1.0)
    sign_bundle(bundle.path, keys.private)
    manager.want("adder", {1: bundle}, {"production": {1: 1}})
    manager.send()
    server = await start_server(manager.address, trusted_keys=trusted)
    assert (await manager.answer()).HasField("ack")
    cached = server.agent.cache.bundle_path(bundle.digest) / SIGNATURE
    await server.stop(1.0)
    cached.write_bytes(b"{}")
    await start_server(manager.address, trusted_keys=trusted)
    assert (await manager.answer()).HasField("ack")
    assert cached.read_bytes() == (bundle.path / SIGNATURE).read_bytes()


async def test_a_cache_that_was_tampered_with_is_not_served_without_the_manager(
    manager, start_server, make_bundle, keys, trusted
) -> None:
    bundle = make_bundle(1.0)
    sign_bundle(bundle.path, keys.private)
    manager.want("adder", {1: bundle}, {"production": {1: 1}})
    manager.send()
    server = await start_server(manager.address, trusted_keys=trusted)
    assert (await manager.answer()).HasField("ack")
    cached = server.agent.cache.bundle_path(bundle.digest)
    await server.stop(1.0)
    await manager.stop()
    stranger = create_key_pair(keys.private.with_name("stranger"))
    sign_bundle(cached, stranger.private)
    again = await start_server(manager.address, trusted_keys=trusted)
    await again.agent.settled.wait()
    (status,) = again.member.statuses()
    assert status.state == fleet_pb.REVISION_STATE_FAILED
    assert stranger.fingerprint in status.error.message


async def test_keys_that_cannot_be_used_stop_the_server(start_server, tmp_path) -> None:
    with pytest.raises(StartupError, match="trusted keys"):
        await start_server(trusted_keys=tmp_path / "nowhere")
    with pytest.raises(StartupError, match="trusted_keys is for bundles"):
        await start_server(trusted_keys=tmp_path, repository=tmp_path)
