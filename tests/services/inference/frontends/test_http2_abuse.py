"""Clients that speak HTTP/2 to do harm: others are answered, and little is kept of them."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import resource
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest

from pollard.inference import grpc_service_pb2_grpc as pb_grpc

_BYTES = 64 << 20
"""How much more memory a server may have had at most; the attacks send as much or more."""

_LINES = 500
"""How much it may log of an attack: tens of lines a second, of thousands of calls."""


def load(name: str) -> Any:
    path = Path(__file__).with_name(f"{name}.py")
    described = importlib.util.spec_from_file_location(f"pollard_tests_{name}", path)
    assert described is not None
    assert described.loader is not None
    module = importlib.util.module_from_spec(described)
    sys.modules[described.name] = module
    described.loader.exec_module(module)
    return module


http2 = load("http2")
peak_bytes = load("test_abuse").peak_bytes


RETRIES = json.dumps(
    {
        "methodConfig": [
            {
                "name": [{}],
                "retryPolicy": {
                    "maxAttempts": 5,
                    "initialBackoff": "0.1s",
                    "maxBackoff": "2s",
                    "backoffMultiplier": 2,
                    "retryableStatusCodes": ["UNAVAILABLE", "CANCELLED"],
                },
            }
        ]
    }
)


class Attacked:
    """A server that is attacked, a modest client of it, and what the server logged."""

    def __init__(self, process: Any, address: str, log: list[str], ask: Any) -> None:
        self.address = address
        self.log = log
        self._process = process
        self._ask = ask
        self._stack = contextlib.ExitStack()
        # As the clients of this project do: gRPC's servers end calls, of whomever, with CANCELLED
        # while thousands of them wait to be taken.
        options = [("grpc.service_config", RETRIES)]
        channel = self._stack.enter_context(grpc.insecure_channel(address, options))
        self._stub = pb_grpc.GRPCInferenceServiceStub(channel)
        self.begin()

    def begin(self) -> None:
        """Count memory and lines from now on."""
        self.serves()
        self._rests()
        for each in self._family():
            # The most that was resident becomes what is resident now.
            Path(f"/proc/{each.pid}/clear_refs").write_text("5")
        self._before, self._lines = peak_bytes(self._process), len(self.log)

    def _family(self) -> list[psutil.Process]:
        parent = psutil.Process(self._process.pid)
        return [parent, *parent.children(recursive=True)]

    def _rests(self) -> None:
        """Wait until the calls of the attack before have ended, which take memory until then."""

        def used() -> float:
            return sum(sum(each.cpu_times()[:2]) for each in self._family())

        give_up = time.monotonic() + 60
        before = used()
        while True:
            time.sleep(0.3)
            now = used()
            if now - before < 0.05:
                return
            assert time.monotonic() < give_up, "it is still busy with the attack before"
            before = now

    def serves(self) -> None:
        for _ in range(10):
            assert self._stub.ModelInfer(self._ask(), timeout=60).raw_output_contents

    def is_unharmed(self, *, most: int = _BYTES) -> None:
        self.serves()
        assert peak_bytes(self._process) - self._before < most
        lines = self.log[self._lines :]
        assert len(lines) < _LINES, "".join(lines)

    def close(self) -> None:
        self._stack.close()


@pytest.fixture(scope="module", params=["grpcio", "core", "envoy"])
def server_of_all(request: Any, serve: Any, ask: Any, tmp_path_factory: Any) -> Iterator[Attacked]:
    if request.param == "envoy" and importlib.util.find_spec("pyvoy") is None:
        pytest.skip("the extra [envoy] is not installed")
    log: list[str] = []
    with serve(tmp_path_factory.mktemp("repository"), request.param, log) as (process, address):
        made = Attacked(process, address, log, ask)
        yield made
        made.close()


@pytest.fixture
def attacked(server_of_all: Attacked) -> Attacked:
    """A server as it is before an attack; the tests share it."""
    server_of_all.begin()
    return server_of_all


def test_calls_that_are_reset_as_soon_as_they_are_made(attacked: Attacked) -> None:
    # CVE-2023-44487, "rapid reset".
    headers = http2.call_headers()
    with contextlib.ExitStack() as stack:
        for _ in range(5):
            connection = stack.enter_context(http2.Connection(attacked.address))
            connection.greet()
            for first in range(1, 20_000, 200):
                burst = b"".join(
                    http2.frame(http2.HEADERS, http2.END_HEADERS, stream, headers)
                    + http2.frame(http2.RST_STREAM, 0, stream, b"\0\0\0\x08")
                    for stream in range(first, first + 200, 2)
                )
                if not connection.send(burst):
                    break
            attacked.serves()
    # Some thousand calls wait to be taken or to be ended, at some 25 kB each: 50 to 140 MB, the
    # more the busier the machine is. All of the fifty thousand would take more than a gigabyte.
    attacked.is_unharmed(most=3 * _BYTES)


def test_headers_that_never_end(attacked: Attacked) -> None:
    # CVE-2024-27316 and its like, "continuation flood".
    field = http2.literal("x-more", b"a" * 15_000)
    with http2.Connection(attacked.address) as connection:
        connection.greet()
        connection.send(http2.frame(http2.HEADERS, 0, 1, http2.call_headers()))
        sent = 0
        while sent < 2 * _BYTES and connection.send(http2.frame(http2.CONTINUATION, 0, 1, field)):
            sent += len(field)
        attacked.serves()
    attacked.is_unharmed()


def test_pings_and_settings_without_end(attacked: Attacked) -> None:
    many = http2.frame(http2.PING, 0, 0, bytes(8)) * 500
    many += http2.frame(http2.SETTINGS, 0, 0, b"\0\x04\0\0\xff\xff") * 500
    with http2.Connection(attacked.address) as connection:
        connection.greet()
        # Nothing of what the server says is read: it must not keep all its answers.
        connection._socket.settimeout(2)
        with contextlib.suppress(TimeoutError):
            for _ in range(200):
                if not connection.send(many):
                    break
        attacked.serves()
    attacked.is_unharmed()


@pytest.mark.parametrize(("count", "size"), [(1, 1 << 20), (5_000, 10)])
def test_fields_that_are_too_long_or_too_many(attacked: Attacked, count: int, size: int) -> None:
    call = http2.call_headers()
    call += b"".join(http2.literal(f"x-{n}", b"a" * size) for n in range(count))
    pieces = [call[at : at + 16_384] for at in range(0, len(call), 16_384)]
    with http2.Connection(attacked.address) as connection:
        connection.greet()
        for n, piece in enumerate(pieces):
            kind = http2.CONTINUATION if n else http2.HEADERS
            flags = http2.END_HEADERS if n == len(pieces) - 1 else 0
            if not connection.send(http2.frame(kind, flags, 1, piece)):
                break
        else:
            connection.send(http2.frame(http2.DATA, http2.END_STREAM, 1))
        # It is refused with the stream, the connection or a status: only that holds an answer.
        with contextlib.suppress(ConnectionError):
            assert b"grpc-status\x010" not in connection.answer(1)
    attacked.is_unharmed()


@pytest.mark.parametrize("name", ["triton-request-id", "x-request-id", "traceparent", "user-agent"])
def test_fields_with_ends_of_lines_write_no_lines(attacked: Attacked, name: str) -> None:
    evil = b"1\r\nlevel=error event=intruder\x1b[31m\0"
    with http2.Connection(attacked.address) as connection:
        connection.greet()
        call = http2.call_headers(**{name: evil})
        connection.send(http2.frame(http2.HEADERS, http2.END_HEADERS, 1, call))
        connection.send(http2.frame(http2.DATA, http2.END_STREAM, 1, b"\0\0\0\0\0"))
        with contextlib.suppress(ConnectionError):
            answered = connection.answer(1)
            assert b"intruder" not in answered
    attacked.is_unharmed()
    assert not [line for line in attacked.log if line.startswith("level=error event=intruder")]
    assert "\x1b[31m" not in "".join(attacked.log)


def test_calls_that_are_made_slowly(attacked: Attacked) -> None:
    # "Slow loris": each holds its call open with a byte now and then, or with none.
    headers = http2.frame(http2.HEADERS, http2.END_HEADERS, 1, http2.call_headers())
    body = http2.frame(http2.DATA, 0, 1, b"\0\0\x0f\xff\xff" + bytes(100))
    with contextlib.ExitStack() as stack:
        for said in (headers[:30], headers, headers + body[:50], headers + body):
            for _ in range(50):
                connection = stack.enter_context(http2.Connection(attacked.address))
                connection.greet()
                connection.send(said)
        attacked.serves()
    attacked.is_unharmed()


def test_connections_by_the_thousands(attacked: Attacked, wide: int) -> None:
    host, _, port = attacked.address.rpartition(":")
    with contextlib.ExitStack() as stack:
        for n in range(wide):
            silent = stack.enter_context(socket.create_connection((host, int(port)), timeout=60))
            if n % 2:
                silent.sendall(http2.PREFACE)
        attacked.serves()
    attacked.is_unharmed(most=wide * 64 * 1024)


@pytest.fixture
def wide() -> Iterator[int]:
    """Number of connections to open: 10,000, or as many as this machine lets a process have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = 12_000 if hard == resource.RLIM_INFINITY else min(hard, 12_000)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))
    yield min(10_000, most - 2_000)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
