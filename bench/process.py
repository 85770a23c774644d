"""Servers as child processes: start, wait until ready, processor time, memory."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import grpc
import psutil

from pollard.inference import grpc_service_pb2 as pb
from pollard.inference import grpc_service_pb2_grpc as pb_grpc


def free_port() -> int:
    """Return a port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _open(address: str, ca: Path | None) -> grpc.Channel:
    if ca is None:
        return grpc.insecure_channel(address)
    return grpc.secure_channel(address, grpc.ssl_channel_credentials(ca.read_bytes()))


def pollard_command() -> list[str]:
    """Return the `pollard` command of this environment, or `bench.pollard` where there is none."""
    installed = Path(sys.executable).with_name("pollard")
    return [str(installed)] if installed.exists() else [sys.executable, "-m", "bench.pollard"]


@dataclass
class ServerProcess:
    """A server that answers the Open Inference Protocol, and all of its processes."""

    name: str
    port: int
    log: Path
    process: subprocess.Popen[bytes]

    @classmethod
    def start(
        cls,
        name: str,
        command: Sequence[str],
        port: int,
        log: Path,
        environment: Mapping[str, str] | None = None,
        seconds: float = 120,
        ca: Path | None = None,
    ) -> ServerProcess:
        """Start it and wait until it says that it is ready.

        Raises:
            RuntimeError: it ended or did not become ready; the message has the end of its log.
        """
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as file:
            process = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, env=environment
            )
        server = cls(name, port, log, process)
        with _open(f"127.0.0.1:{port}", ca) as channel:
            stub = pb_grpc.GRPCInferenceServiceStub(channel)
            until = time.monotonic() + seconds
            while True:
                try:
                    if stub.ServerReady(pb.ServerReadyRequest(), timeout=5).ready:
                        return server
                except grpc.RpcError as error:
                    # Who must show a token is told so by a server that takes requests.
                    if error.code() == grpc.StatusCode.UNAUTHENTICATED:
                        return server
                if process.poll() is not None or time.monotonic() > until:
                    server.stop()
                    tail = log.read_text(errors="replace")[-3000:]
                    raise RuntimeError(f"{name} did not become ready; its log ends with:\n{tail}")
                time.sleep(0.1)

    @property
    def address(self) -> str:
        """Where it listens."""
        return f"127.0.0.1:{self.port}"

    def cpu_seconds(self) -> float:
        """Processor time that it and its children have used so far."""
        times = [process.cpu_times() for process in self._processes()]
        return sum(each.user + each.system for each in times)

    def memory_bytes(self) -> int:
        """Memory that it and its children hold; pages that they share are counted once."""
        return sum(process.memory_full_info().pss for process in self._processes())

    def stop(self) -> None:
        """End it, by force if it does not end by itself."""
        self.process.terminate()
        try:
            self.process.wait(15)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def _processes(self) -> list[psutil.Process]:
        parent = psutil.Process(self.process.pid)
        return [parent, *parent.children(recursive=True)]

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()
