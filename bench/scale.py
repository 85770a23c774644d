"""One manager and many servers: `python -m bench.scale`.

A manager of its own process, and 2,000 simulated servers in a few others, each with a connection
and a Sync stream of its own (`bench/scale_driver.py`). Measured: how long all of them take to come,
processor time and memory of the manager while nothing happens, and, over some switches of an
alias, how long until the last server has acknowledged the new routes. The servers load nothing, so
that it is the manager's time alone; they use the same cores.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
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

_GOAL_BYTES = 1.5e9
_GOAL_SECONDS = 5.0

_PROFILED = (
    "import cProfile, sys; from pollard.client.cli import main; sys.argv[0] = 'pollard'; "
    "out = sys.argv.pop(1); profile = cProfile.Profile();\n"
    "try: profile.runcall(main)\n"
    "finally: profile.dump_stats(out)"
)


class _Drivers:
    """The processes of the simulated servers."""

    def __init__(self, address: str, streams: int, preprocess: int, processes: int) -> None:
        self._processes = []
        self.streams = streams
        for number in range(processes):
            first, last = (streams * each // processes for each in (number, number + 1))
            command = [sys.executable, "-m", "bench.scale_driver", address]
            command += [str(first), str(last - first), str(preprocess // processes)]
            self._processes.append(
                subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            )

    def figures(self) -> list[dict[str, Any]]:
        """Ask each."""
        found = []
        for process in self._processes:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write("\n")
            process.stdin.flush()
            found.append(json.loads(process.stdout.readline()))
        return found

    def wait_connected(self, seconds: float) -> None:
        """Wait until all have heard of the manager."""
        until = time.monotonic() + seconds
        while sum(each["connected"] for each in self.figures()) < self.streams:
            if time.monotonic() > until:
                raise RuntimeError(f"not all connected in {seconds:g} s: {self.figures()}")
            time.sleep(0.25)

    def wait_switched(self, switch: int, seconds: float) -> tuple[float, float]:
        """Return when the first and the last server acknowledged the n-th routes."""
        until = time.monotonic() + seconds
        while True:
            found = [each["switches"].get(str(switch)) for each in self.figures()]
            if all(found) and sum(each[0] for each in found) >= self.streams:
                return min(each[1] for each in found), max(each[2] for each in found)
            if time.monotonic() > until:
                raise RuntimeError(f"not all switched in {seconds:g} s: {self.figures()}")
            time.sleep(0.05)

    def close(self) -> None:
        """End them."""
        for process in self._processes:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()


@contextmanager
def _manager(folder: Path, profile: Path | None) -> Iterator[tuple[str, psutil.Process]]:
    port = free_port()
    command = [*pollard_command()]
    if profile is not None:
        command = [sys.executable, "-c", _PROFILED, str(profile)]
    command += ["serve", "models", "--port", str(port), "--store", str(folder / "store")]
    command += ["--log-level", "warning", "--drain-seconds", "2"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            grpc.channel_ready_future(channel).result(60)
        yield f"127.0.0.1:{port}", psutil.Process(process.pid)
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _cpu(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def _measure(
    streams: int, preprocess: int, processes: int, switches: int, idle: float, profile: Path | None
) -> dict[str, Any]:
    found: dict[str, Any] = {"streams": streams, "preprocess": preprocess, "switches": []}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pollard-scale-")))
        address, manager = stack.enter_context(_manager(folder, profile))
        client = stack.enter_context(ModelsClient(address, timeout=120))
        for number in (1, 2):
            bundle = large_bundle(folder / f"bundle-{number}", number, 1)
            client.push(bundle.path, "scale", alias="production" if number == 1 else None)
        found["empty_bytes"] = manager.memory_full_info().pss
        began, used = time.monotonic(), _cpu(manager)
        drivers = _Drivers(address, streams, preprocess, processes)
        stack.callback(drivers.close)
        drivers.wait_connected(240)
        drivers.wait_switched(1, 240)
        found["connect_seconds"] = time.monotonic() - began
        found["connect_cpu_seconds"] = _cpu(manager) - used
        time.sleep(8)
        began, used = time.monotonic(), _cpu(manager)
        time.sleep(idle)
        found["idle_cores"] = (_cpu(manager) - used) / (time.monotonic() - began)
        for number in range(switches):
            began, used = time.monotonic(), _cpu(manager)
            client.set_alias("scale", "production", 2 - number % 2, wait=False)
            told = time.monotonic()
            first, last = drivers.wait_switched(number + 2, 120)
            client.wait_alias("scale", "production", 2 - number % 2)
            found["switches"].append(
                {
                    "answer_seconds": told - began,
                    "first_seconds": first - began,
                    "last_seconds": last - began,
                    "active_seconds": time.monotonic() - began,
                    "cpu_seconds": _cpu(manager) - used,
                }
            )
            print(found["switches"][-1], flush=True)
            # The old revision is drained before the next one comes.
            time.sleep(4)
        found["bytes"] = manager.memory_full_info().pss
        figures = drivers.figures()
        found["broken_streams"] = sum(each["broken"] for each in figures)
        reasons: Counter[str] = Counter()
        for each in figures:
            reasons.update(each["reasons"])
        found["broken_because"] = dict(reasons)
        print(found["broken_because"], flush=True)
    return found


def main(
    streams: Annotated[int, typer.Option(help="Servers.")] = 2000,
    preprocess: Annotated[int, typer.Option(help="Servers among them that prepare images.")] = 100,
    processes: Annotated[int, typer.Option(help="Processes that simulate them.")] = 4,
    switches: Annotated[int, typer.Option(help="Switches of the alias.")] = 5,
    idle: Annotated[float, typer.Option(help="Seconds without anything.")] = 15,
    profile: Annotated[
        Path | None, typer.Option(help="Write cProfile's figures of the manager here.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the result.")] = ROOT / "bench/results",
) -> None:
    """Measure it; exit with 1 if a goal is missed."""
    before = environment()
    found = _measure(streams, preprocess, processes, switches, idle, profile)
    lasts = [each["last_seconds"] for each in found["switches"]]
    middle = statistics.median(lasts)
    reached = found["bytes"] <= _GOAL_BYTES and max(lasts) <= _GOAL_SECONDS
    rows = [
        ("all servers connected", f"{found['connect_seconds']:.1f} s"),
        ("processor time of the manager for that", f"{found['connect_cpu_seconds']:.1f} s"),
        ("cores of the manager while nothing happens", f"{found['idle_cores']:.2f}"),
        ("memory of the manager before", f"{found['empty_bytes'] / 1e6:.0f} MB"),
        ("memory of the manager with all servers", f"{found['bytes'] / 1e6:.0f} MB"),
        ("alias change to the last acknowledgement, median", f"{middle:.2f} s"),
        ("alias change to the last acknowledgement, longest", f"{max(lasts):.2f} s"),
        (
            "alias change to the first acknowledgement of the new routes, median",
            f"{statistics.median(each['first_seconds'] for each in found['switches']):.2f} s",
        ),
        (
            "processor time of the manager for a switch, median",
            f"{statistics.median(each['cpu_seconds'] for each in found['switches']):.2f} s",
        ),
        ("streams that broke", str(found["broken_streams"])),
    ]
    text = "\n".join(
        [
            f"# One manager, {streams} servers",
            "",
            heading(before),
            "",
            f"{streams - preprocess} inference and {preprocess} preprocess servers, simulated by "
            f"{processes} processes on the same cores; {len(lasts)} switches.",
            "",
            "| | |",
            "|---|--:|",
            *(f"| {name} | {value} |" for name, value in rows),
            "",
            f"Goals: {_GOAL_BYTES / 1e9:g} GB and {_GOAL_SECONDS:g} s to the last acknowledgement: "
            f"{'reached' if reached else 'missed'}.",
            "",
        ]
    )
    print(text)
    out.mkdir(parents=True, exist_ok=True)
    stem = out / f"scale-{before['date'][:10]}"
    stem.with_suffix(".md").write_text(text)
    stem.with_suffix(".json").write_text(
        json.dumps({"environment": before, "found": found}, indent=1) + "\n"
    )
    raise typer.Exit(not reached)


if __name__ == "__main__":
    typer.run(main)
