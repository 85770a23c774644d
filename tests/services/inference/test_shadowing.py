"""Copies of requests run on another revision, are compared, and disturb nobody."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import grpc
import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from pollard.models.v1 import fleet_service_pb2 as fleet_pb
from pollard.services.common.shadows import SHADOW_METADATA
from pollard.services.inference import shadowing


def copy_all(manager: Any, *, output: str = "y", transform_again: bool = False) -> None:
    manager.models["adder"].routes[0].shadow.CopyFrom(
        fleet_pb.Shadow(
            revision=2,
            base_revision=1,
            share_ppm=1_000_000,
            output=output,
            transform_again=transform_again,
        )
    )


def adds_nothing_to_large_numbers() -> bytes:
    """A model that fails in onnxruntime where the first of the numbers is 1 or more."""
    made = helper.make_model(
        helper.make_graph(
            [
                helper.make_node("Gather", ["x", "first"], ["head"], axis=1),
                helper.make_node("Cast", ["head"], ["index"], to=TensorProto.INT64),
                helper.make_node("Gather", ["table", "index"], ["zero"]),
                helper.make_node("Add", ["x", "zero"], ["y"]),
            ],
            "picky",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4])],
            [
                numpy_helper.from_array(np.int64([0]), "first"),
                numpy_helper.from_array(np.float32([0]), "table"),
            ],
        ),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=9,
    )
    return bytes(made.SerializeToString())


async def counted(server: Any, wanted: Any) -> fleet_pb.Counters:
    """The counters of revision 2 once they are as wanted."""
    async with asyncio.timeout(20):
        while True:
            found = {s.revision: s for s in server.member.statuses()}[2].counters
            if wanted(found.shadow):
                return found
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("server", [0.0, 1e6], ids=["workers", "inline"], indirect=True)
async def test_copies_are_compared_and_counted_apart_from_requests(
    manager: Any, server: Any, stub: Any, make_bundle: Any, tensor_request: Any
) -> None:
    # Adds 1 to every score, as revision 1 does, but in another file.
    manager.want(
        "adder", {1: make_bundle(1.0), 2: make_bundle(1.0, weights=3)}, {"production": {1: 1}}
    )
    copy_all(manager)
    assert (await manager.apply()).HasField("ack")
    values = np.float32([[1, 5, 2, 0], [9, 3, 3, 3], [0, 0, 0, 7]])
    for sent in range(1, 6):
        response = await stub.ModelInfer(tensor_request(values), timeout=10)
        assert response.model_version == "1"
        found = await counted(server, lambda s, sent=sent: s.compared + s.dropped == sent)
    shadow = found.shadow
    assert shadow.compared > 0
    assert (shadow.items, shadow.agreed) == (3 * shadow.compared, 3 * shadow.compared)
    assert (found.succeeded, found.failed, found.rejected, shadow.failed) == (0, 0, 0, 0)
    assert list(shadow.distance.counts) == [shadow.items]
    # Requests that name the revision are requests as ever.
    await stub.ModelInfer(tensor_request(values, model_version="2"), timeout=10)
    assert {s.revision: s for s in server.member.statuses()}[2].counters.succeeded == 1


async def test_other_answers_and_failures_are_counted(
    manager: Any, server: Any, stub: Any, make_bundle: Any, tensor_request: Any
) -> None:
    manager.want("adder", {1: make_bundle(1.0), 2: make_bundle(3.0)}, {"production": {1: 1}})
    copy_all(manager)
    assert (await manager.apply()).HasField("ack")
    await stub.ModelInfer(tensor_request(np.zeros((1, 4))), timeout=10)
    found = (await counted(server, lambda s: s.compared)).shadow
    # Three times as large: the distance is twice the length.
    at = found.distance.offset / found.distance.scale
    assert 2**at <= 2e6 < 2 ** (at + 1 / found.distance.scale)


async def test_a_copy_that_the_revision_fails_is_counted_and_hurts_nobody(
    manager: Any, server: Any, stub: Any, make_bundle: Any, tensor_request: Any
) -> None:
    picky = make_bundle(model=adds_nothing_to_large_numbers())
    manager.want("adder", {1: make_bundle(1.0), 2: picky}, {"production": {1: 1}})
    copy_all(manager)
    assert (await manager.apply()).HasField("ack")
    response = await stub.ModelInfer(tensor_request(np.full((1, 4), 9)), timeout=10)
    assert np.frombuffer(response.raw_output_contents[0], np.float32).tolist() == [10.0] * 4
    found = await counted(server, lambda s: s.failed == 1)
    assert (found.failed, found.shadow.compared) == (0, 0)


async def test_shadows_end_with_the_rule_and_where_images_are_prepared_otherwise(
    manager: Any, server: Any, stub: Any, make_bundle: Any, tensor_request: Any
) -> None:
    bundles = {1: make_bundle(1.0), 2: make_bundle(2.0)}
    for transform_again in (False, True):
        manager.want("adder", bundles, {"production": {1: 1}})
        copy_all(manager, transform_again=transform_again)
        assert (await manager.apply()).HasField("ack")
        revision = server.engine.table.models["adder"].revisions[1]
        assert (revision.shadow is None) == transform_again
    manager.want("adder", bundles, {"production": {1: 1}})
    copy_all(manager)
    assert (await manager.apply()).HasField("ack")
    # It is part of what is saved for the next start.
    assert server.member._running()[0].routes[0].shadow.share_ppm == 1_000_000
    manager.want("adder", bundles, {"production": {1: 1}})
    assert (await manager.apply()).HasField("ack")
    assert server.engine.table.models["adder"].revisions[1].shadow is None


async def test_what_finds_no_idle_worker_or_no_place_is_dropped_and_counted(
    manager: Any,
    server: Any,
    stub: Any,
    make_bundle: Any,
    tensor_request: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    manager.want("adder", {1: make_bundle(1.0), 2: make_bundle(2.0)}, {"production": {1: 1}})
    copy_all(manager)
    assert (await manager.apply()).HasField("ack")
    runner = server.engine._shadows
    monkeypatch.setattr(runner, "_idle", lambda: False)
    await stub.ModelInfer(tensor_request(np.zeros((1, 4))), timeout=10)
    found = (await counted(server, lambda s: s.dropped == 1)).shadow
    assert found.compared == 0
    # The thread is held up: only so many wait, and requests are answered all the same.
    held, free = threading.Event(), threading.Event()

    def hold() -> bool:
        held.set()
        return free.wait(20)

    monkeypatch.setattr(runner, "_idle", hold)
    for _ in range(shadowing.MAX_WAITING + 5):
        await stub.ModelInfer(tensor_request(np.zeros((1, 4))), timeout=10)
    assert held.wait(10)
    assert (await counted(server, lambda s: s.dropped == 6)).shadow.compared == 0
    free.set()
    await counted(server, lambda s: s.compared == shadowing.MAX_WAITING)


async def test_a_marked_request_runs_only_if_a_worker_is_idle_and_is_not_counted(
    server: Any, stub: Any, tensor_request: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    marked = ((SHADOW_METADATA, "1"),)
    response = await stub.ModelInfer(tensor_request(np.zeros((2, 4))), metadata=marked, timeout=10)
    assert np.frombuffer(response.raw_output_contents[0], np.float32).tolist() == [1.0] * 8
    monkeypatch.setattr(server.engine._shadows, "_idle", lambda: False)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.ModelInfer(tensor_request(np.zeros((2, 4))), metadata=marked, timeout=10)
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    with pytest.raises(grpc.aio.AioRpcError):
        await stub.ModelInfer(tensor_request(np.zeros((2, 9))), metadata=marked, timeout=10)
    counters = server.member.statuses()[0].counters
    assert (counters.succeeded, counters.failed, counters.rejected) == (0, 0, 0)
