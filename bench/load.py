"""perf_analyzer, Triton's own load generator, and the raw ONNX Runtime loop as the limit."""

from __future__ import annotations

import csv
import subprocess
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench.models import BuiltModel
from bench.peers.fetch import Tools, with_libraries
from bench.process import ServerProcess
from pollard.runtime.sessions import open_session


@dataclass(frozen=True)
class Measured:
    """One run of the load generator against one server."""

    throughput: float
    """Inferences per second; an inference is one row of a batch."""
    p50_us: float
    p99_us: float
    server_cpu_seconds: float
    """Processor time of the server over the run, start and end of the generator included."""
    wall_seconds: float
    memory_bytes: int


def measure(
    tools: Tools,
    server: ServerProcess,
    model: BuiltModel,
    concurrency: int,
    *,
    window_ms: int,
    batch: int = 1,
    shared_memory: str = "none",
) -> Measured:
    """Send requests from so many callers at a time for three windows; return what came of it.

    A window in which not two requests end, on a machine that does much else, is none for
    perf_analyzer; it is measured again with longer ones.

    Raises:
        RuntimeError: perf_analyzer failed; the message has its words.
    """
    for longer in (1, 2, 4):
        try:
            return _measure(
                tools,
                server,
                model,
                concurrency,
                window_ms=longer * window_ms,
                batch=batch,
                shared_memory=shared_memory,
            )
        except _WindowTooShort as error:
            failed = error
    raise RuntimeError(str(failed))


class _WindowTooShort(Exception):
    """Too few requests ended in a window."""


def _measure(
    tools: Tools,
    server: ServerProcess,
    model: BuiltModel,
    concurrency: int,
    *,
    window_ms: int,
    batch: int,
    shared_memory: str,
) -> Measured:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.csv"
        command = [
            str(tools.perf_analyzer),
            *("-m", model.name, "-u", server.address, "-i", "grpc", "--async"),
            *("--concurrency-range", str(concurrency), "-b", str(batch)),
            # Three windows whatever they say: waiting for "stable" ones would choose among them.
            *("-p", str(window_ms), "-s", "999", "-r", "3"),
            *("--shared-memory", shared_memory, "-f", str(report)),
        ]
        if shared_memory != "none":
            size = 4 * int(np.prod(model.output_shape)) * batch
            command += ["--output-shared-memory-size", str(size)]
        cpu, started = server.cpu_seconds(), time.monotonic()
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            env=with_libraries(tools.cuda_runtime),
            timeout=300,
        )
        wall, cpu = time.monotonic() - started, server.cpu_seconds() - cpu
        if done.returncode or not report.exists():
            words = (done.stdout + done.stderr)[-2000:]
            short = "measurement-interval" in words or "larger time window" in words
            kind = _WindowTooShort if short else RuntimeError
            raise kind(
                f"perf_analyzer against {server.name}, {model.name} at {concurrency}: {words}"
            )
        with report.open(newline="") as file:
            row = next(csv.DictReader(file))
    return Measured(
        throughput=float(row["Inferences/Second"]),
        p50_us=float(row["p50 latency"]),
        p99_us=float(row["p99 latency"]),
        server_cpu_seconds=cpu,
        wall_seconds=wall,
        memory_bytes=server.memory_bytes(),
    )


def raw_limit(model: BuiltModel, *, callers: int, batch: int = 1, seconds: float = 2.0) -> float:
    """Return inferences per second of ONNX Runtime alone, without any server.

    Args:
        model: What to run.
        callers: Threads that share one session, each with one thread of its own.
        batch: Rows of a run.
        seconds: How long.
    """
    session = open_session(model.onnx, target=model.target, intra_op_threads=1)
    feeds = {model.input: np.zeros((batch, *model.input_shape), np.float32)}
    session.run(feeds)
    counts = [0] * callers
    until = time.perf_counter() + seconds

    def call(number: int) -> None:
        while time.perf_counter() < until:
            session.run(feeds)
            counts[number] += 1

    threads = [threading.Thread(target=call, args=(number,)) for number in range(callers)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts) * batch / (time.perf_counter() - started)
