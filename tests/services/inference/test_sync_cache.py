"""What a server keeps for its next start: from what it begins, and what becomes of it."""

import asyncio
import json
import shutil
import threading
import time

import grpc
import numpy as np
import pytest

from pollard.inference import grpc_service_pb2 as pb
from pollard.inference import grpc_service_pb2_grpc as pb_grpc
from pollard.models.v1 import fleet_service_pb2 as fleet_pb


def answer_of(response: pb.ModelInferResponse) -> float:
    """What the model that answered adds."""
    return float(np.frombuffer(response.raw_output_contents[0], np.float32)[0])


async def eventually(condition, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        await asyncio.sleep(0.02)


async def test_a_server_restarts_from_its_cache_without_the_manager(
    manager, server, start_server, tensor_request
) -> None:
    await server.stop(1.0)
    await manager.stop()
    again = await start_server(manager.address)
    async with grpc.aio.insecure_channel(again.address) as channel:
        stub = pb_grpc.GRPCInferenceServiceStub(channel)
        response = await stub.ModelInfer(tensor_request(), timeout=10)
        assert (response.model_version, answer_of(response)) == ("1", 1.0)
        await eventually(lambda: again.member.ready)
    downloads = len(manager.downloads)
    await manager.start()
    async with asyncio.timeout(15):
        while len(manager.hellos) < 2:
            await asyncio.sleep(0.05)
    # The same server, which says what it runs, and needs no bundle again.
    assert manager.hellos[1].server_id == manager.hellos[0].server_id
    assert manager.hellos[1].applied_version == manager.version
    assert (await manager.answer()).HasField("ack")
    assert len(manager.downloads) == downloads


async def test_a_bundle_damaged_in_the_cache_is_fetched_again(
    manager, server, start_server, tensor_request
) -> None:
    (digest,) = manager.bundles
    model = server.agent.cache.bundle_path(digest) / "cpu-fp32/model.onnx"
    await server.stop(1.0)
    data = bytearray(model.read_bytes())
    data[50] ^= 1
    model.write_bytes(data)
    assert len(manager.downloads) == 1
    again = await start_server(manager.address)
    assert len(manager.downloads) == 2
    async with grpc.aio.insecure_channel(again.address) as channel:
        stub = pb_grpc.GRPCInferenceServiceStub(channel)
        assert answer_of(await stub.ModelInfer(tensor_request(), timeout=10)) == 1.0


async def test_what_is_damaged_in_the_cache_is_not_unknown_without_the_manager(
    manager, server, start_server, make_bundle, tensor_request
) -> None:
    """Whoever has several servers asks another one, and does not take it for gone."""
    first, second = make_bundle(1.0), make_bundle(2.0)
    manager.want("adder", {1: first, 2: second}, {"production": {2: 1}, "canary": {1: 1}})
    assert (await manager.apply()).HasField("ack")
    (server.agent.cache.bundle_path(second.digest) / "cpu-fp32/model.onnx").write_bytes(b"")
    await server.stop(1.0)
    await manager.stop()
    again = await start_server(manager.address)
    async with grpc.aio.insecure_channel(again.address) as channel:
        stub = pb_grpc.GRPCInferenceServiceStub(channel)

        async def refused(alias: str) -> grpc.StatusCode:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.ModelInfer(
                    tensor_request(), timeout=10, metadata=[("pollard-alias", alias)]
                )
            return caught.value.code()

        assert await refused("production") == grpc.StatusCode.UNAVAILABLE
        assert await refused("nobody") == grpc.StatusCode.NOT_FOUND
        canary = [("pollard-alias", "canary")]
        response = await stub.ModelInfer(tensor_request(), timeout=10, metadata=canary)
        assert answer_of(response) == 1.0


@pytest.mark.parametrize("limit", [0, 1 << 20], ids=["unlimited", "limited"])
async def test_a_cache_removed_beneath_a_server_is_made_anew(
    manager, start_server, make_bundle, tensor_request, limit
) -> None:
    first = make_bundle(1.0)
    manager.want("adder", {1: first}, {"production": {1: 1}})
    manager.send()
    server = await start_server(manager.address, cache_bytes=limit)
    assert (await manager.answer()).HasField("ack")
    cache = server.agent.cache
    shutil.rmtree(cache.root)
    manager.want("adder", {1: first, 2: make_bundle(2.0)}, {"production": {2: 1}})
    answer = await manager.apply()
    assert answer.HasField("ack"), answer.nack.status.message
    async with grpc.aio.insecure_channel(server.address) as channel:
        stub = pb_grpc.GRPCInferenceServiceStub(channel)
        assert answer_of(await stub.ModelInfer(tensor_request(), timeout=10)) == 2.0
    # What nobody needs any more is looked for in there, too; the old bundle is not there at all.
    shutil.rmtree(cache.root)
    manager.models.clear()
    assert (await manager.apply()).HasField("ack")
    cache.discard(first.digest)
    assert cache.load_state() is not None


async def test_a_saved_state_that_cannot_be_read_is_no_reason_not_to_start(
    manager, server, start_server
) -> None:
    state = server.agent.cache.root / "state.json"
    assert json.loads(state.read_text())["models"][0]["model"] == "adder"
    await server.stop(1.0)
    state.write_text("{")
    await start_server(manager.address)
    assert (await manager.answer()).HasField("ack")


async def test_before_it_knows_what_to_serve_nothing_is_unknown(
    manager, start_server, make_bundle, tensor_request
) -> None:
    """A restarted server must not answer "no such model" only because nobody has told it yet."""
    server = await start_server(manager.address)
    async with grpc.aio.insecure_channel(server.address) as channel:
        stub = pb_grpc.GRPCInferenceServiceStub(channel)
        for version in ("", "1"):
            request = tensor_request(np.zeros((1, 4)))
            request.model_version = version
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.ModelInfer(request, timeout=10)
            assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
            assert "not at ready state" in caught.value.details()
        manager.want("other", {1: make_bundle(1.0)}, {"production": {1: 1}})
        assert (await manager.apply()).HasField("ack")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.ModelInfer(tensor_request(np.zeros((1, 4))), timeout=10)
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND


async def test_a_cache_with_a_limit_keeps_what_runs_and_refuses_what_does_not_fit(
    manager, start_server, make_bundle
) -> None:
    """What is not in use goes; a swap for which old and new do not fit is refused with words."""
    bundles = {number: make_bundle(float(number)) for number in range(1, 5)}
    size = max(
        sum(file.stat().st_size for file in bundle.path.rglob("*") if file.is_file())
        for bundle in bundles.values()
    )
    server = await start_server(manager.address, cache_bytes=2 * size + size // 2)
    cache = server.agent.cache

    def kept() -> set[str]:
        return {path.name for path in (cache.root / "bundles").iterdir()}

    for number in (1, 2, 3):
        manager.want("adder", {number: bundles[number]}, {"production": {number: 1}})
        assert (await manager.apply()).HasField("ack")
        assert bundles[number].digest in kept()
        assert len(kept()) <= 2
    wanted = {number: bundles[number] for number in (2, 3)}
    manager.want("adder", wanted, {"production": {3: 1}})
    assert (await manager.apply()).HasField("ack")
    manager.want("adder", wanted | {4: bundles[4]}, {"production": {4: 1}})
    nack = (await manager.apply()).nack
    assert "--cache-bytes" in nack.status.message
    assert "in use or being fetched" in nack.status.message
    assert kept() == {bundle.digest for bundle in wanted.values()}
    assert server.engine.table.models["adder"].routes["production"] == ((3, 1),)


async def test_a_way_back_that_comes_while_its_bundle_goes_has_it_all_the_same(
    manager, start_server, make_bundle, monkeypatch
) -> None:
    """What is acknowledged is tidied up after; an order must not find what is on its way out."""
    server = await start_server(manager.address)
    cache = server.agent.cache
    begun, go_on, ended = threading.Event(), threading.Event(), threading.Event()
    discard_unused = cache.discard_unused

    def slowly(*, keep: int) -> None:
        if begun.is_set() or server.engine.table.models["adder"].routes != {
            "production": ((2, 1),)
        }:
            return
        begun.set()
        assert go_on.wait(20)
        discard_unused(keep=0)
        ended.set()

    monkeypatch.setattr(cache, "discard_unused", slowly)
    bundles = {number: make_bundle(float(number)) for number in (1, 2)}
    for number in (1, 2):
        manager.want("adder", {number: bundles[number]}, {"production": {number: 1}})
        assert (await manager.apply()).HasField("ack")
    await eventually(begun.is_set)
    manager.want("adder", {1: bundles[1]}, {"production": {1: 1}})
    manager.send()
    # Long enough to be taken up by whoever does not wait.
    await asyncio.sleep(0.3)
    go_on.set()
    assert (await manager.answer()).HasField("ack")
    await eventually(ended.is_set)
    kept = {path.name for path in (cache.root / "bundles").iterdir()}
    assert bundles[1].digest in kept
    assert server.engine.table.models["adder"].routes["production"] == ((1, 1),)


async def test_an_order_that_comes_while_another_is_saved_is_saved_after_it(
    manager, start_server, make_bundle, monkeypatch
) -> None:
    """Each writes the same file, beside it first: the older must neither fail it nor come last."""
    server = await start_server(manager.address)
    cache = server.agent.cache
    begun, go_on = threading.Event(), threading.Event()
    saving, most = 0, 0
    save_state = cache.save_state

    def slowly(state: fleet_pb.DesiredState) -> None:
        nonlocal saving, most
        saving += 1
        most = max(most, saving)
        if not begun.is_set():
            begun.set()
            assert go_on.wait(20)
        save_state(state)
        saving -= 1

    monkeypatch.setattr(cache, "save_state", slowly)
    bundle = make_bundle(1.0)
    manager.want("adder", {1: bundle}, {})
    manager.send()
    await eventually(begun.is_set)
    manager.want("adder", {1: bundle}, {"production": {1: 1}})
    manager.send()
    # Long enough to be taken up by whoever does not wait.
    await asyncio.sleep(0.3)
    go_on.set()
    assert (await manager.answer()).HasField("ack")
    assert most == 1
    kept = cache.load_state()
    assert kept is not None
    assert [route.alias for route in kept.models[0].routes] == ["production"]


async def test_a_cache_that_cannot_be_tidied_up_holds_up_no_order(
    manager, start_server, make_bundle, monkeypatch
) -> None:
    server = await start_server(manager.address)

    def fails(**_: object) -> None:
        raise PermissionError("read-only file system")

    monkeypatch.setattr(server.agent.cache, "discard_unused", fails)
    for number in (1, 2, 3):
        bundle = make_bundle(float(number))
        manager.want("adder", {number: bundle}, {"production": {number: 1}})
        assert (await manager.apply()).HasField("ack")
    assert server.engine.table.models["adder"].routes["production"] == ((3, 1),)
