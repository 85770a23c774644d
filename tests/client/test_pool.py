"""Several connections of one client, and several servers behind one client."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import contextmanager
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import HealthServicer

from pollard.client import AsyncVisionClient, RetryPolicy, Tls, Unavailable, VisionClient
from pollard.vision.v1 import vision_service_pb2, vision_service_pb2_grpc


class _Peers(vision_service_pb2_grpc.VisionServiceServicer):
    """Answers, and remembers over which connections it was asked."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.shown: list[str] = []
        self._lock = threading.Lock()

    def Predict(self, request: Any, context: grpc.ServicerContext) -> Any:
        with self._lock:
            self.seen.append(context.peer())
            self.shown.append(dict(context.invocation_metadata()).get("authorization", ""))
        return vision_service_pb2.PredictResponse(model="digits", revision=1)

    def PredictStream(self, requests: Any, context: grpc.ServicerContext) -> Any:
        with self._lock:
            self.seen.append(context.peer())
        for _ in requests:
            yield vision_service_pb2.PredictStreamResponse()


@contextmanager
def serving(
    *, host: str = "127.0.0.1", port: int = 0, health: HealthServicer | None = None
) -> Iterator[tuple[grpc.Server, str, _Peers]]:
    server, peers = grpc.server(futures.ThreadPoolExecutor(8)), _Peers()
    vision_service_pb2_grpc.add_VisionServiceServicer_to_server(peers, server)
    if health is not None:
        health_pb2_grpc.add_HealthServicer_to_server(health, server)
    address = f"{host}:{server.add_insecure_port(f'{host}:{port}')}"
    server.start()
    yield server, address, peers
    server.stop(None).wait()


def ask(asynchronous: bool, address: str, times: int, **options: Any) -> None:
    """Ask so often, one after the other, by one client."""
    if not asynchronous:
        with VisionClient(address, **options) as vision:
            for _ in range(times):
                assert vision.predict(b"png", "digits").revision == 1
        return

    async def run() -> None:
        async with AsyncVisionClient(address, **options) as vision:
            for _ in range(times):
                assert (await vision.predict(b"png", "digits")).revision == 1

    asyncio.run(run())


