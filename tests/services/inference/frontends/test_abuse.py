"""Clients that mean harm: messages that grow when unpacked, connections that say nothing."""

from __future__ import annotations

import contextlib
import socket
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest

from pollard.inference import grpc_service_pb2 as pb
from pollard.inference import grpc_service_pb2_grpc as pb_grpc

_UNPACKED_BYTES = 128 << 20
"""Of zeros, which gzip packs into an eighth of a megabyte; the servers here take one megabyte."""


def peak_bytes(process: Any) -> int:
    """Return the most memory that a process and its children have had resident, in bytes."""
    family = [psutil.Process(process.pid)]
    family += family[0].children(recursive=True)
    total = 0
    for each in family:
        for line in Path(f"/proc/{each.pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                total += int(line.split()[1]) * 1024
    return total


@pytest.mark.parametrize("streaming", [False, True])
def test_a_bomb_is_refused_and_others_are_answered(
    running: tuple[str, Any, str], ask: Any, streaming: bool
) -> None:
    _, process, address = running
    bomb = pb.ModelInferRequest(model_name="quick", raw_input_contents=[bytes(_UNPACKED_BYTES)])
    options = [("grpc.max_send_message_length", -1)]
    before = peak_bytes(process)
    with (
        grpc.insecure_channel(address, options, grpc.Compression.Gzip) as attacker,
        grpc.insecure_channel(address) as channel,
    ):
        other = pb_grpc.GRPCInferenceServiceStub(channel)
        other.ModelInfer(ask(), timeout=20)
        stub = pb_grpc.GRPCInferenceServiceStub(attacker)

        def send() -> None:
            if streaming:
                list(stub.ModelStreamInfer(iter([bomb]), timeout=60))
            else:
                stub.ModelInfer(bomb, timeout=60)

        for _ in range(2):
            with pytest.raises(grpc.RpcError) as caught:
                send()
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert other.ModelInfer(ask(), timeout=20).raw_output_contents
    assert peak_bytes(process) - before < _UNPACKED_BYTES // 2


@pytest.mark.parametrize("said", [b"", b"PRI * HTTP/2.0\r\n", b"GET / HTTP/1.1\r\nX: "])
def test_connections_that_say_nothing_hinder_nobody(
    running: tuple[str, Any, str], ask: Any, said: bytes
) -> None:
    _, process, address = running
    host, _, port = address.rpartition(":")
    before = peak_bytes(process)
    with contextlib.ExitStack() as stack:
        for _ in range(300):
            silent = stack.enter_context(socket.create_connection((host, int(port)), timeout=20))
            silent.sendall(said)
        channel = stack.enter_context(grpc.insecure_channel(address))
        stub = pb_grpc.GRPCInferenceServiceStub(channel)
        for _ in range(20):
            assert stub.ModelInfer(ask(), timeout=20).raw_output_contents
    assert peak_bytes(process) - before < 300 * 256 * 1024
