"""Speed and memory of pushing a large bundle on loopback: `python -m bench.upload`.

Each round pushes the bundle through the client to a manager of its own process, and between them
copies the same bytes with `cp` and hashes them with `sha256sum`, on the same disk: the least that
storing and checking a file can cost on this machine at this moment.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import psutil
import typer

from bench.environment import environment, heading
from bench.lone_server import large_bundle
from bench.peers.fetch import ROOT
from bench.process import free_port, pollard_command
from pollard.client import ModelsClient, RequestFailed

_GOAL_MB_PER_SECOND = 200.0
_ALLOWED_MB = 64.0


@dataclass
class Memory:
    """Samples what a process holds for itself, in the background."""

    process: psutil.Process
    highest: float = 0.0

    def __enter__(self) -> Memory:
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._stop.wait(0.02):
            self.highest = max(self.highest, self.process.memory_info().rss / 1e6)


def _processor_seconds(process: psutil.Process) -> tuple[float, float]:
    """Return the processor time of a process, and of its children that have ended."""
    spent = process.cpu_times()
    return spent.user + spent.system, spent.children_user + spent.children_system


def _copy_and_hash(source: Path, target: Path) -> tuple[float, float]:
    """Return how many seconds, and of processor time, `cp`, `sync` and `sha256sum` take."""
    started = time.perf_counter()
    _, before = _processor_seconds(psutil.Process())
    subprocess.run(["cp", source, target], check=True)
    subprocess.run(["sync", target], check=True)
    subprocess.run(["sha256sum", target], check=True, stdout=subprocess.DEVNULL)
    took = time.perf_counter() - started
    _, after = _processor_seconds(psutil.Process())
    target.unlink()
    return took, after - before


def _start(store: Path, log: Path) -> tuple[subprocess.Popen[bytes], str]:
    port = free_port()
    command = [*pollard_command(), "serve", "models", "--port", str(port), "--store", str(store)]
    with log.open("wb") as file:
        manager = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
    address = f"127.0.0.1:{port}"
    with ModelsClient(address) as client:
        until = time.monotonic() + 60
        while True:
            try:
                client.servers()
                return manager, address
            except RequestFailed:
                if manager.poll() is not None or time.monotonic() > until:
                    manager.kill()
                    raise RuntimeError(log.read_text(errors="replace")[-3000:]) from None
                time.sleep(0.1)


def _round(folder: Path, megabytes: int, seed: int) -> dict[str, float]:
    bundle = large_bundle(folder / "bundle", seed, megabytes)
    size = bundle.size_bytes / 1e6
    plain, plain_processor = _copy_and_hash(bundle.path / "model.onnx", folder / "copy")
    manager, address = _start(folder / "store", folder / "manager.log")
    try:
        process = psutil.Process(manager.pid)
        idle = process.memory_info().rss / 1e6
        mine, before = psutil.Process(), _processor_seconds(process)
        client_before, _ = _processor_seconds(mine)
        with Memory(process) as memory, ModelsClient(address) as client:
            started = time.perf_counter()
            client.push(bundle.path, "large")
            took = time.perf_counter() - started
        after, (client_after, _) = _processor_seconds(process), _processor_seconds(mine)
    finally:
        manager.terminate()
        manager.wait(30)
    for made in (bundle.path, folder / "store"):
        shutil.rmtree(made)
    os.sync()
    return {
        "megabytes": size,
        "plain_seconds": plain,
        "push_seconds": took,
        "mb_per_second": size / took,
        "ratio": took / plain,
        "plain_processor_seconds": plain_processor,
        "client_processor_seconds": client_after - client_before,
        "manager_processor_seconds": after[0] - before[0],
        "check_processor_seconds": after[1] - before[1],
        "idle_mb": idle,
        "above_idle_mb": memory.highest - idle,
    }


def main(
    megabytes: Annotated[int, typer.Option(help="Size of the model.")] = 500,
    rounds: Annotated[int, typer.Option(help="How many.")] = 5,
    out: Annotated[Path, typer.Option(help="Folder for the result.")] = ROOT / "bench/results",
) -> None:
    """Push a bundle a few times; exit with 1 if it is slower or takes more memory than it may."""
    before = environment()
    rows = []
    with tempfile.TemporaryDirectory(prefix="pollard-upload-") as folder:
        for seed in range(rounds):
            rows.append(_round(Path(folder), megabytes, seed))
            print({name: round(value, 2) for name, value in rows[-1].items()}, flush=True)
    middle = {name: statistics.median(row[name] for row in rows) for name in rows[0]}
    memory = max(row["above_idle_mb"] for row in rows)
    text = "\n".join(
        [
            "# Speed of an upload",
            "",
            heading(before),
            "",
            f"A bundle of {middle['megabytes']:.0f} MB, {rounds} times, each to a manager just "
            "started; medians. The time is that of the client's push: it hashes, sends, and gets "
            "its answer when the revision is checked and on disk.",
            "",
            f"- push: {middle['push_seconds']:.2f} s, {middle['mb_per_second']:.0f} MB/s "
            f"(goal {_GOAL_MB_PER_SECOND:.0f} MB/s)",
            f"- `cp`, `sync` and `sha256sum` of the same bytes: {middle['plain_seconds']:.2f} s; "
            f"the push takes {middle['ratio']:.2f} × as long",
            "- processor time: client "
            f"{middle['client_processor_seconds']:.2f} s, manager "
            f"{middle['manager_processor_seconds']:.2f} s, check of the bundle in its own process "
            f"{middle['check_processor_seconds']:.2f} s; `cp`, `sync` and `sha256sum` "
            f"{middle['plain_processor_seconds']:.2f} s",
            f"- memory of the manager: {memory:.0f} MB above idle at most (allowed "
            f"{_ALLOWED_MB:.0f} MB)",
            "",
        ]
    )
    print(text)
    file = out / f"upload-{time.strftime('%Y-%m-%d')}"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.with_suffix(".md").write_text(text)
    file.with_suffix(".json").write_text(
        json.dumps({"environment": before, "rounds": rows}, indent=1) + "\n"
    )
    if middle["mb_per_second"] < _GOAL_MB_PER_SECOND or memory > _ALLOWED_MB:
        raise SystemExit(1)


if __name__ == "__main__":
    typer.run(main)
