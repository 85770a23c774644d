"""What could not be fetched or loaded for a reason that may pass is tried again."""

import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
from google.rpc import error_details_pb2

from pollard.models.v1 import fleet_service_pb2 as fleet_pb
from pollard.runtime.sessions import open_session
from pollard.services.common import bundle_source, retries
from pollard.services.inference import loader


@pytest.fixture
def soon(monkeypatch) -> None:
    """Shorter pauses before what failed is tried again."""
    monkeypatch.setattr(retries, "_FIRST_SECONDS", 0.05)
    monkeypatch.setattr(retries, "_LAST_SECONDS", 0.2)


def blocked(path: Path) -> Callable[[], None]:
    """Put a file where a folder should be: nobody can write there, root neither."""
    shutil.rmtree(path)
    path.write_bytes(b"")
    return path.unlink


def hindered(what: str, manager, server, bundle) -> Callable[[], None]:
    """Bring about that a bundle cannot be had; return what ends that."""
    cache = server.agent.cache.root
    if what == "unreachable":
        manager.ended[bundle.digest] = grpc.StatusCode.UNAVAILABLE
    elif what == "refused":
        manager.ended[bundle.digest] = grpc.StatusCode.PERMISSION_DENIED
    elif what == "unknown":
        manager.ended[bundle.digest] = grpc.StatusCode.NOT_FOUND
    elif what == "damaged":
        manager.damage[bundle.digest] = lambda name, data: data[:-1] + b"?"
        return manager.damage.clear
    elif what == "full":
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))
        return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    elif what == "nowhere":
        return blocked(cache / "tmp")
    elif what == "unwritable":
        return blocked(cache / "bundles")
    return manager.ended.clear


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("unreachable", "for now"),
        ("refused", "for now"),
        ("unknown", "for now"),
        ("damaged", "the manager sent a damaged bundle"),
        ("full", "the disk is full"),
        ("nowhere", "cannot be kept in the cache"),
        ("unwritable", "cannot be kept in the cache"),
    ],
)
async def test_what_failed_for_a_reason_that_may_pass_is_tried_again(
    manager, server, stub, make_bundle, tensor_request, monkeypatch, soon, what, words
) -> None:
    monkeypatch.setattr(bundle_source, "_ATTEMPTS", 1)
    good = next(iter(manager.bundles.values()))
    second = make_bundle(2.0, weights=200_000 if what == "full" else 0)
    ends = hindered(what, manager, server, second)
    try:
        manager.want("adder", {1: good, 2: second}, {"production": {2: 1}})
        refused = await manager.apply()
        # Over and over.
        for _ in range(3):
            assert (await manager.answer()).HasField("nack")
    finally:
        ends()
    assert words in refused.nack.status.message
    assert "; it is tried again in " in refused.nack.status.message
    assert "internal error" not in refused.nack.status.message
    assert (await stub.ModelInfer(tensor_request(), timeout=10)).model_version == "1"
    answer = refused
    while answer.HasField("nack"):
        answer = await manager.answer()
    # The same order, and nobody has said anything.
    assert (answer.ack.version, answer.ack.nonce) == (refused.nack.version, refused.nack.nonce)
    assert (await stub.ModelInfer(tensor_request(), timeout=10)).model_version == "2"
    assert manager.reports[-1].revisions[-1].state == fleet_pb.REVISION_STATE_READY


async def test_it_is_told_when_it_is_tried_again_and_a_new_order_calls_that_off(
    manager, server, make_bundle, monkeypatch
) -> None:
    monkeypatch.setattr(retries, "_FIRST_SECONDS", 500.0)
    good = next(iter(manager.bundles.values()))
    second = make_bundle(2.0)
    manager.ended[second.digest] = grpc.StatusCode.INTERNAL
    manager.want("adder", {1: good, 2: second}, {"production": {2: 1}})
    answer = await manager.apply()
    status = manager.reports[-1].revisions[-1]
    assert status.revision == 2
    retry = error_details_pb2.RetryInfo()
    assert any(detail.Unpack(retry) for detail in status.error.details)
    assert 400 <= retry.retry_delay.seconds <= 600
    seconds = retry.retry_delay.ToMilliseconds() / 1000
    assert status.error.message.endswith(f"; it is tried again in {seconds:.0f} s")
    # As who runs it sees it once, not twice.
    assert status.error.message in answer.nack.status.message

    manager.ended.clear()
    third = make_bundle(3.0)
    manager.want("adder", {1: good, 3: third}, {"production": {3: 1}})
    assert (await manager.apply()).HasField("ack")
    assert [digest for digest, _ in manager.downloads[1:]] == [second.digest, third.digest]
    assert server.agent._retry_seconds is None


async def test_what_cannot_pass_is_not_loaded_again_with_what_may(
    manager, server, stub, make_bundle, tensor_request, monkeypatch, soon
) -> None:
    good = next(iter(manager.bundles.values()))
    bad = make_bundle(2.0, model=b"no model")
    late = make_bundle(3.0)
    opened: list[str] = []

    def counted(path, *args, **more):
        opened.append(str(path))
        return open_session(path, *args, **more)

    monkeypatch.setattr(loader, "open_session", counted)
    manager.ended[late.digest] = grpc.StatusCode.INTERNAL
    manager.want("adder", {1: good, 2: bad, 3: late}, {"production": {3: 1}})
    answer = await manager.apply()
    for _ in range(3):
        answer = await manager.answer()
        assert answer.nack.status.message.count("it is tried again") == 1
    manager.ended.clear()
    while "adder/3: " in answer.nack.status.message:
        answer = await manager.answer()
    # What is left is refused for good: nothing is tried any more.
    assert "adder/2: onnxruntime cannot load the model" in answer.nack.status.message
    assert "tried again" not in answer.nack.status.message
    assert server.agent._retry_seconds is None
    assert [bad.digest in path for path in opened] == [True, False]
    assert (await stub.ModelInfer(tensor_request(), timeout=10)).model_version == "3"


async def test_what_runs_and_cannot_be_noted_is_acknowledged_once_it_is(
    manager, server, stub, make_bundle, tensor_request, soon
) -> None:
    state = server.agent.cache.root / "state.json"
    state.unlink()
    state.mkdir()
    manager.want("adder", {2: make_bundle(2.0)}, {"production": {2: 1}})
    answer = await manager.apply()
    assert "what runs cannot be noted in the cache" in answer.nack.status.message
    assert (await stub.ModelInfer(tensor_request(), timeout=10)).model_version == "2"
    state.rmdir()
    while answer.HasField("nack"):
        answer = await manager.answer()
    assert server.agent.cache.load_state().version == answer.ack.version
