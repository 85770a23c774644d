"""Two servers that differ in one thing, measured in turns."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent import futures
from dataclasses import asdict
from pathlib import Path
from typing import Any

import grpc

from bench.models import MODELS, BuiltModel
from bench.operations.callers import Run, channels_to, request_of, run
from bench.operations.certificates import make_certificates
from bench.pollard_server import start_pollard
from bench.process import ServerProcess, free_port
from bench.statistics import control, ratios

_CALLERS = 16
_SCRAPE_SECONDS = 5.0


def telemetry(model: str, rounds: int, seconds: float) -> dict[str, Any]:
    """Compare a server that tells everything with one that tells nothing."""
    built = MODELS[model]()
    port = free_port()
    with contextlib.ExitStack() as stack:
        collector, seen = stack.enter_context(_collecting())
        quiet = stack.enter_context(
            start_pollard(
                [built],
                *("--access-log", "off", "--traces", "off", "--http-port", "off"),
                name="operations-quiet",
            )
        )
        telling = stack.enter_context(
            start_pollard(
                [built],
                *("--access-log", "all", "--log-format", "json"),
                *("--traces", "otlp", "--traces-endpoint", collector, "--traces-ratio", "0.01"),
                *("--http-port", str(port)),
                name="operations-telling",
            )
        )
        stack.enter_context(_scraping(f"http://127.0.0.1:{port}/metrics"))
        found = asyncio.run(
            _in_turns(built, {"quiet": (quiet, None), "telling": (telling, None)}, rounds, seconds)
        )
        lines = telling.log.read_text(errors="replace").count('"event": "answered"')
    return found | {"spans": len(seen), "access_lines": lines, "model": built.title}


def tls(model: str, rounds: int, seconds: float) -> dict[str, Any]:
    """Compare a server that speaks TLS with one that does not."""
    built = MODELS[model]()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        ca, certificate, key = make_certificates(folder)
        plain = stack.enter_context(start_pollard([built], name="operations-plain"))
        # Started as the plain one, for the bench asks in the clear whether a server is ready.
        secure = stack.enter_context(
            start_pollard(
                [built],
                *("--tls-certificate", str(certificate), "--tls-key", str(key)),
                name="operations-tls",
                ca=ca,
            )
        )
        credentials = grpc.ssl_channel_credentials(ca.read_bytes())
        found = asyncio.run(
            _in_turns(
                built, {"plain": (plain, None), "tls": (secure, credentials)}, rounds, seconds
            )
        )
    return found | {"model": built.title}


async def _in_turns(
    model: BuiltModel,
    servers: dict[str, tuple[ServerProcess, grpc.ChannelCredentials | None]],
    rounds: int,
    seconds: float,
) -> dict[str, Any]:
    request = request_of(model)
    channels = {
        name: channels_to(server.address, credentials)
        for name, (server, credentials) in servers.items()
    }
    runs: dict[str, list[list[Run]]] = {name: [] for name in servers}
    try:
        for name, (server, _) in servers.items():
            await run(server, channels[name], request, callers=_CALLERS, seconds=1.0)
        for number in range(rounds):
            # A B B A, and the other way round in every second round.
            names = list(servers) if number % 2 == 0 else list(reversed(servers))
            pairs: dict[str, list[Run]] = {name: [] for name in names}
            for name in (*names, *reversed(names)):
                pairs[name].append(
                    await run(
                        servers[name][0],
                        channels[name],
                        request,
                        callers=_CALLERS,
                        seconds=seconds,
                    )
                )
            for name, pair in pairs.items():
                runs[name].append(pair)
    finally:
        for opened in channels.values():
            for channel in opened:
                await channel.close()
    return {
        "runs": {
            name: [[asdict(r) for r in pair] for pair in found] for name, found in runs.items()
        }
    }


def judged(found: dict[str, Any], base: str, other: str) -> dict[str, Any]:
    """Return what the second costs over the first."""

    def of(name: str, what: str) -> list[list[float]]:
        return [[one[what] for one in pair] for pair in found["runs"][name]]

    return {
        "throughput": ratios(of(other, "per_second"), of(base, "per_second")),
        "cpu": ratios(of(other, "cpu_ms_each"), of(base, "cpu_ms_each")),
        "p99": ratios(of(other, "p99_ms"), of(base, "p99_ms")),
        "control": control(of(base, "per_second")),
        "control_cpu": control(of(base, "cpu_ms_each")),
    }


@contextlib.contextmanager
def _collecting() -> Iterator[tuple[str, list[int]]]:
    """Run a collector that counts spans."""
    from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

    seen: list[int] = []

    class Servicer(trace_service_pb2_grpc.TraceServiceServicer):
        def Export(self, request: Any, context: Any) -> Any:  # noqa: N802 - OTLP's name
            for resource in request.resource_spans:
                for scope in resource.scope_spans:
                    seen.extend(range(len(scope.spans)))
            return trace_service_pb2.ExportTraceServiceResponse()

    server = grpc.server(futures.ThreadPoolExecutor(1))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(Servicer(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"http://127.0.0.1:{port}", seen
    finally:
        server.stop(None).wait()


@contextlib.contextmanager
def _scraping(url: str) -> Iterator[None]:
    """Read metrics now and then, as Prometheus does."""
    stopping = threading.Event()

    def scrape() -> None:
        while not stopping.wait(_SCRAPE_SECONDS):
            with urllib.request.urlopen(url, timeout=10) as answer:  # noqa: S310 - of this machine
                answer.read()

    thread = threading.Thread(target=scrape, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopping.set()
        thread.join()


def now() -> str:
    """Return the time for a result."""
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
