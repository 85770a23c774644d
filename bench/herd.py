"""Fifty servers that fetch one bundle at once: `python -m bench.herd`.

A manager of its own process keeps its blobs in an S3 (moto's server, a process of its own). Servers
are simulated by a few processes (`bench/herd_driver.py`): each has a cache and a connection of its
own, and fetches as real servers do. Measured, with URLs of the S3 and through the manager: how long
all of them take, and what it costs the manager in processor time, memory and answers to others.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import grpc
import psutil
import typer

from bench.environment import environment, heading
from bench.lone_server import large_bundle
from bench.peers.fetch import ROOT
from bench.process import free_port, pollard_command
from pollard.client import ModelsClient

_KEYS = {
    "AWS_ACCESS_KEY_ID": "bench",
    "AWS_SECRET_ACCESS_KEY": "bench",
    "AWS_DEFAULT_REGION": "us-east-1",
}
_BUCKET = "bench"


@contextlib.contextmanager
def _process(command: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, env={**os.environ, **_KEYS}
        )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _make_bucket(url: str) -> None:
    until = time.monotonic() + 60
    request = urllib.request.Request(f"{url}/{_BUCKET}", method="PUT")  # noqa: S310 - our own
    while True:
        try:
            urllib.request.urlopen(request, timeout=5).close()  # noqa: S310
            return
        except OSError:
            if time.monotonic() > until:
                raise
            time.sleep(0.1)


class _Asking:
    """Asks the manager for a model over and over, and keeps how long each answer takes."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._stop = threading.Event()
        self.seconds: list[float] = []
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        with ModelsClient(self._address) as client:
            while not self._stop.wait(0.01):
                began = time.perf_counter()
                client.model("herd")
                self.seconds.append(time.perf_counter() - began)

    def __enter__(self) -> _Asking:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def figures(self) -> dict[str, float]:
        ordered = sorted(self.seconds)
        return {
            "p50_ms": statistics.median(ordered) * 1e3,
            "p99_ms": ordered[int(len(ordered) * 0.99)] * 1e3,
        }


def _cpu(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def _measure(direct: bool, servers: int, processes: int, megabytes: int) -> dict[str, Any]:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pollard-herd-")))
        s3_port, port = free_port(), free_port()
        s3 = f"http://127.0.0.1:{s3_port}"
        serve_s3 = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(s3_port)]
        stack.enter_context(_process(serve_s3, folder / "s3.log"))
        _make_bucket(s3)
        command = [*pollard_command(), "serve", "models", "--port", str(port)]
        command += ["--store", str(folder / "store"), "--log-level", "warning"]
        command += ["--blobs", f"s3://{_BUCKET}/herd", "--blobs-endpoint", s3]
        command += [] if direct else ["--no-blobs-direct"]
        manager = stack.enter_context(_process(command, folder / "manager.log"))
        address = f"127.0.0.1:{port}"
        with grpc.insecure_channel(address) as channel:
            grpc.channel_ready_future(channel).result(60)
        seen = psutil.Process(manager.pid)
        with ModelsClient(address, timeout=120) as client:
            bundle = large_bundle(folder / "bundle", 1, megabytes)
            client.push(bundle.path, "herd", alias="production")
        digest = bundle.digest
        drivers = []
        for number in range(processes):
            count = servers * (number + 1) // processes - servers * number // processes
            driver = subprocess.Popen(
                [
                    *(sys.executable, "-m", "bench.herd_driver", address, digest),
                    *(str(count), str(folder / f"caches{number}")),
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            stack.callback(driver.wait)
            stack.callback(driver.kill)
            assert driver.stdout is not None
            assert driver.stdout.readline() == "ready\n"
            drivers.append(driver)
        used = _cpu(seen)
        with _Asking(address) as quiet:
            time.sleep(5)
        an_answer = (_cpu(seen) - used) / len(quiet.seconds)
        began, used, memory = time.monotonic(), _cpu(seen), seen.memory_full_info().pss
        with _Asking(address) as during:
            for driver in drivers:
                assert driver.stdin is not None
                driver.stdin.write("\n")
                driver.stdin.flush()
            for driver in drivers:
                assert driver.stdout is not None
                fetched = json.loads(driver.stdout.readline())
                if fetched["failed"]:
                    raise RuntimeError(f"a fetch failed: {fetched['failed'][0]}")
        seconds = time.monotonic() - began
        spent = _cpu(seen) - used
        return {
            "seconds": seconds,
            "cpu_seconds": spent,
            "fetching_cpu_seconds": max(0.0, spent - an_answer * len(during.seconds)),
            "grown_bytes": seen.memory_full_info().pss - memory,
            "quiet": quiet.figures(),
            "during": during.figures(),
        }


def main(
    servers: Annotated[int, typer.Option(help="Servers.")] = 50,
    processes: Annotated[int, typer.Option(help="Processes that simulate them.")] = 2,
    megabytes: Annotated[int, typer.Option(help="Size of the bundle.")] = 20,
    out: Annotated[Path, typer.Option(help="Folder for the result.")] = ROOT / "bench/results",
) -> None:
    """Measure it in both ways."""
    before = environment()
    ways = {"URLs of the S3": True, "through the manager": False}
    found = {name: _measure(way, servers, processes, megabytes) for name, way in ways.items()}

    def row(name: str, cell: Any) -> str:
        return f"| {name} | " + " | ".join(cell(each) for each in found.values()) + " |"

    text = "\n".join(
        [
            f"# {servers} servers fetch a bundle of {megabytes} MB at once",
            "",
            heading(before),
            "",
            f"The servers are simulated by {processes} processes, beside moto's S3 and the manager "
            "on the same cores. Somebody asks the manager for a model all the while.",
            "",
            "| | " + " | ".join(found) + " |",
            "|---|" + "--:|" * len(found),
            row("all servers have it after", lambda each: f"{each['seconds']:.1f} s"),
            row("processor time of the manager", lambda each: f"{each['cpu_seconds']:.2f} s"),
            row(
                "of it for a server, without answers to others",
                lambda each: f"{1e3 * each['fetching_cpu_seconds'] / servers:.0f} ms",
            ),
            row(
                "memory of the manager grew by", lambda each: f"{each['grown_bytes'] / 1e6:.0f} MB"
            ),
            row(
                "answers to others before, p50 and p99",
                lambda each: f"{each['quiet']['p50_ms']:.1f}, {each['quiet']['p99_ms']:.1f} ms",
            ),
            row(
                "answers to others meanwhile, p50 and p99",
                lambda each: f"{each['during']['p50_ms']:.1f}, {each['during']['p99_ms']:.1f} ms",
            ),
            "",
        ]
    )
    print(text)
    out.mkdir(parents=True, exist_ok=True)
    stem = out / f"herd-{str(before['date'])[:10]}"
    stem.with_suffix(".md").write_text(text)
    stem.with_suffix(".json").write_text(
        json.dumps({"environment": before, "found": found}, indent=1) + "\n"
    )


if __name__ == "__main__":
    typer.run(main)