@pytest.fixture(params=[False, True], ids=["sync", "asyncio"])
def asynchronous(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.mark.parametrize("connections", [1, 3])
def test_requests_take_the_connections_in_turn(asynchronous: bool, connections: int) -> None:
    with serving() as (_, address, peers):
        ask(asynchronous, address, 9, connections=connections)
    assert len(set(peers.seen)) == connections
    assert {peers.seen.count(peer) for peer in peers.seen} == {9 // connections}


def test_streams_take_turns_too() -> None:
    with serving() as (_, address, peers), VisionClient(address, connections=2) as vision:
        for _ in range(2):
            assert len(list(vision.predict_stream([b"a", b"b"], "digits"))) == 2
    assert len(set(peers.seen)) == 2


def test_many_threads_share_a_pool() -> None:
    with serving() as (_, address, peers), VisionClient(address, connections=4) as vision:

        def some(_: int) -> None:
            for _ in range(10):
                vision.predict(b"png", "digits")

        with futures.ThreadPoolExecutor(8) as threads:
            list(threads.map(some, range(8)))
    assert {peers.seen.count(peer) for peer in peers.seen} == {20}


def test_closing_closes_every_connection() -> None:
    with serving() as (_, address, _):
        vision = VisionClient(address, connections=3)
        vision.predict(b"png", "digits")
        vision.close()
        pool: Any = vision._channel
        for channel in pool.channels:
            with pytest.raises(ValueError, match="closed"):
                channel.unary_unary("/any/Method")(b"")

    async def run() -> list[grpc.ChannelConnectivity]:
        async with AsyncVisionClient(address, connections=3) as client:
            opened: Any = client._channel
        return [channel.get_state() for channel in opened.channels]

    assert asyncio.run(run()) == [grpc.ChannelConnectivity.SHUTDOWN] * 3


def test_several_servers_are_asked_and_one_that_died_is_left_out(asynchronous: bool) -> None:
    with serving() as (first, one, peers), serving() as (_, two, others):
        both = f"{one},{two}"
        ask(asynchronous, both, 1)  # whichever is connected first
        first.stop(None).wait()
        before = len(peers.seen)
        ask(asynchronous, both, 10)
        assert len(peers.seen) == before
        assert len(others.seen) >= 10


def test_servers_take_turns() -> None:
    with serving() as (_, one, peers), serving() as (_, two, others):
        with VisionClient(f"{one},{two}") as vision:
            while not (peers.seen and others.seen):  # until both are connected
                vision.predict(b"png", "digits")
            del peers.seen[:], others.seen[:]
            for _ in range(10):
                vision.predict(b"png", "digits")
        assert (len(peers.seen), len(others.seen)) == (5, 5)


def test_a_retry_goes_to_another_server() -> None:
    with (
        serving() as (first, one, peers),
        serving() as (_, two, others),
        VisionClient(f"{one},{two}") as vision,
    ):
        while not (peers.seen and others.seen):
            vision.predict(b"png", "digits")
        first.stop(None).wait()
        for _ in range(20):
            vision.predict(b"png", "digits")


def tell(health: HealthServicer, serving: bool) -> None:
    state = health_pb2.HealthCheckResponse.ServingStatus
    health.set("", state.SERVING if serving else state.NOT_SERVING)


def test_a_server_that_says_it_is_not_well_gets_no_requests_until_it_is() -> None:
    well, ill = HealthServicer(), HealthServicer()
    with (
        serving(health=well) as (_, one, peers),
        serving(health=ill) as (_, two, others),
        VisionClient(f"{one},{two}", retry=RetryPolicy.none()) as vision,
    ):

        def until(holds: Callable[[], bool]) -> None:
            give_up = time.monotonic() + 60
            while not holds():
                assert time.monotonic() < give_up
                vision.predict(b"png", "digits")

        until(lambda: bool(peers.seen and others.seen))
        tell(ill, False)

        def left_out() -> bool:
            before = len(others.seen)
            for _ in range(10):
                vision.predict(b"png", "digits")
            return len(others.seen) == before

        until(left_out)
        before = len(others.seen)
        tell(ill, True)
        until(lambda: len(others.seen) > before)


def test_while_no_server_is_well_requests_say_so() -> None:
    ill = HealthServicer()
    tell(ill, False)
    with (
        serving(health=ill) as (_, one, _),
        serving(health=ill) as (_, two, _),
        VisionClient(f"{one},{two}", retry=RetryPolicy.none()) as vision,
        pytest.raises(Unavailable),
    ):
        vision.predict(b"png", "digits")


def test_servers_on_several_hosts_take_turns_and_a_name_stands_for_all_its_addresses() -> None:
    with (
        serving(host="127.0.0.1") as (_, one, peers),
        serving(host="127.0.0.2") as (_, two, others),
    ):
        with VisionClient(f"{one},{two}") as vision:
            while not (peers.seen and others.seen):
                vision.predict(b"png", "digits")
        with VisionClient(f"dns:///localhost:{one.rpartition(':')[2]}") as vision:
            assert vision.predict(b"png", "digits").revision == 1


def test_a_server_that_came_back_under_another_address_is_found_soon(name_server: Any) -> None:
    with contextlib.ExitStack() as stack:
        with serving(host="127.0.0.2") as (_, address, _):
            name_server.address, port = "127.0.0.2", int(address.rpartition(":")[2])
            client = stack.enter_context(
                VisionClient(name_server.target(port), retry=RetryPolicy(max_attempts=1))
            )
            client.predict(b"picture", "digits", timeout=20)
        _, _, peers = stack.enter_context(serving(host="127.0.0.3", port=port))
        name_server.address = "127.0.0.3"
        # By itself gRPC asks for a name again after half a minute.
        give_up = time.monotonic() + 15
        while not peers.seen and time.monotonic() < give_up:
            with contextlib.suppress(Unavailable):
                client.predict(b"picture", "digits", timeout=20)
        assert peers.seen


def test_a_name_that_stands_for_nothing_is_named() -> None:
    with (
        VisionClient("dns:///nowhere.invalid:8001", retry=RetryPolicy.none()) as vision,
        pytest.raises(Unavailable, match=r"nowhere\.invalid"),
    ):
        vision.predict(b"png", "digits")


def test_without_retries_servers_still_take_turns() -> None:
    with (
        serving() as (_, one, peers),
        serving() as (_, two, others),
        VisionClient(f"{one},{two}", retry=RetryPolicy.none()) as vision,
    ):
        while not (peers.seen and others.seen):
            vision.predict(b"png", "digits")


def test_a_token_is_shown_over_every_connection(asynchronous: bool) -> None:
    with serving() as (_, one, peers), serving() as (_, two, others):
        ask(asynchronous, f"{one},{two}", 4, connections=2, token="s3cret")
    assert set(peers.shown + others.shown) == {"Bearer s3cret"}
    assert len(peers.shown + others.shown) == 4


def test_a_list_of_addresses_becomes_one_target() -> None:
    assert VisionClient("10.0.0.1:1, 10.0.0.2:2").address == "ipv4:10.0.0.1:1,10.0.0.2:2"
    assert VisionClient("[::1]:1,[::2]:2").address == "ipv6:[::1]:1,[::2]:2"
    assert VisionClient("ipv4:10.0.0.1:1,10.0.0.2:2").address == "ipv4:10.0.0.1:1,10.0.0.2:2"


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"connections": 0}, "connections must be 1 to 64"),
    ({"connections": 65}, "connections must be 1 to 64"),
    ({"address": "a.example:1,b.example:1"}, "dns:///NAME:PORT"),
    ({"address": "10.0.0.1:1,[::1]:1"}, "all of IPv4 or all of IPv6"),
    ({"address": "127.0.0.1:1,10.0.0.2:1", "token": "s3cret"}, "over TLS only"),
    ({"address": "[::1]:1,[2001:db8::1]:1", "token": "s3cret"}, "over TLS only"),
    ({"address": "10.0.0.1:1,"}, "'' of the addresses"),
    ({"address": "10.0.0.1:1,10.0.0.2:1", "tls": Tls()}, "one name for all servers"),
]


@pytest.mark.parametrize(("options", "words"), WRONG)
def test_what_cannot_be_meant_is_refused(options: dict[str, Any], words: str) -> None:
    make: Callable[..., Any] = VisionClient
    with pytest.raises(ValueError, match=words):
        make(**options)
