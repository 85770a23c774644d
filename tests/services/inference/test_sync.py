"""What the manager wants is loaded, switched to, refused or taken from the cache."""

import asyncio
import time

import grpc
import numpy as np
import pytest
from google.rpc import code_pb2
from onnx import TensorProto, helper

from pollard.bundle.v1 import bundle_pb2
from pollard.inference import grpc_service_pb2 as pb
from pollard.models.v1 import fleet_service_pb2 as fleet_pb
from pollard.runtime.sessions import open_session
from pollard.services.common.errors import StartupError
from pollard.services.inference import idle_tuning, loader, sync

OF_A_FREED_ONE = (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.UNAVAILABLE)


def answer_of(response: pb.ModelInferResponse) -> float:
    """What the model that answered adds."""
    return float(np.frombuffer(response.raw_output_contents[0], np.float32)[0])


def state_of(manager, model: str, revision: int) -> fleet_pb.RevisionStatus | None:
    for status in manager.reports[-1].revisions:
        if (status.model, status.revision) == (model, revision):
            return status
    return None


async def eventually(condition, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        await asyncio.sleep(0.02)


async def test_hello_says_who_and_what(manager, server) -> None:
    hello = manager.hellos[0]
    assert hello.kind == fleet_pb.SERVER_KIND_INFERENCE
    assert hello.server_id.startswith("inference-")
    assert hello.address == server.address
    assert "cpu-fp32" in hello.capabilities.targets
    assert hello.capabilities.cores > 0


@pytest.mark.parametrize("server", [0.0, 1e6], ids=["workers", "inline"], indirect=True)
async def test_no_request_fails_while_revisions_are_swapped(
    manager, server, stub, make_bundle, tensor_request
) -> None:
    bundles = {number: make_bundle(float(number)) for number in range(1, 6)}
    stop = asyncio.Event()
    answered: list[int] = []
    loaded = {1}
    freed: list[int] = []

    async def client(number: int) -> None:
        while not stop.is_set():
            request = tensor_request(np.zeros((1 + number % 3, 4)))
            if number % 2 == 0 and answered:
                # Every other client names the production revision that it was told last.
                request.model_version = str(answered[-1])
            at_first, earlier = set(loaded), len(freed)
            try:
                response = await stub.ModelInfer(request, timeout=10)
            except grpc.aio.AioRpcError as error:
                # Right only of a revision that was freed: it is unknown, or loading once more.
                named = int(request.model_version or 0)
                was_freed = named > 0 and (named not in at_first or named in freed[earlier:])
                if was_freed and error.code() in OF_A_FREED_ONE:
                    continue
                raise
            assert answer_of(response) == float(response.model_version)
            if not request.model_version:
                answered.append(int(response.model_version))

    clients = [asyncio.create_task(client(number)) for number in range(8)]
    current = 1
    for target in (2, 3, 2, 4, 5, 1):
        # Make before break, as the manager does it.
        both = {current: bundles[current], target: bundles[target]}
        manager.want("adder", both, {"production": {current: 1}})
        assert (await manager.apply()).HasField("ack")
        loaded.add(target)
        manager.want("adder", both, {"production": {target: 1}})
        before = len(answered)
        assert (await manager.apply()).HasField("ack")
        await eventually(lambda before=before, target=target: target in answered[before:])
        loaded.remove(current)
        freed.append(current)
        manager.want("adder", {target: bundles[target]}, {"production": {target: 1}})
        assert (await manager.apply()).HasField("ack")
        current = target
    stop.set()
    await asyncio.gather(*clients)
    assert set(answered) == {1, 2, 3, 4, 5}
    await eventually(lambda: len(server.member.statuses()) == 1)


async def test_one_order_that_replaces_a_revision_drops_nothing_either(
    manager, server, stub, make_bundle, tensor_request
) -> None:
    stop = asyncio.Event()

    async def client() -> int:
        count = 0
        while not stop.is_set():
            response = await stub.ModelInfer(tensor_request(), timeout=10)
            assert answer_of(response) == float(response.model_version)
            count += 1
        return count

    clients = [asyncio.create_task(client()) for _ in range(8)]
    for number in (2, 3, 4):
        manager.want("adder", {number: make_bundle(float(number))}, {"production": {number: 1}})
        assert (await manager.apply()).HasField("ack")
        await asyncio.sleep(0.05)
    stop.set()
    assert all(count > 0 for count in await asyncio.gather(*clients))


@pytest.mark.parametrize("back", [False, True], ids=["gone", "wanted again"])
async def test_what_one_order_takes_away_is_answered_until_the_others_know(
    manager, server, stub, make_bundle, tensor_request, monkeypatch, back
) -> None:
    """After a restore of the manager, preprocess servers may hear of it seconds later."""
    monkeypatch.setattr(sync, "LINGER_SECONDS", 0.5)
    first, second = make_bundle(1.0), make_bundle(2.0)
    manager.want("adder", {2: second}, {"production": {2: 1}})
    assert (await manager.apply()).HasField("ack")
    manager.want("adder", {1: first}, {"production": {1: 1}})
    assert (await manager.apply()).HasField("ack")
    assert answer_of(await stub.ModelInfer(tensor_request(), timeout=10)) == 1.0
    named = tensor_request()
    named.model_version = "2"
    assert answer_of(await stub.ModelInfer(named, timeout=10)) == 2.0
    states = {s.revision: s.state for s in server.member.statuses()}
    assert states[2] == fleet_pb.REVISION_STATE_DRAINING
    if back:
        manager.want("adder", {1: first, 2: second}, {"production": {2: 1}})
        assert (await manager.apply()).HasField("ack")
        assert server.agent.cache.bundle_path(second.digest).exists()
        ends = (task for task in server.member._draining if task.get_name() == "let-go-2")
        await asyncio.gather(*ends)
        assert answer_of(await stub.ModelInfer(tensor_request(), timeout=10)) == 2.0
        return
    await eventually(lambda: len(server.member.statuses()) == 1)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.ModelInfer(named, timeout=10)
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND


def lying_outputs() -> list[bundle_pb2.TensorSpec]:
    return [bundle_pb2.TensorSpec(name="y", data_type=bundle_pb2.DATA_TYPE_INT64, shape=[-1, 4])]


@pytest.mark.parametrize(
    ("what", "reason", "words"),
    [
        ("golden", "GOLDEN_MISMATCH", "output 'y' is off the golden one"),
        ("not onnx", "MODEL_LOAD_FAILED", "onnxruntime cannot load the model"),
        ("lie", "SIGNATURE_MISMATCH", "the manifest declares output 'y' as INT64[-1,4]"),
        ("memory", "MEMORY_SHORT", "loading it beside what runs takes"),
        ("machine", "REQUIREMENTS_NOT_MET", "processor features no_such_flag"),
    ],
)
async def test_a_revision_that_cannot_be_loaded_leaves_the_old_one_serving(
    manager, server, stub, make_bundle, tensor_request, monkeypatch, what, reason, words
) -> None:
    from pollard.services.inference import loader

    parts: dict[str, object] = {}
    if what == "golden":
        parts = {"golden": make_bundle(3.0).path.joinpath("cpu-fp32/golden.npz").read_bytes()}
    elif what == "not onnx":
        parts = {"model": b"this is no model"}
    elif what == "lie":
        parts = {"outputs": lying_outputs()}
    elif what == "memory":
        parts = {"memory_bytes": 200 << 20}
        monkeypatch.setattr(loader, "available_memory_bytes", lambda: 100 << 20)
    elif what == "machine":
        parts = {"cpu_features": ("no_such_flag",)}
    bad = make_bundle(2.0, **parts)
    good = manager.bundles[next(iter(manager.bundles))]
    manager.want("adder", {1: good, 2: bad}, {"production": {2: 1}})
    manager.want("other", {1: make_bundle(7.0)}, {"production": {1: 1}})
    answer = await manager.apply()
    assert answer.nack.status.code == code_pb2.FAILED_PRECONDITION
    assert "adder/2: " in answer.nack.status.message
    assert words in answer.nack.status.message
    status = state_of(manager, "adder", 2)
    assert status is not None
    assert status.state == fleet_pb.REVISION_STATE_FAILED
    assert words in status.error.message
    assert reason.encode() in status.error.details[0].value

    # The old revision serves on, and the other model was brought up all the same.
    response = await stub.ModelInfer(tensor_request(), timeout=10)
    assert (response.model_version, answer_of(response)) == ("1", 1.0)
    request = tensor_request()
    request.model_name = "other"
    assert answer_of(await stub.ModelInfer(request, timeout=10)) == 7.0

    # What is known and not ready is not "unknown".
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.ModelInfer(tensor_request(model_version="2"), timeout=10)
    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
    assert "not at ready state" in caught.value.details()
    index = await stub.RepositoryIndex(pb.RepositoryIndexRequest(), timeout=10)
    entry = next(m for m in index.models if (m.name, m.version) == ("adder", "2"))
    assert (entry.state, words in entry.reason) == ("UNAVAILABLE", True)

    # The order is withdrawn: nothing of it is left.
    manager.want("adder", {1: good}, {"production": {1: 1}})
    assert (await manager.apply()).HasField("ack")
    assert state_of(manager, "adder", 2) is None


async def test_a_failed_replacement_keeps_the_revision_that_is_no_longer_listed(
    manager, server, stub, make_bundle, tensor_request
) -> None:
    manager.want("adder", {2: make_bundle(2.0, model=b"no model")}, {"production": {2: 1}})
    assert (await manager.apply()).HasField("nack")
    assert (await stub.ModelInfer(tensor_request(), timeout=10)).model_version == "1"


async def test_a_number_that_means_another_bundle_is_told_of_with_that_bundle(
    manager, server, stub, make_bundle, tensor_request
) -> None:
    """A manager that was restored from a backup gives numbers again."""
    good = manager.bundles[next(iter(manager.bundles))]
    bad, better = make_bundle(2.0, cpu_features=("no_such_flag",)), make_bundle(3.0)

    def told() -> tuple[int, str]:
        status = state_of(manager, "adder", 1)
        return status.state, status.bundle_sha256

    assert told() == (fleet_pb.REVISION_STATE_READY, good.digest)
    # What does not run here is not said to: another bundle has the number, and is served on.
    for _ in range(2):
        manager.want("adder", {1: bad}, {"production": {1: 1}})
        assert (await manager.apply()).HasField("nack")
        assert told() == (fleet_pb.REVISION_STATE_FAILED, bad.digest)
        assert answer_of(await stub.ModelInfer(tensor_request(), timeout=10)) == 1.0
        status = state_of(manager, "adder", 1)
        assert not status.HasField("counters")
    manager.want("adder", {1: good}, {"production": {1: 1}})
    assert (await manager.apply()).HasField("ack")
    assert told() == (fleet_pb.REVISION_STATE_READY, good.digest)
    assert answer_of(await stub.ModelInfer(tensor_request(), timeout=10)) == 1.0
    manager.want("adder", {1: better}, {"production": {1: 1}})
    assert (await manager.apply()).HasField("ack")
    assert told() == (fleet_pb.REVISION_STATE_READY, better.digest)
    assert answer_of(await stub.ModelInfer(tensor_request(), timeout=10)) == 3.0
    # Nothing leads to it, so it is freed; why the other one does not run is told all the same.
    manager.want("adder", {1: bad}, {})
    assert (await manager.apply()).HasField("nack")
    assert told() == (fleet_pb.REVISION_STATE_FAILED, bad.digest)


async def test_bytes_damaged_on_the_way_are_refused(manager, server, make_bundle) -> None:
    bundle = make_bundle(2.0)

    def flip(name: str, data: bytes) -> bytes:
        if name.endswith("model.onnx"):
            return data[:50] + bytes([data[50] ^ 1]) + data[51:]
        return data

    manager.damage[bundle.digest] = flip
    manager.want("adder", {2: bundle}, {"production": {2: 1}})
    answer = await manager.apply()
    assert "damaged" in answer.nack.status.message
    assert not server.agent.cache.bundle_path(bundle.digest).exists()
    assert not list((server.agent.cache.root / "tmp").iterdir())


async def test_a_newer_order_overtakes_a_load_that_is_no_longer_wanted(
    manager, server, stub, make_bundle, tensor_request
) -> None:
    manager.gate.clear()  # Downloads hang.
    manager.want("adder", {2: make_bundle(2.0)}, {"production": {2: 1}})
    manager.send()
    await eventually(lambda: len(manager.downloads) == 2)
    third = make_bundle(3.0)
    manager.want("adder", {3: third}, {"production": {3: 1}})
    version = manager.send()
    await eventually(lambda: len(manager.downloads) == 3)
    assert (await stub.ModelInfer(tensor_request(), timeout=10)).model_version == "1"
    manager.gate.set()
    answer = await manager.answer()
    assert answer.ack.version == version
    assert answer_of(await stub.ModelInfer(tensor_request(), timeout=10)) == 3.0
    assert [s.revision for s in server.member.statuses() if s.state != 6] == [3]


async def test_a_load_goes_on_when_a_newer_order_still_wants_it(
    manager, server, make_bundle
) -> None:
    manager.gate.clear()
    second = make_bundle(2.0)
    manager.want("adder", {2: second}, {"production": {2: 1}})
    manager.send()
    await eventually(lambda: len(manager.downloads) == 2)
    manager.want("other", {1: second}, {"production": {1: 1}})
    version = manager.send()
    await eventually(lambda: server.agent._order.version == version)
    manager.gate.set()
    answer = await manager.answer()
    assert answer.ack.version == version
    assert len(manager.downloads) == 2


async def test_a_model_that_is_no_longer_listed_goes(manager, server, stub, tensor_request) -> None:
    manager.models.clear()
    assert (await manager.apply()).HasField("ack")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.ModelInfer(tensor_request(), timeout=10)
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND
    await eventually(lambda: not server.member.statuses())


async def test_a_split_alias_follows_its_weights(
    manager, server, stub, make_bundle, tensor_request
) -> None:
    first = next(iter(manager.bundles.values()))
    manager.want(
        "adder",
        {1: first, 2: make_bundle(2.0)},
        {"production": {1: 1}, "canary": {1: 1, 2: 3}},
    )
    assert (await manager.apply()).HasField("ack")
    metadata = [("pollard-alias", "canary")]
    versions = [
        (await stub.ModelInfer(tensor_request(), metadata=metadata, timeout=10)).model_version
        for _ in range(200)
    ]
    assert 120 <= versions.count("2") <= 180


async def test_the_stream_is_opened_again_and_serving_goes_on(
    manager, server, stub, tensor_request
) -> None:
    await manager.stop()
    for _ in range(20):
        await stub.ModelInfer(tensor_request(), timeout=10)
    await manager.start()
    await eventually(lambda: len(manager.hellos) >= 2, 15)
    assert (await manager.answer()).HasField("ack")


async def test_a_server_ends_though_its_stream_fails_at_that_moment(
    manager, server, monkeypatch
) -> None:
    waiting, stream_once = asyncio.Event(), server.agent._stream_once

    async def loses_its_cancellation() -> None:
        # As gRPC does now and then: the error of the call takes the place of the cancellation.
        waiting.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            await stream_once()

    monkeypatch.setattr(server.agent, "_stream_once", loses_its_cancellation)
    await manager.stop()
    await waiting.wait()
    async with asyncio.timeout(60):
        await server.stop(1.0)


async def test_a_server_that_was_cut_off_for_long_loads_only_what_is_new(
    manager, server, stub, make_bundle, tensor_request, monkeypatch
) -> None:
    first = next(iter(manager.bundles.values()))
    opened: list[str] = []

    def counted(path, *args, **more):
        opened.append(str(path))
        return open_session(path, *args, **more)

    monkeypatch.setattr(loader, "open_session", counted)
    await manager.stop()
    # Meanwhile the world went on by many versions: one model is new, the other as it was.
    manager.version += 40
    second = make_bundle(2.0)
    manager.want("other", {7: second}, {"production": {7: 1}})
    downloads = len(manager.downloads)
    await manager.start()
    await eventually(lambda: len(manager.hellos) >= 2, 15)
    assert (await manager.answer()).HasField("ack")
    request = tensor_request()
    request.model_name = "other"
    response = await stub.ModelInfer(request, timeout=10)
    assert (response.model_version, answer_of(response)) == ("7", 2.0)
    response = await stub.ModelInfer(tensor_request(), timeout=10)
    assert (response.model_version, answer_of(response)) == ("1", 1.0)
    assert len(manager.downloads) == downloads + 1
    assert opened
    assert all(second.digest in path for path in opened)
    assert not any(first.digest in path for path in opened)


async def test_reports_carry_counters(manager, server, stub, tensor_request) -> None:
    for _ in range(5):
        await stub.ModelInfer(tensor_request(), timeout=10)
    request = tensor_request()
    request.inputs[0].datatype = "INT8"
    with pytest.raises(grpc.aio.AioRpcError):
        await stub.ModelInfer(request, timeout=10)
    server.agent.report_soon()

    def counted() -> bool:
        status = state_of(manager, "adder", 1)
        if status is None:
            return False
        # Regular reports come, too, and one may tell of the first five alone.
        return (status.counters.succeeded, status.counters.rejected) == (5, 1)

    await eventually(counted)
    status = state_of(manager, "adder", 1)
    assert status is not None
    assert status.counters.rejected == 1
    assert sum(status.counters.latency.counts) == 5
    assert status.variant == "cpu-fp32"


async def test_reports_tell_how_a_revision_is_run(
    manager, start_server, make_bundle, monkeypatch
) -> None:
    monkeypatch.setattr(idle_tuning, "_LOOK_SECONDS", 0.05)
    manager.want("adder", {1: make_bundle(1.0)}, {"production": {1: 1}})
    manager.send()
    await start_server(manager.address, measure=True, workers=3)
    assert (await manager.answer()).HasField("ack")

    def measured() -> bool:
        status = state_of(manager, "adder", 1)
        return status is not None and status.tuning.HasField("measured_time")

    before = [
        s.tuning for report in manager.reports for s in report.revisions if s.HasField("tuning")
    ]
    # Without waiting for the next report that is due.
    await eventually(measured, seconds=30)
    assert before[0].workers == 3
    assert before[0].threads >= 1
    tuning = state_of(manager, "adder", 1).tuning
    assert (tuning.workers, tuning.set_by_hand, tuning.aim) == (3, ["workers"], "throughput")
    assert tuning.joined_batch >= 1
    assert tuning.cores > 0
    assert tuning.onnxruntime
    assert {point.batch_size for point in tuning.points} >= {1, 2, 4, 8}
    assert all(point.rows_per_second > 0 and point.latency_us > 0 for point in tuning.points)


async def test_two_servers_may_not_share_a_cache(manager, server, start_server) -> None:
    with pytest.raises(StartupError, match="in use by another server"):
        await start_server(manager.address)


async def test_a_port_in_use_is_a_clear_error(server, start_server, tmp_path) -> None:
    with pytest.raises(StartupError, match="the port is in use"):
        await start_server(port=server.grpc.port, cache_dir=tmp_path / "other")


async def test_strings_and_halves_are_carried(manager, server, stub, make_bundle) -> None:
    graph = helper.make_graph(
        [
            helper.make_node("Identity", ["s"], ["t"]),
            helper.make_node("Identity", ["h"], ["g"]),
            helper.make_node("Not", ["b"], ["c"]),
        ],
        "types",
        [
            helper.make_tensor_value_info("s", TensorProto.STRING, ["n"]),
            helper.make_tensor_value_info("h", TensorProto.FLOAT16, ["n"]),
            helper.make_tensor_value_info("b", TensorProto.BOOL, ["n"]),
        ],
        [
            helper.make_tensor_value_info("t", TensorProto.STRING, ["n"]),
            helper.make_tensor_value_info("g", TensorProto.FLOAT16, ["n"]),
            helper.make_tensor_value_info("c", TensorProto.BOOL, ["n"]),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    kinds = {"BYTES": "s t", "FP16": "h g", "BOOL": "b c"}
    specs = [
        [
            bundle_pb2.TensorSpec(
                name=names.split()[side],
                data_type=bundle_pb2.DataType.Value(f"DATA_TYPE_{kind}"),
                shape=[-1],
            )
            for kind, names in kinds.items()
        ]
        for side in (0, 1)
    ]
    bundle = make_bundle(model=model.SerializeToString(), inputs=specs[0], outputs=specs[1])
    manager.want("types", {1: bundle}, {"production": {1: 1}})
    assert (await manager.apply()).HasField("ack")
    request = pb.ModelInferRequest(model_name="types")
    strings = b"\x03\0\0\0abc" + b"\x00\0\0\0"
    halves = np.float16([1.5, -2]).tobytes()
    for name, kind, raw in [
        ("b", "BOOL", b"\x01\0"),
        ("s", "BYTES", strings),
        ("h", "FP16", halves),
    ]:
        request.inputs.add(name=name, datatype=kind, shape=[2])
        request.raw_input_contents.append(raw)
    response = await stub.ModelInfer(request, timeout=10)
    assert [o.name for o in response.outputs] == ["t", "g", "c"]
    assert list(response.raw_output_contents) == [strings, halves, b"\0\x01"]

    request.raw_input_contents[1] = b"\x03\0\0\0ab"
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.ModelInfer(request, timeout=10)
    assert "incomplete string data" in caught.value.details()
    request.raw_input_contents[1] = b"\x03\0\0\0abc"
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.ModelInfer(request, timeout=10)
    assert "expected 2 string elements" in caught.value.details()
